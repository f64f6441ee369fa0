"""The modules that do the work, loaded only when there is work: it takes seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def loaded(module: str = "attnlens.cli.commands") -> Any:
    """A module that needs torch and transformers."""
    from attnlens.cli.progress import progress

    with progress() as steps, steps("Loading torch and transformers"):
        return import_module(module)
