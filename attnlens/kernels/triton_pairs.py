"""Single weights of attention: one key for each of a list of rows, all heads."""

# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.kernels.triton_scores import LOG2E, Spans, batch_stride, load_tile, scores_of

PAIRS = 64
"""Pairs of one program."""


@torch.no_grad()
def weights_of_pairs(
    spans: Spans,
    lse: Float[Tensor, "batch head row"],
    prompt: Int[Tensor, " pair"],
    row: Int[Tensor, " pair"],
    key: Int[Tensor, " pair"],
) -> Float[Tensor, "head pair"]:
    """`A[b, h, t, s]` at pairs (b, t, s); 0 where t does not see s, or there is no such key."""
    _, heads, rows, keys = spans.shape
    count = len(prompt)
    query = spans.query
    found = torch.empty((heads, count), dtype=torch.float32, device=query.device)
    if not count:
        return found
    with torch.cuda.device_of(query):
        _pair_kernel[(triton.cdiv(count, PAIRS), heads)](
            query,
            spans.key,
            lse.contiguous(),
            spans.first,
            spans.stop,
            prompt.contiguous(),
            row.contiguous(),
            key.contiguous(),
            found,
            *query.stride()[:3],
            *spans.key.stride()[:3],
            batch_stride(spans.first),
            batch_stride(spans.stop),
            heads,
            spans.group,
            rows,
            keys,
            count,
            *spans.factors,
            BLOCK=PAIRS,
            **spans.widths,
        )
    return found


@triton.jit
def _pair_kernel(
    query,
    key,
    lse,
    firsts,
    stops,
    prompts,
    pair_rows,
    pair_keys,
    weights,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_group,
    k_key,
    first_batch,
    stop_batch,
    heads,
    group,
    rows,
    keys,
    count,
    scale,
    cap,
    CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h = tl.program_id(1).to(tl.int64)
    asked = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.minimum(asked, count - 1)
    b = tl.load(prompts + place).to(tl.int64)
    t = tl.load(pair_rows + place).to(tl.int64)
    s = tl.load(pair_keys + place).to(tl.int64)
    at = tl.minimum(tl.maximum(s, 0), keys - 1)
    first = tl.load(firsts + b * first_batch + t)
    stop = tl.load(stops + b * stop_batch + t)
    log_total = tl.load(lse + (b * heads + h) * rows + t) * LOG2E
    q = load_tile(query + h * q_head, b * q_batch + t * q_row, 1, WIDTH, BLOCK_D)
    k = load_tile(key + (h // group) * k_group, b * k_batch + at * k_key, 1, WIDTH, BLOCK_D)
    products = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    x = scores_of(products, scale, cap, CAP)
    weight = tl.exp2(tl.where((s >= first) & (s < stop), x - log_total, -1e38))
    tl.store(weights + h * count + asked, weight, mask=asked < count)
