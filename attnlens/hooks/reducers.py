"""Streaming statistics over attention rows.

A reducer keeps a small state for one site, is shown the site's rows block by block, and returns one
value a prompt and head. All reducers of a run share each block; nothing of size queries x keys is
kept. Padded rows carry no weight, and results are aligned to the first real token, so padding on
either side gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.errors import InputError
from attnlens.hooks.tokens import Layout


@dataclass(frozen=True)
class Block:
    """Some rows of one site: `pattern` and `scores`, their keys cut to those that a row sees."""

    layout: Layout
    rows: slice
    keys: slice
    pattern: Float[Tensor, "batch head row key"]
    scores: Float[Tensor, "batch head row key"]
    visible: Bool[Tensor, "#batch #head row key"] | None
    """Which keys each row sees; None where it sees all."""
    softmax_of_scores: bool
    """Whether the pattern is the plain softmax of `scores`, in full precision."""

    @cached_property
    def weights(self) -> Float[Tensor, "batch 1 row"] | None:
        """1 for a real row, 0 for padding; None where all are real."""
        real = self.layout.real_rows(self.rows)
        return None if real is None else real[:, None].to(self.pattern.dtype)

    @cached_property
    def positions(self) -> Int[Tensor, " row"]:
        """Key position of each row's own token."""
        layout = self.layout
        return torch.arange(self.rows.start, self.rows.stop, device=layout.device) + layout.offset

    @cached_property
    def partners(self) -> Int[Tensor, "#batch row"]:
        """Key position at the same distance from the first real key as each row from the first row.

        The row's own position, but in cross-attention, where each side may have its own padding.
        """
        shift = self.layout.first_key() - self.layout.first_query()
        return self.positions + shift[:, None]

    @cached_property
    def peak(self) -> Float[Tensor, "batch head row"]:
        """Largest weight of each row."""
        return self.pattern.amax(-1)

    @cached_property
    def row_sums(self) -> Float[Tensor, "batch head row"]:
        """Sum of each row: 1, or less where learned sinks take a share."""
        return self.pattern.sum(-1)

    def mass_on(self, chosen: Bool[Tensor, "batch #row key"]) -> Float[Tensor, "batch head row"]:
        """Weight of each row on the chosen keys."""
        return (self.pattern * chosen[:, None].to(self.pattern.dtype)).sum(-1)

    def mass_at(self, pairs: Bool[Tensor, "batch row key"]) -> Float[Tensor, "batch head row"]:
        """Weight of each row on its own few keys, gathered there rather than summed over all."""
        prompt, row, key = pairs.nonzero(as_tuple=True)
        batch, heads, rows, _ = self.pattern.shape
        mass = self.pattern.new_zeros(batch, rows, heads)
        mass.index_put_((prompt, row), self.pattern[prompt, :, row, key], accumulate=True)
        return mass.transpose(1, 2)

    def at(self, keys: Int[Tensor, "#batch row"]) -> Float[Tensor, "batch head row"]:
        """Weight of one key a row; 0 where the key is outside the block."""
        index = keys - self.keys.start
        inside = (index >= 0) & (index < self.pattern.shape[-1])
        index = index.clamp(0, self.pattern.shape[-1] - 1)
        batch, heads, rows, _ = self.pattern.shape
        wide = index[:, None, :, None].expand(batch, heads, rows, 1)
        return self.pattern.gather(-1, wide)[..., 0] * inside[:, None]


class Reducer(Protocol):
    """A statistic of attention rows. State is whatever `start` returns; `update` changes it."""

    @property
    def name(self) -> str:
        """Key of the result in `Statistics`."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers a head in a table; empty where the result is larger than that."""
        ...

    def start(self, layout: Layout) -> Any:
        """A fresh state for one site and one batch."""
        ...

    def update(self, state: Any, block: Block) -> None:
        """Take in one block of rows."""
        ...

    def finish(self, state: Any) -> Tensor:
        """The statistic: `batch head ...`."""
        ...


@dataclass
class Mean:
    """State of a mean over rows: a sum a head and the number of rows that counted."""

    layout: Layout
    total: Float[Tensor, "batch head"]
    rows: Int[Tensor, "batch 1"]

    @classmethod
    def zero(cls, layout: Layout) -> Mean:
        """Nothing seen yet; sums are kept in float64."""
        total = torch.zeros(layout.batch, layout.heads, dtype=torch.float64, device=layout.device)
        rows = torch.zeros(layout.batch, 1, dtype=torch.long, device=layout.device)
        return cls(layout, total, rows)

    def add(
        self, block: Block, values: Float[Tensor, "batch head row"], counted: Tensor | None = None
    ) -> None:
        """Add rows: the real ones, and of these the `counted` (`batch row`) where given."""
        real = block.layout.real_rows(block.rows)
        if counted is not None:
            real = counted if real is None else real & counted
        if real is None:
            self.total += values.sum(-1)
            self.rows += values.shape[-1]
        else:
            self.total += (values * real[:, None]).sum(-1)
            self.rows += real.sum(-1, keepdim=True)

    def value(self) -> Float[Tensor, "batch head"]:
        """The mean; NaN for a prompt without a row that counted."""
        return (self.total / self.rows).float()


