"""Decisions of a removal, kept in the folder of its results, so that a stop loses little."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attnlens.cli.asked import CircuitAsked
from attnlens.errors import FileError

STATE = "removal.json"


@contextmanager
def removal_state(out: Path, asked: CircuitAsked) -> Generator[Path | None]:
    """Where decisions are kept; None of other methods. A folder made for nothing is removed.

    Raises:
        FileError: `out` is a file, cannot be made, or holds a removal that is not gone on with.

    """
    if asked.method != "removal" or asked.evaluate is not None:
        yield None
        return
    state = out / STATE
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file. Give a folder for the report, with --out.")
    if state.exists() and not asked.resume:
        raise FileError(
            f"{out} holds a removal already: add --resume to go on with it, or choose another "
            "folder."
        )
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{out} cannot be made: {error.strerror}. Choose another --out.") from error
    try:
        yield state
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def kept_text(out: Path, asked: CircuitAsked, words: Sequence[str]) -> str | None:
    """What a stop left, and the command that goes on; None where there is nothing."""
    if asked.method != "removal" or asked.evaluate is not None:
        return None
    try:
        content = json.loads((out / STATE).read_bytes())
        done, total = len(content["stays"]), int(content["facts"]["visits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    again = list(words) if "--resume" in words else [*words, "--resume"]
    return (
        f"{done:,} of {total:,} edges are decided, which is kept in {out}. This goes on:\n"
        f"  {shlex.join(['attnlens', *again])}"
    )
