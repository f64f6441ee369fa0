"""The one text that a command explains: an argument, a file, or the input stream."""

from __future__ import annotations

import sys
from pathlib import Path

from attnlens.cli.texts import read_text
from attnlens.errors import FileError, InputError

STREAM = "-"


def read_prompt(text: str | None, file: Path | None) -> str:
    """The text as it is given; of a file or the stream, without the line ends after its last line.

    Raises:
        InputError: no text, two of them, an empty one, or bytes that are none.
        FileError: a file that cannot be read.

    """
    if (text is None) == (file is None):
        both = "Give the text once, not in --file too." if file else "Give a TEXT to explain"
        raise InputError(both if file else f'{both}, "-" to read it from the input, or --file.')
    where = "The text"
    if file is not None:
        where, text = str(file), read_text(file).rstrip("\r\n")
    elif text == STREAM:
        where, text = "The input", _streamed().rstrip("\r\n")
    if not text or not text.strip():
        raise InputError(f"{where} holds no text: give at least one word.")
    return text


def check_place(out: Path, files: tuple[str, ...], others: tuple[str, ...] = ()) -> bool:
    """Whether `out` is a file of one of these suffixes, and not a folder.

    Raises:
        FileError: a suffix among `others`; a file where a folder is needed or the other way round;
            a file in a folder that is not there.

    """
    suffix = out.suffix.lower()
    if suffix in others:
        raise FileError(
            f"{out} has the suffix {suffix!r}; give a folder, or a file with {', '.join(files)}."
        )
    if suffix not in files or out.is_dir():
        if out.exists() and not out.is_dir():
            raise FileError(f"{out} is a file. Give a folder, or a file with {', '.join(files)}.")
        return False
    if not out.absolute().parent.is_dir():
        raise FileError(f"There is no folder {out.parent} to write {out.name} in: create it first.")
    return True


def _streamed() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The input is no UTF-8 text (byte {error.start}). Give a plain text in UTF-8."
        ) from None
