"""A sweep without a model, whose values are known, for processes that are killed."""

import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pandas as pd

from attnlens.sweeps.manifest import Manifest
from attnlens.sweeps.store import Store

PROMPTS, TRIALS = 8, 300


def known() -> Manifest:
    trials = [(f"h{trial}", {"heads": [trial]}) for trial in range(TRIALS)]
    return Manifest.of(model={}, task={}, prompts=PROMPTS, trials=trials)


def value(prompts: np.ndarray, trial: int) -> np.ndarray:
    return np.sin(1000.0 * trial + prompts)


def expected() -> pd.DataFrame:
    trials = np.repeat(np.arange(-1, TRIALS), PROMPTS)
    prompts = np.tile(np.arange(PROMPTS), TRIALS + 1)
    values = np.concatenate([value(np.arange(PROMPTS), trial) for trial in range(-1, TRIALS)])
    return pd.DataFrame({"prompt": prompts, "trial": trials, "value": values})


def begin(folder: Path, together: Barrier) -> None:
    """Resume at the same moment as others."""
    together.wait()
    with Store.resume(folder, known()) as store:
        store.append(np.arange(PROMPTS), -1, value(np.arange(PROMPTS), -1))


def sweep(folder: Path, seconds: float, report: Connection | None) -> None:
    """Compute what is missing; report when it begins, and the rows that are safe by now."""
    if report is not None:
        report.send(None)
    with Store.resume(folder, known(), seconds=seconds) as store:
        missing = ~store.done()
        told: list[tuple[int, int]] = []
        for trial in range(-1, TRIALS):
            for prompts in np.array_split(np.flatnonzero(missing[trial]), 2):
                if not len(prompts):
                    continue
                time.sleep(0.002)  # the model at work
                store.append(prompts, trial, value(prompts, trial))
                told += [(trial, int(prompt)) for prompt in prompts]
            if told and report is not None and (seconds == 0 or trial % 4 == 0):
                store.flush()
                report.send(told)
                told = []