class RowMean:
    """Base of reducers that are a mean over rows; a subclass gives the value of each row."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """One number a head."""
        return (self.name,)

    def start(self, layout: Layout) -> Mean:
        """An empty mean."""
        return Mean.zero(layout)

    def finish(self, state: Mean) -> Float[Tensor, "batch head"]:
        """The mean over the real rows."""
        return state.value()


@dataclass(frozen=True)
class FirstTokenMass(RowMean):
    """Mean over rows of the weight on the first real token: `F = mean_t A[t, 0]`."""

    name: str = "first_token"

    def update(self, state: Mean, block: Block) -> None:
        """Add the column of the first real key."""
        first = state.layout.first_key()[:, None].expand(-1, block.pattern.shape[2])
        state.add(block, block.at(first))


@dataclass(frozen=True)
class Entropy(RowMean):
    """Mean entropy of the rows in nats: `H_t = -sum_s A[t, s] ln A[t, s]`.

    From the scores, without a logarithm a weight: `ln A = score - lse`, and lse is known from the
    largest weight of the row.
    """

    name: str = "entropy"

    def update(self, state: Mean, block: Block) -> None:
        """Add the entropy of each row."""
        if not block.softmax_of_scores:
            state.add(block, torch.special.entr(block.pattern).sum(-1))
            return
        # The largest score and the largest weight are of the same key: ln A = score - lse there.
        lse = block.scores.amax(-1) - block.peak.clamp_min(1e-30).log()
        mean_score = (block.pattern * block.scores).sum(-1)
        state.add(block, (lse * block.row_sums - mean_score).clamp_min(0))


@dataclass(frozen=True)
class MeanDistance(RowMean):
    """Mean distance to the keys, in tokens: `sum_s A[t, s] |t - s|`."""

    name: str = "distance"

    def update(self, state: Mean, block: Block) -> None:
        """Add the mean distance of each row."""
        keys = torch.arange(block.keys.start, block.keys.stop, device=block.pattern.device)
        dtype = block.pattern.dtype
        if state.layout.site.causal:
            # Taken from the block's first row on: all terms but a few have one sign, none cancels.
            start = int(block.positions[0])
            back = block.pattern @ (start - keys).to(dtype)
            values = back + block.row_sums * (block.positions - start).to(dtype)
        else:
            far = (block.partners[:, None, :, None] - keys).abs().to(dtype)
            values = (block.pattern * far).sum(-1)
        state.add(block, values)


@dataclass(frozen=True)
class OffsetMass:
    """Mean weight on keys at fixed offsets back: `mean_t A[t, t - o]` over the rows that have it.

    Offset 1 is the previous token, 0 the token itself, -1 the next one.
    """

    offsets: tuple[int, ...] = (1,)
    name: str = "offset"

    @property
    def columns(self) -> tuple[str, ...]:
        """One number an offset: `offset_1`, `offset_-1`."""
        return tuple(f"{self.name}_{offset}" for offset in self.offsets)

    def start(self, layout: Layout) -> list[Mean]:
        """An empty mean an offset."""
        return [Mean.zero(layout) for _ in self.offsets]

    def update(self, state: list[Mean], block: Block) -> None:
        """Add one diagonal an offset."""
        for mean, offset in zip(state, self.offsets, strict=True):
            keys = block.partners - offset
            exists = (keys >= 0) & (keys < mean.layout.keys)
            real = mean.layout.key_tokens.real
            if real is not None:
                exists = exists & real.gather(
                    1, keys.clamp(0, mean.layout.keys - 1).expand(len(real), -1)
                )
            exists = exists.expand(block.pattern.shape[0], -1)
            mean.add(block, block.at(keys), exists)

    def finish(self, state: list[Mean]) -> Float[Tensor, "batch head offset"]:
        """One mean an offset."""
        return torch.stack([mean.value() for mean in state], -1)


@dataclass(frozen=True)
class TokenMass(RowMean):
    """Mean weight on keys with certain ids S (special tokens): `mean_t sum_{s in S} A[t, s]`."""

    ids: frozenset[int]
    name: str = "tokens"

    def update(self, state: Mean, block: Block) -> None:
        """Add the weight on the chosen keys."""
        ids = _known(state.layout.key_tokens.ids, self.name)[:, block.keys]
        wanted = torch.tensor(sorted(self.ids), dtype=ids.dtype, device=ids.device)
        state.add(block, block.mass_on(torch.isin(ids, wanted)[:, None]))


@dataclass(frozen=True)
class InductionMass(RowMean):
    """Mean weight on the tokens that follow earlier copies of the current one (prefix matching).

    `mean_t sum_{s < t, x[s-1] = x[t]} A[t, s]` over the rows that have such a token (Olsson et al.
    2022). The current token itself is not counted where it follows its own copy.
    """

    name: str = "induction"

    def update(self, state: Mean, block: Block) -> None:
        """Add the weight on the tokens after earlier copies."""
        state.add(block, *_mass_after(block, state.layout, self.name, shift=1))


@dataclass(frozen=True)
class DuplicateMass(RowMean):
    """Mean weight on earlier copies of a row's token: `mean_t sum_{s < t, x[s] = x[t]} A[t, s]`."""

    name: str = "duplicate"

    def update(self, state: Mean, block: Block) -> None:
        """Add the weight on earlier copies."""
        state.add(block, *_mass_after(block, state.layout, self.name, shift=0))


