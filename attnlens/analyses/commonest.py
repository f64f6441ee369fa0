"""The commonest token at each position of many texts, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

SLOTS = 64
"""Tokens counted at a position."""


class Commonest:
    """Counts of tokens by position, of at most `slots` different ones at each.

    Exact while no more than `slots` different tokens were met at a position. Beyond that a new
    token takes the place and count of the rarest: every token of more than one in `slots` texts is
    kept, and no count is too high by more than that (space saving; Metwally et al. 2005, Efficient
    computation of frequent and top-k elements in data streams). Of equally common ones the first
    met is taken.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._ids = torch.full((0, slots), -1, dtype=torch.int32)
        self._counts = torch.zeros(0, slots, dtype=torch.int32)

    def add(self, ids: Sequence[int]) -> None:
        """Count one text."""
        row, missing = torch.tensor(ids, dtype=torch.int32), len(ids) - len(self._ids)
        if missing > 0:
            self._ids = pad(self._ids, (0, 0, 0, missing), value=-1)
            self._counts = pad(self._counts, (0, 0, 0, missing))
        own, counts = self._ids[: len(row)], self._counts[: len(row)]
        same = own == row[:, None]
        place = torch.where(same.any(1), same.int().argmax(1), counts.argmin(1))
        positions = torch.arange(len(row))
        own[positions, place] = row
        counts[positions, place] += 1

    def ids(self) -> list[int]:
        """The commonest token at each position."""
        if not len(self._ids):
            return []
        return self._ids.gather(1, self._counts.argmax(1, keepdim=True))[:, 0].tolist()

    def tensors(self) -> dict[str, Tensor]:
        """What to save."""
        return {"ids": self._ids, "counts": self._counts}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was saved."""
        self._ids, self._counts = tensors["ids"], tensors["counts"]
