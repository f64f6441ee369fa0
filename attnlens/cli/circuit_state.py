"""Decisions of a removal, kept in the folder of its results, so that a stop loses little."""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attnlens.cli.asked import CircuitAsked, StoppedError
from attnlens.errors import AttnlensError, FileError

STATE = "removal.json"


@contextmanager
def removal_state(out: Path, asked: CircuitAsked, words: Sequence[str]) -> Generator[Path | None]:
    """Where decisions are kept; None of other methods. A folder made for nothing is removed.

    After a stop or an error it says what is kept; `words` are those of the command.

    Raises:
        FileError: `out` is a file, cannot be made, or holds a removal that is not gone on with.
        StoppedError: Ctrl-C where decisions are kept.

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
    made, before = not out.exists(), _decided(state)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{out} cannot be made: {error.strerror}. Choose another --out.") from error
    try:
        yield state
    except AttnlensError as error:
        if _decided(state) != before:
            error.add_note(_kept_text(out, words))
        raise
    except KeyboardInterrupt:
        if _decided(state) is None:
            raise
        raise StoppedError(_kept_text(out, words)) from None
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def _decided(state: Path) -> tuple[int, int] | None:
    """Of how many edges is decided, and how many there are; None without a readable state."""
    try:
        content = json.loads(state.read_bytes())
        return len(content["stays"]), int(content["facts"]["visits"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept_text(out: Path, words: Sequence[str]) -> str:
    """What is kept, and the command that goes on."""
    done, total = _decided(out / STATE) or (0, 0)
    again = list(words) if "--resume" in words else [*words, "--resume"]
    return (
        f"{done:,} of {total:,} edges are decided, which is kept in {out}. This goes on:\n"
        f"  {shlex.join(['attnlens', *again])}"
    )
