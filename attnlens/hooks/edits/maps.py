"""Edits of scores and weights: biases, and two kinds of knock-out, at chosen rows and keys."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.hooks.edits.base import HeadEdit
from attnlens.hooks.edits.changes import chosen_keys, with_pattern, with_scores
from attnlens.hooks.edits.given import check_number
from attnlens.hooks.positions import Positions
from attnlens.hooks.seam import Call, View
from attnlens.hooks.where import Where
from attnlens.kernels.rows import hidden_value


@dataclass(frozen=True)
class Bias(HeadEdit):
    """scores + value at the chosen keys, before the softmax: `ln 2` doubles a key's odds.

    On the first key this is ZeroTuning.
    """

    value: float
    keys: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("value", self.value)

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Add to the scores; what a row does not see stays hidden."""

        def biased(scores: Tensor, view: View) -> Tensor:
            keys, moved = chosen_keys(where, view), scores + self.value
            return moved if keys is None else torch.where(keys, moved, scores)

        return with_scores(site, call, where, biased)


@dataclass(frozen=True)
class Hide(HeadEdit):
    """scores = -inf at the chosen keys: the rest of the row grows to 1 again.

    A row that loses every key it sees attends to nothing, and its z is 0.
    """

    keys: Positions = field(default=None, kw_only=True)

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Hide the keys before the softmax."""

        def hidden(scores: Tensor, view: View) -> Tensor:
            keys = chosen_keys(where, view)
            away = scores.new_tensor(hidden_value(scores.dtype))
            return away.expand_as(scores) if keys is None else torch.where(keys, away, scores)

        return with_scores(site, call, where, hidden)


@dataclass(frozen=True)
class Drop(HeadEdit):
    """A = 0 at the chosen keys, after the softmax: the rest of the row stays as it is."""

    keys: Positions = field(default=None, kw_only=True)

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Take the weights away."""

        def dropped(pattern: Tensor, seen: Tensor | None, view: View) -> Tensor:
            keys = chosen_keys(where, view)
            return torch.zeros_like(pattern) if keys is None else pattern.masked_fill(keys, 0)

        return with_pattern(site, call, where, dropped)
