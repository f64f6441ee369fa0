"""A sweep that is killed at any moment and resumed ends as if it had never been disturbed."""

import multiprocessing
import random
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd

from attnlens.sweeps.store import Store
from tests.sweeps.sweeping import begin, expected, known, sweep

# Processes forked from one that has imported what they need begin within milliseconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.sweeps.sweeping"])

Sweeper = tuple[BaseProcess, Connection]


def start(folder: Path, seconds: float) -> Sweeper:
    """A process that has begun to sweep."""
    reader, writer = FORKED.Pipe(duplex=False)
    process = FORKED.Process(target=sweep, args=(folder, seconds, writer))
    process.start()
    writer.close()
    assert reader.recv() is None
    return process, reader


def kill(sweeper: Sweeper, chance: random.Random) -> set[tuple[int, int]]:
    """Kill a process some time after some reports; the rows that it had reported as safe."""
    process, reader = sweeper
    safe: set[tuple[int, int]] = set()
    with suppress(EOFError, OSError):  # it has ended, or the kill fell into a report
        for _ in range(chance.randrange(3)):
            safe |= set(reader.recv())
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        while True:
            safe |= set(reader.recv())
    process.join()
    return safe


def check_whole(folder: Path, unbroken: Path) -> None:
    """The table is that of a run that nothing disturbed, and that of the formula."""
    sweep(folder, 1.0, None)
    sweep(unbroken, 1.0, None)
    table = Store.open(folder).table()
    pd.testing.assert_frame_equal(table, Store.open(unbroken).table())
    pd.testing.assert_frame_equal(table.drop(columns="name"), expected())
    assert Store.open(folder).notes == ()


def test_thirty_kills_lose_no_row_and_double_none(tmp_path: Path) -> None:
    chance, safe = random.Random(0), set[tuple[int, int]]()
    for _ in range(30):
        # At 0 most kills fall into a write, else most fall while rows are waiting.
        sweeper = start(tmp_path / "killed", chance.choice([0.0, 0.02]))
        safe |= kill(sweeper, chance)
        assert sweeper[0].exitcode == -signal.SIGKILL, "it had ended before: give it more to do"
        done = Store.resume(tmp_path / "killed", known()).done()
        assert all(done[place] for place in safe)
    assert 100 < len(safe) <= done.sum() < done.size
    check_whole(tmp_path / "killed", tmp_path / "unbroken")
    alone = pd.read_parquet(tmp_path / "killed" / "rows")
    assert not alone.duplicated(["prompt", "trial"]).any()


def test_processes_that_sweep_at_once_and_are_killed_lose_no_row(tmp_path: Path) -> None:
    chance, safe = random.Random(0), set[tuple[int, int]]()
    folder = tmp_path / "killed"
    sweepers = [start(folder, 0.0) for _ in range(3)]
    for number in range(6):  # always some still at work while another resumes
        safe |= kill(sweepers[number % 3], chance)
        sweepers[number % 3] = start(folder, 0.0)
    for sweeper in sweepers:
        safe |= kill(sweeper, chance)
    done = Store.open(folder).done()
    assert safe
    assert all(done[place] for place in safe)
    check_whole(folder, tmp_path / "unbroken")


def test_processes_may_begin_one_sweep_at_once(tmp_path: Path) -> None:
    for folder in (tmp_path / str(attempt) for attempt in range(5)):
        together = FORKED.Barrier(6)
        beginning = [FORKED.Process(target=begin, args=(folder, together)) for _ in range(6)]
        for process in beginning:
            process.start()
        for process in beginning:
            process.join()
        assert [process.exitcode for process in beginning] == [0] * 6
        assert Store.open(folder).done()[-1].all()
