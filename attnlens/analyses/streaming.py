"""Averages over texts of which there may be any number: read, measured and added up by the window.

A window is some batches of texts that are tokenised together and batched by length. What is kept of
them is a `Tally`, whose size does not grow with their number, and which can be saved and gone on
from at the end of each window.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

from jaxtyping import Int
from torch import Tensor

from attnlens.analyses.per_head import side_by_side
from attnlens.analyses.reading import (
    WINDOW,
    Reading,
    Texts,
    Window,
    as_texts,
    check_reading,
    each_text,
    read_window,
    whole_window,
)
from attnlens.analyses.saved import Consumed, check_same, fingerprint, read_state, write_state
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import FileError
from attnlens.hooks.reducers import FirstTokenMass, Reducer
from attnlens.lens import Inputs, Lens, Statistics

SAVE_SECONDS = 10.0
"""Time between two saves; longer where saving itself takes long."""


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
    check_reading(lens, reading)
    layers = tuple(layers) if isinstance(layers, Iterator) else layers  # asked for every batch
    given = as_texts(texts)
    if given is None:
        window = whole_window(lens, cast("Inputs", texts), reading)
        run = _Run(lens, tally, layers, reading, sum(len(own) for _, own in window.parts))
        run.take(window)
        return run.counted
    run = _Run(lens, tally, layers, reading, len(given) if isinstance(given, Sized) else None)
    stream = each_text(given)
    run.start(stream)
    size = reading.batch_size * WINDOW
    try:
        while own := list(islice(stream, size)):
            window = read_window(lens, own, run.counted.prompts, reading)
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
