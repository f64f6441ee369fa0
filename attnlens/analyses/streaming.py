"""Averages over texts of which there may be any number: read, measured and added up by the window.

A window is some batches of texts that are tokenised together and batched by length. What is kept of
them is a `Tally`, whose size does not grow with their number, and which can be saved and gone on
from at the end of each window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from jaxtyping import Int
from torch import Tensor

from attnlens.analyses.per_head import side_by_side
from attnlens.analyses.saved import Consumed, check_same, fingerprint, read_state, write_state
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import FileError, InputError
from attnlens.hooks.reducers import FirstTokenMass, Reducer
from attnlens.lens import Inputs, Lens, Statistics
from attnlens.lens.inputs import split

Texts = Inputs | Iterable[str]
"""What the lens takes, or texts that come one after another."""

Progress = Callable[[int, int | None], None]
"""Called with the number of texts that are done, and of how many where that is known."""

WINDOW = 16
"""Batches in a window."""

SAVE_SECONDS = 10.0
"""Time between two saves; longer where saving itself takes long."""


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


class Tally(Protocol):
    """What a method keeps of the prompts."""

    name: str
    """The method's name."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What has to be the same to go on from a saved state; plain values."""
        ...

    def begin(self, window: Window) -> Sequence[Reducer]:
        """What to measure in a window; the first token's mass is among it."""
        ...

    def add(self, measured: Statistics, prompts: Int[Tensor, " prompt"]) -> None:
        """Take in one batch; `prompts` are the numbers of its prompts, from 0."""
        ...

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is kept: tensors, and plain values."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        ...


@dataclass
class Counted:
    """What was read: prompts, those that were cut, and the lengths of the shortest and longest."""

    prompts: int = 0
    cut: int = 0
    shortest: int = 0
    longest: int = 0
    unknown: int = 0
    """Prompts of which the model made NaN."""

    def add(self, measured: Statistics) -> None:
        """Count one batch."""
        lengths = measured.lengths
        least = min(lengths, default=0)
        self.shortest = min(self.shortest, least) if self.prompts else least
        self.longest = max(self.longest, *lengths)
        self.prompts += len(lengths)
        # Every prompt has this statistic at every site.
        self.unknown += int(side_by_side(measured, FirstTokenMass.name).isnan().any(1).sum())

    def notes(self, max_tokens: int | None) -> tuple[str, ...]:
        """How many texts were cut or gave NaN, where some did."""
        notes: list[str] = []
        if self.cut:
            notes.append(
                f"{self.cut} of {self.prompts} texts were cut to their first {max_tokens} tokens."
            )
        if self.unknown:
            notes.append(
                f"{self.unknown} of {self.prompts} texts gave NaN at some heads, whose numbers "
                "leave them out: the model overflows, or makes NaN of padding (batch_size=1)."
            )
        return tuple(notes)


def fold(
    lens: Lens, texts: Texts, tally: Tally, layers: HeadSpec | None, reading: Reading
) -> Counted:
    """Measure prompts batch by batch, add each batch to the tally, and say what was read.

    Going on from a saved state gives the very numbers that one run would have given.

    Raises:
        InputError: no text, an empty one, one over the context; a state of other texts, another
            model or other settings, or inside `lens.edit`.
        FileError: a state that is damaged or cannot be written.

    """
    _check(lens, reading)
    layers = tuple(layers) if isinstance(layers, Iterator) else layers  # asked for every batch
    given = _as_texts(texts)
    if given is None:
        return _fold_whole(lens, cast("Inputs", texts), tally, layers, reading)
    run = _Run(lens, tally, layers, reading, len(given) if isinstance(given, Sized) else None)
    stream = _each(given)
    run.start(stream)
    size = reading.batch_size * WINDOW
    try:
        while own := list(islice(stream, size)):
            window = _read(lens, own, run.counted.prompts, reading)
            run.take(window)
            run.finish_window(own)
    finally:
        run.save_whole()
    return run.counted


def heads_named(lens: Lens, names: Iterable[str]) -> tuple[Head, ...]:
    """Heads by how they print, as a saved state has them."""
    heads = {str(head): head for head in lens.anatomy.heads}
    return tuple(heads[name] for name in names)


