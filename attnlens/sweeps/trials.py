"""A trial: a name and the edits that act together in one run of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnlens.errors import InputError
from attnlens.hooks.edits import Edit
from attnlens.hooks.edits.saved import edit_to_dict
from attnlens.lens import Lens

EditsOf = Callable[[Lens, slice], Sequence[Edit]]
"""The edits for some prompts of the task, for edits made of other runs of those prompts."""


@dataclass(frozen=True)
class Trial:
    """One thing to try on every prompt: its edits act together.

    Attributes:
        name: what it is called, once in a sweep: `L3H5`.
        edits: the edits, in order; or a function that makes those of some prompts when their turn
            comes, so that what they are made of need not be held for all.
        about: what the edits are, in plain values; a store knows the trial again by it. Needed
            where edits are a function; else they describe themselves.
        start: nothing before this position is changed, in no prompt; a sweep need not run it again.
        first: name of the site that is changed first, where edits are dear to make and it is known
            without them.

    """

    name: str
    edits: Sequence[Edit] | EditsOf
    about: Mapping[str, Any] | None = None
    start: int = 0
    first: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.edits) and not self.edits:
            raise InputError(f"Trial {self.name!r} has no edit; the clean run is part of a sweep.")
        if callable(self.edits) and self.about is None:
            raise InputError(
                f"Trial {self.name!r} makes its edits later: say what they are, about=."
            )

    def of_prompts(self, lens: Lens, prompts: slice, width: int | None = None) -> tuple[Edit, ...]:
        """The edits for some prompts of the task, whose padding from `width` on is cut off."""
        if callable(self.edits):
            found = tuple(self.edits(lens, prompts))
        else:
            found = tuple(_cut(edit.of_prompts(prompts), width) for edit in self.edits)
        if any(edit.phase == "decode" for edit in found):
            raise InputError(
                f"Trial {self.name!r} edits the decode phase, and a task is graded without "
                "decoding: leave phase out."
            )
        return found

    def describe(self) -> Any:
        """What the edits are, as JSON can hold it."""
        if self.about is not None:
            return dict(self.about)
        assert not callable(self.edits)
        return [edit_to_dict(edit) for edit in self.edits]


_Kind = TypeVar("_Kind", bound=Edit)


def _cut(edit: _Kind, width: int | None) -> _Kind:
    """The edit for prompts of `width` positions, out of one for longer ones."""
    changed: dict[str, Any] = {}
    for part in fields(edit):
        value = getattr(edit, part.name)
        if part.metadata.get("by_prompt"):
            both = getattr(edit, "kind", None) == "pattern"
            changed[part.name] = {name: _narrow(t, width, both) for name, t in value.items()}
        elif part.name in ("queries", "keys") and isinstance(value, Tensor):
            changed[part.name] = value[..., :width] if value.dtype == torch.bool else value
    return replace(edit, **changed) if changed else edit


def _narrow(tensor: Tensor, width: int | None, both: bool) -> Tensor:
    """`batch heads position last` or `batch position last` cut; patterns at rows and keys."""
    cut = tensor[..., :width, :]
    return cut[..., :width] if both else cut
