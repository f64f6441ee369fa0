"""Whose thread this is: what one thread put on a model acts for that thread alone.

A backward pass may run a part of a forward again in a thread of its own (checkpointing on a GPU).
There it acts for the thread that ran the forward.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

_NOBODY = -1
_acting = threading.local()


def this_thread() -> int:
    """The thread that code running here acts for."""
    return getattr(_acting, "thread", None) or threading.get_ident()


@contextmanager
def acting_for(thread: int) -> Generator[None]:
    """Act for another thread, which waits meanwhile."""
    before = getattr(_acting, "thread", None)
    _acting.thread = thread
    try:
        yield
    finally:
        _acting.thread = before


@contextmanager
def apart() -> Generator[None]:
    """Act for no thread: what this one put on models before rests."""
    with acting_for(_NOBODY):
        yield
