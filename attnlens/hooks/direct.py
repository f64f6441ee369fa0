"""What parts of a model add to its output directly: by the residual stream, through no other part.

The run is made linear around itself. What attention and MLPs read has no graph, and what they write
begins one, so that gradients come to them along the residual stream alone; norms on this way keep
the statistics of the run, as constants. Then `part x gradient` is what a part adds, whatever stands
between it and the logits: output projections, norms after them, multipliers, scaled logits.

A norm is known by its numbers: `gain x (x, or x less its mean) / statistic + bias`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.residual import Passing, Stream, streams_of
from attnlens.hooks.returned import tensors_of
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer

_MISFIT = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Of a norm's output from the rule that is taken for it; 1e-4 in wider types."""


@dataclass(frozen=True)
class Written:
    """What one part wrote: a leaf of the graph, or the output of a module that adds a bias."""

    kind: str
    """`embeddings`, `head`, `mlp` or `bias`."""
    name: str
    """Name of the stream, site, block or module."""
    tensor: Tensor
    part: Tensor | None = None
    """What of the tensor is the part's own; None for all of it."""
    call: Call | None = None


class Direct(Observer):
    """Observer that leaves of a run's graph the direct ways to its output: `written` has the parts.

    `mlps` names the module that ends each block's MLP, by block.
    """

    def __init__(self, anatomy: Anatomy, mlps: Mapping[str, str]) -> None:
        self.sites = frozenset(site.name for site in anatomy.sites)
        self.written: list[Written] = []
        self.raw: Tensor | None = None
        """What the unembedding returned."""
        self.rounded = False
        """Whether a norm computed in a narrower type than it was given."""
        self._anatomy = anatomy
        self._mlps = mlps
        self._model: nn.Module | None = None

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on blocks, attention modules, norms, and modules with a bias."""
        self._model = model
        streams = streams_of(self._anatomy, self._anatomy.sites)
        firsts: dict[str, Stream] = {}
        for stream in streams:
            assert stream.site.block is not None
            firsts.setdefault(stream.site.block.rpartition(".")[0], stream)
        ended = [s for s in streams if not s.final and s.site.block in self._mlps]
        handles: list[Handle] = [
            model.register_forward_pre_hook(of_this_thread(self._begin)),
            Passing(model, self._anatomy, [*firsts.values()], self._leaf("embeddings")),
            Passing(model, self._anatomy, ended, self._leaf("mlp"), self._mlps),
        ]
        for name in dict.fromkeys(site.module for site in self._anatomy.sites):
            module = model.get_submodule(name)
            hook = of_this_thread(_without_graph)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return [*handles, *self._outputs(model)]

    def _outputs(self, model: nn.Module) -> list[Handle]:
        """Hooks on what norms and modules with a bias return, but for those of an MLP."""
        mlps = set(self._mlps.values())
        inside = tuple(f"{name}." for name in mlps)
        handles: list[Handle] = []
        for name, module in model.named_modules():
            if name in mlps or name.startswith(inside):
                continue
            norm = "norm" in type(module).__name__.lower()
            bias = isinstance(getattr(module, "bias", None), Tensor)
            if norm or bias or name == self._anatomy.unembedding:
                hook = of_this_thread(self._returned(name, norm))
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def _begin(self, *_: object) -> None:
        self.written.clear()
        self.raw = None

    def _leaf(self, kind: str) -> Callable[[Stream, Tensor], Tensor]:
        def look(stream: Stream, tensor: Tensor) -> Tensor:
            leaf = tensor.detach().clone().requires_grad_()
            self.written.append(Written(kind, stream.name, leaf))
            return leaf.clone()

        return look

    def see(self, site: Site, call: Call) -> Call:
        """Let the graph of a head begin at its z."""
        leaf = call.output.detach().requires_grad_()
        self.written.append(Written("head", site.name, leaf, call=replace(call, output=leaf)))
        return replace(call, output=leaf.clone())

    def _returned(self, name: str, norm: bool) -> Callable[..., Tensor | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return None
            frozen = None
            bias = getattr(module, "bias", None)
            if norm:
                given = tensors_of((*args, *kwargs.values()))
                frozen, bias = self._freeze(module, given[0], output)
            shown = output if frozen is None else frozen
            if isinstance(bias, Tensor) and bias.shape == shown.shape[-1:]:
                self.written.append(Written("bias", f"{name}.bias", shown, bias.detach()))
            if name == self._anatomy.unembedding:
                self.raw = output
            return frozen

        return hook

    def _freeze(
        self, module: nn.Module, given: Tensor, output: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """A norm's output as a linear function of its input, and its bias; None if it is none."""
        rule = norm_rule(module, given.detach(), output.detach())
        if rule is None:
            return None, None
        self.rounded |= rule.misfit > 1e-10
        linear = rule.of(given).to(output.dtype)
        # The numbers are the model's own; only the way back is another.
        bias = rule.bias.to(output) if bool(rule.bias.any()) else None
        return output.detach() + (linear - linear.detach()), bias


@dataclass(frozen=True)
class NormRule:
    """A norm with the statistics of one run: `scale x (x, or x less its mean) + bias`."""

    scale: Float[Tensor, "*rows d"]
    bias: Float[Tensor, " d"]
    centred: bool
    misfit: float
    """Largest difference to what the module returned, as a share of the largest number of it."""

    def of(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The linear part of an input."""
        return self.scale * (x - x.mean(-1, keepdim=True) if self.centred else x)


@torch.no_grad()
def norm_rule(
    module: nn.Module, given: Float[Tensor, "*rows d"], output: Float[Tensor, "*rows d"]
) -> NormRule | None:
    """The rule of a LayerNorm or RMSNorm over the last axis, from its numbers; None if neither.

    The bias is what 0 becomes, the gain what numbers of mean 0 become, but for a factor, and the
    statistic is fitted row by row to what the module returned.
    """
    width = given.shape[-1]
    if output.shape != given.shape or width < 4 or not bool(output.isfinite().all()):
        return None
    probe = torch.ones(width, dtype=given.dtype, device=given.device)
    probe[1::2] = -1
    if width % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0]).to(probe)
    probes = torch.stack([torch.zeros_like(probe), probe]).view(2, *[1] * (given.ndim - 2), width)
    try:
        bias, probed = module.forward(probes).reshape(2, width)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    gain = (probed - bias) / probe
    rules = [_fitted(gain, bias, given, output, centred) for centred in (False, True)]
    best = min(rules, key=lambda rule: rule.misfit)
    return best if best.misfit < _MISFIT.get(output.dtype, 1e-4) else None


def _fitted(gain: Tensor, bias: Tensor, given: Tensor, output: Tensor, centred: bool) -> NormRule:
    wide = torch.promote_types(given.dtype, torch.float32)
    x = given.to(wide)
    linear = gain.to(wide) * (x - x.mean(-1, keepdim=True) if centred else x)
    wanted = output.to(wide) - bias.to(wide)
    size = linear.square().sum(-1, keepdim=True)
    factor = (linear * wanted).sum(-1, keepdim=True) / torch.where(size > 0, size, 1)
    largest = wanted.abs().max().clamp_min(1e-30)
    misfit = float((factor * linear - wanted).abs().max() / largest)
    return NormRule((factor * gain.to(wide)).to(given.dtype), bias, centred, misfit)


def _without_graph(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What an attention module is given, cut from the graph: gates and norms inside it, too."""
    free = {name: _detached(value) for name, value in kwargs.items()}
    return tuple(map(_detached, args)), free


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
