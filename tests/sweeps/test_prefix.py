"""Positions before a trial's first change are not run again, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnlens as al
from attnlens.sweeps.clean_run import CleanRun
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.prefix import after_prefix, shared_positions
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.sweep import SweepSettings
from attnlens.sweeps.trials import Trial
from tests.sweeps.naive import assert_close, lens_of, one_by_one, some_heads, task_of

NAMES = [
    *("gpt2", "opt", "gpt_neox", "llama", "mistral", "gemma3_text", "qwen3", "phi3", "cohere2"),
    *("olmo2", "gpt_oss", "mixtral", "deepseek_v3", "diffllama", "llama4_text"),
]
DAILY = {"gpt2", "mistral", "gpt_oss", "deepseek_v3"}
EVERY = [pytest.param(n, marks=[] if n in DAILY else [pytest.mark.long]) for n in NAMES]
NONE = ["bert", "t5", "jamba", "recurrent_gemma"]
IN_PART = {"deepseek_v3": 1e-6, "llama4_text": 1e-6}  # routers in float32


@pytest.mark.parametrize("name", [*NAMES, *NONE])
def test_the_rest_of_the_prompts_is_run_as_in_the_whole(name: str) -> None:
    lens = lens_of(name)
    clean = CleanRun.of(lens, task_of(lens, (16, 15, 16)), "loss")
    rest = after_prefix(clean, 8)
    if name in NONE:
        assert rest is None
        return
    assert rest is not None
    torch.testing.assert_close(rest.logits, clean.logits, rtol=1e-6, atol=1e-6)
    assert rest.check() is None
    assert rest.tokens == 3 * 8
    assert rest.recording is not None
    for attended in rest.recording.attention.values():
        assert attended.call.query.shape[2] == 8
        assert attended.call.key.shape[2] == 16


@pytest.mark.parametrize("name", EVERY)
def test_every_mode_at_every_position_is_what_full_forwards_give(name: str) -> None:
    lens = lens_of(name)
    task = task_of(lens, (16, 14, 15), same=9)
    last = lens.anatomy.sites[-1]
    trials: list[Trial] = []
    for mode in Mode:
        ablator = Ablator.of(lens, task, mode)
        heads = [lens.anatomy.sites[0].head(1), last.head(0)]
        trials += [ablator.trial(heads, f"{mode} at {p}", p) for p in (2, 5, 9, 11, 13, -1, -3)]
        trials += [ablator.trial(own, f"{mode} {own}") for own in some_heads(lens)]
    kept = lens.run(task.corrupt_inputs(), keep=("q", "k", "v", "pattern"))
    late = torch.zeros_like(task.mask)
    late[:, 10:] = True
    step = {last.name: torch.linspace(-1, 1, 32).double()}
    edits = {
        "q": al.Patch(last.name, "q", kept.q, queries=late),
        "k": al.Patch(last.name, "k", kept.k, keys=late),
        "v": al.Patch("all", "v", kept.v, keys=slice(10, None)),
        "pattern": al.Patch(last.name, "pattern", kept.pattern, queries=late),
        "hide": al.Hide(last.name, queries=slice(10, None), keys=2),
        "drop": al.Drop("all", queries=slice(10, None), keys=slice(3, 11)),
        "by ids": al.Zero("all", queries=lambda ids: torch.arange(ids.shape[1]).expand_as(ids) > 9),
        "prefill": al.Zero("all", queries=slice(10, None), phase="prefill"),
    }
    if name != "diffllama":  # a block attends twice
        edits["steer"] = al.SteerStream(last.name, vectors=step, queries=slice(10, None))
    trials += [Trial(f"late {text}", (edit,), {}, 10) for text, edit in edits.items()]
    wanted = one_by_one(lens, task, trials)
    found = run_trials(lens, task, trials)
    assert found.notes == ()
    # A softmax in float32 rounds to neighbours 6e-8 apart where its scores, of products of another
    # height, differ in their last bit; which models that meets depends on the processor.
    upcast = any(site.upcast for site in lens.anatomy.sites)
    rounding = IN_PART.get(name, 1e-7 if upcast else 1e-10)
    assert_close(found.values, wanted, rounding)
    few = run_trials(lens, task, trials, settings=SweepSettings(batch_size=2, tokens=20))
    assert_close(few.values, wanted, rounding)


def test_only_the_positions_from_the_start_on_are_run() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens, (16, 16), same=9)
    seen: list[int] = []

    def note(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        seen.append(output.shape[:2].numel())

    def progress(done: int, _: int) -> None:
        if done == len(task):
            seen.clear()

    zero, resample = Ablator.of(lens, task, "zero"), Ablator.of(lens, task, "resample")
    handle: Any = lens.model.transformer.wte.register_forward_hook(note)
    heads = lens.anatomy.find("L1,L2")
    for trials, starts in (
        ([zero.trial([h], f"{h}", 3) for h in heads], [128, 128]),
        # the prefix, the clean run of the rest, four trials at a time
        ([zero.trial([h], f"{h}", 11) for h in heads], [20, 12, 48, 48]),
        ([zero.trial([h], f"{h}", 11) for h in heads[:6]], [128, 64]),  # they save too little
        # the donor's run comes before
        ([resample.trial([h]) for h in heads], [32, 16, 16, 64, 64]),
    ):
        run_trials(lens, task, trials, progress=progress)
        assert seen == starts
    handle.remove()


def test_starts_of_the_modes() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens, (16, 12, 14), same=7)
    (head, *_), *_ = some_heads(lens)
    zero, resample = Ablator.of(lens, task, "zero"), Ablator.of(lens, task, "resample")
    assert [zero.trial([head], "h", p).start for p in (None, 0, 5, -1, -12)] == [0, 0, 5, 11, 0]
    assert [resample.trial([head], "h", p).start for p in (None, 5, 9, -1)] == [7, 7, 9, 11]
    # The corrupt twins of these prompts are themselves.
    same = task_of(lens, (6, 6), same=6)
    assert Ablator.of(lens, same, "resample").trial([head]).start == 6


def test_positions_are_shared_where_it_saves() -> None:
    lens = lens_of("gpt2")
    clean = CleanRun.of(lens, task_of(lens, (40, 33)), "loss")  # reads from 30 on
    starts = [0, 4, 9, 10, 14, 15, 29, 30, 39]
    found = shared_positions(clean, starts * 16)
    assert found[:9] == [0, 0, 0, 10, 10, 15, 25, 30, 30]
    # 160 positions have to be saved: 5 trials from 30 on save 150, 6 save 180.
    assert shared_positions(clean, [30] * 5) == [0] * 5
    assert shared_positions(clean, [30] * 6) == [30] * 6
