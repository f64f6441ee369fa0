"""Functions of one number, and statistics: what stands still in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attnlens.hooks.backward.asked import Asked, Function, depends

_NEAR_ZERO = 1e-4  # some activations miss 0 at 0 by their epsilon; gates are far from it


class _Ratio(torch.autograd.Function):
    """`f(x)`, in whose gradient `f(x) / x` stands for the slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function, at_zero: float) -> Tensor:
        y = function(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        above = y if wide == x.dtype else function(x.to(wide))
        ratio = above / x.to(wide)
        # At 0 it is 0 / 0, and infinite where a function misses 0 by its epsilon.
        ratio = ratio.nan_to_num_(at_zero, at_zero, at_zero).to(x.dtype)
        ctx.save_for_backward(ratio)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return gradients[0] * ratio, None, None


def _kept(tensor: Tensor) -> Tensor:
    return tensor


def ratio(function: Function, x: Tensor) -> Tensor:
    """`f(x)` of each number with `f(x) / x` as a constant; a constant where `f(0)` is not 0."""
    with torch.enable_grad(), saved_tensors_hooks(_kept, _kept):  # not those of a checkpoint
        zero = torch.zeros(1, dtype=torch.float32, device=x.device, requires_grad=True)
        at_zero = function(zero)
        if not float(at_zero.detach().abs().max()) <= _NEAR_ZERO:
            return function(x.detach()).detach()
        (slope,) = torch.autograd.grad(at_zero.mean(), zero)
    return _Ratio.apply(x, function, float(slope))


def elementwise(asked: Asked) -> Any:
    """A function of each number; a constant where the input is no such number (an exponent)."""
    x = asked.argument(0, "input")
    if not depends(x):
        return asked.constant()
    rest = {name: value for name, value in asked.kwargs.items() if name not in ("input", "inplace")}
    return ratio(lambda value: asked.function(value, *asked.args[1:], **rest), x)


def in_place(asked: Asked) -> Any:
    """A function of each number that writes over it."""
    x = asked.args[0]
    changed = ratio(lambda v: asked.function(v.clone(), *asked.args[1:], **asked.kwargs), x)
    return x.copy_(changed)


def statistic(asked: Asked) -> Any:
    """What is made of many numbers to divide or gate by: a constant."""
    return asked.constant()
