"""Progress on the error stream: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

Advance = Callable[[int, int | None], None]
"""Called with how much is done, and of how much where that is known."""


Steps = Callable[[str], AbstractContextManager[Advance]]
"""Called with what is being done; the block that does it gets a function to report with."""

LINE_SECONDS = 30.0
"""Where there is no terminal, a long step says so often how far it is."""


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
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        _Counts(Column(no_wrap=True)),
        _Times(Column(no_wrap=True)),
    )
    with Progress(*columns, console=console) as bars:
        yield lambda name: _bar(bars, name)


class _Counts(ProgressColumn):
    """How much is done, and of how much where that is known."""

    def render(self, task: Task) -> Text:
        """`1,024/4,000`, `1,024`, or nothing where the step counts nothing."""
        if task.total is None and not task.completed:
            return Text("")
        return Text(counts(int(task.completed), None if task.total is None else int(task.total)))


class _Times(ProgressColumn):
    """Time left where that can be told, else time since the beginning."""

    def render(self, task: Task) -> Text:
        """`0:03:20 left`, and in the end `0:04:30`."""
        left = None if task.finished else task.time_remaining
        if left is not None:
            return Text(f"{clock(left)} left")
        return Text(clock(task.finished_time if task.finished else task.elapsed))


def counts(done: int, total: int | None) -> str:
    """`1,024/4,000`, or `1,024` where the total is not known."""
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def clock(seconds: float | None) -> str:
    """`0:01:10`."""
    return str(timedelta(seconds=int(seconds or 0)))


@contextmanager
def _line(console: Console, name: str) -> Generator[Advance]:
    start = time.perf_counter()
    said = start
    first: tuple[float, int] | None = None  # what was done before this step is no measure of speed

    def advance(done: int, total: int | None) -> None:
        nonlocal said, first
        now = time.perf_counter()
        first = first or (now, done)
        if now - said < LINE_SECONDS or done == total:
            return
        said = now
        since, before = first
        left = ""
        if total and done > before:
            left = f", {clock((now - since) * (total - done) / (done - before))} left"
        say(f"{name}: {counts(done, total)} after {clock(now - start)}{left}")

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    yield advance
    say(f"{name}: {time.perf_counter() - start:.1f} s")


@contextmanager
def _bar(bars: Progress, name: str) -> Generator[Advance]:
    task = bars.add_task(name, total=None)
    yield lambda done, total: bars.update(task, completed=done, total=total)
    own = bars.tasks[bars.task_ids.index(task)]
    known = own.total or own.completed or 1
    bars.update(task, completed=known, total=known)
