"""Row statistics of attention in one pass over q and k, on a GPU, without the map.

`row_statistics` reads q and k once. It keeps the running largest score m of each row, as flash
attention does, and four sums beside it that are scaled down when m grows: `sum e^(x-m)`,
`sum e^(x-m) (x-m)`, `sum e^(x-m) |t-s|` and where the largest was. What it writes is O(rows).
`mass` is a second pass over chosen keys alone, with the log-sum-exp of the first.

Against the float64 definition the errors are those of a float32 score: a weight is off by about
2^-22 times its score (2e-6 at scores up to 8), and sums of n weights by less than that. With bf16
inputs the kernel is nearer to the exact answer than torch's path, which rounds its scores to bf16.

Floor on a GPU, Llama-8B's shape (32 heads on 8 groups, width 128, bf16), T 32,768, causal: a layer
has 32 T^2 / 2 = 17.2 G scores.

| a layer | matrix flops | exponentials | bytes that must move |
|---|---|---|---|
| flash forward (q k^T and A v) | 8.8 T | 17.2 G | q, k, v, output: 0.67 GB |
| row kernel (q k^T) | 4.4 T | 17.2 G | q, k, 12 to 24 bytes a row: 0.36 GB |
| column kernel (q k^T again) | 4.4 T | 17.2 G | q, k, lse, 4 bytes a key: 0.34 GB |

At 990 bf16 Tflop/s (H100 data sheet) a pass of q k^T takes 4.4 ms, at 16 exponentials a clock and
multiprocessor (132 of them, 1.7 GHz) its exponentials take 4.8 ms, its bytes 0.1 ms: it is bound by
arithmetic, and both kernels together do the matrix work of the plain forward and twice its
exponentials. The row kernel adds about ten float32 operations a score (largest, arg-max, three
sums), 17.2 G * 10 / (132 * 128 * 1.7 GHz) = 6 ms if nothing overlaps; that is why what nobody asked
for is left out at compile time. The rest of such a layer is 2 * 218 M weights * T = 14 Tflop, 14 ms
at the same rate, so that a forward cannot take less than 23 ms a layer, and row and column kernels
together cannot add less than 9 (1.4 x), the row kernel alone 4.4 to 6 (1.2 to 1.3 x). With the
log-sum-exp of the forward one pass could write rows and columns both; sdpa does not hand it out.
These are counts, not measurements.
"""

# Types of Triton's language: see triton_scores.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.kernels.triton_scores import (
    LN2,
    LOG2E,
    Spans,
    Tile,
    batch_and_head,
    batch_stride,
    kernel,
    load_tile,
    stretch,
    tile_scores,
    whole_tiles,
)


@dataclass(frozen=True)
class RowStatistics:
    """What one pass knows of every row; a row that sees no key has lse +inf and zeros elsewhere."""

    lse: Float[Tensor, "batch head row"]
    """`ln sum_s e^score`, in nats, learned sinks included."""
    row_sums: Float[Tensor, "batch head row"]
    """`sum_s A[t, s]`: 1, or less with learned sinks."""
    peak: Float[Tensor, "batch head row"]
    """`max_s A[t, s]`"""
    entropy: Float[Tensor, "batch head row"] | None
    """`-sum_s A[t, s] ln A[t, s]`, in nats."""
    distance: Float[Tensor, "batch head row"] | None
    """`sum_s A[t, s] |t - s|`, in tokens."""
    largest: Int[Tensor, "batch head row"] | None
    """The key with the largest score, the first of several; 0 where a row sees none."""


