"""Another forward on a module for a while: what was there before comes back as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn


class Replaced:
    """Handle of a module whose forward is another, for the thread that made it, until `remove`.

    An instance attribute that was there (accelerate puts one) is restored, else ours is deleted.
    Hooks of the module stay and run.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._held = vars(module)
        self._before = self._held.get("forward")
        own, thread = module.forward, threading.get_ident()

        def replaced(*args: Any, **kwargs: Any) -> Any:
            called = forward if threading.get_ident() == thread else own
            return called(*args, **kwargs)

        self._held["forward"] = replaced

    def remove(self) -> None:
        """Put the module's forward back."""
        if self._before is None:
            del self._held["forward"]
        else:
            self._held["forward"] = self._before
