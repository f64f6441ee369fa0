"""Heads held to what they wrote in the clean run, whatever changes below them."""

from __future__ import annotations

from dataclasses import dataclass, field

from attnlens.anatomy import Anatomy
from attnlens.hooks.edits.patches import Kind, Patch


@dataclass(frozen=True, eq=False)
class Freeze(Patch):
    """z = what it is with nothing edited, `values` as for a `Patch` of z from the clean run.

    Edits of z that are given after it win. It says more than such a patch does: that the values are
    the run's own, so that a sweep, which has them, need not compute this attention.
    """

    kind: Kind = field(default="z", init=False)

    def whole(self, anatomy: Anatomy) -> frozenset[str]:
        """Sites of which it holds every head at every position."""
        if self.queries is not None:
            return frozenset()
        held = set(anatomy.find(self.heads))
        return frozenset(
            site.name
            for site in anatomy.sites
            if all(site.head(number) in held for number in range(site.heads))
        )
