"""A sweep on several workers, each with a model of its own: Ray Data hands them their units.

The sweep itself is sent, once (sent.py); units are numbers alone. Values come back to this process
as units end, so a store has one writer.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from attnlens import errors
from attnlens.errors import AttnlensError, BudgetError
from attnlens.sweeps.cluster import Pool, connected
from attnlens.sweeps.sent import Sent
from attnlens.sweeps.sweep import Progress, Sweep, Take

MOST, LEAST = 64, 8
"""Trials of a unit: so many that its own clean run costs little, and values come every while."""

UNITS = 4
"""Units a worker at least, where there are trials enough, so that all end at about one time."""

ATTEMPTS = 4
"""Workers that one unit may take down with it."""


class Unit(NamedTuple):
    """Some trials on some prompts; trial -1 is the clean run."""

    prompts: slice
    trials: tuple[int, ...]


def spread(
    job: Sweep, take: Take, done: NDArray[np.bool_] | None = None, progress: Progress | None = None
) -> None:
    """Do on Ray what `job.run` does here; the sweep's settings tell where, and how many workers.

    Raises:
        InputError: Ray is not installed, cannot be reached, or has no GPU that was asked for; the
            sweep cannot be sent; a worker's model is another one; what `job.run` raises.
        BudgetError: one unit took down a worker again and again.

    """
    if done is None:
        done = np.zeros((len(job.trials) + 1, len(job.task)), dtype=np.bool_)
    if done.all():
        return
    settings = job.settings
    assert settings.ray is not None
    with connected(settings.ray) as ray:
        pool = Pool.on(_nodes(ray), settings.workers, settings.gpus)
        units = plan(job, done, pool.workers)
        left, total = int((~done).sum()), done.size
        with closing(_answers(ray, job, units, pool)) as answers:
            for number, answer in answers:
                prompts = units[number].prompts
                for trial, values in answer.values(prompts.stop - prompts.start):
                    new = ~done[trial, prompts]
                    take(np.arange(prompts.start, prompts.stop)[new], trial, values[new])
                    left -= int(new.sum())
                    if progress is not None:
                        progress(total - left, total)
                job.notes += [note for note in answer.notes if note not in job.notes]
                answer.raise_error()


def plan(job: Sweep, done: NDArray[np.bool_], workers: int) -> list[Unit]:
    """What is missing, in units: prompts by prompts, trials of one site together, from below."""
    starts = range(0, len(job.task), job.settings.batch_size)
    parts = [slice(i, min(i + job.settings.batch_size, len(job.task))) for i in starts]
    places = _places(job)
    missing: list[NDArray[np.bool_]] = [np.any(~done[:, prompts], axis=1) for prompts in parts]
    size = sum(int(own[:-1].sum()) for own in missing) // (UNITS * workers)
    size = min(max(size, LEAST), MOST)
    units: list[Unit] = []
    for prompts, own in zip(parts, missing, strict=True):
        wanted = [[trial for trial in group if own[trial]] for group in places]
        chunks = list(_chunks(wanted, size))
        if own[-1]:
            first, *others = chunks or [()]
            chunks = [(-1, *first), *others]
        units += [Unit(prompts, chunk) for chunk in chunks]
    return units


def _places(job: Sweep) -> list[list[int]]:
    """Trials by where they begin and by the site that they change first, from below.

    Edits that are made when their prompts are due are made for the first prompt: the sites are
    the same for all.
    """
    anatomy = job.lens.anatomy
    order = {site.name: i for i, site in enumerate(anatomy.sites)}
    places: dict[tuple[int, int], list[int]] = {}
    for number, trial in enumerate(job.trials):
        edits = trial.of_prompts(job.lens, slice(0, 1))
        first = min(order[name] for edit in edits for name in edit.sites(anatomy))
        places.setdefault((trial.start, first), []).append(number)
    return [places[place] for place in sorted(places)]


def _chunks(groups: Sequence[Sequence[int]], size: int) -> Iterator[tuple[int, ...]]:
    """Groups joined as long as `size` allows; only what is larger by itself is cut."""
    open_: tuple[int, ...] = ()
    for group in groups:
        for start in range(0, len(group), size):
            piece = tuple(group[start : start + size])
            if open_ and len(open_) + len(piece) > size:
                yield open_
                open_ = ()
            open_ += piece
    if open_:
        yield open_


@dataclass(frozen=True)
class Answer:
    """What a worker found for a unit, and why it stopped, as plain columns of one row."""

    trials: NDArray[np.int64]
    numbers: NDArray[np.float64]
    notes: tuple[str, ...]
    error: tuple[str, str] | None

    def to_row(self, unit: int) -> dict[str, list[Any]]:
        """As a batch of one row."""
        kind, text = self.error or ("", "")
        return {
            "unit": [unit],
            "trials": [self.trials.tobytes()],
            "values": [self.numbers.tobytes()],
            "notes": ["\n".join(self.notes)],
            "kind": [kind],
            "text": [text],
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Answer:
        """What was written."""
        kind, notes = str(row["kind"][0]), str(row["notes"][0])
        return cls(
            np.frombuffer(row["trials"][0], dtype=np.int64),
            np.frombuffer(row["values"][0], dtype=np.float64),
            tuple(notes.split("\n")) if notes else (),
            (kind, str(row["text"][0])) if kind else None,
        )

    def values(self, prompts: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Trial by trial, the values of the unit's prompts."""
        rows = self.numbers.reshape(len(self.trials), prompts)
        yield from zip(self.trials.tolist(), rows, strict=True)

    def raise_error(self) -> None:
        """Raise what stopped the worker, as it would have been raised here."""
        if self.error is not None:
            kind, text = self.error
            raise getattr(errors, kind)(text)