class _Run:
    """One fold: what was counted, and when it was last saved."""

    def __init__(
        self,
        lens: Lens,
        tally: Tally,
        layers: HeadSpec | None,
        reading: Reading,
        total: int | None,
    ) -> None:
        self.counted = Counted()
        self._lens, self._tally, self._layers = lens, tally, layers
        self._reading, self._total = reading, total
        self._path = None if reading.state is None else Path(reading.state)
        self._consumed = Consumed()
        self._whole = False
        """Whether the tally holds whole windows, and more of them than were saved."""
        self._due = 0.0

    def start(self, stream: Iterator[str]) -> None:
        """Go on from the saved state, past the texts that it has counted; or begin one."""
        if self._path is None:
            return
        if not self._path.exists():
            self._save()  # a place that cannot be written is told now, not after an hour
            return
        tensors, facts = read_state(self._path)
        check_same(self._path, facts.get("settings", {}), self._settings)
        try:
            self._consumed.restore(facts["texts"])
            self.counted = Counted(**facts["counted"])
            self._tally.restore(tensors, facts["tally"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{self._path} is damaged; delete it to start anew.") from error
        self._consumed.skip(stream, self._path)
        self._report()

    def take(self, window: Window) -> None:
        """Measure one window."""
        self._whole = False
        reducers = self._tally.begin(window)
        for inputs, prompts in window.parts:
            measured = self._lens.measure(inputs, reducers, self._layers, max(len(prompts), 1))
            self._tally.add(measured, prompts)
            self.counted.add(measured)
            self._report()
        self.counted.cut += window.cut

    def finish_window(self, texts: Sequence[str]) -> None:
        """Note the texts of a window that was taken whole, and save it where that is due."""
        if self._path is None:
            return
        for text in texts:
            self._consumed.add(text)
        self._whole = True
        if time.monotonic() >= self._due:
            self._save()

    def save_whole(self) -> None:
        """Save what was not, unless the run broke off inside a window."""
        if self._whole:
            self._save()

    def _save(self) -> None:
        assert self._path is not None
        begun = time.monotonic()
        tensors, values = self._tally.save()
        facts = {
            "settings": self._settings,
            "texts": self._consumed.facts(),
            "counted": asdict(self.counted),
            "tally": values,
        }
        write_state(self._path, tensors, facts)
        self._whole = False
        now = time.monotonic()
        self._due = now + max(SAVE_SECONDS, 20 * (now - begun))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        sites = [site.name for site in self._lens.anatomy.layers(self._layers)]
        return {
            "method": self._tally.name,
            **fingerprint(self._lens),
            "layers": sites,
            "max_tokens": self._reading.max_tokens,
            **self._tally.settings,
        }

    def _report(self) -> None:
        if self._reading.progress is not None:
            self._reading.progress(self.counted.prompts, self._total)


def _fold_whole(
    lens: Lens, inputs: Inputs, tally: Tally, layers: HeadSpec | None, reading: Reading
) -> Counted:
    """Ids and dictionaries are there as a whole: one window."""
    for name in ("state", "max_tokens"):
        if getattr(reading, name) is not None:
            raise InputError(
                f"{name} is for texts, and this input is token ids or a dictionary. Leave it out."
            )
    batch = lens.encode(inputs)
    parts, order = split(batch, reading.batch_size)
    run = _Run(lens, tally, layers, reading, batch.size)
    numbers = torch.tensor(order).split([part.size for part in parts])
    pairs = tuple((dict(part.inputs), own) for part, own in zip(parts, numbers, strict=True))
    run.take(Window(_real_ids(batch.ids, batch.real), pairs))
    return run.counted


def _real_ids(ids: Tensor | None, real: Tensor | None) -> tuple[tuple[int, ...], ...]:
    if ids is None:
        return ()
    kept = [row if real is None else row[real[prompt]] for prompt, row in enumerate(ids)]
    return tuple(tuple(row.tolist()) for row in kept)


def _as_texts(texts: Texts) -> Iterable[str] | None:
    """The input as texts one after another; None where it is something else."""
    if isinstance(texts, str):
        return (texts,)
    if isinstance(texts, Mapping | Tensor) or not isinstance(texts, Iterable):
        return None
    if isinstance(texts, Sequence) and not (len(texts) and isinstance(texts[0], str)):
        return None
    return texts  # type: ignore[return-value]


def _each(texts: Iterable[str]) -> Iterator[str]:
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


def _check(lens: Lens, reading: Reading) -> None:
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


def _read(lens: Lens, texts: list[str], first: int, reading: Reading) -> Window:
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
