"""What goes wrong in a sweep is told, what was done is kept, and the model is as it was."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import attnlens as al
from attnlens.errors import InputError
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import SweepSettings
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task
from tests.architectures import ARCHITECTURES
from tests.hooks.test_restart import state
from tests.sweeps.naive import assert_close, lens_of, one_by_one, task_of


def zeros() -> list[Trial]:
    return [Trial(f"L{n // 4}H{n % 4}", (al.Zero(f"L{n // 4}H{n % 4}"),)) for n in range(12)]


@pytest.mark.parametrize("metric", ["loss", "logit_difference", "accuracy"])
@pytest.mark.parametrize("restart", [True, False])
def test_a_trial_that_gives_no_numbers_is_named(tmp_path: Path, metric: str, restart: bool) -> None:
    """Also where the metric of NaN is a number: the likeliest of such tokens is one."""
    lens = lens_of("gpt2")
    task = task_of(lens)
    trials = [*zeros()[4:8], Trial("too much", (al.Scale("L1H2", 1e300),))]
    before = state(lens.model)
    settings = SweepSettings(store=tmp_path, restart=restart, tokens=60)
    with pytest.raises(InputError, match=r"Trial 'too much' makes the .* leave this trial out"):
        run_trials(lens, task, trials, metric, settings)
    assert state(lens.model) == before
    table = Store.open(tmp_path).table()
    assert list(table["name"].unique()) == ["clean", "L1H0", "L1H1", "L1H2", "L1H3"]
    assert len(table) == 5 * 3


def test_values_are_kept_that_were_computed_beside_those_without_numbers(tmp_path: Path) -> None:
    lens = lens_of("gpt2")
    trials = [*zeros()[4:6], Trial("too much", (al.Scale("L1H2", 1e300),))]
    with pytest.raises(InputError, match="too much"):
        run_trials(lens, task_of(lens), trials, settings=SweepSettings(store=tmp_path))
    assert Store.open(tmp_path).done().tolist() == [[True] * 3, [True] * 3, [False] * 3, [True] * 3]


def test_without_end_is_no_number_either() -> None:
    lens = lens_of("gpt2")
    trial = Trial("without end", (al.Scale("L2H0", float("inf")),))
    with pytest.raises(InputError, match="'without end' makes the loss of a prompt nan"):
        run_trials(lens, task_of(lens), [trial])


def test_a_model_without_numbers_is_told() -> None:
    lens = al.load(ARCHITECTURES["gpt2"].build())
    with torch.no_grad():
        lens.model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    for metric in ("loss", "accuracy"):
        with pytest.raises(InputError, match=r"gives nan .* nothing edited.*batch_size=1"):
            run_trials(lens, task_of(lens), zeros(), metric)


def test_a_model_that_makes_nan_of_padding_runs_prompt_by_prompt() -> None:
    """Gemma 2's windows hold nothing but padding in rows of padding; its layers spread that."""
    lens = lens_of("gemma2")
    task = task_of(lens)
    trials = zeros()[:8]
    with pytest.raises(InputError, match="try batch_size=1"):
        run_trials(lens, task, trials)
    found = run_trials(lens, task, trials, settings=SweepSettings(batch_size=1))
    for number in range(len(task)):
        alone = task.subset([number])
        width = int(alone.mask.sum())
        cut = Task(
            "one",
            alone.clean[:, :width],
            alone.corrupt[:, :width],
            alone.mask[:, :width],
            alone.reads,
            alone.answers,
            alone.wrong,
            "loss",
            ("",),
        )
        assert_close(found.values[:, [number]], one_by_one(lens, cut, trials), 1e-10)


