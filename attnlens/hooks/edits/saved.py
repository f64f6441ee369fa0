"""Edits as JSON and back: names, numbers, and tensors exactly (base64 of their bytes).

Nothing is run on loading: a function of positions is written by its name, and who loads the file
gives the functions that the names stand for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.hooks.edits.base import Edit, spec_text
from attnlens.hooks.edits.heads import Identity, Mean, Scale, Uniform, Zero
from attnlens.hooks.edits.maps import Bias, Drop, Hide
from attnlens.hooks.edits.patches import Patch, PatchStream, Steer, SteerStream
from attnlens.hooks.where import PositionsOf

_KINDS: dict[str, type[Edit]] = {
    kind.__name__: kind
    for kind in (
        Zero, Scale, Mean, Uniform, Identity, Bias, Hide, Drop, Patch, Steer, PatchStream,
        SteerStream,
    )
}  # fmt: skip

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool,
    )
}  # fmt: skip


def edits_to_json(edits: Sequence[Edit]) -> str:
    """The edits in their order as JSON text.

    Raises:
        InputError: an edit of a class that is not attnlens' own, or a function without a name.

    """
    return json.dumps([edit_to_dict(edit) for edit in edits])


def edits_from_json(
    text: str, functions: Mapping[str, PositionsOf] | None = None
) -> tuple[Edit, ...]:
    """The edits of a JSON text; `functions` are those of positions, by the names in the text.

    Raises:
        InputError: the text is no JSON of edits, or names a function that was not given.

    """
    try:
        read = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"This is no JSON of edits: {error}.") from error
    if not isinstance(read, list) or not all(isinstance(part, dict) for part in read):
        raise InputError("A JSON of edits is a list of objects, as edits_to_json writes it.")
    return tuple(_edit(part, functions or {}) for part in read)


def edit_to_dict(edit: Edit) -> dict[str, Any]:
    """One edit as what JSON can hold."""
    name = type(edit).__name__
    if _KINDS.get(name) is not type(edit):
        raise InputError(f"{name} is no edit of attnlens, so it cannot be written as JSON.")
    found: dict[str, Any] = {"edit": name}
    for field in fields(edit):
        value = getattr(edit, field.name)
        if field.name in ("heads", "layers"):
            value = spec_text(value)
        if value is not None and not (field.name == "phase" and value == "all"):
            found[field.name] = _plain(value, f"{name}.{field.name}")
    return found


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, Mapping):
        return {str(name): _plain(part, what) for name, part in value.items()}
    if isinstance(value, str | int | float | Head):
        return str(value) if isinstance(value, Head) else value
    if callable(value):
        name = getattr(value, "__name__", "<lambda>")
        if name == "<lambda>":
            raise InputError(
                f"{what} is a function without a name, which JSON cannot hold. Define it with "
                "def, or give positions or a mask."
            )
        return {"function": name}
    return [_plain(part, what) for part in value]


def _tensor(tensor: Tensor) -> dict[str, Any]:
    plain = tensor.detach().cpu().contiguous()
    return {
        "dtype": str(plain.dtype).removeprefix("torch."),
        "shape": list(plain.shape),
        "data": base64.b64encode(plain.flatten().view(torch.uint8).numpy().tobytes()).decode(),
    }


def _edit(read: Mapping[str, Any], functions: Mapping[str, PositionsOf]) -> Edit:
    kind = _KINDS.get(read.get("edit", ""))
    if kind is None:
        raise InputError(
            f"There is no edit {read.get('edit')!r} in attnlens; there is {', '.join(_KINDS)}."
        )
    given = {name: _value(value, functions) for name, value in read.items() if name != "edit"}
    known = {field.name for field in fields(kind)}
    if not set(given) <= known:
        raise InputError(f"{kind.__name__} has no {', '.join(sorted(set(given) - known))}.")
    try:
        return kind(**given)
    except TypeError as error:
        raise InputError(f"{kind.__name__} in the JSON is incomplete: {error}.") from error


def _value(value: Any, functions: Mapping[str, PositionsOf]) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {"slice"}:
        return slice(*value["slice"])
    if set(value) == {"function"}:
        if value["function"] not in functions:
            raise InputError(
                f"The edit's positions are the function {value['function']!r}: give it as "
                f"functions={{{value['function']!r}: ...}}."
            )
        return functions[value["function"]]
    if set(value) == {"dtype", "shape", "data"}:
        return _read_tensor(value)
    return {name: _value(part, functions) for name, part in value.items()}


def _read_tensor(value: Mapping[str, Any]) -> Tensor:
    try:
        dtype = _DTYPES[value["dtype"]]
        data = np.frombuffer(base64.b64decode(value["data"], validate=True), dtype=np.uint8).copy()
        return torch.from_numpy(data).view(dtype).view(value["shape"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"A tensor in the JSON of edits is damaged: {error}.") from error
