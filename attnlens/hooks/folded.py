"""The norms around an attention site, as they fold into its weights: which, and their gains.

A norm is known by its numbers: the one that q, k or v is made from returned what their linear
module was given, and the one that attention's output goes through was given what the output
projection returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.weights import HeadWeights
from attnlens.hooks.direct import norm_rule
from attnlens.hooks.probe import evaluating
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.returned import same_numbers, tensors_of
from attnlens.hooks.session import Handle, Observer, Session


@dataclass(frozen=True)
class Gain:
    """What a norm does but for its statistic: `gain x (x, or x less its mean)`."""

    module: str
    gain: Float[Tensor, " d_model"]
    """Up to one factor, which the statistic of a run decides."""
    centred: bool

    def before(self, weight: Float[Tensor, "head d_model d"]) -> Float[Tensor, "head d_model d"]:
        """The weight of a linear map and the norm before it."""
        scaled = self.gain.to(weight)[:, None] * weight
        return scaled - scaled.mean(-2, keepdim=True) if self.centred else scaled

    def after(self, weight: Float[Tensor, "head d d_model"]) -> Float[Tensor, "head d d_model"]:
        """The weight of a linear map and the norm after it."""
        centred = weight - weight.mean(-1, keepdim=True) if self.centred else weight
        return centred * self.gain.to(weight)


@dataclass(frozen=True)
class SiteNorms:
    """The norms around a site."""

    reads: Mapping[str, Gain]
    """Before `query`, `key` and `value`, where there is one."""
    written: Gain | None
    """After the output projection, before the sum with the stream."""
    within: tuple[str, ...]
    """Norms inside the attention module, of queries and keys say."""


@torch.no_grad()
def find_norms(
    model: nn.Module,
    anatomy: Anatomy,
    weights: Mapping[str, HeadWeights],
    inputs: Mapping[str, Any],
) -> dict[str, SiteNorms]:
    """The norms around sites, by name, from one short run on `inputs`."""
    sites = [anatomy[name] for name in weights]
    spy = _Spy(sites, {name: own.projections for name, own in weights.items()})
    with evaluating(model), Session(model, anatomy, [spy]):
        model(**inputs)
    return {site.name: spy.norms(site) for site in sites}


@dataclass(frozen=True)
class _Run:
    """One run of a module, and how many norms had run before."""

    name: str
    given: Tensor
    made: Tensor
    norms: int


class _Spy(Observer):
    """Observer that notes what norms, and the linear modules of sites, are given and return."""

    def __init__(self, sites: Sequence[Site], projections: Mapping[str, Mapping[str, Any]]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self._linear = {
            site: {part: own.module for part, own in parts.items()}
            for site, parts in projections.items()
        }
        self._outputs = {site.name: site.output for site in sites}
        self._norms: list[_Run] = []
        self._runs: dict[str, list[_Run]] = {}
        self._modules: dict[str, nn.Module] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Watch the modules."""
        return list(self._hooks(model))

    def _hooks(self, model: nn.Module) -> Iterator[Handle]:
        linear = {name for parts in self._linear.values() for name in parts.values()}
        linear |= {name for name in self._outputs.values() if name is not None}
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                self._modules[name] = module
                yield module.register_forward_hook(self._note(name, self._norms))
            elif name in linear:
                kept = self._runs.setdefault(name, [])
                yield module.register_forward_hook(self._note(name, kept))

    def norms(self, site: Site) -> SiteNorms:
        """The norms around one site."""
        found = {
            part: self._before(run)
            for part, name in self._linear[site.name].items()
            if (run := self._run(name, site)) is not None
        }
        last = self._run(site.output, site)
        inside = dict.fromkeys(
            run.name for run in self._norms if run.name.startswith(f"{site.module}.")
        )
        return SiteNorms(
            {part: gain for part, gain in found.items() if gain is not None},
            None if last is None else self._after(last),
            tuple(inside),
        )

    def _run(self, name: str | None, site: Site) -> _Run | None:
        """The run of a module that belongs to the site's call."""
        runs = self._runs.get(name or "", [])
        return runs[min(site.call, len(runs) - 1)] if runs else None

    def _before(self, linear: _Run) -> Gain | None:
        """The latest norm that returned what a linear module was given."""
        earlier = reversed(self._norms[: linear.norms])
        return self._gain(run for run in earlier if same_numbers(run.made, linear.given))

    def _after(self, linear: _Run) -> Gain | None:
        """The next norm that was given what a linear module returned."""
        later = self._norms[linear.norms :]
        return self._gain(run for run in later if same_numbers(run.given, linear.made))

    def _gain(self, runs: Iterable[_Run]) -> Gain | None:
        for run in runs:
            rule = norm_rule(self._modules[run.name], run.given, run.made)
            if rule is not None:
                return Gain(run.name, rule.scale.flatten(0, -2)[0], rule.centred)
        return None

    def _note(self, name: str, kept: list[_Run]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given, made = tensors_of(args), tensors_of(output)
            if given and made:
                count = len(self._norms)
                kept.append(_Run(name, given[0].detach(), made[0].detach(), count))

        return of_this_thread(hook)
