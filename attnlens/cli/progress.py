"""Progress on the error stream: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

Advance = Callable[[int, int | None], None]
"""Called with how much is done, and of how much where that is known."""


Steps = Callable[[str], AbstractContextManager[Advance]]
"""Called with what is being done; the block that does it gets a function to report with."""


@contextmanager
def silent(name: str) -> Generator[Advance]:
    """A step that says nothing."""
    yield lambda done, total: None


@contextmanager
def progress() -> Generator[Steps]:
    """Steps for the command line, on the error stream."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda name: _line(console, name)
        return
    columns = (
        SpinnerColumn(finished_text="\u2713"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield lambda name: _bar(bars, name)


@contextmanager
def _line(console: Console, name: str) -> Generator[Advance]:
    start = time.perf_counter()
    yield lambda done, total: None
    console.print(f"{name}: {time.perf_counter() - start:.1f} s", markup=False, soft_wrap=True)


@contextmanager
def _bar(bars: Progress, name: str) -> Generator[Advance]:
    task = bars.add_task(name, total=None)
    yield lambda done, total: bars.update(task, completed=done, total=total)
    known = bars.tasks[task].total or 1
    bars.update(task, completed=known, total=known)