@pytest.mark.parametrize("after", [3, 9])
def test_an_interrupted_sweep_is_resumed(tmp_path: Path, after: int) -> None:
    lens = lens_of("gpt2")
    task = task_of(lens, (14, 9, 12, 11))
    left = {"runs": after}

    def interrupt(_: nn.Module, __: tuple[Tensor]) -> None:
        left["runs"] -= 1
        if left["runs"] < 0:
            raise KeyboardInterrupt

    before = state(lens.model)
    settings = SweepSettings(store=tmp_path, batch_size=2, tokens=90)
    handle = lens.model.transformer.h[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_trials(lens, task, zeros(), settings=settings)
    handle.remove()
    assert state(lens.model) == before
    done = Store.open(tmp_path).done()
    assert 0 < done.sum() < done.size
    again = SweepSettings(store=tmp_path, resume=True, batch_size=2, tokens=90)
    told: list[tuple[int, int]] = []
    found = run_trials(lens, task, zeros(), settings=again, progress=lambda *at: told.append(at))
    assert told[0][0] > done.sum()
    assert told[-1] == (done.size, done.size)
    assert_close(found.values, one_by_one(lens, task, zeros()), 1e-10)
    table = Store.open(tmp_path).table()
    assert not table.duplicated(["prompt", "trial"]).any()
    unbroken = run_trials(lens, task, zeros(), settings=SweepSettings(batch_size=2, tokens=90))
    assert torch.equal(found.values, unbroken.values)


def test_resuming_with_other_parts_keeps_no_row_twice(tmp_path: Path) -> None:
    """pandas alone reads what is on disk, so nothing may stand there twice."""
    lens = lens_of("gpt2")
    task = task_of(lens, (14, 9, 12, 11))
    wanted = run_trials(lens, task, zeros(), settings=SweepSettings(store=tmp_path / "whole"))
    lost: list[int] = []

    def stop(done: int, _: int) -> None:
        lost.append(done)
        if len(lost) == 20:
            raise KeyboardInterrupt

    settings = SweepSettings(store=tmp_path / "broken", batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        run_trials(lens, task, zeros(), settings=settings, progress=stop)
    again = SweepSettings(store=tmp_path / "broken", batch_size=4, resume=True)
    found = run_trials(lens, task, zeros(), settings=again)
    assert_close(found.values, wanted.values, 1e-10)
    rows = pd.read_parquet(tmp_path / "broken" / "rows")
    assert not rows.duplicated(["prompt", "trial"]).any()


def test_a_sweep_inside_an_edit_is_refused() -> None:
    lens = lens_of("gpt2")
    with lens.edit(al.Zero("L0H0")):
        with pytest.raises(InputError, match="an edit is on"):
            run_trials(lens, task_of(lens), zeros())
        lens.run([[5, 6, 7]])
    run_trials(lens, task_of(lens), zeros()[:1])


def test_trials_that_cannot_be_are_refused() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens)
    decoding = Trial("later", (al.Zero("L0H0", phase="decode"),))
    with pytest.raises(InputError, match="'later' edits the decode phase"):
        run_trials(lens, task, [decoding])
    with pytest.raises(InputError, match="'nothing' has no edit"):
        Trial("nothing", ())
    with pytest.raises(InputError, match="say what they are"):
        Trial("made", lambda lens, prompts: ())
    twice = [zeros()[0], zeros()[0]]
    with pytest.raises(InputError, match="L0H0"):
        run_trials(lens, task, twice, settings=SweepSettings(store="never"))
    assert not Path("never").exists()
    with pytest.raises(InputError, match="batch_size=0"):
        SweepSettings(batch_size=0)
    with pytest.raises(InputError, match="store='DIR'"):
        SweepSettings(resume=True)


def test_prompts_longer_than_the_context_are_refused() -> None:
    lens = lens_of("gpt2")
    with pytest.raises(InputError, match="70 tokens and the model reads at most 64"):
        run_trials(lens, task_of(lens, (70, 9)), zeros())


def test_a_model_without_an_unembedding_is_refused() -> None:
    lens = al.load(ARCHITECTURES["gpt2"].build().transformer)
    with pytest.raises(InputError, match="has no logits"):
        run_trials(lens, task_of(lens), zeros())
