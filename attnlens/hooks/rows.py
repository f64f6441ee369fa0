"""Blocks of attention rows of one call, exactly as the model would have them.

Rows are recomputed from q and k when somebody asks, a block of query rows against the keys that the
block can see, so nothing of size queries x keys outlives its block. A row of the result equals the
row of the module's own eager attention; only a row that sees no key at all (padding) differs: it is
all zero here, where eager code gives it a meaningless uniform weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.seam import Call, PatternEdit, ScoreEdit, View
from attnlens.kernels.rows import (
    hidden_value,
    hide,
    hide_future,
    scaled_products,
    soft_cap,
    softmax_rows,
)

BLOCK_BYTES = 6 << 20
"""Scores held at a time. Two or three tensors of this size stay near the cache."""
TILE_ROWS = 128
"""Rows of a tile where it can have as many: fewer make thin products, more see the future."""


@dataclass(frozen=True)
class Rows:
    """The rule that turns one call's q and k into rows of scores and weights."""

    query: Float[Tensor, "batch head query d_qk"]
    key: Float[Tensor, "batch group key d_qk"]
    scaling: float
    cap: float | None
    bias: Float[Tensor, "#batch #head query key"] | None
    mask: Tensor | None
    causal: bool
    """Whether the kernel hides the future by itself (mask None)."""
    sinks: Float[Tensor, " head"] | None
    softmax_dtype: torch.dtype | None
    score_edits: tuple[ScoreEdit, ...] = ()
    pattern_edits: tuple[PatternEdit, ...] = ()
    heads: Int[Tensor, " head"] | None = None
    """Head numbers where only some of the site's heads were selected."""
    first_prompt: int = 0
    """Number of the first prompt where only one of the batch was selected."""

    @classmethod
    def of(cls, call: Call, upcast: bool = False, sinks: bool = True) -> Rows:
        """Read a call's arguments the way the kernels of transformers do.

        Two facts are not in the call and are found by the probe: whether the module takes its
        softmax in float32 whatever the dtype, and whether learned sinks take a share of its rows.
        """
        arguments = call.arguments
        if arguments.get("indices") is not None:
            raise UnsupportedModelError(
                f"{type(call.module).__name__} picks its keys with an indexer outside the "
                "attention mask, so its rows cannot be recomputed from q and k."
            )
        keys = call.key.shape[2]
        # Some encoders give one row of mask for all queries.
        mask = call.mask
        if mask is not None:
            mask = mask[..., :keys].expand(-1, -1, call.query.shape[2], -1)
        scaling = arguments.get("scaling")
        return cls(
            query=call.query,
            key=call.key,
            scaling=call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            cap=arguments.get("softcap"),
            bias=arguments.get("position_bias"),
            mask=mask,
            causal=mask is None and call.kernel != "eager" and _is_causal(call),
            sinks=_sinks(call) if sinks else None,
            softmax_dtype=torch.float32 if upcast else None,
            score_edits=call.score_edits,
            pattern_edits=call.pattern_edits,
        )

    @classmethod
    def at(cls, site: Site, call: Call) -> Rows:
        """The rule of a call at a known site."""
        return cls.of(call, site.upcast, site.sinks)

    @classmethod
    def summing(cls, site: Site, call: Call) -> Rows:
        """The rule by which rows times values are z.

        It is that of `at`, but for a learned sink that scales z after the softmax (GraniteSWA):
        here it takes its share of the rows, which is the same z.
        """
        return cls.of(call, site.upcast)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """batch, heads, queries, keys."""
        return (*self.query.shape[:3], self.key.shape[2])  # type: ignore[return-value]

    @cached_property
    def offset(self) -> int:
        """Key position of the first query: 0, or the length of the cache while decoding.

        A causal kernel without a mask aligns queries and keys at the left.
        """
        return 0 if self.causal else max(self.shape[3] - self.shape[2], 0)

    def select(self, heads: Int[Tensor, " head"]) -> Rows:
        """The same rule for some of the heads, each with its own key group."""
        return self._of(heads, heads // (self.query.shape[1] // self.key.shape[1]), heads)

    def part(self, heads: slice) -> Rows:
        """The same rule for neighbouring heads, without a copy; see `tiles` for which go."""
        if heads == slice(0, self.shape[1]):
            return self
        size = self.query.shape[1] // self.key.shape[1]
        groups = slice(heads.start // size, -(-heads.stop // size))
        numbers = torch.arange(heads.start, heads.stop, device=self.query.device)
        return self._of(heads, groups, numbers)

    def _of(self, heads: Tensor | slice, groups: Tensor | slice, numbers: Tensor) -> Rows:
        """The same rule for the heads that an index picks, whose numbers are `numbers`."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            wide = tensor is not None and tensor.ndim == 4 and tensor.shape[1] > 1
            return tensor[:, heads] if wide and tensor is not None else tensor

        return replace(
            self,
            query=self.query[:, heads],
            key=self.key[:, groups],
            bias=pick(self.bias),
            mask=pick(self.mask),
            sinks=None if self.sinks is None else self.sinks[heads],
            heads=numbers if self.heads is None else self.heads[heads],
        )

    def prompt(self, index: int) -> Rows:
        """The same rule for one prompt of the batch, as a batch of one."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            wide = tensor is not None and tensor.shape[0] > 1
            return tensor[index : index + 1] if wide and tensor is not None else tensor

        return replace(
            self,
            query=self.query[index : index + 1],
            key=self.key[index : index + 1],
            bias=pick(self.bias),
            mask=pick(self.mask),
            first_prompt=self.first_prompt + index,
        )

    @property
    def edited(self) -> bool:
        """Whether earlier listeners changed scores or weights."""
        return bool(self.score_edits or self.pattern_edits)

    def _view(self, rows: slice, keys: slice) -> View:
        """Where a block is in the call, for edits."""
        heads = self.heads
        if heads is None:
            heads = torch.arange(self.shape[1], device=self.query.device)
        prompts = slice(self.first_prompt, self.first_prompt + self.shape[0])
        return View(prompts, heads, rows, keys)

    def visible(self, rows: slice, keys: slice) -> Bool[Tensor, "#batch #head row key"] | None:
        """Which keys each row sees; None where it sees all."""
        if self.mask is not None:
            block = self.mask[:, :, rows, keys]
            if block.dtype == torch.bool:
                return block
            return block > torch.finfo(block.dtype).min / 2
        if not self.causal:
            return None
        t = torch.arange(rows.start, rows.stop, device=self.query.device)
        s = torch.arange(keys.start, keys.stop, device=self.query.device)
        return (s <= t[:, None])[None, None]

    def keys_seen(self, rows: slice) -> slice:
        """The range of keys outside which no row of the block sees anything."""
        if self.causal:
            return slice(0, min(rows.stop, self.shape[3]))
        if self.mask is None:
            return slice(0, self.shape[3])
        seen = self.visible(rows, slice(0, self.shape[3]))
        assert seen is not None
        found = seen.any(dim=(0, 1, 2)).nonzero()
        if not len(found):
            return slice(0, 1)
        return slice(int(found[0]), int(found[-1]) + 1)

    def scores(self, rows: slice, keys: slice) -> Float[Tensor, "batch head row key"]:
        """Scaled, capped, biased scores; a hidden key has a large negative finite score."""
        scores = scaled_products(self.query[:, :, rows], self.key[:, :, keys], self.scaling)
        if self.cap is not None:
            scores = soft_cap(scores, self.cap)
        if self.bias is not None:
            scores = scores + self.bias[:, :, rows, keys]
        for edit in self.score_edits:
            scores = edit(scores, self._view(rows, keys))
        if self.causal:
            return hide_future(scores, rows.start - keys.start)
        if self.mask is not None:
            block = self.mask[:, :, rows, keys]
            if block.dtype != torch.bool:
                scores = scores + block
            seen = self.visible(rows, keys)
            assert seen is not None
            scores = hide(scores, seen)
        return scores

    def pattern(
        self, scores: Float[Tensor, "batch head row key"], rows: slice, keys: slice
    ) -> Float[Tensor, "batch head row key"]:
        """The weights of a block of scores, with the edits that earlier listeners made."""
        pattern = softmax_rows(scores, self.sinks, self.softmax_dtype)
        if self.mask is not None or self.score_edits:
            blind = scores.amax(-1) <= hidden_value(scores.dtype)
            if blind.any():
                pattern = pattern.masked_fill(blind[..., None], 0)
        if self.pattern_edits:
            seen = self.visible(rows, keys)
            for edit in self.pattern_edits:
                pattern = edit(pattern, seen, self._view(rows, keys))
        return pattern

    def blocks(self, budget: int = BLOCK_BYTES, rows: slice | None = None) -> Iterator[slice]:
        """Query rows in blocks whose scores take about `budget` bytes (one row at least).

        Causal rows near the start see few keys, so their blocks are taller.
        """
        batch, heads, queries, keys = self.shape
        rows = rows or slice(0, queries)
        cells = budget // (batch * heads * max(self.query.element_size(), 4))
        start = rows.start
        while start < rows.stop:
            if self.causal:
                # rows * (start + rows) = cells
                size = int((math.sqrt(start * start + 4 * cells) - start) / 2)
            else:
                size = cells // keys
            stop = min(start + max(size, 1), rows.stop)
            yield slice(start, stop)
            start = stop

    def tiles(self, budget: int = BLOCK_BYTES) -> Iterator[tuple[slice, list[slice]]]:
        """Every row of every head once: blocks of rows, each with the heads that go at a time.

        A tile's scores take about `budget` bytes (one row of one head at least). Tall tiles of few
        heads rather than flat ones of all: a product of few rows reads all keys for little. The
        heads of a tile are of one key group or of whole ones.
        """
        batch, heads, queries, keys = self.shape
        size = heads // self.key.shape[1]
        cells = budget // (batch * max(self.query.element_size(), 4))
        start = 0
        while start < queries:
            seen = min(start + TILE_ROWS, keys) if self.causal else keys
            rows = min(TILE_ROWS, queries - start, max(cells // seen, 1))
            together = max(cells // (rows * seen), 1)
            if together >= size:
                together = together // size * size
            else:
                together = next(n for n in range(together, 0, -1) if size % n == 0)
            parts = [slice(h, min(h + together, heads)) for h in range(0, heads, together)]
            yield slice(start, start + rows), parts
            start += rows

    def block(self, heads: slice, rows: slice) -> tuple[Float[Tensor, "batch head row key"], slice]:
        """Weights of a block of rows of neighbouring heads, and the keys they are of."""
        keys = self.keys_seen(rows)
        own = self.part(heads)
        return own.pattern(own.scores(rows, keys), rows, keys), keys

    def dense(
        self, rows: Sequence[int] | None = None, scores: bool = False
    ) -> Float[Tensor, "batch head row key"]:
        """Weights, or scores, of the asked rows against all keys.

        Hidden keys have weight 0 and score -inf.
        """
        batch, heads, queries, keys = self.shape
        wanted = range(queries) if rows is None else rows
        fill = -math.inf if scores else 0.0
        dense = self.query.new_full((batch, heads, len(wanted), keys), fill)
        place = 0
        for run in _runs(wanted):
            for block in self.blocks(rows=run):
                seen = self.keys_seen(block)
                values = self.scores(block, seen)
                if scores:
                    values = values.masked_fill(values <= hidden_value(values.dtype), fill)
                else:
                    values = self.pattern(values, block, seen)
                size = block.stop - block.start
                dense[:, :, place : place + size, seen] = values
                place += size
        return dense


def _runs(rows: Sequence[int]) -> Iterator[slice]:
    """Consecutive rows as slices, in the order asked."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield slice(rows[start], rows[end - 1] + 1)
            start = end


def _is_causal(call: Call) -> bool:
    """As the sdpa kernel decides it for a call without a mask; a single query sees everything."""
    given = call.arguments.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if given is None else given
    return bool(causal) and call.query.shape[2] > 1


def _sinks(call: Call) -> Tensor | None:
    """Learned sink logits, one a head (gpt-oss)."""
    sinks: Any = call.arguments.get("s_aux")
    if sinks is None:
        sinks = getattr(call.module, "sinks", None)
    return sinks if isinstance(sinks, Tensor) and sinks.numel() == call.query.shape[1] else None
