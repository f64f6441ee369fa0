"""A planned sweep gives what one full forward a trial gives, and computes less."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnlens as al
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.sweep import Sweep, SweepSettings
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task
from tests.sweeps.naive import assert_close, lens_of, one_by_one, some_heads, task_of

NAMES = [
    *("gpt2", "opt", "gpt_neox", "llama", "mistral", "gemma3_text", "qwen3", "phi3", "cohere"),
    *("olmo2", "stablelm", "mixtral", "gpt_oss", "deepseek_v3", "diffllama"),
    *("jamba", "zamba2", "falcon_h1", "qwen3_next"),
    *("bert", "modernbert", "albert", "t5", "bart"),
]
WHOLE = {"albert"}  # no forward can go on from a layer
STILL = {"t5": ["q"], "bart": ["q"]}  # a row that sees one key
ROUNDING = 1e-10  # float64; products of another height round otherwise
IN_PART = {"deepseek_v3": 1e-6}  # its router is float32, and rounds so


def edits_of(lens: Lens, task: Task) -> dict[str, tuple[Edit, ...]]:
    """Patches, steps and changed rows; of heads, of streams, and of both together."""
    sites = lens.anatomy.sites
    first, middle, last = sites[0], sites[len(sites) // 2], sites[-1]
    kept = lens.run(task.corrupt_inputs(), keep=("q", "k", "v", "pattern", "residual"))
    streams = dict(kept.kept["residual"])
    # A block has one stream, of the first of its sites.
    own = list({site.block: site for site in reversed(sites)}.values())[::-1]
    mlps = [site for site in own if site.block in lens.mlps]
    width = next(iter(streams.values())).shape[-1]
    step = {site.name: torch.linspace(-1, 1, width).double() for site in sites}
    found: dict[str, tuple[Edit, ...]] = {
        "q": (al.Patch(middle.name, "q", kept.q),),
        "k": (al.Patch(str(last.head(0)), "k", kept.k),),
        "v": (al.Patch(first.name, "v", kept.v),),
        "pattern": (al.Patch(str(last.head(1)), "pattern", kept.pattern),),
        "hide": (al.Hide(middle.name, keys=0),),
        "drop": (al.Drop(f"{first.name},{last.name}", keys=slice(0, 3)),),
        "bias": (al.Bias(str(last.head(0)), 1.5, keys=0),),
        "zero then scale": (al.Zero(str(last.head(1))), al.Scale(first.name, 0.5)),
        "at a row": (al.Zero(middle.name, queries=-1), al.Zero(first.name, queries=[0])),
    }
    if len(own) > 1:
        found["residual"] = (al.PatchStream(own[-1].name, values=streams),)
        found["steer"] = (al.SteerStream(own[0].name, vectors=step), al.Zero(str(last.head(0))))
    if mlps:
        found["mlp"] = (al.SteerStream(mlps[0].name, "mlp", vectors=step),)
        found["last mlp"] = (al.PatchStream(mlps[-1].name, "mlp", values=streams),)
    return found


@cache
def trials_of(name: str) -> tuple[Task, tuple[Trial, ...], Tensor, Tensor]:
    """A task, trials of every mode and of many edits, and what the slow way gives, clean last."""
    lens = lens_of(name)
    task = task_of(lens)
    trials: list[Trial] = []
    for mode in Mode:
        ablator = Ablator.of(lens, task, mode)
        for heads in some_heads(lens):
            crosses = any(lens.anatomy[head.site].kind == "cross" for head in heads)
            if mode is not Mode.IDENTITY or not crosses:
                trials.append(ablator.trial(heads, f"{mode} {heads}"))
    trials += [Trial(text, edits) for text, edits in edits_of(lens, task).items()]
    values = one_by_one(lens, task, trials)
    clean = task.score(lens.logits(task.clean_inputs(), task.reads))
    return task, tuple(trials), values, clean


@pytest.mark.parametrize("name", NAMES)
def test_batched_is_unbatched_is_restarted_is_full(name: str) -> None:
    lens = lens_of(name)
    task, trials, wanted, clean = trials_of(name)
    moved = (wanted - clean).abs().amax(1)
    still = {trial.name for trial, by in zip(trials, moved, strict=True) if by < 1e-9}
    assert not still - set(STILL.get(name, ())), "an edit that moves nothing shows nothing"
    for how in (
        SweepSettings(),
        SweepSettings(tokens=1),
        SweepSettings(batch_size=2, tokens=90),
        SweepSettings(restart=False),
    ):
        found = run_trials(lens, task, trials, settings=how)
        assert_close(found.values, wanted, IN_PART.get(name, ROUNDING))
        # In batches of another height routers of float32 round otherwise without an edit, too.
        assert_close(found.clean, clean, IN_PART.get(name, ROUNDING))
        if name in WHOLE and how.restart:
            assert "Every run is a full forward" in found.notes[0]
        else:
            assert found.notes == ()


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "t5"])
def test_in_float32(name: str) -> None:
    lens = lens_of(name, double=False)
    task = task_of(lens)
    trials = [
        Ablator.of(lens, task, mode).trial(heads, f"{mode} {heads}")
        for mode in (Mode.ZERO, Mode.RESAMPLE, Mode.UNIFORM, Mode.FROZEN)
        for heads in some_heads(lens)
    ]
    wanted = one_by_one(lens, task, trials)
    for how in (SweepSettings(), SweepSettings(tokens=1), SweepSettings(restart=False)):
        assert_close(run_trials(lens, task, trials, settings=how).values, wanted, 1e-6)


@given(
    st.lists(st.integers(4, 16), min_size=1, max_size=5),
    st.integers(1, 6),
    st.integers(1, 200),
    st.integers(0, 4),
)
@settings(max_examples=15)
def test_any_lengths_at_any_sizes(
    lengths: list[int], batch_size: int, tokens: int, same: int
) -> None:
    lens = lens_of("llama")
    task = task_of(lens, lengths, same)
    trials = [
        *(Ablator.of(lens, task, "resample").trial(heads) for heads in some_heads(lens)),
        *(
            Ablator.of(lens, task, "identity").trial(some_heads(lens)[0], f"at {p}", p)
            for p in (0, 3, -1, -4)
        ),
    ]
    how = SweepSettings(batch_size=batch_size, tokens=tokens)
    found = run_trials(lens, task, trials, settings=how)
    assert_close(found.values, one_by_one(lens, task, trials), ROUNDING)


@pytest.mark.parametrize("restart", [True, False])
def test_learned_sinks_are_not_taken_for_rows(restart: bool) -> None:
    """Two prompts under two trials are four rows, as many as there are heads, each with a sink."""
    lens = lens_of("gpt_oss")
    task = task_of(lens, (14, 9))
    trials = [Trial(f"{i}", (al.Hide(f"L1H{i}", keys=0), al.Zero("L0H0"))) for i in range(2)]
    found = run_trials(lens, task, trials, settings=SweepSettings(restart=restart))
    assert_close(found.values, one_by_one(lens, task, trials), ROUNDING)


class Ran:
    """Which modules of a GPT-2 ran, and on how many positions, while trials ran."""

    def __init__(self, lens: Lens) -> None:
        self.of_model: Counter[str] = Counter()
        self.positions: dict[str, int] = {}
        self.handles = [
            module.register_forward_hook(self._note(name))
            for name, module in lens.model.named_modules()
            if name.endswith(("c_attn", "c_fc", "wte", "lm_head"))
        ]

    def _note(self, name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
            self.of_model[name] += 1
            self.positions[name] = output.shape[:2].numel()

        return hook

    def forget(self) -> None:
        self.of_model.clear()


def ran_under(trials: list[Trial], tokens: int = 10_000) -> tuple[Counter[str], dict[str, int]]:
    """What trials alone run, at three prompts of 16, 9 and 12 tokens, read at two each."""
    lens = lens_of("gpt2")
    task = task_of(lens, (16, 9, 12))
    run_trials(lens, task, trials)  # the MLPs are found
    ran = Ran(lens)

    def progress(done: int, _: int) -> None:
        if done == len(task):  # the clean run and its check are over
            ran.forget()

    run_trials(lens, task, trials, settings=SweepSettings(tokens=tokens), progress=progress)
    for handle in ran.handles:
        handle.remove()
    return ran.of_model, ran.positions


def test_only_what_lies_above_an_edit_is_run() -> None:
    ran, positions = ran_under([Trial(f"{h}", (al.Zero(f"L1H{h}"),)) for h in range(4)])
    assert ran == {
        "transformer.wte": 1,
        "transformer.h.1.mlp.c_fc": 1,
        "transformer.h.2.attn.c_attn": 1,
        "transformer.h.2.mlp.c_fc": 1,
        "lm_head": 1,
    }
    copies = 4 * 3
    assert positions["transformer.h.1.mlp.c_fc"] == positions["transformer.h.2.attn.c_attn"]
    assert positions["transformer.h.1.mlp.c_fc"] == copies * 16
    assert positions["transformer.h.2.mlp.c_fc"] == positions["lm_head"] == copies * 2


def test_only_as_many_as_fit_run_at_once() -> None:
    ran, positions = ran_under([Trial(f"{h}", (al.Zero(f"L2H{h}"),)) for h in range(4)], 3 * 32)
    assert ran == {"transformer.wte": 2, "transformer.h.2.mlp.c_fc": 2, "lm_head": 2}
    assert positions["lm_head"] == 2 * 3 * 2


def test_a_changed_key_makes_its_attention_run_from_what_is_known() -> None:
    """No projection of a query runs at the layer of the edit, but its map is made anew."""
    ran, _ = ran_under([Trial("steer", (al.Steer("L2H0", "k", {"L2": torch.ones(4, 8)}),))])
    assert ran == {"transformer.wte": 1, "transformer.h.2.mlp.c_fc": 1, "lm_head": 1}


def test_a_changed_stream_runs_all_rows_of_the_last_mlp() -> None:
    step = {"L2": torch.ones(32)}
    ran, positions = ran_under([Trial("mlp", (al.SteerStream("L2", "mlp", vectors=step),))])
    assert ran == {"transformer.wte": 1, "transformer.h.2.mlp.c_fc": 1, "lm_head": 1}
    assert positions["transformer.h.2.mlp.c_fc"] == 3 * 16
    ran, _ = ran_under([Trial("residual", (al.SteerStream("L2", vectors=step),))])
    assert ran["transformer.h.2.attn.c_attn"] == 1
    assert ran["transformer.h.1.mlp.c_fc"] == 0


def test_layers_come_from_below_whatever_the_order_of_trials() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens)
    order = [5, 0, 9, 4, 11, 8]
    trials = [Trial(f"{n}", (al.Zero(f"L{n // 4}H{n % 4}"),)) for n in order]
    taken: list[int] = []
    Sweep(lens, task, trials).run(lambda _, trial, __: taken.append(trial))
    assert [order[number] for number in taken[1:]] == [0, 5, 4, 9, 11, 8]
    assert taken[0] == -1
    assert_close(run_trials(lens, task, trials).values, one_by_one(lens, task, trials), ROUNDING)


def test_what_is_done_is_not_done_again() -> None:
    lens = lens_of("gpt2")
    task = task_of(lens)
    trials = [Trial(f"{h}", (al.Zero(f"L1H{h}"),)) for h in range(4)]
    done = np.zeros((5, 3), dtype=np.bool_)
    done[[0, 2, 4]] = True
    done[1, :2] = True
    taken: list[tuple[int, list[int]]] = []
    told: list[tuple[int, int]] = []
    Sweep(lens, task, trials, settings=SweepSettings(batch_size=2)).run(
        lambda prompts, trial, _: taken.append((trial, prompts.tolist())),
        done,
        lambda *at: told.append(at),
    )
    assert taken == [(3, [0, 1]), (1, [2]), (3, [2])]
    assert told == [(13, 15), (14, 15), (15, 15)]
