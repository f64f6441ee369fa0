"""Routes traced down through the blocks of a run, row by row from the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.analyses.block_parts import BlockParts
from attnlens.analyses.contributions import Shares
from attnlens.errors import UnsupportedModelError
from attnlens.graphs.routes import KINDS
from attnlens.hooks.sublayers import BlockRun

_ATTENTION, _RESIDUAL, _MLP = range(len(KINDS))


@dataclass(frozen=True)
class Edges:
    """The kept edges of one layer of one prompt, a number an edge in each column."""

    step: Int[Tensor, " edge"]
    """Which of the block's sums the edge enters: 0, or 1 for that of the MLP."""
    kind: Int[Tensor, " edge"]
    """0 attention, 1 residual, 2 MLP."""
    head: Int[Tensor, " edge"]
    """Head; -1 of what is no attention."""
    query: Int[Tensor, " edge"]
    source: Int[Tensor, " edge"]
    importance: Float[Tensor, " edge"]
    """Share of the sum."""
    weight: Float[Tensor, " edge"]
    """Share among the parts of the sum that were kept."""

    def __len__(self) -> int:
        return len(self.query)

    def moved(self, place: Int[Tensor, " position"]) -> Edges:
        """The same with positions looked up in a table."""
        query, source = (place[column.long()].int() for column in (self.query, self.source))
        return Edges(self.step, self.kind, self.head, query, source, self.importance, self.weight)

    def to_frame(self) -> pd.DataFrame:
        """One row an edge."""
        names = [field.name for field in fields(self)]
        return pd.DataFrame({name: getattr(self, name).numpy() for name in names})

    @classmethod
    def joined(cls, parts: Sequence[Edges]) -> Edges:
        """Several tables as one."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Traced:
    """Routes in padded positions; see `Routes`."""

    target: tuple[int, ...]
    edges: tuple[tuple[Edges, ...], ...]
    arriving: Float[Tensor, "batch layer position"]
    heads: Float[Tensor, "batch head"]
    residual: Float[Tensor, "batch layer position"]
    mlp: Float[Tensor, "batch layer position"]
    bias: Float[Tensor, "batch layer position"]
    lost: Float[Tensor, " batch"]
    steps: tuple[int, ...]
    parallel: bool
    """Whether a block adds attention and MLP in one sum."""
    empty: int
    """Sums of which no part has a proximity."""


def trace_routes(
    model: nn.Module, runs: Sequence[BlockRun], target: Sequence[int], threshold: float
) -> Traced:
    """Trace from the target position of each prompt down through all blocks."""
    _check_joined(runs)
    batch, length = runs[0].entering.shape[:2]
    prompts = [_Trace(len(runs), length, place) for place in target]
    for layer in range(len(runs) - 1, -1, -1):
        for prompt, one in enumerate(prompts):
            one.down(layer, BlockParts(model, runs[layer], prompt), threshold)
    assert len(prompts) == batch
    return Traced(
        tuple(target),
        tuple(tuple(one.edges[::-1]) for one in prompts),
        torch.stack([one.arriving for one in prompts]),
        torch.stack([torch.cat(one.heads[::-1]) for one in prompts]).float(),
        torch.stack([one.residual for one in prompts]),
        torch.stack([one.mlp for one in prompts]),
        torch.stack([one.bias for one in prompts]),
        torch.tensor([one.lost for one in prompts], dtype=torch.float64),
        tuple(len(run.sums) for run in runs),
        any(one.attention and one.mlp for run in runs for one in run.sums),
        sum(one.empty for one in prompts),
    )


def _check_joined(runs: Sequence[BlockRun]) -> None:
    """Raise where the stream between two blocks with attention is changed."""
    for below, above in pairwise(runs):
        left, entered = below.leaving, above.entering
        if left is not entered and not torch.equal(left, entered.to(left.device)):
            raise UnsupportedModelError(
                f"What enters {above.site.name} is not what leaves {below.site.name}: blocks "
                "without attention, or something else, lie between, and routes are traced through "
                "attention blocks only."
            )


class _Trace:
    """The routes of one prompt while they are traced down."""

    def __init__(self, layers: int, length: int, target: int) -> None:
        self.arriving = torch.zeros(layers + 1, length, dtype=torch.float64)
        self.arriving[layers, target] = 1
        self.edges: list[Edges] = []
        self.heads: list[Float[Tensor, " head"]] = []
        self.residual, self.mlp, self.bias = torch.full((3, layers, length), torch.nan)
        self.lost = 0.0
        self.empty = 0

    def down(self, layer: int, block: BlockParts, threshold: float) -> None:
        """Carry what arrives above a block to what enters it."""
        reached = self.arriving[layer + 1].nonzero()[:, 0]
        self.heads.append(torch.zeros(block.run.site.heads, dtype=torch.float64))
        found: list[Edges] = []
        for rows in block.blocks(reached):
            carried = self.arriving[layer + 1, rows]
            shares = block.importances(rows)
            self._note(layer, rows, shares)
            for step in range(len(shares) - 1, -1, -1):
                kept = shares[step].kept(threshold)
                found.append(_edges(step, rows, shares[step], kept))
                carried = self._carry(layer, rows, carried, kept)
            self.arriving[layer, rows] += carried
        self.edges.append(Edges.joined(found))
        self.empty += block.empty

    def _carry(
        self, layer: int, rows: Tensor, carried: Float[Tensor, " row"], kept: Shares
    ) -> Float[Tensor, " row"]:
        """Hand attention's share down; returns what stays at the rows themselves."""
        self.lost += float((carried * kept.bias.double().cpu()).sum())
        if kept.attention.numel():
            passing = carried[:, None] * kept.attention.double().cpu()
            self.arriving[layer] += passing.sum((0, 1))
            self.heads[-1] += passing.sum((1, 2))
        return carried * (kept.residual + kept.mlp).double().cpu()

    def _note(self, layer: int, rows: Tensor, shares: Sequence[Shares]) -> None:
        self.residual[layer, rows] = shares[0].residual.float().cpu()
        self.mlp[layer, rows] = shares[-1].mlp.float().cpu()
        self.bias[layer, rows] = sum(one.bias.float().cpu() for one in shares)


def _edges(step: int, rows: Int[Tensor, " row"], shares: Shares, kept: Shares) -> Edges:
    """The kept edges of some rows of a sum."""
    parts: list[Edges] = []
    for kind, importance, weight in (
        (_RESIDUAL, shares.residual, kept.residual),
        (_MLP, shares.mlp, kept.mlp),
    ):
        chosen = weight.nonzero()[:, 0]
        own = rows[chosen.cpu()]
        parts.append(_table(step, kind, None, own, own, importance[chosen], weight[chosen]))
    if kept.attention.numel():
        head, row, source = kept.attention.nonzero().unbind(1)
        values = shares.attention[head, row, source], kept.attention[head, row, source]
        own = rows[row.cpu()]
        parts.append(_table(step, _ATTENTION, head.cpu(), own, source.cpu(), *values))
    return Edges.joined(parts)


def _table(
    step: int,
    kind: int,
    head: Tensor | None,
    query: Tensor,
    source: Tensor,
    importance: Tensor,
    weight: Tensor,
) -> Edges:
    """A table of edges of one kind, in small numbers."""
    count = len(query)
    return Edges(
        torch.full((count,), step, dtype=torch.int8),
        torch.full((count,), kind, dtype=torch.int8),
        torch.full((count,), -1, dtype=torch.int16) if head is None else head.to(torch.int16),
        query.to(torch.int32),
        source.to(torch.int32),
        importance.cpu(),
        weight.cpu(),
    )
