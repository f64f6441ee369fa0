"""The self-check: is what the instrument shows what the model does?

Four questions, asked of every site on a small input: does it fire; do recomputed rows equal the
weights of the model's own eager attention; does changing its pattern change the output; and is the
output bit for bit the same when nothing is asked (the probe asks that one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import SeamError
from attnlens.hooks import seam
from attnlens.hooks.edits import Editor, Uniform
from attnlens.hooks.probe import evaluating, output_tensors
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session
from attnlens.hooks.tokens import Sides


@dataclass(frozen=True)
class SiteCheck:
    """What was found at one site."""

    site: str
    row_error: float
    """Largest difference of a recomputed weight from the model's own eager weight, same q and k."""
    drift: float
    """Largest difference of a weight under the model's own kernel from the eager run's."""
    row_sum: float
    """Mean sum of a real row; below 1 where learned sinks take a share."""
    moves: bool
    """Whether the output changes when the site's pattern does."""


@dataclass(frozen=True)
class Check:
    """The self-check of a model."""

    model: str
    dtype: str
    sites: tuple[SiteCheck, ...]
    tolerance: float
    """Bound on `row_error`: a few units in the last place of a weight near 1."""

    @property
    def row_error(self) -> float:
        """The largest row error of all sites."""
        return max(site.row_error for site in self.sites)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one sentence each; empty when all is well."""
        found = [
            f"{site.site}: recomputed rows differ from the model's eager weights by "
            f"{site.row_error:.1e} (at most {self.tolerance:.0e} is allowed)"
            for site in self.sites
            if not site.row_error <= self.tolerance
        ]
        for stack in dict.fromkeys(_stack(site.site) for site in self.sites):
            members = [site for site in self.sites if _stack(site.site) == stack]
            if not any(site.moves for site in members):
                found.append(
                    f"changing a pattern changes nothing at {', '.join(m.site for m in members)}"
                )
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether the instrument may be believed on this model."""
        return not self.problems

    def to_frame(self) -> pd.DataFrame:
        """One row a site."""
        return pd.DataFrame([vars(site) for site in self.sites])

    def raise_problems(self) -> None:
        """Raise if there is a problem."""
        if self.problems:
            raise SeamError(f"The self-check of {self.model} failed. " + ". ".join(self.problems))


# A weight is at most 1, and its rounding error a few units in the last place of its dtype; float32
# takes in that float32 products are summed in another order. Half precision rounds the scores too.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def check_model(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any]) -> Check:
    """Check every site of a model on one small input."""
    sides = Sides.of(inputs)
    with torch.no_grad(), evaluating(model):
        with seam.kernel(model, "eager"):
            eager = _Compare(anatomy.sites, sides)
            with Session(model, anatomy, [eager]):
                model(**inputs)
        own = _Compare(anatomy.sites, sides)
        with Session(model, anatomy, [own]):
            plain = output_tensors(model(**inputs))
        sites: list[SiteCheck] = []
        for site in anatomy.sites:
            name = site.name
            drift = (own.patterns[name] - eager.patterns[name]).abs().max()
            sites.append(
                SiteCheck(
                    name,
                    eager.errors[name],
                    float(drift),
                    eager.sums[name],
                    _moves(model, anatomy, site, inputs, plain, eager.patterns[name]),
                )
            )
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCES.get(dtype, 2e-6)
    return Check(anatomy.model, str(dtype).removeprefix("torch."), tuple(sites), tolerance)


def _moves(
    model: nn.Module,
    anatomy: Anatomy,
    site: Site,
    inputs: Mapping[str, Any],
    plain: Sequence[Tensor],
    pattern: Tensor,
) -> bool:
    """Whether uniform attention at one site changes the model's output."""
    if pattern.shape[-1] < 2:
        return True
    heads = [site.head(h) for h in range(site.heads)]
    with Session(model, anatomy, [Editor(anatomy, [Uniform(heads)])]):
        moved = output_tensors(model(**inputs))
    return any(not torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


class _Compare(Observer):
    """Observer that recomputes every row and compares with the weights that the kernel returned."""

    def __init__(self, sites: Sequence[Site], sides: Sides) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.errors: dict[str, float] = {}
        self.sums: dict[str, float] = {}
        self.patterns: dict[str, Tensor] = {}
        self._sides = sides

    def see(self, site: Site, call: Call) -> Call:
        pattern = Rows.at(site, call).dense()
        real = self._sides.queries(site).cut(pattern.shape[2]).real
        if real is not None:
            pattern = pattern * real[:, None, :, None]
        self.patterns[site.name] = pattern
        if call.weights is not None:
            own = call.weights
            if real is not None:
                own = own * real[:, None, :, None]
            self.errors[site.name] = float((pattern - own).abs().max())
            rows = pattern.sum() if real is None else pattern.sum() / real.float().mean()
            self.sums[site.name] = float(rows / pattern[..., 0].numel())
        else:
            self.errors[site.name] = float("nan")
        return call


def _stack(name: str) -> str:
    return name.rpartition(".")[0]
