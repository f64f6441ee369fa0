"""Streaming statistics over attention rows.

A reducer keeps a small state for one site, is shown the site's rows block by block (some rows of
some heads at a time, see `hooks.block`), and returns one value a prompt and head. All reducers of a
run share each block; nothing of size queries x keys is kept. Padded rows carry no weight, and
results are aligned to the first real token, so padding on either side gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.tokens import Layout


class Reducer(Protocol):
    """A statistic of attention rows. State is whatever `start` returns; `update` changes it.

    One that reads only what kernels on a GPU can write, and no weights, may say so in `reads`
    (see `hooks.fused`).
    """

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
    """State of a mean over rows: a value a head and row, and which rows count. O(rows) a head."""

    layout: Layout
    values: Float[Tensor, "batch head query"] | None = None
    counted: Bool[Tensor, "batch query"] | None = None
    """None where all real rows count."""

    @classmethod
    def zero(cls, layout: Layout) -> Mean:
        """Nothing seen yet."""
        return cls(layout)

    def add(
        self, block: Block, values: Float[Tensor, "batch head row"], counted: Tensor | None = None
    ) -> None:
        """Note rows: the real ones count, and of these the `counted` (`batch row`) where given."""
        layout = self.layout
        if self.values is None:
            self.values = values.new_zeros(layout.batch, layout.heads, layout.queries)
        self.values[:, block.heads, block.rows] = values
        if counted is not None and block.heads.start == 0:  # the other heads see the same rows
            if self.counted is None:
                shape = (layout.batch, layout.queries)
                self.counted = torch.zeros(shape, dtype=torch.bool, device=layout.device)
            self.counted[:, block.rows] = counted

    def value(self) -> Float[Tensor, "batch head"]:
        """The mean, summed in float64; NaN for a prompt without a row that counts."""
        assert self.values is not None
        real = self.layout.query_tokens.real
        counts = self.counted
        if real is not None:
            counts = real if counts is None else counts & real
        if counts is None:
            return self.values.double().mean(-1).float()
        total = self.values.double().masked_fill(~counts[:, None], 0).sum(-1)
        return (total / counts.sum(-1, keepdim=True)).float()


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
    reads: ClassVar[tuple[str, ...]] = ("at",)

    def update(self, state: Mean, block: Block) -> None:
        """Add the column of the first real key."""
        first = state.layout.first_key()[:, None]
        state.add(block, block.at(first.expand(-1, block.rows.stop - block.rows.start)))


@dataclass(frozen=True)
class Entropy(RowMean):
    """Mean entropy of the rows in nats: `H_t = -sum_s A[t, s] ln A[t, s]`."""

    name: str = "entropy"
    reads: ClassVar[tuple[str, ...]] = ("entropy",)

    def update(self, state: Mean, block: Block) -> None:
        """Add the entropy of each row."""
        state.add(block, block.entropy)


@dataclass(frozen=True)
class MeanDistance(RowMean):
    """Mean distance to the keys, in tokens: `sum_s A[t, s] |t - s|`."""

    name: str = "distance"
    reads: ClassVar[tuple[str, ...]] = ("distance",)

    def update(self, state: Mean, block: Block) -> None:
        """Add the mean distance of each row."""
        state.add(block, block.distance)


@dataclass(frozen=True)
class OffsetMass:
    """Mean weight on keys at fixed offsets back: `mean_t A[t, t - o]` over the rows that have it.

    Offset 1 is the previous token, 0 the token itself, -1 the next one.
    """

    offsets: tuple[int, ...] = (1,)
    name: str = "offset"
    reads: ClassVar[tuple[str, ...]] = ("at",)

    @property
    def columns(self) -> tuple[str, ...]:
        """One number an offset: `offset_1`, `offset_-1`."""
        return tuple(f"{self.name}_{offset}" for offset in self.offsets)

    def start(self, layout: Layout) -> list[tuple[Mean, Tensor, Tensor]]:
        """For each offset an empty mean, the key of each row, and whether that key is there."""
        partners = layout.partners(slice(0, layout.queries))
        real = layout.key_tokens.real
        found: list[tuple[Mean, Tensor, Tensor]] = []
        for offset in self.offsets:
            keys = partners - offset
            exists = (keys >= 0) & (keys < layout.keys)
            if real is not None:
                exists = exists & real.gather(1, keys.clamp(0, layout.keys - 1))
            found.append((Mean.zero(layout), keys, exists))
        return found

    def update(self, state: list[tuple[Mean, Tensor, Tensor]], block: Block) -> None:
        """Add one diagonal an offset."""
        for mean, keys, exists in state:
            mean.add(block, block.at(keys[:, block.rows]), exists[:, block.rows])

    def finish(
        self, state: list[tuple[Mean, Tensor, Tensor]]
    ) -> Float[Tensor, "batch head offset"]:
        """One mean an offset."""
        return torch.stack([mean.value() for mean, _, _ in state], -1)


@dataclass(frozen=True)
class TokenMass(RowMean):
    """Mean weight on keys with certain ids S (special tokens): `mean_t sum_{s in S} A[t, s]`."""

    ids: frozenset[int]
    name: str = "tokens"
    reads: ClassVar[tuple[str, ...]] = ("mass_on",)

    def update(self, state: Mean, block: Block) -> None:
        """Add the weight on the chosen keys."""
        ids = _known(state.layout.key_tokens.ids, self.name)
        wanted = torch.tensor(sorted(self.ids), dtype=ids.dtype, device=ids.device)
        state.add(block, block.mass_on(torch.isin(ids, wanted).float()))


@dataclass(frozen=True)
class InductionMass:
    """Mean weight on the tokens that follow earlier copies of the current one (prefix matching).

    `mean_t sum_{s < t, x[s-1] = x[t]} A[t, s]` over the rows that have such a token (Olsson et al.
    2022). The current token itself is not counted where it follows its own copy.
    """

    name: str = "induction"
    reads: ClassVar[tuple[str, ...]] = ("mass_at",)
    shift: ClassVar[int] = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """One number a head."""
        return (self.name,)

    def start(self, layout: Layout) -> tuple[Mean, Copies]:
        """An empty mean, and where the copies are."""
        return Mean.zero(layout), Copies.of(layout, self.name, self.shift)

    def update(self, state: tuple[Mean, Copies], block: Block) -> None:
        """Add the weight on the tokens after earlier copies."""
        mean, copies = state
        mean.add(block, block.mass_at(*copies.pairs(block.rows)), copies.counts[:, block.rows] > 0)

    def finish(self, state: tuple[Mean, Copies]) -> Float[Tensor, "batch head"]:
        """The mean over the real rows that have such a token."""
        return state[0].value()


@dataclass(frozen=True)
class DuplicateMass(InductionMass):
    """Mean weight on earlier copies of a row's token: `mean_t sum_{s < t, x[s] = x[t]} A[t, s]`."""

    name: str = "duplicate"
    shift: ClassVar[int] = 0


