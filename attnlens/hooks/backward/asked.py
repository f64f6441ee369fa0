"""One call of a torch function while relevance rules hold, and which rules they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlens.hooks.backward.tally import Tally

Function = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """Which rules a backward pass follows."""

    name: str
    through_patterns: bool
    """Whether relevance flows through softmaxes, to queries and keys, or they are constants."""
    positive: bool = False
    """Whether linear maps hand down by their positive products alone (alpha = 1), not by all."""


ATTNLRP = Rule("attnlrp", through_patterns=True)
CP_LRP = Rule("cp_lrp", through_patterns=False)
ALPHA_ONE = Rule("alpha_one", through_patterns=True, positive=True)


@dataclass(frozen=True)
class Asked:
    """One call of a torch function under a rule."""

    rule: Rule
    tally: Tally
    function: Function
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def plain(self) -> Any:
        """What the function returns."""
        return self.function(*self.args, **self.kwargs)

    def constant(self) -> Any:
        """What the function returns, cut off from the input."""
        with torch.no_grad():
            return self.plain()

    def argument(self, place: int, name: str) -> Any:
        """An argument by its place or name; None where it was not given."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name)


def depends(value: Any) -> bool:
    """Whether a value depends on the input of the model."""
    return isinstance(value, Tensor) and value.requires_grad


def is_constant(value: Any) -> bool:
    """Whether a value is a number, or numbers, that no input changes."""
    if isinstance(value, Tensor):
        return not value.requires_grad and (value.is_floating_point() or value.is_complex())
    return isinstance(value, (int, float)) and not isinstance(value, bool)
