"""Edits as JSON and back: names, numbers, and tensors exactly (base64 of their bytes).

Nothing is run on loading: a function of positions is written by its name, and who loads the file
gives the functions that the names stand for.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlens.errors import InputError
from attnlens.hooks.edits.base import Edit
from attnlens.hooks.edits.heads import Identity, Mean, Scale, Uniform, Zero
from attnlens.hooks.edits.maps import Bias, Drop, Hide
from attnlens.hooks.edits.patches import Patch, PatchStream, Steer, SteerStream
from attnlens.hooks.edits.text import spec_text
from attnlens.hooks.positions import PositionsOf

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
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip

Functions = Mapping[str, PositionsOf]


def edits_to_json(edits: Sequence[Edit]) -> str:
    """The edits in their order as JSON text.

    Raises:
        InputError: an edit of a class that is not attnlens' own, or a function without a name.

    """
    return json.dumps([edit_to_dict(edit) for edit in edits])


def edits_from_json(text: str, functions: Functions | None = None) -> tuple[Edit, ...]:
    """The edits of a JSON text; `functions` are those of positions, by the names in the text.

    Raises:
        InputError: the text is no JSON of edits, is damaged, or names a function that was not
            given.

    """
    try:
        read = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"This is no JSON of edits: {error}.") from error
    if not isinstance(read, list):
        raise InputError("A JSON of edits is a list of objects, as edits_to_json writes it.")
    return tuple(edit_from_dict(part, functions) for part in read)


def edit_to_dict(edit: Edit) -> dict[str, Any]:
    """One edit as what JSON can hold."""
    name = type(edit).__name__
    if _KINDS.get(name) is not type(edit):
        raise InputError(f"{name} is no edit of attnlens, so it cannot be written as JSON.")
    found: dict[str, Any] = {"edit": name}
    for field in fields(edit):
        value = getattr(edit, field.name)
        if value is not None and (field.name, value) != ("phase", "all"):
            found[field.name] = _FORMS[field.name][0](value)
    return found


def edit_from_dict(read: Any, functions: Functions | None = None) -> Edit:
    """The edit that `edit_to_dict` wrote.

    Raises:
        InputError: it is damaged, or names a function that was not given.

    """
    if not isinstance(read, dict):
        raise InputError(f"An edit in JSON is an object, as edit_to_dict writes it, not {read!r}.")
    given: dict[str, Any] = dict(read)
    name = given.pop("edit", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"There is no edit {name!r} in attnlens; there is {', '.join(_KINDS)}.")
    unknown = set(given) - {field.name for field in fields(kind)}
    if unknown:
        raise InputError(f"{kind.__name__} has no {', '.join(sorted(unknown))}.")
    try:
        return kind(**{n: _FORMS[n][1](value, functions or {}) for n, value in given.items()})
    except InputError:
        raise
    # What a damaged file can hold where it is read as numbers, names and tensors.
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"{kind.__name__} in the JSON is damaged: {error}.") from error


def _positions_to(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _tensor_to(value)
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if callable(value):
        name = getattr(value, "__name__", "<lambda>")
        if name == "<lambda>":
            raise InputError(
                "Positions are a function without a name, which JSON cannot hold. Define it with "
                "def, or give positions or a mask."
            )
        return {"function": name}
    return value


def _positions_from(value: Any, functions: Functions) -> Any:
    if isinstance(value, list):
        return tuple(index(place) for place in value)
    if not isinstance(value, dict):
        return index(value)
    if "slice" in value:
        ends = [None if end is None else index(end) for end in value["slice"]]
        if len(ends) != 3:
            raise ValueError("a slice has a start, a stop and a step")
        return slice(*ends)
    if "function" not in value:
        return _tensor_from(value)
    name: Any = value["function"]
    if name not in functions:
        raise InputError(
            f"The edit's positions are the function {name!r}: give it as functions={{{name!r}: "
            "...}."
        )
    return functions[name]


def _tensor_to(tensor: Tensor) -> dict[str, Any]:
    plain = tensor.detach().cpu()
    dtype = str(plain.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InputError(
            f"JSON of edits holds no tensors of {dtype}; there is {', '.join(_DTYPES)}."
        )
    raw = plain.flatten().view(torch.uint8).numpy().tobytes()
    return {"dtype": dtype, "shape": list(plain.shape), "data": base64.b64encode(raw).decode()}


def _tensor_from(value: Any) -> Tensor:
    shape = [index(size) for size in value["shape"]]
    dtype = _DTYPES[value["dtype"]]
    raw = base64.b64decode(value["data"], validate=True)
    if min(shape, default=0) < 0 or len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} and {dtype} has not {len(raw)} bytes")
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy()).view(dtype).view(shape)


def _tensors_from(value: Any, _: Functions) -> dict[str, Tensor]:
    return {name: _tensor_from(tensor) for name, tensor in value.items()}


def _text(value: Any, _: Functions | None = None) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} stands where a name belongs")
    return value


def _number(value: Any, _: Functions | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} stands where a number belongs")
    return value


def _tensors_to(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: _tensor_to(tensor) for name, tensor in tensors.items()}


_Form = tuple[Callable[[Any], Any], Callable[[Any, Functions], Any]]
_TENSORS: _Form = _tensors_to, _tensors_from
_POSITIONS: _Form = _positions_to, _positions_from
_FORMS: dict[str, _Form] = {
    "heads": (spec_text, _text),
    "layers": (spec_text, _text),
    "phase": (_text, _text),
    "kind": (_text, _text),
    "stream": (_text, _text),
    "factor": (float, _number),
    "share": (float, _number),
    "value": (float, _number),
    "means": _TENSORS,
    "values": _TENSORS,
    "vectors": _TENSORS,
    "queries": _POSITIONS,
    "keys": _POSITIONS,
}
"""How each field is written, and how it is read."""
