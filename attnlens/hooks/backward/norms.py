"""Norms: their statistics are constants, the mean that they take off is linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnlens.hooks.backward.asked import Asked
from attnlens.hooks.backward.sums import with_offset
from attnlens.hooks.backward.tally import on_gradient


class _LayerNorm(torch.autograd.Function):
    """LayerNorm whose standard deviation is a constant; the mean that it takes off is linear."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        y, _, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.axes = tuple(range(-len(shape), 0))
        ctx.save_for_backward(inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        inverse, weight = ctx.saved_tensors
        gradient = gradients[0] if weight is None else gradients[0] * weight
        gradient = gradient - gradient.mean(ctx.axes, keepdim=True)
        return (gradient * inverse).to(gradients[0].dtype), None, None, None, None


def layer_norm(asked: Asked) -> Any:
    """`(x - mean) / sigma w + b` with sigma as a constant."""
    x, shape = asked.argument(0, "input"), asked.argument(1, "normalized_shape")
    weight, bias = asked.argument(2, "weight"), asked.argument(3, "bias")
    eps = asked.argument(4, "eps")
    found = _LayerNorm.apply(x, tuple(shape), weight, bias, 1e-5 if eps is None else eps)
    if bias is not None:
        on_gradient(found, asked.tally.constant("biases", bias))
    return found


def rms_norm(asked: Asked) -> Any:
    """`x / rms w` with the rms as a constant."""
    x, shape = asked.argument(0, "input"), asked.argument(1, "normalized_shape")
    weight, eps = asked.argument(2, "weight"), asked.argument(3, "eps")
    wide = torch.promote_types(x.dtype, torch.float32)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    axes = tuple(range(-len(shape), 0))
    inverse = (x.detach().to(wide).pow(2).mean(axes, keepdim=True) + eps).rsqrt()
    normed = x * inverse if weight is None else x * inverse * weight
    return normed.to(x.dtype)


def group_norm(asked: Asked) -> Any:
    """Groups of channels less their mean, over a standard deviation that is a constant."""
    names = ("input", "num_groups", "weight", "bias", "eps")
    x, groups, weight, bias, eps = (asked.argument(p, n) for p, n in enumerate(names))
    split = x.reshape(x.shape[0], groups, -1)
    centred = split - split.mean(-1, keepdim=True)
    spread = split.detach().var(-1, correction=0, keepdim=True) + (1e-5 if eps is None else eps)
    normed = (centred * spread.rsqrt()).reshape(x.shape)
    channels = (-1, *[1] * (x.ndim - 2))
    normed = normed if weight is None else normed * weight.reshape(channels)
    return normed if bias is None else with_offset(asked.tally, normed, bias.reshape(channels))


def batch_norm(asked: Asked) -> Any:
    """Fixed statistics, those of evaluation: a scale and an offset a channel."""
    names = ("input", "running_mean", "running_var", "weight", "bias")
    x, mean, variance, weight, bias = (asked.argument(p, n) for p, n in enumerate(names))
    eps = asked.argument(7, "eps")
    inverse = (variance + (1e-5 if eps is None else eps)).rsqrt()
    scale = inverse if weight is None else inverse * weight
    offset = -mean * scale if bias is None else bias - mean * scale
    channels = (-1, *[1] * (x.ndim - 2))
    return with_offset(asked.tally, x * scale.reshape(channels), offset.reshape(channels))


def normalize(asked: Asked) -> Any:
    """A vector over its length: the length is a statistic."""
    x = asked.argument(0, "input")
    found = asked.constant()
    inverse = torch.where(x == 0, 0, found / x).detach().nan_to_num(0, 0, 0)
    return x * inverse
