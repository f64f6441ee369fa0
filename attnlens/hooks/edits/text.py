"""Edits as a reader would name them: `Zero of L3H5 at queries 0:5 in decode`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnlens.anatomy import HeadSpec
from attnlens.hooks.edits.given import held_heads
from attnlens.hooks.positions import Positions


def describe(edit: object) -> str:
    """The edit's name with its kind and numbers: `Scale 0.5`, `Steer q 2`."""
    own = [getattr(edit, name, None) for name in ("kind", "factor", "share", "value")]
    words = [
        str(word) if isinstance(word, str) else f"{word:g}" for word in own if word is not None
    ]
    return " ".join([type(edit).__name__, *words])


def spec_text(spec: HeadSpec | int) -> str:
    """A specification of heads or layers as its text: `L3H5,L4H0`."""
    held = held_heads(spec)
    return ",".join(map(str, held)) if isinstance(held, tuple) else str(held)


def where_text(edit: object) -> str:
    """Positions and phase of an edit, as they follow its name; empty where it acts everywhere."""
    text = ""
    for name in ("queries", "keys"):
        positions = getattr(edit, name, None)
        if positions is not None:
            text += f" at {name} {positions_text(positions)}"
    phase = getattr(edit, "phase", "all")
    return text if phase == "all" else f"{text} in {phase}"


def positions_text(positions: Positions) -> str:
    """Positions as people write them."""
    if isinstance(positions, slice):
        parts = [positions.start, positions.stop, positions.step]
        shown = ["" if part is None else str(part) for part in parts]
        return ":".join(shown if positions.step is not None else shown[:2])
    if isinstance(positions, Tensor):
        return f"of a mask {list(positions.shape)}"
    if callable(positions):
        return f"of {getattr(positions, '__name__', 'a function')}"
    return str(list(positions) if isinstance(positions, Sequence) else positions)
