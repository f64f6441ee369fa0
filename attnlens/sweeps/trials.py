"""A trial: a name and the edits that act together in one run of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    """

    name: str
    edits: Sequence[Edit] | EditsOf
    about: Mapping[str, Any] | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if not callable(self.edits) and not self.edits:
            raise InputError(f"Trial {self.name!r} has no edit; the clean run is part of a sweep.")
        if callable(self.edits) and self.about is None:
            raise InputError(
                f"Trial {self.name!r} makes its edits later: say what they are, about=."
            )

    def of_prompts(self, lens: Lens, prompts: slice) -> tuple[Edit, ...]:
        """The edits for some prompts of the task."""
        if callable(self.edits):
            found = tuple(self.edits(lens, prompts))
        else:
            found = tuple(edit.of_prompts(prompts) for edit in self.edits)
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
