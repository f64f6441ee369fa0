"""Every kind of sweep is read from its store alone, finished or not."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.stored import stored_ablation
from attnlens.errors import FileError
from attnlens.lens import Lens
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task, repeated_tokens

Run = Callable[..., Any]
KINDS: dict[str, Run] = {
    "heads": lambda lens, task, **how: al.ablate(lens, task, "L1H0,L2H3", "mean", **how),
    "set": lambda lens, task, **how: al.ablate_together(lens, task, "L0H1,L1H2", **how),
    "groups": lambda lens, task, **how: al.ablate_groups(
        lens, task, {"one": "L0H1", "two": "L1"}, "identity", **how
    ),
    "pairs": lambda lens, task, **how: al.ablate_pairs(lens, task, "L0H1,L1H2,L2H0", **how),
    "positions": lambda lens, task, **how: al.ablate_positions(
        lens, task, "L0H1,L1H2", [0, 3, -1], **how
    ),
    "edits": lambda lens, task, **how: al.try_edits(
        lens, task, {"half": al.Scale("L1", 0.5), "both": (al.Zero("L0"), al.Uniform("L1"))}, **how
    ),
    "patching": lambda lens, task, **how: al.patch(
        lens, task, "z", "L0H1,L1H2", (3, -1), "noise", **how
    ),
    "patched layers": lambda lens, task, **how: al.patch(lens, task, "mlp", **how),
}


@pytest.fixture(scope="module")
def task(random_lens: Lens) -> Task:
    return repeated_tokens(random_lens, prompts=4, period=5)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(9e9), other.nan_to_num(9e9))
    return bool(one == other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_that_of_the_run(
    random_lens: Lens, task: Task, tmp_path: Path, kind: str
) -> None:
    made = KINDS[kind](random_lens, task, sweep=SweepSettings(store=tmp_path / "sweep"), seed=3)
    read = stored_ablation(tmp_path / "sweep")
    assert type(read) is type(made)
    apart = [
        f.name for f in fields(made) if not _equal(getattr(made, f.name), getattr(read, f.name))
    ]
    assert apart == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_is_left_out_and_said(
    random_lens: Lens, task: Task, tmp_path: Path, kind: str
) -> None:
    """Two prompts of four are there: the result is that of a task of these two."""

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    sweep = SweepSettings(batch_size=2, store=tmp_path / "sweep")
    with pytest.raises(KeyboardInterrupt):
        KINDS[kind](random_lens, task, sweep=sweep, progress=stop)
    read = stored_ablation(tmp_path / "sweep")
    grid = Store.open(tmp_path / "sweep").values()
    assert f"{int((grid != grid).sum())} of {grid.size} values are missing" in read.notes[0]
    half = KINDS[kind](random_lens, task.subset(slice(2)))
    if kind == "heads":  # means are of the corrupt prompts, here of all four
        half = al.ablate(
            random_lens, task.subset(slice(2)), "L1H0,L2H3", "mean", reference=task.corrupt_inputs()
        )
    for name in ("effect", "interaction", "joint", "control", "share"):
        if hasattr(half, name):
            wanted, found = (torch.as_tensor(getattr(r, name)) for r in (half, read))
            assert torch.allclose(found, wanted, atol=1e-12, equal_nan=True), name


def test_sweeps_without_a_result_and_folders_without_a_sweep(
    random_lens: Lens, task: Task, tmp_path: Path
) -> None:
    from attnlens.sweeps.run import run_trials
    from attnlens.sweeps.trials import Trial

    settings = SweepSettings(store=tmp_path / "own")
    run_trials(random_lens, task, [Trial("quiet", (al.Zero("L0"),))], settings=settings)
    with pytest.raises(FileError, match="no result"):
        stored_ablation(tmp_path / "own")
    with pytest.raises(FileError, match="holds no sweep"):
        stored_ablation(tmp_path)
