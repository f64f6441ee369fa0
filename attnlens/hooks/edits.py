"""Interventions on heads while the model runs.

An edit names heads and what becomes of them. Zero, mean and scale act on z (a head's output before
the output projection), so the model's kernel stays; uniform changes the pattern, and z with it.
Edits of one `with` act in the order in which they are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnlens.anatomy import Anatomy, Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call


class Edit(Protocol):
    """A change to some heads of the model."""

    @property
    def heads(self) -> HeadSpec:
        """The heads that it changes."""
        ...

    def apply(self, site: Site, call: Call, heads: Tensor) -> Call:
        """Change the given heads of one site in one call."""
        ...


@dataclass(frozen=True)
class Zero:
    """z = 0: the heads write nothing."""

    heads: HeadSpec

    def apply(self, site: Site, call: Call, heads: Tensor) -> Call:
        """Zero z of the heads."""
        zeros = call.output.new_zeros(())
        return _with_z(call, heads, zeros)


@dataclass(frozen=True)
class Scale:
    """z = factor * z; a factor of 1 changes nothing."""

    heads: HeadSpec
    factor: float

    def apply(self, site: Site, call: Call, heads: Tensor) -> Call:
        """Scale z of the heads."""
        return _with_z(call, heads, call.output[:, :, heads] * self.factor)


@dataclass(frozen=True)
class Mean:
    """z = its mean over a reference set: the heads write what they write on average.

    `means` holds `head d_v` a site name, from `lens.mean_z(reference)`.
    """

    heads: HeadSpec
    means: Mapping[str, Float[Tensor, "head d_v"]]

    def apply(self, site: Site, call: Call, heads: Tensor) -> Call:
        """Put the mean in the place of z."""
        if site.name not in self.means:
            raise InputError(
                f"There is no mean z for {site.name}; the means cover {', '.join(self.means)}. "
                "Make them with lens.mean_z(reference) for all sites that are edited."
            )
        means = self.means[site.name].to(call.output)[heads]
        return _with_z(call, heads, means.expand(*call.output.shape[:2], *means.shape))


@dataclass(frozen=True)
class Uniform:
    """A = 1 / number of visible keys: even attention, without the future."""

    heads: HeadSpec

    def apply(self, site: Site, call: Call, heads: Tensor) -> Call:
        """Make the rows even, and z the mean of the visible values."""

        def even(pattern: Tensor, seen: Tensor | None, _: slice, numbers: Tensor) -> Tensor:
            chosen = torch.isin(numbers, heads)[None, :, None, None]
            visible = torch.ones_like(pattern[:, :1]) if seen is None else seen.to(pattern.dtype)
            spread = visible / visible.sum(-1, keepdim=True).clamp_min(1)
            return torch.where(chosen, spread, pattern)

        changed = replace(call, pattern_edits=(*call.pattern_edits, even))
        return _with_z(changed, heads, z_of_rows(site, changed, heads))


def z_of_rows(site: Site, call: Call, heads: Tensor) -> Float[Tensor, "batch query head d_v"]:
    """z of some heads from their rows as edited, a block at a time."""
    rows = Rows.at(site, call).select(heads)
    value = call.value[:, heads // (site.heads // site.groups)]
    parts: list[Tensor] = []
    for part in rows.blocks():
        keys = rows.keys_seen(part)
        pattern = rows.pattern(rows.scores(part, keys), part, keys)
        parts.append(pattern @ value[:, :, keys])
    return torch.cat(parts, dim=2).transpose(1, 2)


def _with_z(call: Call, heads: Tensor, z: Tensor) -> Call:
    """The call with z of some heads replaced; the kernel's own output is not written to."""
    output = call.output.clone()
    output[:, :, heads] = z.to(output.dtype)
    return replace(call, output=output)


class Editor:
    """Observer that applies edits, in order, at the sites of their heads."""

    def __init__(self, anatomy: Anatomy, edits: Sequence[Edit]) -> None:
        if not edits:
            raise InputError("No edit was given. For example lens.edit(al.Zero('L3H5')).")
        self._edits = [(edit, _heads_by_site(anatomy.find(edit.heads))) for edit in edits]
        self.sites = frozenset(name for _, heads in self._edits for name in heads)

    def attach(self, model: nn.Module) -> Sequence[RemovableHandle]:
        """Nothing beside the seam."""
        return ()

    def see(self, site: Site, call: Call) -> Call:
        """Apply the edits of this site."""
        for edit, heads in self._edits:
            if site.name in heads:
                numbers = torch.tensor(heads[site.name], device=call.output.device)
                call = edit.apply(site, call, numbers)
        return call


def _heads_by_site(heads: Sequence[Head]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for head in heads:
        found.setdefault(head.site, []).append(head.head)
    return found


class MeanZ:
    """Observer that sums z over real positions, for `Mean`."""

    def __init__(self, sites: Sequence[Site], real: Mapping[str, Tensor | None]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.sums: dict[str, Float[Tensor, "head d_v"]] = {}
        self.counts: dict[str, int] = {}
        self._real = real

    def attach(self, model: nn.Module) -> Sequence[RemovableHandle]:
        """Nothing beside the seam."""
        return ()

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Add the real positions of one call."""
        z, real = call.output.double(), self._real.get(site.name)
        if real is not None:
            z = z * real[:, :, None, None]
        self.sums[site.name] = self.sums.get(site.name, 0) + z.sum((0, 1))
        count = z.shape[0] * z.shape[1] if real is None else int(real.sum())
        self.counts[site.name] = self.counts.get(site.name, 0) + count
        return call
