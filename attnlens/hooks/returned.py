"""What a module returned: a tensor, or tensors inside tuples and mappings, the stream first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a return value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def first_tensor(value: Any) -> Tensor:
    """The stream in a return value."""
    return tensors_of(value)[0]


def put(value: Any, tensors: Sequence[Tensor | None]) -> Any:
    """The return value with other tensors in the places of its own."""
    return _filled(value, iter(tensors))


def _filled(value: Any, tensors: Iterator[Tensor | None]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return type(value)(**{name: _filled(part, tensors) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)([_filled(part, tensors) for part in value])
    return value


def widened(
    value: Any, times: int, wide: dict[int, Tensor] | None = None, unread: bool = False
) -> list[Tensor]:
    """The tensors of a value for `times` copies; those with one row for all prompts stay.

    `wide` holds what blocks pass along unchanged (a position bias), so that it is copied once. Of a
    stream that is `unread` only the shape matters: it is not copied.
    """
    first, *others = tensors_of(value)
    wide = {} if wide is None else wide
    for tensor in others:
        if id(tensor) not in wide:
            repeats = tensor.shape and tensor.shape[0] == first.shape[0] != 1 and times > 1
            wide[id(tensor)] = _repeated(tensor, times) if repeats else tensor
    stream = (
        first[:1].expand(times * first.shape[0], *first.shape[1:])
        if unread
        else _repeated(first, times)
    )
    return [stream, *(wide[id(tensor)] for tensor in others)]


def without_graph(tensor: Tensor) -> Tensor:
    """The tensor without its graph; the very tensor where it has none."""
    return tensor.detach() if tensor.requires_grad else tensor


def _repeated(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order; padded rows may be NaN."""
    if a.numel() != b.numel() or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.allclose(a.flatten(), b.flatten(), rtol=0, atol=0, equal_nan=True)
