"""A small ablation with a store, for processes that are killed in the middle of it."""

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from attnlens.lens import Lens
from attnlens.sweeps.modes import Ablator
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.sweep import SweepSettings
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task
from tests.sweeps.naive import lens_of, task_of


def asked() -> tuple[Lens, Task, list[Trial]]:
    """24 trials on 40 prompts."""
    lens = lens_of("gpt2")
    task = task_of(lens, [6 + number % 9 for number in range(40)])
    heads = [site.head(number) for site in lens.anatomy.sites for number in range(site.heads)]
    modes = ("zero", "resample")
    trials = [
        ablator.trial([head], f"{ablator.mode} {head}")
        for ablator in (Ablator.of(lens, task, mode) for mode in modes)
        for head in heads
    ]
    return lens, task, trials


def ablate(folder: Path, report: Connection | None = None) -> None:
    """Go on with the sweep in a folder; report before it begins and after each of its values."""
    lens, task, trials = asked()
    if report is not None:
        report.send(None)
    run_trials(
        lens,
        task,
        trials,
        settings=SweepSettings(store=folder, resume=True, batch_size=4, tokens=60),
        progress=None if report is None else lambda *at: report.send(at),
    )


# Before a server forks, so that processes begin at once; a fork has none of torch's threads.
torch.set_num_threads(1)
asked()
