"""Blocks of attention rows whose quantities come from Triton kernels, without any weights.

A fused block answers what `hooks.block.Block` answers (entropy, distance, the weight at a key,
column sums, ...), but has no `pattern`, `scores` or `visible`: q and k are read by a kernel that
writes the quantity alone, so a block holds all heads and thousands of rows. A reducer that is
content with that says so by naming what it reads:

    reads = ("entropy",)

Measure takes fused blocks for a site if every reducer of the run has `reads` within `QUANTITIES`
and `fused_blocks` does not decline the call; else all reducers get torch blocks. `layout`, `heads`,
`rows`, `keys`, `real`, `positions` and `partners` are free and need not be named. What is named and
comes from the row kernel is computed in one pass; what nobody named is not computed at all.

Fused: causal and two-sided attention, windows, chunks and packed texts, padding on either side,
cached decoding, grouped keys, soft cap, learned sinks, float32, bfloat16 and float16. Left to
torch: position bias and other additive masks, masks in which a row sees keys with holes between
them, masks that differ between heads, edited patterns, float64.

Results differ from torch's by rounding: see `kernels.triton_rows`. A bfloat16 model's scores are
not rounded to bfloat16 here. Triton is imported when the first block is made, and not before.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.errors import InputError
from attnlens.hooks.rows import Rows
from attnlens.hooks.tokens import Layout

if TYPE_CHECKING:
    from attnlens.kernels.triton_scores import Spans

ROW_QUANTITIES = frozenset({"entropy", "distance", "row_sums", "peak", "largest"})
QUANTITIES = ROW_QUANTITIES | {
    "at",
    "mass_on",
    "mass_at",
    "column_sums",
    "rows_seeing",
    "band_sums",
}
"""What a reducer may name in its `reads`."""

ROWS = 1 << 14
"""Rows of a block: enough to fill a GPU, few enough to list a block's pairs of equal tokens."""
PAIRS = 1 << 18
"""Pairs of `mass_at` whose weights are held at a time."""
MASK_BYTES = 1 << 26
"""Cells of a mask read at a time."""
WIDEST = 512
"""Largest head width that the kernels hold in shared memory."""


def read_by(reducers: Iterable[object]) -> frozenset[str] | None:
    """All that these reducers read; None if one reads what fused blocks do not have, or is mute."""
    found: set[str] = set()
    for reducer in reducers:
        reads = getattr(reducer, "reads", None)
        if reads is None or not QUANTITIES.issuperset(reads):
            return None
        found.update(reads)
    return frozenset(found)


def can_fuse(rows: Rows) -> bool:
    """Whether `fused_blocks` would take a call; reads its mask, as `fused_blocks` does again."""
    return _kernels_take(rows) and _seen(rows) is not None


def fused_blocks(
    rows: Rows, layout: Layout, reads: frozenset[str] = QUANTITIES, height: int = ROWS
) -> Iterator[FusedRows] | None:
    """A call as fused blocks, every row of every head once; None where torch must do it."""
    seen = _seen(rows) if _kernels_take(rows) else None
    if seen is None:
        return None
    from attnlens.kernels.triton_scores import prepared

    spans = prepared(rows.query, rows.key, rows.scaling, rows.cap, *seen)
    parts = range(0, layout.queries, height)
    return (
        FusedRows(layout, _part(spans, own), rows.sinks, own, reads)
        for own in (slice(start, min(start + height, layout.queries)) for start in parts)
    )


