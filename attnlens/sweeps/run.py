"""From trials to their values: in memory or in a store, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from attnlens.lens import Lens
from attnlens.sweeps.fingerprint import model_facts, task_facts
from attnlens.sweeps.manifest import Manifest
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import Progress, Sweep, SweepSettings, Take
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task


@dataclass(frozen=True)
class Values:
    """What a sweep found.

    Attributes:
        clean: the metric of each prompt with nothing edited.
        values: the metric of each prompt under each trial; NaN where a store has none yet.
        notes: what a reader should know: why runs were not restarted, parts that were left out.

    """

    clean: Float[Tensor, " prompt"]
    values: Float[Tensor, "trial prompt"]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, grid: NDArray[np.float64], notes: Sequence[str]) -> Values:
        """From values `[trial + 1, prompt]`, clean last."""
        values = torch.from_numpy(grid)
        return cls(values[-1], values[:-1], tuple(dict.fromkeys(notes)))


def run_trials(
    lens: Lens,
    task: Task,
    trials: Sequence[Trial],
    metric: str | None = None,
    settings: SweepSettings | None = None,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Values:
    """Grade a task under each trial.

    With a store, values that are there already are not computed again, and each is kept as soon as
    it is known; `about` is what a reader of the store alone has to know beside the trials.

    Raises:
        FileError: the store is of another sweep, or cannot be written.
        InputError, BudgetError: as `Sweep.run`.

    """
    settings = settings or SweepSettings()
    job = Sweep(lens, task, trials, metric, settings)
    if settings.store is None:
        grid = np.full((len(job.trials) + 1, len(task)), np.nan)

        def take(prompts: NDArray[np.int64], trial: int, values: NDArray[np.float64]) -> None:
            grid[trial, prompts] = values

        _work(job, take, None, progress)
        return Values.of(grid, job.notes)
    manifest = Manifest.of(
        model=model_facts(lens),
        task=task_facts(task, job.metric),
        prompts=len(task),
        trials=[(trial.name, trial.describe()) for trial in job.trials],
        seed=seed,
        settings=about,
    )
    begin = Store.resume if settings.resume else Store.create
    with begin(settings.store, manifest) as store:
        _work(job, store.append, store.done(), progress)
        store.flush()
        return Values.of(store.values(), (*job.notes, *store.notes))


def _work(
    job: Sweep, take: Take, done: NDArray[np.bool_] | None, progress: Progress | None
) -> None:
    if job.settings.ray is None:
        return job.run(take, done, progress)
    from attnlens.sweeps.spread import spread

    return spread(job, take, done, progress)
