"""Queries and keys held over a forward pass, for methods that compare heads of different layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from attnlens.anatomy import Site
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer


class HeldRows(Observer):
    """Observer that holds each site's rule for rows: `rows[site name]`, O(tokens x width) a site.

    Afterwards `rows[site].block(heads, rows)` gives any block of weights, while no map is kept.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.rows: dict[str, Rows] = {}

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Hold one call's queries and keys; the call itself is left alone."""
        found = Rows.at(site, call)
        # A copy: a cache or an in-place operation may write to the model's own tensors.
        self.rows[site.name] = replace(
            found, query=found.query.detach().clone(), key=found.key.detach().clone()
        )
        return call
