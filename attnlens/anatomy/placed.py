"""Where weights are when accelerate has placed them: on several devices, or away until called.

A module with an `_hf_hook` may hold its weights on the meta device and fetch them, from memory or
disk, for the length of each call; names, shapes and types stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def laid_out(model: nn.Module) -> bool:
    """Whether the model is over several devices, or some of its weights are away."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    several = len(set(map(str, places.values()))) > 1
    return several or any(weight.is_meta for weight in model.parameters())


def input_device(model: nn.Module) -> torch.device:
    """Where inputs go: where the module with the first weights computes."""
    for module in model.modules():
        weight = next(module.parameters(recurse=False), None)
        if weight is not None:
            places = (getattr(hook, "execution_device", None) for hook in _hooks(module))
            found = next((place for place in places if place is not None), None)
            return weight.device if found is None else torch.device(found)
    return torch.device("cpu")


def weight_names(model: nn.Module) -> list[str]:
    """Names of the parameters, a shared one by its first; sharing is lost when weights go away."""
    found = [name for name, _ in model.named_parameters()]  # told by the tensor itself
    if not laid_out(model):
        return found
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[str, str] = {}
    for name in found:
        names.setdefault(tied.get(name, name), name)
    return list(names.values())


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A parameter by its name, fetched if it is away."""
    parts = name.split(".")
    weight = getattr(model.get_submodule(".".join(parts[:-1])), parts[-1])
    if not weight.is_meta:
        return weight
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        for hook in _hooks(module):
            weights: Any = getattr(hook, "weights_map", None)
            if weights is not None:
                with suppress(KeyError):
                    return weights[".".join(parts[end:])]
    return weight


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
