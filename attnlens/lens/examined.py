"""The anatomy of a model for the inputs that it is opened with, and which inputs need another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import AttnlensError, UnsupportedModelError
from attnlens.hooks.probe import examine


def examined(model: nn.Module, example: Mapping[str, Any], made_up: bool) -> Anatomy:
    """The anatomy; a model that cannot run the made-up example is told apart from a broken one."""
    try:
        return examine(model, example)
    except AttnlensError:
        raise
    except Exception as error:
        if not made_up:
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on the example input that attnlens made up "
            f"({', '.join(example)}): {error}. Give one, as the model's processor makes it: "
            "al.load(model, example={...})."
        ) from error


def modality(inputs: Mapping[str, Any]) -> frozenset[tuple[str, object]]:
    """What decides which towers run, and how often: the inputs that are not tokens or masks.

    A model may attend once an image, so the sizes of images count, and grids of image sizes.
    """
    found: set[tuple[str, object]] = set()
    for name, value in inputs.items():
        if isinstance(value, Tensor) and "mask" not in name:
            if value.is_floating_point():
                found.add((name, tuple(value.shape[1:])))
            elif "grid" in name:
                found.add((name, tuple(value.flatten().tolist())))
    return frozenset(found)
