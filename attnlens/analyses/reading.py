"""How texts are read: one after another, tokenised by the window and batched by length.

A window is some batches of texts that are tokenised together. Nothing of a window outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens
from attnlens.lens.inputs import split

Texts = Inputs | Iterable[str]
"""What the lens takes, or texts that come one after another."""

Progress = Callable[[int, int | None], None]
"""Called with the number of texts that are done, and of how many where that is known."""

WINDOW = 16
"""Batches in a window."""


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Attributes:
        batch_size: texts that run together.
        max_tokens: texts are cut to their first so many tokens, special tokens at their end kept;
            None refuses texts over the model's context.
        state: a file in which to save what was counted, and to go on from where it is there.
        progress: called after every batch.

    Raises:
        InputError: a batch size or number of tokens below 1.

    """

    batch_size: int = 8
    max_tokens: int | None = None
    state: str | Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: give 1 or more.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens}: give 1 or more.")


@dataclass(frozen=True)
class Window:
    """Some prompts that are read together."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of each prompt, in their order; empty where there are none."""
    parts: tuple[tuple[Mapping[str, Any], Int[Tensor, " prompt"]], ...]
    """Batches as the lens takes them, each with the numbers of its prompts."""
    cut: int = 0
    """How many texts were cut."""


def windows(lens: Lens, texts: Texts, reading: Reading) -> Iterator[Window]:
    """The prompts of any input, window by window, numbered from 0.

    Raises:
        InputError: no text, an empty one, one over the context; max_tokens for token ids.

    """
    check_reading(lens, reading)
    given = as_texts(texts)
    if given is None:
        yield whole_window(lens, cast("Inputs", texts), reading)
        return
    stream, first = each_text(given), 0
    while own := list(islice(stream, reading.batch_size * WINDOW)):
        yield read_window(lens, own, first, reading)
        first += len(own)


def whole_window(lens: Lens, inputs: Inputs, reading: Reading) -> Window:
    """Ids and dictionaries are there as a whole: one window."""
    for name in ("state", "max_tokens"):
        if getattr(reading, name) is not None:
            raise InputError(
                f"{name} is for texts, and this input is token ids or a dictionary. Leave it out."
            )
    batch = lens.encode(inputs)
    parts, order = split(batch, reading.batch_size)
    numbers = torch.tensor(order).split([part.size for part in parts])
    pairs = tuple((dict(part.inputs), own) for part, own in zip(parts, numbers, strict=True))
    return Window(_real_ids(batch.ids, batch.real), pairs)


def _real_ids(ids: Tensor | None, real: Tensor | None) -> tuple[tuple[int, ...], ...]:
    if ids is None:
        return ()
    kept = [row if real is None else row[real[prompt]] for prompt, row in enumerate(ids)]
    return tuple(tuple(row.tolist()) for row in kept)


def as_texts(texts: Texts) -> Iterable[str] | None:
    """The input as texts one after another; None where it is something else."""
    if isinstance(texts, str):
        return (texts,)
    if isinstance(texts, Mapping | Tensor) or not isinstance(texts, Iterable):
        return None
    if isinstance(texts, Sequence) and not (len(texts) and isinstance(texts[0], str)):
        return None
    return texts  # type: ignore[return-value]


def each_text(texts: Iterable[str]) -> Iterator[str]:
    """The texts, checked one by one."""
    number = -1
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"Text {number} is of type {type(text).__name__}; an iterator gives texts. Token "
                "ids are given as a list or tensor."
            )
        if not text.strip():
            raise InputError(f"Text {number} is empty: give at least one word.")
        yield text
    if number < 0:
        raise InputError("The input is empty: it gives no text.")


def check_reading(lens: Lens, reading: Reading) -> None:
    """Raise InputError for a state inside `lens.edit`, or more tokens than the context."""
    if reading.state is not None and lens.edited:
        raise InputError(
            "A state does not know what is edited, so another call might go on from it with other "
            "edits. Leave state out inside lens.edit."
        )
    limit = lens.context
    if reading.max_tokens is not None and limit is not None and reading.max_tokens > limit:
        raise InputError(
            f"max_tokens={reading.max_tokens} is over the model's context of {limit} tokens; give "
            f"max_tokens={limit} or less."
        )


def read_window(lens: Lens, texts: list[str], first: int, reading: Reading) -> Window:
    """Tokenise texts and batch them by length; `first` is the number of the first."""
    rows, cut = _tokenise(lens, texts, first, reading.max_tokens)
    order = sorted(range(len(rows)), key=lambda prompt: len(rows[prompt]))
    pad = lens.tokenizer.pad_token_id or 0
    parts: list[tuple[Mapping[str, Any], Tensor]] = []
    for start in range(0, len(order), reading.batch_size):
        own = order[start : start + reading.batch_size]
        length = len(rows[own[-1]])
        ids = [[*rows[prompt], *[pad] * (length - len(rows[prompt]))] for prompt in own]
        mask = [[int(place < len(rows[prompt])) for place in range(length)] for prompt in own]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        parts.append((inputs, torch.tensor(own) + first))
    return Window(tuple(map(tuple, rows)), tuple(parts), cut)


def _tokenise(
    lens: Lens, texts: list[str], first: int, max_tokens: int | None
) -> tuple[list[list[int]], int]:
    """Token ids of each text, and how many texts were cut."""
    if lens.tokenizer is None:
        raise InputError(
            "The model has no tokenizer, so text cannot be read. Give one "
            "(al.load(model, tokenizer=...)) or give token ids."
        )
    rows: list[list[int]] = lens.tokenizer(texts, verbose=False)["input_ids"]
    empty = next((number for number, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise InputError(f"Text {first + empty} has no token: the tokenizer drops all of it.")
    limit = lens.context if max_tokens is None else max_tokens
    over = [i for i, row in enumerate(rows) if limit is not None and len(row) > limit]
    if limit is None or not over:
        return rows, 0
    if max_tokens is None:
        raise InputError(
            f"Text {first + over[0]} has {len(rows[over[0]])} tokens and the model reads at most "
            f"{limit}. Give max_tokens={limit} to read its first {limit} tokens, or split it."
        )
    for prompt in over:
        rows[prompt] = _cut(lens, texts[prompt], rows[prompt], limit)
    return rows, len(over)


def _cut(lens: Lens, text: str, ids: list[int], limit: int) -> list[int]:
    """The first tokens of a text, and behind them the special tokens that end every text."""
    marks = lens.tokenizer(text, return_special_tokens_mask=True, verbose=False)
    mask: list[int] = marks["special_tokens_mask"]
    end = next((n for n, mark in enumerate(reversed(mask)) if not mark), 0)
    return ids[:limit] if end >= limit else ids[: limit - end] + ids[len(ids) - end :]