@torch.no_grad()
def row_statistics(
    spans: Spans,
    sinks: Float[Tensor, " head"] | None = None,
    positions: Int[Tensor, "#batch row"] | None = None,
    entropy: bool = True,
    largest: bool = True,
    tile: Tile | None = None,
) -> RowStatistics:
    """Statistics of all rows from one pass over q and k.

    `positions` are the keys that distances count from (none asked where None); `sinks` one learned
    logit a head, which takes its share of every row.
    """
    batch, heads, rows, _ = spans.shape
    tile = tile or spans.tile()

    near = None if positions is None else positions.int().contiguous()

    def room(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, heads, rows), dtype=dtype, device=spans.query.device)

    found = RowStatistics(
        lse=room(),
        row_sums=room(),
        peak=room(),
        entropy=room() if entropy else None,
        distance=None if near is None else room(),
        largest=room(torch.int32) if largest else None,
    )
    with torch.cuda.device_of(spans.query):
        _row_kernel[(triton.cdiv(rows, tile.held), batch * heads)](
            spans.query,
            spans.key,
            spans.first,
            spans.stop,
            None if sinks is None else sinks.float().contiguous(),
            near,
            found.lse,
            found.row_sums,
            found.peak,
            found.entropy,
            found.distance,
            found.largest,
            spans.strides,
            0 if near is None else batch_stride(near),
            spans.sizes,
            spans.factors,
            BLOCK_T=tile.held,
            BLOCK_S=tile.moving,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **spans.widths,
        )
    return found