@dataclass(frozen=True)
class ColumnMass:
    """Mean weight that each key gets from the rows that see it.

    `alpha_k = 1 / (T - k + 1) * sum_{i >= k} A[i, k]` when causal (Gu et al. 2024). Column 0 is the
    first real token; columns past a prompt's end are NaN.
    """

    name: str = "columns"
    reads: ClassVar[tuple[str, ...]] = ("column_sums", "rows_seeing")
    columns: tuple[str, ...] = ()

    def start(self, layout: Layout) -> tuple[Layout, Tensor, Tensor]:
        """Sums and counts, a column each."""
        shape = (layout.batch, layout.heads, layout.keys)
        sums = torch.zeros(shape, dtype=torch.float64, device=layout.device)
        return layout, sums, torch.zeros_like(sums[:, :1])

    def update(self, state: tuple[Layout, Tensor, Tensor], block: Block) -> None:
        """Add the columns of the real rows."""
        _, sums, counts = state
        sums[:, block.heads, block.keys] += block.column_sums()
        if block.heads.start == 0:  # the heads after the first see the same rows again
            counts[..., block.keys] += block.rows_seeing()[:, None]

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
    reads: ClassVar[tuple[str, ...]] = ("largest",)
    columns: tuple[str, ...] = ()

    def start(self, layout: Layout) -> tuple[Layout, Tensor]:
        """Room for one key a row."""
        shape = (layout.batch, layout.heads, layout.queries)
        return layout, torch.full(shape, -1, dtype=torch.long, device=layout.device)

    def update(self, state: tuple[Layout, Tensor], block: Block) -> None:
        """Note the largest key of each row."""
        layout, keys = state
        first = layout.first_key()[:, None, None]
        keys[:, block.heads, block.rows] = block.largest - first

    def finish(self, state: tuple[Layout, Tensor]) -> Int[Tensor, "batch head query"]:
        """The keys, aligned."""
        layout, keys = state
        return layout.align_queries(keys, -1)


@dataclass
class Copies:
    """For each row, the keys `shift` after earlier copies of its token; found by sorting the ids.

    What is kept is O(tokens); the pairs of a block of rows are made when they are asked for.
    """

    order: Int[Tensor, "batch key"]
    """Keys sorted by token, and by position within a token."""
    first: Int[Tensor, "batch row"]
    """Where in the order each row's copies begin."""
    counts: Int[Tensor, "batch row"]
    """How many copies each row has; a fact of the text, those outside a window count too."""
    shift: int
    _last: tuple[slice, tuple[Tensor, Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, layout: Layout, name: str, shift: int) -> Copies:
        """Sort the tokens of a site once."""
        keys = _known(layout.key_tokens.ids, name)
        queries = _known(layout.query_tokens.ids, name)
        if layout.key_tokens.real is not None:
            keys = keys.masked_fill(~layout.key_tokens.real, -1)
        width = layout.keys
        ranked = keys * width + torch.arange(width, device=keys.device)
        order = ranked.argsort(dim=-1)
        ranked = ranked.gather(-1, order)
        rows = layout.positions(slice(0, layout.queries))
        # A copy at p counts where p + shift < t: the token after it lies before the row.
        least = (queries * width).contiguous()
        first = torch.searchsorted(ranked, least)
        past = torch.searchsorted(ranked, least + (rows - shift).clamp(0, width))
        return cls(order, first, (past - first).clamp_min(0), shift)

    def pairs(
        self, rows: slice
    ) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Prompt, row (from the first of `rows`) and key of every pair."""
        if self._last is None or self._last[0] != rows:  # the heads of a block come one by one
            self._last = rows, self._expand(rows)
        return self._last[1]

    def _expand(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        counts, first = self.counts[:, rows].flatten(), self.first[:, rows].flatten()
        height = self.counts[:, rows].shape[1]
        own = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        begins = counts.cumsum(0) - counts
        place = torch.arange(len(own), device=own.device) - begins[own] + first[own]
        prompt = own // height
        return prompt, own % height, self.order[prompt, place] + self.shift


def _known(ids: Tensor | None, name: str) -> Tensor:
    """The ids, or an error that says which statistic needs them."""
    if ids is None:
        raise InputError(
            f"The statistic {name!r} compares tokens, and this site has no token ids (an image, "
            "audio or embedding input). Leave it out for this site."
        )
    return ids
