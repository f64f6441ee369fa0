"""Run many trials on a task: a clean run of some prompts at a time, and all trials on top of it.

For each part of the prompts the model runs once with nothing edited. Trials that change the same
layer first go together: the run is taken up at that layer, with as many trials side by side along
the batch as memory is given. Each value is the metric of one prompt under one trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from attnlens.errors import BudgetError, InputError
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from attnlens.sweeps.at_reads import edits_at, reads_suffice
from attnlens.sweeps.clean_run import CleanRun
from attnlens.sweeps.prefix import after_prefix, shared_positions
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task
from attnlens.tasks.task import check_metric

TOKENS = 1024
"""Positions in one forward where nothing is asked: enough that products are not thin, and few
enough that what lies between two of them stays near a cache."""

Progress = Callable[[int, int], None]
"""Called with (done, all) values."""

Take = Callable[[NDArray[np.int64], int, NDArray[np.float64]], None]
"""Takes values as they come: numbers of the prompts, number of the trial (-1 clean), values."""

_Make = Callable[[int], tuple[Edit, ...]]
"""The edits of the trial of a number, for the prompts whose turn it is."""


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep runs and where its values go; none of it changes a value but for rounding.

    Attributes:
        batch_size: prompts whose clean run is kept at a time.
        tokens: positions in one forward at most, those of all trials side by side together.
        restart: whether to go on from the first changed layer; else every run is a full one.
        store: folder in which every value is kept as soon as it is known.
        resume: whether to go on with the sweep in that folder.
        ray: address of a Ray cluster, or "local"; the work is spread over its machines.
        workers: models on the cluster; one a GPU, or one, where not given.
        gpus: share of a GPU that each of them takes; 0 for none.

    """

    batch_size: int = 16
    tokens: int = TOKENS
    restart: bool = True
    store: str | Path | None = None
    resume: bool = False
    ray: str | None = None
    workers: int | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.tokens < 1:
            raise InputError(
                f"batch_size={self.batch_size} and tokens={self.tokens}: give 1 or more of both."
            )
        if self.resume and self.store is None:
            raise InputError("resume=True goes on with a sweep in a folder: give store='DIR' too.")