@torch.no_grad()
def mass(
    spans: Spans,
    lse: Float[Tensor, "batch head row"],
    values: Float[Tensor, "#batch key"],
    tile: Tile | None = None,
) -> Float[Tensor, "batch head row"]:
    """`sum_s A[t, s] values[s]` over the keys of `spans`, given the lse over all keys."""
    batch, heads, rows, _ = spans.shape
    tile = tile or spans.tile()
    values = values.float().contiguous()
    found = torch.empty_like(lse, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(spans.query):
        _mass_kernel[(triton.cdiv(rows, tile.held), batch * heads)](
            spans.query,
            spans.key,
            spans.first,
            spans.stop,
            lse.contiguous(),
            values,
            found,
            spans.strides,
            batch_stride(values),
            spans.sizes,
            spans.factors,
            BLOCK_T=tile.held,
            BLOCK_S=tile.moving,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **spans.widths,
        )
    return found


@kernel
def _row_kernel(
    query,
    key,
    firsts,
    stops,
    sinks,
    nears,
    lse,
    row_sums,
    peaks,
    entropies,
    distances,
    largests,
    strides,
    near_stride,
    sizes,
    factors,
    CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    heads, group, rows, keys = sizes
    b, h, pair = batch_and_head(heads)
    asked, t, first, stop, q = _own_rows(
        query, firsts, stops, b, h, strides, rows, WIDTH, BLOCK_D, BLOCK_T
    )
    k_base = key + b * strides[1][0] + (h // group) * strides[1][1]
    near = t
    if nears is not None:
        near = tl.load(nears + b * near_stride + t)
    # Finite, far below any score and far above a hidden one: no infinity meets another.
    m = tl.full([BLOCK_T], -1e37, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    spread = tl.zeros([BLOCK_T], tl.float32)
    far = tl.zeros([BLOCK_T], tl.float32)
    largest = tl.zeros([BLOCK_T], tl.int32)
    begin = tl.min(first)
    end = tl.max(stop)
    whole_from, whole_to = whole_tiles(begin, tl.max(first), tl.min(stop), BLOCK_S)
    for part in tl.static_range(3):
        low, high = stretch(part, begin, whole_from, whole_to, end)
        for start in tl.range(low, high, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            k = load_tile(k_base, tl.minimum(s, keys - 1), strides[1][2], WIDTH, BLOCK_D)
            x = tile_scores(q, k, factors, CAP, UPCAST)
            if part != 1:
                seen = (s[None, :] >= first[:, None]) & (s[None, :] < stop[:, None])
                x = tl.where(seen, x, -1e38)
            m, total, spread, far, largest = _take_in(
                m,
                total,
                spread,
                far,
                largest,
                x,
                tl.max(x, 1),
                s,
                near,
                entropies,
                distances,
                largests,
            )
    m, shrink, total, spread, whole = _with_sink(sinks, h, m, total, spread)
    log_whole = tl.log2(whole)
    out = pair * rows + asked
    inside = asked < rows
    blind = total == 0.0
    tl.store(lse + out, tl.where(blind, float("inf"), (m + log_whole) * LN2), mask=inside)
    tl.store(row_sums + out, total / whole, mask=inside)
    tl.store(peaks + out, tl.where(blind, 0.0, shrink / whole), mask=inside)
    if entropies is not None:
        nats = (total * log_whole - spread) / whole * LN2
        tl.store(entropies + out, tl.maximum(nats, 0.0), mask=inside)
    if distances is not None:
        tl.store(distances + out, far * shrink / whole, mask=inside)
    if largests is not None:
        tl.store(largests + out, largest, mask=inside)


@triton.jit
def _own_rows(
    query,
    firsts,
    stops,
    b,
    h,
    strides,
    rows,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The rows of a program: asked for, loaded, their spans, their q."""
    # The last rows first: of a causal map they have the most to do.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    asked = block * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows and keys beyond the end are the last one again, so that loads need no mask.
    t = tl.minimum(asked, rows - 1)
    first = tl.load(firsts + b * strides[2][0] + t)
    stop = tl.load(stops + b * strides[2][1] + t)
    base = query + b * strides[0][0] + h * strides[0][1]
    return asked, t, first, stop, load_tile(base, t, strides[0][2], WIDTH, BLOCK_D)


@triton.jit
def _take_in(
    m,
    total,
    spread,
    far,
    largest,
    x,
    top,
    s,
    near,
    entropies,
    distances,
    largests,
):
    """The running sums with one more tile of scores; `top` is the largest score of each row.

    The pointers only say which sums are wanted: None where one is not.
    """
    new = tl.maximum(m, top)
    shrink = tl.exp2(m - new)
    y = x - new[:, None]
    p = tl.exp2(y)
    if entropies is not None:
        spread = (spread + total * (m - new)) * shrink + tl.sum(p * y, 1)
    if distances is not None:
        back = tl.abs(near[:, None] - s[None, :]).to(tl.float32)
        far = far * shrink + tl.sum(p * back, 1)
    if largests is not None:
        found = tl.min(tl.where(x == top[:, None], s[None, :], 2147483647), 1)
        largest = tl.where(top > m, found, largest)
    return new, total * shrink + tl.sum(p, 1), spread, far, largest


@triton.jit
def _with_sink(sinks, h, m, total, spread):
    """The sums with a learned sink as one more column, and the sum that weights are shares of."""
    shrink = tl.full(m.shape, 1.0, tl.float32)
    whole = total
    if sinks is not None:
        sink = tl.load(sinks + h) * LOG2E
        new = tl.maximum(m, sink)
        shrink = tl.exp2(m - new)
        spread = (spread + total * (m - new)) * shrink
        total = total * shrink
        whole = total + tl.exp2(sink - new)
        m = new
    return m, shrink, total, spread, tl.where(whole == 0.0, 1.0, whole)


@kernel
def _mass_kernel(
    query,
    key,
    firsts,
    stops,
    lse,
    values,
    masses,
    strides,
    value_stride,
    sizes,
    factors,
    CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    heads, group, rows, keys = sizes
    b, h, pair = batch_and_head(heads)
    asked, t, first, stop, q = _own_rows(
        query, firsts, stops, b, h, strides, rows, WIDTH, BLOCK_D, BLOCK_T
    )
    k_base = key + b * strides[1][0] + (h // group) * strides[1][1]
    log_total = tl.load(lse + pair * rows + t) * LOG2E
    found = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(tl.min(first), tl.max(stop), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = tl.minimum(s, keys - 1)
        k = load_tile(k_base, at, strides[1][2], WIDTH, BLOCK_D)
        value = tl.load(values + b * value_stride + at)
        x = tile_scores(q, k, factors, CAP, UPCAST) - log_total[:, None]
        seen = (s[None, :] >= first[:, None]) & (s[None, :] < stop[:, None])
        p = tl.exp2(tl.where(seen, x, -1e38))
        found += tl.sum(p * value[None, :], 1)
    tl.store(masses + pair * rows + asked, found, mask=asked < rows)
