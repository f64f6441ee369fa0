"""From a file to the texts that a model reads: a few at once, or any number one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from attnlens.cli.asked import TextsAsked
from attnlens.cli.progress import Steps
from attnlens.errors import FileError, InputError

if TYPE_CHECKING:
    from attnlens.lens import Lens

SEPARATOR = "<|endoftext|>"
SAMPLE = 64
"""So many texts are read by what needs them all at once."""
_NO_TOKENIZER = (
    "The model has no tokenizer, so the text file cannot be read. Give one with --tokenizer "
    "FOLDER, or leave --file out."
)


@dataclass(frozen=True)
class Texts:
    """The texts of a job."""

    every: Iterable[str] = ()
    """All of them, which can be read again."""
    sample: tuple[str, ...] = ()
    """The first ones, none over the context."""
    max_tokens: int | None = None
    """Each of `every` is cut to its first so many tokens."""
    whole: bool = True
    """Whether the sample is all there is."""

    @classmethod
    def given(cls, texts: Sequence[str]) -> Texts:
        """A few texts that fit the model."""
        return cls(tuple(texts), tuple(texts[:SAMPLE]), whole=len(texts) <= SAMPLE)


@dataclass(frozen=True)
class First:
    """The first texts of a source."""

    source: Iterable[str]
    limit: int | None

    def __iter__(self) -> Iterator[str]:
        return islice(self.source, self.limit)


@dataclass(frozen=True)
class Pieces:
    """The texts of a source in pieces that fit a model."""

    lens: Lens
    source: Iterable[str]
    limit: int | None

    def __iter__(self) -> Iterator[str]:
        for text in self.source:
            yield from cut_texts(self.lens, (text,), self.limit)


@dataclass(frozen=True)
class Known:
    """Texts of a source, and how many there are."""

    source: Iterable[str]
    count: int

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return self.count


def open_source(asked: TextsAsked) -> Iterable[str] | None:
    """The texts that were asked for, opened; None where the built-in ones are to be read.

    Raises FileError or InputError where there is no such file, column or text.
    """
    if asked.file is None:
        for name in ("lines", "column", "limit", "state"):
            if getattr(asked, name):
                raise InputError(f"--{name} is about the texts of --file. Give that too.")
        return None
    if not asked.streamed:
        return read_texts(asked.file)[: asked.limit]
    from attnlens.lens.sources import open_texts, text_lines

    if asked.lines and asked.column is None:
        return First(text_lines(asked.file), asked.limit)
    return First(open_texts(asked.file, asked.column), asked.limit)


def settle(
    lens: Lens,
    source: Iterable[str] | None,
    asked: TextsAsked,
    built_in: Sequence[str],
    steps: Steps,
) -> Texts:
    """The texts as this model can read them; none where it has no tokenizer and none were given.

    A source of any length is read through once: that says how many texts there are, and finds a
    damaged one before the model has run for hours.
    """
    limit = _limit(lens, asked.max_tokens)
    if source is None:
        if lens.tokenizer is None:
            return Texts()
        return Texts.given(cut_texts(lens, tuple(built_in), limit))
    if isinstance(source, tuple):
        return _few(lens, source, asked, limit)
    if lens.tokenizer is None:
        raise InputError(_NO_TOKENIZER)
    with steps(f"Reading {asked.file}") as advance:
        count = 0
        for count, _ in enumerate(source, start=1):
            if count % 1000 == 0:
                advance(count, None)
        advance(count, count)
    sample = _sample(lens, islice(source, SAMPLE), limit)
    if asked.cut:
        return Texts(Pieces(lens, source, limit), sample, None, whole=False)
    return Texts(Known(source, count), sample, limit, whole=count <= SAMPLE)


def _few(lens: Lens, texts: tuple[str, ...], asked: TextsAsked, limit: int | None) -> Texts:
    """The texts of one file, which are there as a whole."""
    if asked.cut:
        return Texts.given(cut_texts(lens, texts, limit))
    if asked.max_tokens is None:
        check_lengths(lens, texts)
        return Texts.given(texts)
    sample = _sample(lens, texts[:SAMPLE], limit)
    return Texts(texts, sample, asked.max_tokens, whole=len(texts) <= SAMPLE)


def _sample(lens: Lens, texts: Iterable[str], limit: int | None) -> tuple[str, ...]:
    """The beginning of each text."""
    return tuple(cut_texts(lens, (text,), limit)[0] for text in texts)


def _limit(lens: Lens, asked: int | None) -> int | None:
    """The most tokens of a text."""
    if asked is not None and lens.context is not None and asked > lens.context:
        raise InputError(
            f"--max-tokens {asked} is over the model's context of {lens.context} tokens; give at "
            "most that."
        )
    return lens.context if asked is None else asked


def read_texts(path: Path) -> tuple[str, ...]:
    """The texts of a UTF-8 file, one or several separated by `<|endoftext|>`.

    Raises FileError where it cannot be read, InputError where it holds no text.
    """
    texts = tuple(part.strip() for part in read_text(path).split(SEPARATOR) if part.strip())
    if not texts:
        raise InputError(f"{path} holds no text: give a file with at least one word.")
    return texts


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises FileError where it cannot be read, InputError where it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"There is no file {str(path)!r}.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is no UTF-8 text (byte {error.start}). Give a plain text file in UTF-8."
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error


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
                f"{limit}. Give --cut to read it in pieces, --max-tokens {limit} to read its "
                f"beginning, or put {SEPARATOR} between parts of it."
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
        raise InputError(_NO_TOKENIZER)
    return len(lens.tokenizer(text, verbose=False)["input_ids"])  # asking is no reason to warn
