"""Whole sweeps, models and all, that are killed at any moment and resumed."""

import multiprocessing
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch

from attnlens.sweeps.store import Store
from tests.sweeps.ablating import ablate, asked
from tests.sweeps.naive import assert_close, one_by_one

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.sweeps.ablating"])


def kill_once(folder: Path, chance: random.Random) -> None:
    """Resume in a process of its own, and kill it some values after it began to compute."""
    reader, writer = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=ablate, args=(folder, writer))
    process.start()
    writer.close()
    assert reader.poll(60), "it has not begun"
    assert reader.recv() is None
    with suppress(EOFError):
        for _ in range(chance.randrange(4)):
            reader.recv()
    time.sleep(chance.uniform(0, 0.1))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it had ended before: give it more to do"


@pytest.mark.long
def test_thirty_kills_leave_the_table_of_an_unbroken_run(tmp_path: Path) -> None:
    chance, folder, counts = random.Random(0), tmp_path / "killed", list[int]()
    for _ in range(30):
        kill_once(folder, chance)
        if (folder / "manifest.json").exists():
            counts.append(int(Store.open(folder).done().sum()))
    assert counts == sorted(counts)
    assert len(set(counts)) > 5, "kills did not fall among values"
    ablate(folder)
    ablate(tmp_path / "unbroken")
    rows = pd.read_parquet(folder / "rows")
    assert not rows.duplicated(["prompt", "trial"]).any()
    table = Store.open(folder).table()
    assert len(table) == 25 * 40
    pd.testing.assert_frame_equal(table, Store.open(tmp_path / "unbroken").table(), rtol=1e-10)
    lens, task, trials = asked()
    values = Store.open(folder).values()
    assert_close(torch.from_numpy(values[:-1]), one_by_one(lens, task, trials), 1e-10)
