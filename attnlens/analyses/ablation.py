"""Head ablation: how much worse, or better, a task goes without a head.

A head's output is replaced (see `Mode`), and the task is graded again; each head is set beside
matched random heads of its layer. Michel et al. 2019, Are sixteen heads really better than one?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.asked import Asked, Facts
from attnlens.analyses.per_head import head_frame
from attnlens.anatomy import Head, HeadSpec
from attnlens.anatomy.sites import read_head
from attnlens.lens import Inputs, Lens
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.run import Values, run_trials
from attnlens.sweeps.sweep import Progress, SweepSettings
from attnlens.tasks import Task

__all__ = ["Ablation", "Mode", "ablate"]


@dataclass(frozen=True)
class Ablation:
    """Effect of ablating each head by itself.

    Attributes:
        task, metric, mode: what was graded, by what, and what took the place of a head's output.
        heads: the heads that were ablated, in the order of every `head` axis.
        clean: the metric of each prompt, nothing ablated.
        ablated: the metric of each prompt with one head ablated; NaN where a store read before its
            sweep ended has none.
        effect: `mean(ablated - clean)` over prompts, with bounds `low` and `high`; a head that
            helps has a negative effect on accuracy and logit difference, a positive one on loss.
        control: the same for matched random heads, those of `control_heads`: other heads of the
            same layer, averaged; NaN where the layer has no other head.
        seed: of the choice of control heads and of the bootstrap.
        confidence: of the intervals.
        notes: what a reader should know.

    """

    task: str
    metric: str
    mode: Mode
    heads: tuple[Head, ...]
    clean: Float[Tensor, " prompt"]
    ablated: Float[Tensor, "head prompt"]
    effect: Float[Tensor, " head"]
    low: Float[Tensor, " head"]
    high: Float[Tensor, " head"]
    control: Float[Tensor, " head"]
    control_low: Float[Tensor, " head"]
    control_high: Float[Tensor, " head"]
    control_heads: tuple[tuple[Head, ...], ...]
    seed: int
    confidence: float
    notes: tuple[str, ...]

    def grid(self, stack: str = "") -> Float[Tensor, "layer head"]:
        """Effects of one stack by layer and head; NaN where a head was not ablated."""
        own = [(head, i) for i, head in enumerate(self.heads) if head.stack == stack]
        shape = [max((head.layer for head, _ in own), default=-1) + 1]
        shape.append(max((head.head for head, _ in own), default=-1) + 1)
        grid = torch.full(shape, torch.nan, dtype=torch.float64)
        for head, i in own:
            grid[head.layer, head.head] = self.effect[i]
        return grid

    def to_frame(self) -> pd.DataFrame:
        """One row a head: ablated metric, effect with bounds, control with bounds."""
        return head_frame(
            self.heads,
            {
                "ablated": self.ablated.nanmean(1),
                "effect": self.effect,
                "effect_low": self.low,
                "effect_high": self.high,
                "control": self.control,
                "control_low": self.control_low,
                "control_high": self.control_high,
            },
        )

    def prompts_frame(self) -> pd.DataFrame:
        """One row a head and prompt: the metric clean and ablated, and the effect."""
        count = len(self.clean)
        clean = self.clean.repeat(len(self.heads))
        return pd.DataFrame(
            {
                "head": [str(head) for head in self.heads for _ in range(count)],
                "prompt": list(range(count)) * len(self.heads),
                "clean": clean.tolist(),
                "ablated": self.ablated.flatten().tolist(),
                "effect": (self.ablated.flatten() - clean).tolist(),
            }
        )


def ablate(
    lens: Lens,
    task: Task,
    heads: HeadSpec = "all",
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    controls: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """Ablate each head by itself and grade the task: `effect = mean(M(ablated) - M(clean))`.

    Runs go on from the layer of the head, many heads side by side; logits are taken only where the
    metric reads. `reference` gives the means of the two mean modes; the task's corrupt prompts
    where not given. Each head's control is the mean effect of up to `controls` random other heads
    of its layer. `sweep` says where values are kept, and how the work is spread. `progress` is
    called with (values done, all).

    Raises:
        HeadError: a head that the model does not have.
        InputError: an unknown mode, a model without logits, or one that gives no numbers.
        FileError: the store is of another sweep, or cannot be written.

    """
    chosen = lens.anatomy.find(heads)
    draw = random.Random(seed)
    matched = tuple(_others(lens, head, controls, draw) for head in chosen)
    ablator = Ablator.of(lens, task, mode, reference)
    trials = [ablator.trial([head]) for head in _wanted(chosen, matched)]
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    about = asked.facts(
        "heads",
        mode=str(ablator.mode),
        heads=[str(head) for head in chosen],
        controls=[[str(head) for head in group] for group in matched],
    )
    values = run_trials(lens, task, trials, metric, sweep, seed, about, progress)
    return heads_result(asked, about, values)


def heads_result(asked: Asked, facts: Facts, found: Values) -> Ablation:
    """The result of values, one row a head: the heads, then those that are controls alone."""
    heads = tuple(map(read_head, facts["heads"]))
    controls = tuple(tuple(map(read_head, group)) for group in facts["controls"])
    values = dict(zip(_wanted(heads, controls), found.values, strict=True))
    ablated = torch.stack([values[head] for head in heads])
    lost = torch.full_like(found.clean, torch.nan)
    beside = [
        torch.stack([values[head] for head in group]).mean(0) if group else lost
        for group in controls
    ]
    alone = [head for head, group in zip(heads, controls, strict=True) if not group]
    return Ablation(
        asked.task,
        asked.metric,
        Mode(facts["mode"]),
        heads,
        found.clean,
        ablated,
        *asked.interval(ablated - found.clean),
        *asked.interval(torch.stack(beside) - found.clean),
        controls,
        asked.seed,
        asked.confidence,
        (*found.notes, *ablation_notes(len(found.clean), alone)),
    )


def ablation_notes(prompts: int, alone: Sequence[Head] = ()) -> tuple[str, ...]:
    """What a reader should know of few prompts and of heads without controls."""
    notes: list[str] = []
    if alone:
        notes.append(f"No control for {', '.join(map(str, alone[:4]))}: none drawn from the layer.")
    if prompts < 2:
        notes.append("One prompt gives no interval over prompts; give several.")
    return tuple(notes)


def _wanted(heads: Sequence[Head], controls: Sequence[Sequence[Head]]) -> list[Head]:
    """Each head once."""
    return list(dict.fromkeys([*heads, *(head for group in controls for head in group)]))


def _others(lens: Lens, head: Head, count: int, draw: random.Random) -> tuple[Head, ...]:
    """Up to `count` random other heads of the same layer, in order."""
    site = lens.anatomy[head.site]
    others = [site.head(number) for number in range(site.heads) if number != head.head]
    return tuple(sorted(draw.sample(others, min(count, len(others)))))
