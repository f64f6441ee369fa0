"""Edits as a reader would name them: `Zero of L3H5 at queries 0:5 in decode`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnlens.anatomy import Head, HeadSpec
from attnlens.hooks.where import Positions


def describe(edit: object) -> str:
    """The edit's name with its kind and numbers: `Scale 0.5`, `Steer q 2`."""
    own = [getattr(edit, name, None) for name in ("kind", "factor", "share", "value")]
    words = [
        str(word) if isinstance(word, str) else f"{word:g}" for word in own if word is not None
    ]
    return " ".join([type(edit).__name__, *words])


def spec_text(spec: HeadSpec) -> str:
    """A specification of heads as its text: `L3H5,L4H0`."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Head):
        return str(spec)
    parts: list[Any] = list(spec)
    if len(parts) == 2 and all(isinstance(part, int) for part in parts):
        return f"L{parts[0]}H{parts[1]}"
    return ",".join(spec_text(part) for part in parts)


def layers_text(spec: HeadSpec | int) -> str:
    """A specification of layers as its text: `L3,L4`."""
    if isinstance(spec, int):
        return f"L{spec}"
    if isinstance(spec, str | Head):
        return str(spec)
    parts: tuple[Any, ...] = tuple(spec)
    if all(isinstance(part, int) for part in parts):
        return ",".join(f"L{part}" for part in parts)
    return spec_text(parts)


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
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return f"of a mask {list(positions.shape)}"
    if callable(positions) and not isinstance(positions, Tensor):
        return f"of {getattr(positions, '__name__', 'a function')}"
    if isinstance(positions, Tensor):
        return str(positions.tolist())
    return str(list(positions) if isinstance(positions, Sequence) else positions)