def read_mask(
    mask: Tensor,
) -> tuple[Int[Tensor, "batch row"], Int[Tensor, "batch row"]] | None:
    """The first key that each row sees, and one past the last; None if keys between are hidden.

    Exact: a row is a span if it sees as many keys as lie between its first and its last. Floating
    masks must be 0 where they hide nothing. Rows that see no key have an empty span. Reads the mask
    once, `MASK_BYTES` at a time.
    """
    batch, heads, rows, keys = mask.shape
    if heads > 1 and mask.stride(1) != 0:
        return None
    cells = mask[:, 0] if mask.stride(2) != 0 else mask[:, 0, :1]
    height = max(MASK_BYTES // (batch * keys), 1)
    firsts: list[Tensor] = []
    stops: list[Tensor] = []
    holds = torch.ones((), dtype=torch.bool, device=mask.device)
    for block in cells.split(height, dim=1):
        seen = block
        if block.dtype != torch.bool:
            seen = block > torch.finfo(block.dtype).min / 2
            holds &= ((block == 0) | ~seen).all()
        seen = seen.to(torch.uint8)
        count = seen.sum(-1)
        first = seen.argmax(-1)
        stop = torch.where(count > 0, keys - seen.flip(-1).argmax(-1), first)
        holds &= (count == stop - first).all()
        firsts.append(first)
        stops.append(stop)
    if not bool(holds):
        return None
    return torch.cat(firsts, 1).expand(-1, rows), torch.cat(stops, 1).expand(-1, rows)


def _seen(rows: Rows) -> tuple[Tensor, Tensor] | None:
    """The span of keys that each row sees, `#batch row` each; None if it is no span."""
    if rows.mask is not None:
        return read_mask(rows.mask)
    _, _, queries, keys = rows.shape
    if rows.causal:
        stop = torch.arange(1, queries + 1, device=rows.query.device).clamp_max(keys)
    else:
        stop = torch.full((queries,), keys, device=rows.query.device)
    return torch.zeros_like(stop)[None], stop[None]


def _kernels_take(rows: Rows) -> bool:
    """Whether there is a GPU (or Triton's interpreter) and kernels for this arithmetic."""
    query = rows.query
    if query.device.type == "cuda":
        if torch.version.cuda is None or torch.cuda.get_device_capability(query.device) < (8, 0):
            return False
    elif query.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return (
        query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.dtype == rows.key.dtype
        and query.shape[-1] <= WIDEST
        and rows.bias is None
        and not rows.edited
        and importlib.util.find_spec("triton") is not None
    )


def _part(spans: Spans, rows: slice) -> Spans:
    return replace(
        spans,
        query=spans.query[:, :, rows],
        first=spans.first[:, rows].contiguous(),
        stop=spans.stop[:, rows].contiguous(),
    )


@dataclass(frozen=True)
class FusedRows:
    """Some rows of all heads of a site: the quantities of `Block`, from kernels, on demand."""

    layout: Layout
    spans: Spans
    """q of these rows, k of the site, and the span of keys that each row sees."""
    sinks: Float[Tensor, " head"] | None
    rows: slice
    reads: frozenset[str] = QUANTITIES
    """What will be asked for, so that one pass answers it all."""
    _found: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def heads(self) -> slice:
        """All of the site's heads."""
        return slice(0, self.layout.heads)

    @property
    def keys(self) -> slice:
        """All of the site's keys."""
        return slice(0, self.layout.keys)

    @property
    def real(self) -> Bool[Tensor, "batch row"] | None:
        """Which rows are real and not padding; None where all are."""
        return self.layout.real_rows(self.rows)

    @property
    def positions(self) -> Int[Tensor, " row"]:
        """Key position of each row's own token."""
        return self.layout.positions(self.rows)

    @property
    def partners(self) -> Int[Tensor, "#batch row"]:
        """Key at the same distance from the first real key as each row from the first real row."""
        return self.layout.partners(self.rows)

    @property
    def lse(self) -> Float[Tensor, "batch head row"]:
        """`ln sum_s e^score`, learned sinks included; +inf where a row sees no key."""
        return self._row("lse")

    @property
    def row_sums(self) -> Float[Tensor, "batch head row"]:
        """Sum of each row: 1, or less where learned sinks take a share."""
        return self._row("row_sums")

    @property
    def peak(self) -> Float[Tensor, "batch head row"]:
        """Largest weight of each row."""
        return self._row("peak")

    @property
    def entropy(self) -> Float[Tensor, "batch head row"]:
        """`-sum_s A[t, s] ln A[t, s]` in nats."""
        return self._row("entropy")

    @property
    def distance(self) -> Float[Tensor, "batch head row"]:
        """`sum_s A[t, s] |t - s|` in tokens."""
        return self._row("distance")

    @property
    def largest(self) -> Int[Tensor, "batch head row"]:
        """The key with the largest score of each row, the first of several."""
        return self._row("largest").long()

    def at(self, keys: Int[Tensor, "#batch row"]) -> Float[Tensor, "batch head row"]:
        """Weight of one key a row; 0 where there is no such key or the row does not see it."""
        batch, heads, height, _ = self.spans.shape
        device = self.layout.device
        prompt = torch.arange(batch, device=device).repeat_interleave(height)
        row = torch.arange(height, device=device).repeat(batch)
        found = self._weights(prompt, row, keys.expand(batch, -1).reshape(-1))
        return found.view(heads, batch, height).transpose(0, 1)

    def mass_at(
        self, prompt: Int[Tensor, " pair"], row: Int[Tensor, " pair"], key: Int[Tensor, " pair"]
    ) -> Float[Tensor, "batch head row"]:
        """Weight of each row on its own few keys; rows count from the block's first."""
        batch, heads, height, _ = self.spans.shape
        mass = torch.zeros(heads, batch * height, device=self.layout.device)
        for part in zip(prompt.split(PAIRS), row.split(PAIRS), key.split(PAIRS), strict=True):
            mass.index_add_(1, part[0] * height + part[1], self._weights(*part))
        return mass.view(heads, batch, height).transpose(0, 1)

    def mass_on(self, values: Float[Tensor, "#batch key"]) -> Float[Tensor, "batch head row"]:
        """`sum_s A[t, s] values[s]`, over all keys of the site; 1 and 0 make the mass on a set.

        A pass over the keys with a value other than 0, and over no others.
        """
        from attnlens.kernels.triton_rows import mass

        used = values != 0
        count = int(used.sum(-1).max())
        if not count:
            return torch.zeros_like(self.lse)
        # The used keys of each prompt to the front, in their order; the rest lies past every span.
        order = (~used).int().argsort(dim=-1, stable=True)[:, :count]
        place = order.masked_fill(~used.gather(1, order), self.layout.keys).int()
        place = place.expand(len(self.spans.first), -1) if len(place) == 1 else place
        ends = (self.spans.first, self.spans.stop)
        first, stop = (
            torch.searchsorted(place.contiguous(), end.expand(len(place), -1).contiguous())
            for end in ends
        )
        batch, groups, _, width = self.spans.key.shape
        index = order[:, None, :, None].expand(batch, groups, count, width)
        chosen = replace(
            self.spans,
            key=self.spans.key.gather(2, index),
            first=first.int(),
            stop=stop.int(),
        )
        return mass(chosen, self.lse, values.gather(1, order))

    def column_sums(self) -> Float[Tensor, "batch head key"]:
        """`sum_t A[t, s]` over the real rows, for all keys of the site."""
        return self._columns(self.spans)

    def band_sums(self, low: int, high: int) -> Float[Tensor, "batch head key"]:
        """`sum_t A[t, s]` over the real rows with `low <= t - s <= high`.

        Only the diagonal band is computed.
        """
        positions = self.positions.int()
        first = torch.maximum(self.spans.first, positions - high)
        stop = torch.minimum(self.spans.stop, positions - low + 1)
        return self._columns(replace(self.spans, first=first, stop=stop))

    def rows_seeing(self) -> Float[Tensor, "#batch key"]:
        """How many real rows see each key of the site."""
        first, stop, real = self.spans.first.long(), self.spans.stop.long(), self.real
        if real is None:
            weights = torch.ones(first.shape, device=first.device)
        else:
            weights = real.float()
            first, stop = first.expand(real.shape), stop.expand(real.shape)
        steps = torch.zeros(len(weights), self.layout.keys + 1, device=first.device)
        steps.scatter_add_(1, first, weights)
        steps.scatter_add_(1, stop, -weights)
        return steps.cumsum(-1)[:, :-1]

    @property
    def pattern(self) -> NoReturn:
        """There are no weights here."""
        _absent("pattern")

    @property
    def scores(self) -> NoReturn:
        """There are no scores here."""
        _absent("scores")

    @property
    def visible(self) -> NoReturn:
        """There is no mask here."""
        _absent("visible")

    def _row(self, name: str) -> Tensor:
        if name not in self._found:
            self._find_rows(self.reads | {name})
        return self._found[name]

    def _find_rows(self, wanted: frozenset[str]) -> None:
        """One pass of the row kernel, for everything that is wanted of it."""
        from attnlens.kernels.triton_rows import row_statistics

        found = row_statistics(
            self.spans,
            self.sinks,
            self.partners if "distance" in wanted else None,
            entropy="entropy" in wanted,
            largest="largest" in wanted,
        )
        for name in ROW_QUANTITIES | {"lse"}:
            value: Tensor | None = getattr(found, name)
            if value is not None:
                self._found[name] = value

    def _weights(self, prompt: Tensor, row: Tensor, key: Tensor) -> Float[Tensor, "head pair"]:
        from attnlens.kernels.triton_pairs import weights_of_pairs

        return weights_of_pairs(self.spans, self.lse, prompt, row, key)

    def _columns(self, spans: Spans) -> Float[Tensor, "batch head key"]:
        from attnlens.kernels.triton_columns import column_sums

        lse = self.lse
        if self.real is not None:
            lse = lse.masked_fill(~self.real[:, None], torch.inf)
        return column_sums(spans, lse)


def _absent(name: str) -> NoReturn:
    raise InputError(
        f"A fused block has no {name!r}. A reducer that needs it must not declare `reads`, or must "
        "name it there; it then gets blocks computed by torch."
    )
