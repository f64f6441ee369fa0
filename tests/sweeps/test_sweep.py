"""A planned sweep gives what one full forward a trial gives, and computes less."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.sweep import SweepSettings
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
        assert_close(found.values, wanted, ROUNDING)
        assert_close(found.clean, clean, ROUNDING)
        if name in WHOLE and how.restart:
            assert "Every run is a full forward" in found.notes[0]
        else:
            assert found.notes == ()