class Worker:
    """One process of the pool: holds the sweep with a model of its own, and does units of it."""

    def __init__(self, reference: Any, attempts: Any, pool: Pool) -> None:
        self._ray = import_module("ray")
        sent: Sent
        sent, self._units = self._ray.get(reference)
        self._attempts = attempts
        self._problem: AttnlensError | None = None
        torch.set_num_threads(max(int(pool.cpus), 1))
        try:
            self._job = sent.open("cuda" if pool.gpus and torch.cuda.is_available() else "cpu")
        except AttnlensError as error:  # raised here, it would reach the user as a trace of Ray's
            self._problem = error

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The values of one unit."""
        number = int(row["item"][0])
        found: list[tuple[int, NDArray[np.float64]]] = []
        notes: list[str] = []
        problem = self._problem
        try:
            if problem is None:
                _refuse_deadly(self._ray.get(self._attempts.add.remote(number)))
                unit, job = self._units[number], self._job
                done = np.ones((len(job.trials) + 1, len(job.task)), dtype=np.bool_)
                done[list(unit.trials), unit.prompts] = False
                notes = job.notes
                job.run(lambda _, trial, values: found.append((trial, values)), done)
        except AttnlensError as error:
            problem = error
        return Answer(
            np.array([trial for trial, _ in found], dtype=np.int64),
            np.array([values for _, values in found], dtype=np.float64),
            tuple(notes),
            None if problem is None else (type(problem).__name__, str(problem)),
        ).to_row(number)


def _counting(ray: Any) -> Any:
    """Counts how often each unit was begun; Ray gives a unit anew whose worker died."""

    # A class within a function is sent whole, so that its process need not import torch.
    class Attempts:
        def __init__(self) -> None:
            self._begun: dict[int, int] = {}

        def add(self, unit: int) -> int:
            self._begun[unit] = self._begun.get(unit, 0) + 1
            return self._begun[unit]

    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(**options)(Attempts).remote()


def _refuse_deadly(attempt: int) -> None:
    if attempt > ATTEMPTS:
        raise BudgetError(
            f"Workers died {ATTEMPTS} times over the same prompts and trials, of too little memory "
            "most likely. Give fewer workers a machine, a smaller batch_size or fewer tokens; what "
            "was done is kept: resume."
        )


def _answers(
    ray: Any, job: Sweep, units: Sequence[Unit], pool: Pool
) -> Generator[tuple[int, Answer]]:
    """Answers as they come, one a unit."""
    reference = ray.put((Sent.of(job), units))
    attempts = _counting(ray)
    rows = ray.data.from_items(list(range(len(units))), override_num_blocks=len(units))
    rows = rows.map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(reference, attempts, pool),
        **pool.options,
    )
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    answered: set[int] = set()
    batches = iter(rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    try:
        for row in batches:
            number = int(row["unit"][0])
            if number not in answered:
                answered.add(number)
                yield number, Answer.from_row(row)
    finally:
        with suppress(AttributeError):
            batches.close()
        ray.kill(attempts)


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
