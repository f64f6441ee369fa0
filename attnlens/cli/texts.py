"""From a text file to the texts that a model reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnlens.errors import FileError, InputError

if TYPE_CHECKING:
    from attnlens.lens import Lens

SEPARATOR = "<|endoftext|>"


def read_texts(path: Path) -> tuple[str, ...]:
    """The texts of a UTF-8 file, one or several separated by `<|endoftext|>`.

    Raises FileError where it cannot be read, InputError where it holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"There is no file {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no UTF-8 text (byte {error.start}). Give a plain text file in UTF-8."
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    texts = tuple(part.strip() for part in content.split(SEPARATOR) if part.strip())
    if not texts:
        raise InputError(f"{path} holds no text: give a file with at least one word.")
    return texts


def check_lengths(lens: Lens, texts: tuple[str, ...]) -> None:
    """Raise InputError for a text over the model's context, saying how to cut it."""
    limit = lens.context
    if limit is None:
        return
    for number, text in enumerate(texts, start=1):
        length = _length(lens, text)
        if length > limit:
            raise InputError(
                f"Text {number} of {len(texts)} has {length} tokens and the model reads at most "
                f"{limit}. Give --cut to read it in pieces, or put {SEPARATOR} between parts of it."
            )


def cut_texts(lens: Lens, texts: tuple[str, ...], limit: int | None = None) -> tuple[str, ...]:
    """Texts in pieces of at most `limit` tokens (the model's context), cut at line or word ends."""
    limit = limit or lens.context
    if limit is None:
        return texts
    return tuple(piece for text in texts for piece in _pieces(lens, text, limit))


def _pieces(lens: Lens, text: str, limit: int) -> list[str]:
    """The text itself if it fits, else the pieces of its two halves."""
    if _length(lens, text) <= limit:
        return [text] if text.strip() else []
    middle = len(text) // 2
    breaks = [text.rfind(mark, 1, middle) for mark in ("\n", " ")]
    place = next((found for found in breaks if found > len(text) // 4), middle)
    return _pieces(lens, text[:place], limit) + _pieces(lens, text[place:].lstrip(), limit)


def _length(lens: Lens, text: str) -> int:
    if lens.tokenizer is None:
        raise InputError(
            "The model has no tokenizer, so the text file cannot be read. Give one with "
            "--tokenizer FOLDER, or leave --file out."
        )
    return len(lens.tokenizer(text, verbose=False)["input_ids"])  # asking is no reason to warn
