"""Column sums of attention in one pass over q and k, given the log-sum-exp of the rows.

A program owns some keys and goes through the rows that see them. Sums over a band of rows
(`low <= t - s <= high`) are the same kernel over narrower spans: what a row's span loses on either
side costs nothing. The floor on a GPU is in `triton_rows`.
"""

# Types of Triton's language: see triton_scores.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.kernels.triton_scores import (
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


@torch.no_grad()
def column_sums(
    spans: Spans, lse: Float[Tensor, "batch head row"], tile: Tile | None = None
) -> Float[Tensor, "batch head key"]:
    """`sum_t A[t, s]` over the rows whose span holds s; a row with lse +inf adds nothing."""
    batch, heads, _, keys = spans.shape
    tile = tile or spans.tile()
    limits = row_limits(spans.first, spans.stop, keys, tile.held)
    found = torch.empty((batch, heads, keys), dtype=torch.float32, device=lse.device)
    with torch.cuda.device_of(spans.query):
        _column_kernel[(triton.cdiv(keys, tile.held), batch * heads)](
            spans.query,
            spans.key,
            spans.first,
            spans.stop,
            lse.contiguous(),
            limits,
            found,
            spans.strides,
            batch_stride(limits),
            spans.sizes,
            spans.factors,
            BLOCK_T=tile.moving,
            BLOCK_S=tile.held,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **spans.widths,
        )
    return found


def row_limits(
    first: Int[Tensor, "#batch row"], stop: Int[Tensor, "#batch row"], keys: int, size: int
) -> Int[Tensor, "#batch tile 4"]:
    """For each tile of keys: no other row than [0]..[1] sees any, all rows of [2]..[3] see all.

    Spans need not grow with t; where they do, as in any mask of a language model, the limits are
    tight.
    """
    starts = torch.arange(0, keys, size, device=first.device, dtype=first.dtype)
    starts = starts.expand(first.shape[0], -1).contiguous()
    ends = (starts + size).clamp_max(keys)
    # Running extremes are sorted, and cross a value where the first (or last) row does.
    latest_first, latest_stop = first.cummax(-1).values, stop.cummax(-1).values
    next_first = first.flip(-1).cummin(-1).values.flip(-1).contiguous()
    next_stop = stop.flip(-1).cummin(-1).values.flip(-1).contiguous()
    limits = (
        torch.searchsorted(latest_stop, starts, right=True),
        torch.searchsorted(next_first, ends),
        torch.searchsorted(next_stop, ends),
        torch.searchsorted(latest_first, starts, right=True),
    )
    return torch.stack(limits, -1).int()


@kernel
def _column_kernel(
    query,
    key,
    firsts,
    stops,
    lse,
    limits,
    sums,
    strides,
    limit_stride,
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
    block = tl.program_id(0)
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    k_base = key + b * strides[1][0] + (h // group) * strides[1][1]
    # Keys and rows beyond the end are the last one again, so that loads need no mask.
    k = load_tile(k_base, tl.minimum(s, keys - 1), strides[1][2], WIDTH, BLOCK_D)
    q_base = query + b * strides[0][0] + h * strides[0][1]
    limit = limits + b * limit_stride + block * 4
    begin = tl.load(limit)
    end = tl.load(limit + 1)
    whole_high = tl.minimum(tl.load(limit + 3), end)
    whole_from, whole_to = whole_tiles(begin, tl.load(limit + 2), whole_high, BLOCK_T)
    total = tl.zeros([BLOCK_S], tl.float32)
    for part in tl.static_range(3):
        low, high = stretch(part, begin, whole_from, whole_to, end)
        for start in tl.range(low, high, BLOCK_T):
            asked = start + tl.arange(0, BLOCK_T)
            t = tl.minimum(asked, rows - 1)
            q = load_tile(q_base, t, strides[0][2], WIDTH, BLOCK_D)
            log_total = tl.load(lse + pair * rows + t) * LOG2E
            x = tile_scores(k, q, factors, CAP, UPCAST) - log_total[None, :]
            if part != 1:
                first = tl.load(firsts + b * strides[2][0] + t)
                stop = tl.load(stops + b * strides[2][1] + t)
                seen = (s[:, None] >= first[None, :]) & (s[:, None] < stop[None, :])
                x = tl.where(seen & (asked < end)[None, :], x, -1e38)
            total += tl.sum(tl.exp2(x), 1)
    tl.store(sums + pair * keys + s, total, mask=s < keys)
