"""Memory that runs out: fewer trials at a time, the same values; and a way out where one is many.

The allocator is a hook that raises what a device raises when more rows than it holds come along.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnlens as al
from attnlens.errors import BudgetError
from attnlens.lens import Lens
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import Sweep, SweepSettings, out_of_memory
from attnlens.sweeps.trials import Trial
from tests.hooks.test_restart import state
from tests.sweeps.naive import assert_close, lens_of, one_by_one, task_of

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@contextmanager
def room_for(lens: Lens, rows: int, error: BaseException = ERRORS[0]) -> Generator[list[int]]:
    """A device on which the last block takes so many rows; gives the rows of every attempt."""
    tried: list[int] = []

    def allocate(_: nn.Module, args: tuple[Tensor]) -> None:
        tried.append(args[0].shape[0])
        if args[0].shape[0] > rows:
            raise error

    handle = lens.model.transformer.h[2].mlp.register_forward_pre_hook(allocate)
    try:
        yield tried
    finally:
        handle.remove()


def trials(layer: int = 1) -> list[Trial]:
    return [Trial(f"L{layer}H{h}", (al.Scale(f"L{layer}H{h}", 0.5 * h),)) for h in range(4)]


@pytest.mark.parametrize("error", ERRORS)
def test_fewer_trials_run_at_a_time_and_values_are_the_same(error: BaseException) -> None:
    lens = lens_of("gpt2")
    task = task_of(lens)
    asked = [*trials(1), *trials(2)]
    wanted = one_by_one(lens, task, asked)
    assert lens.mlps  # found once, by a run of its own
    before = state(lens.model)
    with room_for(lens, 7, error) as tried:
        found = run_trials(lens, task, asked)
    assert_close(found.values, wanted, 1e-10)
    # clean and its check; 4 trials of 3 prompts are too many, 2 are not; remembered for layer 2
    assert tried == [3, 3, 12, 6, 6, 6, 6]
    assert state(lens.model) == before


def test_one_trial_that_does_not_fit_is_told_with_the_way_out() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens)
    first = [Trial("L0", (al.Zero("L0"),))]
    seen: list[tuple[int, int]] = []
    job = Sweep(lens, task, first)

    def shrink(done: int, every: int) -> None:
        seen.append((done, every))

    rows = {"now": 3}

    def allocate(_: nn.Module, args: tuple[Tensor]) -> None:
        if args[0].shape[0] > rows["now"]:
            raise ERRORS[0]

    handle = lens.model.transformer.h[2].mlp.register_forward_pre_hook(allocate)

    def take(_: object, trial: int, __: object) -> None:
        rows["now"] = 2  # less room after the clean run

    with pytest.raises(BudgetError, match=r"3 prompts of up to 14 tokens.*batch_size \(it is 16\)"):
        job.run(take, progress=shrink)
    handle.remove()
    assert seen == [(3, 6)]


def test_a_clean_run_that_does_not_fit_is_told_too() -> None:
    lens = lens_of("gpt2")
    before = state(lens.model)
    with pytest.raises(BudgetError, match="smaller batch_size"), room_for(lens, 2):
        run_trials(lens, task_of(lens), trials())
    assert state(lens.model) == before
    with room_for(lens, 2) as tried:
        run_trials(lens, task_of(lens), trials(), settings=SweepSettings(batch_size=2))
    assert max(tried) > 2
    assert tried.count(2) > 4


def test_what_was_done_is_kept_and_resumed(tmp_path) -> None:
    lens = lens_of("gpt2")
    task = task_of(lens, (14, 9, 12, 11))
    store = SweepSettings(store=tmp_path / "sweep", batch_size=2, tokens=30)
    calls = {"left": 6}

    def allocate(_: nn.Module, args: tuple[Tensor]) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise ERRORS[0]

    handle = lens.model.transformer.h[2].mlp.register_forward_pre_hook(allocate)
    with pytest.raises(BudgetError):
        run_trials(lens, task, trials(), settings=store)
    handle.remove()
    done = Store.open(tmp_path / "sweep").done()
    assert 0 < done.sum() < done.size
    again = SweepSettings(store=tmp_path / "sweep", resume=True, batch_size=2, tokens=30)
    found = run_trials(lens, task, trials(), settings=again)
    assert_close(found.values, one_by_one(lens, task, trials()), 1e-10)
    assert np.array_equal(Store.open(tmp_path / "sweep").done(), np.ones((5, 4), dtype=bool))


def test_other_errors_are_not_taken_for_memory() -> None:
    lens = lens_of("gpt2")
    error = RuntimeError("shapes cannot be multiplied")
    assert not out_of_memory(error)
    with pytest.raises(RuntimeError, match="multiplied"), room_for(lens, 7, error):
        run_trials(lens, task_of(lens), trials())
