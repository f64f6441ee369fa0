"""Whether two scores order the same things alike."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor


def spearman(
    one: Float[Tensor, "prompt position"],
    other: Float[Tensor, "prompt position"],
    counted: Bool[Tensor, "prompt position"],
) -> Float[Tensor, " prompt"]:
    """Correlation of ranks over the counted positions of each prompt; ties share their mean rank.

    NaN where fewer than two positions count, or where all of them tie in one of the scores.
    Spearman 1904.
    """
    return torch.tensor(
        [
            _correlation(_ranks(a[own]), _ranks(b[own]))
            for a, b, own in zip(one, other, counted, strict=True)
        ],
        dtype=torch.float64,
    )


def _ranks(values: Float[Tensor, " counted"]) -> Float[Tensor, " counted"]:
    ranks = torch.as_tensor(rankdata(values.double().cpu().numpy()), dtype=torch.float64)
    return ranks - ranks.mean()


def _correlation(one: Float[Tensor, " counted"], other: Float[Tensor, " counted"]) -> float:
    size = one.norm() * other.norm()
    return float(one @ other / size) if len(one) > 1 and size > 0 else float("nan")
