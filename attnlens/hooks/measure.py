"""Stream statistics over the rows of chosen sites while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.hooks.block import Block, TorchBlock
from attnlens.hooks.fused import fused_blocks, read_by
from attnlens.hooks.reducers import Reducer
from attnlens.hooks.rows import BLOCK_BYTES, Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer
from attnlens.hooks.tokens import Layout, Sides


class Measure(Observer):
    """Observer that feeds each block of rows to every reducer: `batch head ...` a site."""

    def __init__(
        self,
        sites: Sequence[Site],
        reducers: Sequence[Reducer],
        sides: Sides,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.results: dict[str, dict[str, Tensor]] = {reducer.name: {} for reducer in reducers}
        self._reducers = tuple(reducers)
        self._sides = sides
        self._block_bytes = block_bytes

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Reduce one call; the call itself is left alone."""
        rows = Rows.at(site, call)
        layout = self._layout(site, rows)
        states = [reducer.start(layout) for reducer in self._reducers]
        for block in self._blocks(rows, layout):
            for reducer, state in zip(self._reducers, states, strict=True):
                reducer.update(state, block)
        for reducer, state in zip(self._reducers, states, strict=True):
            self.results[reducer.name][site.name] = reducer.finish(state)
        return call

    def _blocks(self, rows: Rows, layout: Layout) -> Iterator[Block]:
        """Blocks by the kernels where they serve all reducers, else by torch."""
        reads = read_by(self._reducers)
        fused = None if reads is None else fused_blocks(rows, layout, reads)
        return blocks(rows, layout, self._block_bytes) if fused is None else fused

    def _layout(self, site: Site, rows: Rows) -> Layout:
        batch, heads, queries, keys = rows.shape
        return Layout(
            site,
            batch,
            heads,
            queries,
            keys,
            rows.offset if site.kind != "cross" else 0,
            self._sides.queries(site).cut(queries),
            self._sides.keys(site).cut(keys),
            rows.query.device,
        )


def blocks(rows: Rows, layout: Layout, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The rows of one call as blocks for reducers: each row of each head once."""
    query, real = rows.query, layout.query_tokens.real
    if real is not None:  # a model may make NaN of padding, and 0 times NaN is no 0
        query = query.masked_fill(query.isnan() & ~real[:, None, :, None], 0)
    rows = replace(rows, query=query, key=rows.key.contiguous())
    for part, tiles in rows.tiles(block_bytes):
        keys = rows.keys_seen(part)
        for heads in tiles:
            own = rows.part(heads)
            scores = own.scores(part, keys)
            pattern = own.pattern(scores, part, keys)
            half = pattern.dtype in (torch.float16, torch.bfloat16)
            yield TorchBlock(
                layout,
                own,
                heads,
                part,
                keys,
                scores,
                pattern.float() if half else pattern,
                softmax_of_scores=not half and not rows.edited,
            )


def merge(batches: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Results of several batches as one, along the prompts; shorter ones are filled up.

    Floats are filled with NaN, integers with -1.
    """
    merged: dict[str, dict[str, Tensor]] = {}
    for name in batches[0]:
        merged[name] = {
            site: join_ragged([batch[name][site] for batch in batches]) for site in batches[0][name]
        }
    return merged


def join_ragged(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first axis, filling the others up to the longest."""
    shape = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    filled: list[Tensor] = []
    for part in parts:
        wide = part.new_full(
            (part.shape[0], *shape), float("nan") if part.is_floating_point() else -1
        )
        wide[tuple(slice(0, size) for size in part.shape)] = part
        filled.append(wide)
    return torch.cat(filled)
