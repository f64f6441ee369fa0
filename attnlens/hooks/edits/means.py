"""Mean head outputs of a reference set, for the edit `Mean`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer


class MeanZ(Observer):
    """Observer that sums z over real positions: `position head d_v` a site, with counts.

    Positions are counted from the first real token of each prompt.
    """

    def __init__(self, sites: Sequence[Site], real: Mapping[str, Tensor | None]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.sums: dict[str, Float[Tensor, "position head d_v"]] = {}
        self.counts: dict[str, Int[Tensor, " position"]] = {}
        self._real = real

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Add the real positions of one call."""
        z, real = call.output.double(), self._real.get(site.name)
        if real is None:
            sums = z.sum(0)
            counts = torch.full((z.shape[1],), z.shape[0], device=z.device)
        else:
            sums, counts = _by_position(z, real.to(z.device))
        self.sums[site.name] = add_longer(self.sums.get(site.name), sums)
        self.counts[site.name] = add_longer(self.counts.get(site.name), counts)
        return call


def _by_position(
    z: Float[Tensor, "batch query head d_v"], real: Bool[Tensor, "batch query"]
) -> tuple[Tensor, Tensor]:
    place = (real.long().cumsum(-1) - 1)[real]
    sums = z.new_zeros(z.shape[1:]).index_add(0, place, z[real])
    return sums, torch.bincount(place, minlength=z.shape[1])


def add_longer(one: Tensor | None, other: Tensor) -> Tensor:
    """The sum of two tensors along the first axis, whose lengths may differ."""
    if one is None:
        return other
    long, short = (one, other) if len(one) >= len(other) else (other, one)
    total = long.clone()
    total[: len(short)] += short
    return total