class Sweep:
    """Trials on a task with one model."""

    def __init__(
        self,
        lens: Lens,
        task: Task,
        trials: Sequence[Trial],
        metric: str | None = None,
        settings: SweepSettings | None = None,
    ) -> None:
        if lens.edited:
            raise InputError(
                "A sweep compares with the model as it is, and an edit is on: leave the `with "
                "lens.edit(...)` block, or make its edits part of the trials."
            )
        self.lens, self.task, self.trials = lens, task, tuple(trials)
        self.metric = check_metric(metric or task.metric)
        self.settings = settings or SweepSettings()
        self.notes: list[str] = []
        self._restart: bool | None = None if self.settings.restart else False
        self._prefix = self.settings.restart

    def run(
        self, take: Take, done: NDArray[np.bool_] | None = None, progress: Progress | None = None
    ) -> None:
        """Compute every value that is not done, `[trial + 1, prompt]` with clean last.

        Values are handed to `take` as soon as they are known.

        Raises:
            InputError: logits that are no numbers, in the clean run or under a trial.
            BudgetError: one trial on one prompt does not fit in memory.

        """
        if done is None:
            done = np.zeros((len(self.trials) + 1, len(self.task)), dtype=np.bool_)
        left, total = int((~done).sum()), done.size
        for prompts in self._parts():
            missing = ~done[:, prompts]
            if not missing.any():
                continue
            for trial, values in self._part(prompts, missing):
                new = missing[trial]
                take(np.arange(prompts.start, prompts.stop)[new], trial, values[new])
                left -= int(new.sum())
                if progress is not None:
                    progress(total - left, total)

    def _parts(self) -> Iterator[slice]:
        size = self.settings.batch_size
        for start in range(0, len(self.task), size):
            yield slice(start, min(start + size, len(self.task)))

    def _part(
        self, prompts: slice, missing: NDArray[np.bool_]
    ) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Values of each missing trial on some prompts; the clean run first."""
        clean = self._clean(prompts)
        if missing[-1].any():
            yield -1, clean.values.numpy()
        wanted = [i for i in range(len(self.trials)) if missing[i].any()]

        def make(number: int) -> tuple[Edit, ...]:
            return self._edits(clean, prompts, number)

        for run, site, group in self._groups(clean, wanted, make):
            for number, values in self._group(run, site, group, make):
                self._check(number, values)
                yield number, values.numpy()

    def _clean(self, prompts: slice) -> CleanRun:
        """The clean run of some prompts, recorded where this model can be restarted."""
        part, record = self.task.subset(prompts), self._restart is not False
        try:
            clean = CleanRun.of(self.lens, part, self.metric, record)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise self._too_large(part) from error
            raise
        clean.check_finite()
        return self._settled(clean)

    def _groups(
        self, clean: CleanRun, wanted: Sequence[int], make: _Make
    ) -> Iterator[tuple[CleanRun, str, list[int]]]:
        """Trials by where they begin and by the site that they change first, from below.

        Each group comes with the clean run on which it goes on.
        """
        order = {site.name: i for i, site in enumerate(clean.anatomy.sites)}
        places: dict[tuple[int, int, bool], list[int]] = {}
        starts = [self.trials[number].start if self._prefix else 0 for number in wanted]
        for number, start in zip(wanted, shared_positions(clean, starts), strict=True):
            site, short = self._place(clean, number, make)
            # Fewer rows than those from the start on.
            places.setdefault((start * (not short), order[site], short), []).append(number)
        run = clean
        for start, site, short in sorted(places):
            if start != run.first:
                run = self._after_prefix(clean, start)
            own = run.at_reads if short else None
            yield own or run, clean.anatomy.sites[site].name, places[start, site, short]

    def _place(self, clean: CleanRun, number: int, make: _Make) -> tuple[str, bool]:
        """The site that a trial changes first, and whether rows that are read suffice for it."""
        known = self.trials[number].first
        if known is not None:
            return known, False
        edits = make(number)
        site = clean.first_site(edits)
        return site, reads_suffice(clean, edits, site)

    def _edits(self, clean: CleanRun, prompts: slice, number: int) -> tuple[Edit, ...]:
        try:
            return self.trials[number].of_prompts(self.lens, prompts, clean.width)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise self._too_large(clean.task) from error
            raise

    def _after_prefix(self, clean: CleanRun, start: int) -> CleanRun:
        """The clean run from a position on; that of all positions where this model has none."""
        found = after_prefix(clean, start) if self._prefix else None
        self._prefix = found is not None
        return found or clean

    def _group(
        self, clean: CleanRun, site: str, group: Sequence[int], make: _Make
    ) -> Iterator[tuple[int, Float[Tensor, " prompt"]]]:
        """Values of trials of one site, as many at a time as fit; their edits are made as due."""
        size = max(self.settings.tokens // clean.tokens, 1)
        forwards = -(-len(group) // size)
        size = -(-len(group) // forwards)  # forwards of one size: a small one saves little
        start = 0
        while start < len(group):
            taken = group[start : start + size]
            try:
                edits = [make(number) for number in taken]
                if clean.rows is not None:
                    edits = [edits_at(own, clean) for own in edits]
                values = clean.run(edits, site)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(taken) == 1:
                    raise self._too_large(clean.task) from error
                values = None
            if values is None:  # the error no longer holds on to what the forward had made
                size = len(taken) // 2
                self.settings = replace(self.settings, tokens=size * clean.tokens)
                _give_back()
                continue
            yield from zip(taken, values, strict=True)
            start += len(taken)

    def _settled(self, clean: CleanRun) -> CleanRun:
        """The clean run, to be restarted only where one run showed that this model can be."""
        if self._restart is None:
            problem = clean.check()
            self._restart = problem is None
            if problem is not None:
                self.notes.append(f"Every run is a full forward: {problem.rstrip('.')}.")
        self._prefix = self._prefix and self._restart
        return clean if self._restart else replace(clean, recording=None)

    def _too_large(self, part: Task) -> BudgetError:
        return BudgetError(
            f"Memory does not suffice for {len(part)} prompts of up to "
            f"{int(part.mask.sum(1).max())} tokens under one trial. Give a smaller batch_size (it "
            f"is {self.settings.batch_size}); what was done is kept."
        )

    def _check(self, number: int, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise InputError(
                f"Trial {self.trials[number].name!r} makes the {self.metric} of a prompt "
                f"{float(values[~values.isfinite()][0])}: the edited model gives no numbers. What "
                "was done before is kept; leave this trial out, or take another mode."
            )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def _give_back() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
