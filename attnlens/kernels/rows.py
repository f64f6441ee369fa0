"""Blocks of attention rows from q and k: the arithmetic, with nothing of a model in it.

The order of operations is the one that every eager attention in transformers follows: products,
scale, soft cap, position bias, mask, softmax (with learned sinks as one more column, dropped).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def hidden_value(dtype: torch.dtype) -> float:
    """A finite score whose softmax weight is exactly 0; `0 * score` is 0, where -inf gives NaN."""
    return torch.finfo(dtype).min / 4


def scaled_products(
    query: Float[Tensor, "batch head row d_qk"],
    key: Float[Tensor, "batch group key d_qk"],
    scaling: float,
) -> Float[Tensor, "batch head row key"]:
    """q k^T times the scale; head h reads group h // (heads / groups), keys are not repeated."""
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    exact = math.frexp(scaling)[0] == 0.5  # a power of two scales the queries without rounding
    folded = (query * scaling if exact else query).reshape(
        batch * groups, heads // groups * rows, width
    )
    transposed = key.reshape(batch * groups, keys, width).transpose(1, 2)
    products = torch.bmm(folded, transposed)
    return (products if exact else products.mul_(scaling)).view(batch, heads, rows, keys)


def soft_cap(scores: Float[Tensor, "*shape"], cap: float) -> Float[Tensor, "*shape"]:
    """cap * tanh(scores / cap) (Gemma 2), in place unless a gradient needs what lies between."""
    if scores.requires_grad:
        return torch.tanh(scores / cap) * cap
    return scores.div_(cap).tanh_().mul_(cap)


def hide(
    scores: Float[Tensor, "batch head row key"], visible: Bool[Tensor, "#batch #head #row #key"]
) -> Float[Tensor, "batch head row key"]:
    """Give the keys that a row does not see a weight of exactly 0, in place."""
    return scores.masked_fill_(~visible, hidden_value(scores.dtype))


def hide_future(
    scores: Float[Tensor, "batch head row key"], offset: int
) -> Float[Tensor, "batch head row key"]:
    """Hide key s from row t where s > t + offset, in place, touching only the columns in need."""
    rows, keys = scores.shape[-2:]
    first = max(offset + 1, 0)
    if first < keys:
        tail = scores[..., first:]
        future = torch.ones(rows, keys - first, dtype=torch.bool, device=scores.device)
        tail.masked_fill_(future.triu(offset - first + 1), hidden_value(scores.dtype))
    return scores


def softmax_rows(
    scores: Float[Tensor, "batch head row key"],
    sinks: Float[Tensor, " head"] | None,
    dtype: torch.dtype | None,
) -> Float[Tensor, "batch head row key"]:
    """Softmax over the keys, in `dtype` where the model upcasts; result in the dtype of the scores.

    With learned sinks a row is the softmax over S + 1 columns without the last, and sums to less
    than 1.
    """
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
        scores = scores - scores.amax(-1, keepdim=True)
        return torch.softmax(scores, dim=-1, dtype=dtype)[..., :-1].to(scores.dtype)
    return torch.softmax(scores, dim=-1, dtype=dtype).to(scores.dtype)
