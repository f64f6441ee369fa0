"""Find the linear modules that make q, k and v of a site, by matching numbers, not names.

The model runs once with the outputs of the site's linear modules replaced by noise, and what
attention receives is compared with the noise, channel by channel; so channels of a head whose
weights are zero are told apart too. Position 0 is compared where a rotary embedding turns the
others; a norm between the projection and attention (QK-norm) is undone by comparing directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.weights import HeadWeights, Projection
from attnlens.hooks.probe import evaluating
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session

# Cosine of two channels over the prompts that are the same but for rounding.
_COSINE = {torch.float64: 1 - 1e-9, torch.float32: 1 - 1e-5}


def head_weights(
    model: nn.Module, anatomy: Anatomy, site: Site, example: Mapping[str, Any]
) -> HeadWeights:
    """W_Q, W_K, W_V and W_O of a site, head by head, without biases and norms."""
    return weights_of_sites(model, anatomy, [site], example)[site.name]


def weights_of_sites(
    model: nn.Module, anatomy: Anatomy, sites: Sequence[Site], example: Mapping[str, Any]
) -> dict[str, HeadWeights]:
    """The weights of several sites, by name, from one run."""
    spy = _Spy(sites)
    with torch.no_grad(), evaluating(model), Session(model, anatomy, [spy]):
        model(**example)
    return {site.name: HeadWeights(model, site, _matched(*spy.seen[site.name])) for site in sites}


def _matched(call: Call, outputs: Mapping[str, Tensor]) -> dict[str, Projection]:
    received = {"query": call.query, "key": call.key, "value": call.value}
    found = {name: _match(tensor, outputs) for name, tensor in received.items()}
    return {name: part for name, part in found.items() if part}


class _Spy(Observer):
    """Observer of sites that makes their modules' linear parts return noise, and notes it."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.seen: dict[str, tuple[Call, dict[str, Tensor]]] = {}
        """By site, its call and what the linear modules returned before it."""
        self._modules = tuple(dict.fromkeys(site.module for site in sites))
        self._latest: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def attach(self, model: nn.Module) -> list[Any]:
        """Replace the output of every linear module inside the attention modules."""
        handles: list[Any] = []
        for prefix in self._modules:
            for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
                weight = getattr(module, "weight", None)
                norm = "norm" in type(module).__name__.lower()
                if isinstance(weight, Tensor) and weight.ndim == 2 and not norm:
                    handles.append(module.register_forward_hook(self._replace(name)))
        return handles

    def _replace(self, name: str) -> Callable[..., Tensor | None]:
        def hook(_: nn.Module, __: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            noise = torch.randn(output.shape, generator=self._generator, dtype=torch.float32)
            self._latest[name] = noise.to(output)
            return self._latest[name]

        return hook

    def see(self, site: Site, call: Call) -> Call:
        """Freeze what was noted when the site is called."""
        own = {n: made for n, made in self._latest.items() if n.startswith(f"{site.module}.")}
        self.seen[site.name] = call, own
        return call


def _match(received: Float[Tensor, "b n s d"], outputs: Mapping[str, Tensor]) -> Projection | None:
    """The module and features whose outputs are the received channels, up to one positive scale."""
    batch, heads, length, width = received.shape
    candidates = {
        name: output.reshape(batch, length, -1).double()
        for name, output in outputs.items()
        if output.numel() % (batch * length) == 0 and output.shape[0] == batch
    }
    threshold = _COSINE.get(received.dtype, 1 - 1e-3)
    for positions in (slice(None), slice(0, 1)):
        wanted = received[:, :, positions].double().permute(1, 3, 0, 2).reshape(heads * width, -1)
        for name, output in candidates.items():
            for normalise in (_plain, _rms(width), _rms(None), _layer_norm(width)):
                given = normalise(output)
                matched = given is not None and _parallel(
                    wanted, _channels(given, positions), threshold
                )
                if matched:
                    index, scales = matched
                    scale = float(scales.median()) if normalise is _plain else 1.0
                    return Projection(name, index.view(heads, width), _clean(scale))
    return None


def _channels(output: Float[Tensor, "b s feature"], positions: slice) -> Tensor:
    """`feature n`: what each feature is at the given positions of all prompts."""
    return output[:, positions].permute(2, 0, 1).reshape(output.shape[2], -1)


def _parallel(
    wanted: Float[Tensor, "channel n"], given: Float[Tensor, "feature n"], threshold: float
) -> tuple[Tensor, Tensor] | None:
    """For each wanted channel the feature that points its way, and the ratio of their sizes."""
    if wanted.shape[1] < 4:
        return None
    # Without their means over the prompts, so that the bias of a norm does not matter.
    wanted = wanted - wanted.mean(1, keepdim=True)
    given = given - given.mean(1, keepdim=True)
    unit = wanted / wanted.norm(dim=1, keepdim=True).clamp_min(1e-30)
    norms = given.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosine, index = (unit @ (given / norms).T).max(1)
    if bool((cosine < threshold).any()) or len(torch.unique(index)) < len(index):
        return None
    return index, wanted.norm(dim=1) / norms[index, 0]


def _plain(output: Tensor) -> Tensor:
    return output


def _rms(width: int | None) -> Callable[[Tensor], Tensor | None]:
    """Divide by the root mean square of each head, or of the whole output."""

    def normalise(output: Tensor) -> Tensor | None:
        size = width or output.shape[-1]
        if output.shape[-1] % size:
            return None
        parts = output.unflatten(-1, (-1, size))
        return (parts / parts.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)).flatten(-2)

    return normalise


def _layer_norm(width: int) -> Callable[[Tensor], Tensor | None]:
    """Centre and divide by the standard deviation of each head."""
    scale = _rms(width)

    def normalise(output: Tensor) -> Tensor | None:
        if output.shape[-1] % width:
            return None
        parts = output.unflatten(-1, (-1, width))
        return scale((parts - parts.mean(-1, keepdim=True)).flatten(-2))

    return normalise


def _clean(scale: float) -> float:
    """1 where the scale is 1 but for rounding."""
    return 1.0 if abs(scale - 1) < 1e-4 else scale
