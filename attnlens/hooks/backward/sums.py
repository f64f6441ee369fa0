"""Sums with constants: biases and positions keep their share of relevance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlens.hooks.backward.asked import Asked, depends, is_constant
from attnlens.hooks.backward.positive import positive_linear
from attnlens.hooks.backward.tally import Tally, on_gradient, scaled

_HIDDEN = -1e4  # no score bias is as low


def functions(*names: str) -> list[Callable[..., Any]]:
    """Functions of these names, wherever torch has them."""
    homes = (torch, Tensor, F, torch.linalg, torch.special)
    return [getattr(home, name) for home in homes for name in names if hasattr(home, name)]


_REVERSED = frozenset(functions("__rsub__", "rsub"))
_DIFFERENCES = _REVERSED.union(functions("sub", "subtract", "__sub__", "__isub__", "sub_"))
_FACTORS = ("mat1", "mat2", "batch1", "batch2")
_SPACE = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def added(asked: Asked) -> Any:
    """A constant that is added keeps its share."""
    found = asked.plain()
    if not depends(found):
        return found
    terms = [*asked.args[:2], *(asked.kwargs[n] for n in ("input", "other") if n in asked.kwargs)]
    for term, factor in zip(terms, _factors(asked), strict=True):
        if is_constant(term) and not _hides(term):
            signed = term if factor == 1 else factor * term
            on_gradient(found, asked.tally.constant(_kind(term), signed))
    return found


def _factors(asked: Asked) -> tuple[float, float]:
    """What a sum multiplies its two terms by."""
    alpha = asked.kwargs.get("alpha", 1.0)
    if asked.function in _REVERSED:
        return -alpha, 1.0
    return 1.0, -alpha if asked.function in _DIFFERENCES else alpha


def _hides(constant: Tensor | float) -> bool:
    """Whether a constant is a mask of scores, whose hidden places no gradient reaches."""
    if not isinstance(constant, Tensor) or constant.ndim < 4:
        return False
    return bool(((constant == 0) | (constant < _HIDDEN)).all())


def _kind(constant: Tensor | float) -> str:
    """Constants that differ from position to position are positions, others biases."""
    if not isinstance(constant, Tensor) or constant.ndim < 2:
        return "biases"
    return "positions" if constant.shape[-2] > 1 else "biases"


def linear(asked: Asked) -> Any:
    """`W x + b`: b keeps its share; by positive products alone under alpha = 1."""
    bias = asked.argument(2, "bias")
    if asked.rule.positive:
        return positive_linear(asked.argument(0, "input"), asked.argument(1, "weight"), bias)
    return _with_bias(asked, bias)


def addmm(asked: Asked) -> Any:
    """`beta b + alpha X Y`: b keeps its share; X and Y get half each where both depend."""
    bias = asked.argument(0, "input")
    beta, alpha = (asked.kwargs.get(name, 1) for name in ("beta", "alpha"))
    given = (asked.kwargs[name] for name in _FACTORS if name in asked.kwargs)
    one, other = [*asked.args[1:], *given]
    if asked.rule.positive and not depends(other):
        return positive_linear(alpha * one, other.mT, beta * bias)
    if depends(one) and depends(other):
        found = beta * bias + alpha * scaled(one @ other, 0.5)
    else:
        found = asked.plain()
    if depends(found) and not depends(bias):
        on_gradient(found, asked.tally.constant("biases", beta * bias))
    return found


def convolution(asked: Asked) -> Any:
    """A convolution whose bias, one a channel, keeps its share."""
    bias = asked.argument(2, "bias")
    return _with_bias(
        asked, None if bias is None else bias.reshape(-1, *[1] * _SPACE[asked.function])
    )


def _with_bias(asked: Asked, bias: Tensor | None) -> Any:
    found = asked.plain()
    if depends(found) and bias is not None and not depends(bias):
        on_gradient(found, asked.tally.constant("biases", bias))
    return found


def with_offset(tally: Tally, values: Tensor, constant: Tensor) -> Tensor:
    """A sum with a constant, which keeps its share."""
    found = values + constant
    on_gradient(found, tally.constant("biases", constant))
    return found


def joined(asked: Asked) -> Any:
    """Constants between what depends on the input (a class token) keep their share."""
    found = asked.plain()
    parts, axis = asked.argument(0, "tensors"), asked.argument(1, "dim") or 0
    if not depends(found):
        return found
    start = 0
    for part in parts:
        if not part.numel():  # a cache that is empty yet
            continue
        if is_constant(part):
            on_gradient(found, _within(asked.tally, part, axis, start))
        start += part.shape[axis]
    return found


def _within(tally: Tally, part: Tensor, axis: int, start: int) -> Callable[[Tensor], None]:
    kind = "positions" if part.ndim == 3 else "biases"  # a token; a learned sink
    seen, length = tally.constant(kind, part), part.shape[axis]
    return lambda gradient: seen(gradient.narrow(axis, start, length))


def written(asked: Asked) -> Any:
    """Constants that are written over a part of what depends on the input keep their share."""
    values, index, constant = asked.args
    asked.plain()
    if depends(values) and isinstance(constant, Tensor) and is_constant(constant):
        seen = asked.tally.constant("biases", constant)
        on_gradient(values, lambda gradient: seen(gradient[index]))


def chosen(asked: Asked) -> Any:
    """A constant that stands in places of what depends on the input keeps its share."""
    found = asked.plain()
    where, terms = asked.argument(0, "condition"), asked.args[1:3]
    for term, stands in zip(terms, (where, ~where), strict=False):
        if depends(found) and is_constant(term) and not _hides(term):
            seen = asked.tally.constant(_kind(term), term)
            on_gradient(found, _there(stands, seen))
    return found


def _there(stands: Tensor, seen: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    return lambda gradient: seen(gradient * stands)
