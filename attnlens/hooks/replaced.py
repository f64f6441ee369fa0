"""Hooks and forwards that act for the thread that put them on a model, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from attnlens.hooks.thread import this_thread

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def of_this_thread(hook: Callable[_Given, _Made]) -> Callable[_Given, _Made | None]:
    """The hook for the thread that asks for it; in others it does nothing."""
    thread = this_thread()

    @wraps(hook)
    def guarded(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made | None:
        return hook(*args, **kwargs) if this_thread() == thread else None

    return guarded


class Replaced:
    """Handle of a module whose forward is another, for the thread that made it, until `remove`.

    An instance attribute that was there (accelerate puts one) is restored, else ours is deleted.
    Hooks of the module stay and run.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._held = vars(module)
        self._before = self._held.get("forward")
        own, thread = module.forward, this_thread()

        def replaced(*args: Any, **kwargs: Any) -> Any:
            called = forward if this_thread() == thread else own
            return called(*args, **kwargs)

        self._held["forward"] = replaced

    def remove(self) -> None:
        """Put the module's forward back."""
        if self._before is None:
            del self._held["forward"]
        else:
            self._held["forward"] = self._before
