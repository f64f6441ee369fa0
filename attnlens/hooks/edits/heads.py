"""Edits of what heads write (z) and of the weights behind it that need no attention map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.errors import InputError
from attnlens.hooks.edits.base import HeadEdit
from attnlens.hooks.edits.changes import with_pattern, with_z
from attnlens.hooks.edits.given import at_site, check_number, check_tensors
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call, View
from attnlens.hooks.where import Where


@dataclass(frozen=True)
class Zero(HeadEdit):
    """z = 0: the heads write nothing."""

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Zero z of the heads."""
        return with_z(call, where, torch.zeros_like)


@dataclass(frozen=True)
class Scale(HeadEdit):
    """z = factor * z; a factor of 1 changes nothing."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("factor", self.factor)

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Scale z of the heads."""
        return with_z(call, where, lambda z: z * self.factor)


@dataclass(frozen=True, eq=False)
class Mean(HeadEdit):
    """z = its mean over a reference set: the heads write what they write on average.

    `means` holds `head d_v` a site name, from `lens.mean_z(reference)`, or one mean a position,
    `position head d_v`, from `lens.mean_z(reference, by_position=True)`.
    """

    means: Mapping[str, Float[Tensor, "*position head d_v"]]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensors("means", self.means)

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Put the mean in the place of z."""
        by_position = site.name in self.means and self.means[site.name].ndim == 3
        position = (None,) if by_position else ()
        means = at_site(self.means, site, "mean z", *position, site.heads, site.d_v)
        means = means.to(call.output)
        if not by_position:
            return with_z(call, where, means[where.heads].expand_as)
        counted = where.counted
        if where.rows is not None:
            counted = counted.masked_fill(~where.rows, 0)
        last = int(counted.max())
        if last >= means.shape[0]:
            raise InputError(
                f"The means for {site.name} cover {means.shape[0]} positions and the edit reaches "
                f"position {last}. Make them from prompts as long, or without by_position."
            )
        return with_z(call, where, means[:, where.heads][counted].expand_as)


@dataclass(frozen=True)
class Uniform(HeadEdit):
    """A = 1 / number of visible keys: even attention, without the future.

    z is the running mean of the visible values, so no map is made.
    """

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Make the rows even, and z the mean of the visible values."""

        def even(pattern: Tensor, seen: Tensor | None, view: View) -> Tensor:
            visible = torch.ones_like(pattern[:, :1]) if seen is None else seen.to(pattern.dtype)
            return visible / visible.sum(-1, keepdim=True).clamp_min(1)

        z = mean_of_visible(site, call, where.heads)
        return with_pattern(site, call, where, even, lambda _: z)


@dataclass(frozen=True)
class Identity(HeadEdit):
    """A = (1 - share) A + share I: each row looks at its own token, wholly or in part.

    z becomes (1 - share) z + share v, with v of the row's own token. A share between is the mix of
    Smoothed PAG (SoftPAG).
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("share", self.share)
        if not 0 <= self.share <= 1:
            raise InputError(f"share={self.share:g} is no share: give 0 to 1.")

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Mix the rows with the identity, and z with the row's own value."""
        if site.kind == "cross":
            raise InputError(
                f"{site.name} is cross-attention: its rows and keys are different texts, so there "
                "is no identity. Choose uniform or zero there."
            )
        rows, first = call.query.shape[2], where.row_places.start - where.key_places.start
        if first < 0 or first + rows > call.key.shape[2]:
            raise InputError(f"The keys of {site.name} do not hold the rows' own tokens.")

        def mixed(pattern: Tensor, seen: Tensor | None, view: View) -> Tensor:
            t = torch.arange(view.rows.start, view.rows.stop, device=pattern.device) + first
            s = torch.arange(view.keys.start, view.keys.stop, device=pattern.device)
            own = (t[:, None] == s).to(pattern.dtype)
            return torch.lerp(pattern, own.expand_as(pattern), self.share)

        groups = where.heads // (site.heads // site.groups)
        values = call.value[:, groups, first : first + rows].transpose(1, 2)
        return with_pattern(site, call, where, mixed, lambda z: torch.lerp(z, values, self.share))


def mean_of_visible(
    site: Site, call: Call, heads: Tensor
) -> Float[Tensor, "batch query chosen d_v"]:
    """Mean of the values that each row sees; rows that see nothing give 0."""
    rows = Rows.at(site, call)
    groups = heads // (site.heads // site.groups)
    value = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    if rows.mask is not None:
        by_head = rows.mask.shape[1] > 1
        rows = rows.select(heads) if by_head else rows
        z = _mean_under_mask(rows, value[:, groups] if by_head else value)
        return (z if by_head else z[:, groups]).transpose(1, 2)
    queries, keys = call.query.shape[2], call.key.shape[2]
    if rows.causal:
        seen = torch.arange(1, queries + 1, device=value.device).clamp(max=keys)
        z = value.cumsum(2)[:, :, seen - 1] / seen[:, None]
    else:
        z = value.mean(2, keepdim=True).expand(-1, -1, queries, -1)
    return z[:, groups].transpose(1, 2)


def _mean_under_mask(
    rows: Rows, value: Float[Tensor, "batch own key d_v"]
) -> Float[Tensor, "batch own query d_v"]:
    """Mean of the values under a mask, a block of rows at a time; one mask may serve all heads."""
    parts: list[Tensor] = []
    for part in rows.blocks():
        keys = rows.keys_seen(part)
        seen = rows.visible(part, keys)
        assert seen is not None
        weights = seen.to(value.dtype)
        parts.append(weights @ value[:, :, keys] / weights.sum(-1, keepdim=True).clamp_min(1))
    return torch.cat(parts, dim=2)
