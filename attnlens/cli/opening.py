"""Opening what was asked for."""

from __future__ import annotations

import torch

from attnlens.cli.asked import ModelAsked
from attnlens.cli.progress import Steps
from attnlens.errors import InputError
from attnlens.lens import Lens, load


def open_lens(asked: ModelAsked, steps: Steps) -> Lens:
    """The model, not yet checked. Raises what `load` raises, InputError for a device."""
    if asked.device is not None:
        _check_device(asked.device)
    with steps(f"Opening {asked.title}"):
        return load(asked.model, asked.tokenizer, asked.device, asked.dtype, check=False)


def open_checked(asked: ModelAsked, steps: Steps) -> Lens:
    """The model, once the instrument was found to see it exactly."""
    lens = open_lens(asked, steps)
    with steps("Checking the instrument"):
        lens.check().raise_problems()
    return lens


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"The device {device!r} is not there. Leave --device out, or write cpu or cuda."
        ) from None
    if kind == "meta":
        raise InputError("The device 'meta' holds no numbers. Write cpu or cuda.")
