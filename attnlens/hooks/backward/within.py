"""Tensors within what modules are given and return: lists, mappings, model outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors within a value, in order: lists, mappings, model outputs."""
    found: list[Tensor] = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)
    return found


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value whose floating-point tensors are changed, in lists, tuples and mappings too."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        changed = {name: mapped(part, change) for name, part in value.items()}
        return type(value)(**changed) if isinstance(value, ModelOutput) else changed
    if isinstance(value, (list, tuple)):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
