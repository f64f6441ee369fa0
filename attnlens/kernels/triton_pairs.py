"""Single weights of attention: one key for each of a list of rows, all heads."""

# Types of Triton's language: see triton_scores.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.kernels.triton_scores import LOG2E, Spans, kernel, load_tile, scores_of

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
    heads, count = spans.shape[1], len(prompt)
    found = torch.empty((heads, count), dtype=torch.float32, device=lse.device)
    if not count:
        return found
    with torch.cuda.device_of(spans.query):
        _pair_kernel[(triton.cdiv(count, PAIRS), heads)](
            spans.query,
            spans.key,
            spans.first,
            spans.stop,
            lse.contiguous(),
            prompt.contiguous(),
            row.contiguous(),
            key.contiguous(),
            found,
            count,
            spans.strides,
            spans.sizes,
            spans.factors,
            BLOCK=PAIRS,
            **spans.widths,
        )
    return found


@kernel
def _pair_kernel(
    query,
    key,
    firsts,
    stops,
    lse,
    prompts,
    pair_rows,
    pair_keys,
    weights,
    count,
    strides,
    sizes,
    factors,
    CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    heads, group, rows, keys = sizes
    h = tl.program_id(1).to(tl.int64)
    asked = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.minimum(asked, count - 1)
    b = tl.load(prompts + place).to(tl.int64)
    t = tl.load(pair_rows + place).to(tl.int64)
    s = tl.load(pair_keys + place).to(tl.int64)
    at = tl.minimum(tl.maximum(s, 0), keys - 1)
    first = tl.load(firsts + b * strides[2][0] + t)
    stop = tl.load(stops + b * strides[2][1] + t)
    log_total = tl.load(lse + (b * heads + h) * rows + t) * LOG2E
    q_base = query + h * strides[0][1]
    k_base = key + (h // group) * strides[1][1]
    q = load_tile(q_base, b * strides[0][0] + t * strides[0][2], 1, WIDTH, BLOCK_D)
    k = load_tile(k_base, b * strides[1][0] + at * strides[1][2], 1, WIDTH, BLOCK_D)
    x = scores_of(tl.sum(q.to(tl.float32) * k.to(tl.float32), 1), factors, CAP) - log_total
    weight = tl.exp2(tl.where((s >= first) & (s < stop), x, -1e38))
    tl.store(weights + h * count + asked, weight, mask=asked < count)
