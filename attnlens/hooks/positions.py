"""Positions of a text: how people name them, and the mask that they stand for in a padded batch.

Positions count the real tokens of a text from 0; padding is never among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnlens.errors import InputError

PositionsOf = Callable[[Int[Tensor, "batch position"]], Bool[Tensor, "batch position"]]
Positions = int | slice | Sequence[int] | Tensor | PositionsOf | None
"""One position (`-1` the last), a slice, several, a mask `[position]` or `[batch, position]` over
the padded input, or a function of the token ids that returns such a mask; None for all."""


def held_positions(positions: Any) -> Positions:
    """Positions in one form, to be read more than once: numbers are ints, and several a tuple.

    Raises:
        InputError: they are no positions.

    """
    given: Positions = positions
    if given is None or callable(given):
        return given
    try:
        if isinstance(positions, slice):
            ends = (positions.start, positions.stop, positions.step)
            held = slice(*(None if end is None else _number(end) for end in ends))
            held.indices(0)  # refuses a step of 0
            return held
        if isinstance(positions, Tensor | np.ndarray):
            tensor = torch.as_tensor(positions)
            if tensor.dtype == torch.bool:
                return tensor
            positions = tensor.tolist()
        if isinstance(positions, Iterable) and not isinstance(positions, str):
            return tuple(map(_number, positions))
        return _number(positions)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{positions!r} names no positions: give a number, a slice, numbers, a mask (a boolean "
            "tensor), or a function of the token ids."
        ) from error


def _number(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a truth value counts nothing")
    return index(value)


def resolve(
    positions: Positions,
    real: Bool[Tensor, "batch position"],
    ids: Int[Tensor, "batch position"] | None,
    growing: bool = False,
) -> Bool[Tensor, "batch position"]:
    """The mask that positions stand for, in a padded batch; `growing` texts may yet have them."""
    positions = held_positions(positions)
    if positions is None:
        return real
    if isinstance(positions, Tensor):
        return _widened(positions, real, growing) & real
    if callable(positions):
        return _asked_of_ids(positions, real, ids).to(real.device) & real
    counts: list[int] = real.sum(-1).tolist()
    mask = torch.zeros_like(real)
    for prompt, count in enumerate(counts):
        numbers = _numbers(positions, count, prompt, growing)
        own = real[prompt].nonzero()[:, 0]
        mask[prompt, own[torch.tensor(numbers, dtype=torch.long, device=own.device)]] = True
    return mask


def _numbers(
    positions: int | slice | Sequence[int], count: int, prompt: int, growing: bool
) -> list[int]:
    """Positions of one prompt of `count` real tokens, from 0."""
    if isinstance(positions, slice):
        return list(range(count))[positions]
    asked = (positions,) if isinstance(positions, int) else positions
    outside = [p for p in asked if not -count <= p < count]
    if outside and not growing:
        raise InputError(
            f"Position {outside[0]} is outside prompt {prompt}, which has {count} tokens: choose "
            f"{-count} to {count - 1}, or a slice, which takes what is there."
        )
    return [p % count for p in asked if -count <= p < count]


def _widened(mask: Tensor, real: Tensor, growing: bool) -> Tensor:
    """A mask over the input as wide as the text is by now; what was not asked is not chosen."""
    wide = mask.to(real.device)
    wide = wide[None] if wide.ndim == 1 else wide
    if (
        wide.ndim != 2
        or wide.shape[0] not in (1, real.shape[0])
        or not (wide.shape[1] == real.shape[1] or growing)
    ):
        raise InputError(
            f"A mask of positions has shape {list(mask.shape)}, and the input is "
            f"{list(real.shape)}: give [position] or [batch, position] of the padded input (beams "
            "and several answers a prompt multiply its batch)."
        )
    missing = max(real.shape[1] - wide.shape[1], 0)
    wide = torch.nn.functional.pad(wide, (0, missing))[:, : real.shape[1]]
    return wide.expand(real.shape[0], -1)


def _asked_of_ids(function: PositionsOf, real: Tensor, ids: Tensor | None) -> Tensor:
    if ids is None or ids.shape[1] != real.shape[1]:
        raise InputError(
            "Positions are given by a function of the token ids, and the ids of this pass are not "
            "known (embeddings or images instead of ids, or a cache that was filled before the "
            "edit began)."
        )
    mask = function(ids)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
        raise InputError(
            f"The function of positions must return a boolean tensor of the shape of the ids, "
            f"{list(ids.shape)}."
        )
    return mask