@dataclass(frozen=True)
class ColumnMass:
    """Mean weight that each key gets from the rows that see it.

    `alpha_k = 1 / (T - k + 1) * sum_{i >= k} A[i, k]` when causal (Gu et al. 2024). Column 0 is the
    first real token; columns past a prompt's end are NaN.
    """

    name: str = "columns"
    columns: tuple[str, ...] = ()

    def start(self, layout: Layout) -> tuple[Layout, Tensor, Tensor]:
        """Sums and counts, a column each."""
        shape = (layout.batch, layout.heads, layout.keys)
        sums = torch.zeros(shape, dtype=torch.float64, device=layout.device)
        return layout, sums, torch.zeros_like(sums[:, :1])

    def update(self, state: tuple[Layout, Tensor, Tensor], block: Block) -> None:
        """Add the columns of the real rows."""
        _, sums, counts = state
        batch, _, rows, _ = block.pattern.shape
        weights = block.pattern.new_ones(batch, 1, rows) if block.weights is None else block.weights
        sums[..., block.keys] += (weights[..., None, :] @ block.pattern)[..., 0, :]
        if block.visible is None:
            counts[..., block.keys] += weights.sum(-1, keepdim=True)
        else:
            seen = block.visible[:, :1].to(weights.dtype)
            counts[..., block.keys] += (weights[..., None, :] @ seen)[..., 0, :]

    def finish(self, state: tuple[Layout, Tensor, Tensor]) -> Float[Tensor, "batch head key"]:
        """The mean of each column."""
        layout, sums, counts = state
        return layout.align_keys((sums / counts).float(), float("nan"))


@dataclass(frozen=True)
class ArgMax:
    """The key with the largest weight of each row; -1 in rows past a prompt's end.

    Positions count from the first real token, rows and keys alike.
    """

    name: str = "argmax"
    columns: tuple[str, ...] = ()

    def start(self, layout: Layout) -> tuple[Layout, Tensor]:
        """Room for one key a row."""
        shape = (layout.batch, layout.heads, layout.queries)
        return layout, torch.full(shape, -1, dtype=torch.long, device=layout.device)

    def update(self, state: tuple[Layout, Tensor], block: Block) -> None:
        """Note the largest key of each row."""
        layout, keys = state
        found = block.pattern.argmax(-1)
        keys[..., block.rows] = found + block.keys.start - layout.first_key()[:, None, None]

    def finish(self, state: tuple[Layout, Tensor]) -> Int[Tensor, "batch head query"]:
        """The keys, aligned."""
        layout, keys = state
        return layout.align_queries(keys, -1)


def _known(ids: Tensor | None, name: str) -> Tensor:
    """The ids, or an error that says which statistic needs them."""
    if ids is None:
        raise InputError(
            f"The statistic {name!r} compares tokens, and this site has no token ids (an image, "
            "audio or embedding input). Leave it out for this site."
        )
    return ids


def _mass_after(
    block: Block, layout: Layout, name: str, shift: int
) -> tuple[Float[Tensor, "batch head row"], Bool[Tensor, "batch row"]]:
    """Weight on keys `shift` after earlier copies of a row's token, and which rows have one."""
    queries = _known(layout.query_tokens.ids, name)[:, block.rows]
    keys = _known(layout.key_tokens.ids, name)
    # Every key up to the row, those outside its window too: which rows count is a fact of the text.
    source = torch.arange(block.keys.stop, device=keys.device) - shift
    copied = keys[:, source.clamp_min(0)]
    matches = queries[:, :, None] == copied[:, None, :]
    matches &= (source >= 0) & (source + shift < block.positions[:, None])
    if layout.key_tokens.real is not None:
        matches &= layout.key_tokens.real[:, source.clamp_min(0)][:, None, :]
    return block.mass_at(matches[..., block.keys]), matches.any(-1)
