"""The alpha = 1 rule of linear maps (Bach et al. 2015): relevance follows positive products.

    R_i = sum_j  (x_i w_ij)+ / sum_k (x_k w_kj)+  R_j

Biases get nothing, and where no product of an output is positive its relevance is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _PositiveLinear(torch.autograd.Function):
    """`x W^T + b`; what comes down is `R / x`, so that value x gradient is the rule's relevance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.ndim == 2:
            found = torch.nn.functional.linear(x, weight, bias)
        else:
            found = x @ weight.mT if bias is None else x @ weight.mT + bias
        ctx.save_for_backward(x, weight, found)
        return found.clone()  # the model may change what it gets in place (OLMo)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, found = ctx.saved_tensors
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        total = x.clamp(min=0) @ up.mT + x.clamp(max=0) @ down.mT
        shares = torch.where(total > 0, found * gradients[0] / total, 0)
        return torch.where(x > 0, shares @ up, shares @ down), None, None


def positive_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` under the alpha = 1 rule; `weight` is `out in`, or `batch out in`."""
    found: Tensor = _PositiveLinear.apply(x, weight, bias)
    return found
