"""Ablation of pairs of heads: what two do together beyond what each does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.ablation import ablation_notes
from attnlens.analyses.asked import Asked, Facts
from attnlens.anatomy import Head, HeadSpec
from attnlens.anatomy.sites import read_head
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.run import Values, run_trials
from attnlens.sweeps.sweep import Progress, SweepSettings
from attnlens.tasks import Task


@dataclass(frozen=True)
class PairAblation:
    """Effect of ablating heads by twos.

    Attributes:
        heads: the heads, in the order of every `head` axis.
        clean: the metric of each prompt, nothing ablated.
        single: effect of each head by itself, `mean(ablated - clean)`.
        joint: effect of both heads of a pair; on the diagonal that of the one head.
        interaction: `joint - (single of one + single of the other)`, 0 on the diagonal: 0 where the
            two act independently; of the sign opposite to the effects where one does for both.
        low, high: bounds of the interaction over prompts, of the interval of `confidence`.

    """

    task: str
    metric: str
    mode: Mode
    heads: tuple[Head, ...]
    clean: Float[Tensor, " prompt"]
    single: Float[Tensor, " head"]
    joint: Float[Tensor, "head head"]
    interaction: Float[Tensor, "head head"]
    low: Float[Tensor, "head head"]
    high: Float[Tensor, "head head"]
    seed: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a pair: the two heads, their single effects, joint effect, interaction."""
        rows = [
            {
                "head": str(self.heads[i]),
                "other": str(self.heads[j]),
                "effect": float(self.single[i]),
                "other_effect": float(self.single[j]),
                "joint": float(self.joint[i, j]),
                "interaction": float(self.interaction[i, j]),
                "interaction_low": float(self.low[i, j]),
                "interaction_high": float(self.high[i, j]),
            }
            for i, j in combinations(range(len(self.heads)), 2)
        ]
        return pd.DataFrame(rows)


def ablate_pairs(
    lens: Lens,
    task: Task,
    heads: HeadSpec,
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> PairAblation:
    """Ablate every pair of heads: `interaction = joint - sum` of the two single effects.

    n heads make n (n + 1) / 2 trials. Arguments and errors otherwise as for `ablate`.
    """
    chosen = lens.anatomy.find(heads)
    if len(chosen) < 2:
        raise InputError(f"{heads!r} names one head; a pair needs two.")
    ablator = Ablator.of(lens, task, mode, reference)
    pairs = list(combinations(range(len(chosen)), 2))
    trials = [ablator.trial([head]) for head in chosen]
    trials += [ablator.trial([chosen[i], chosen[j]]) for i, j in pairs]
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    heads_named = [str(head) for head in chosen]
    about = asked.facts("pairs", mode=str(ablator.mode), heads=heads_named)
    found = run_trials(lens, task, trials, metric, sweep, seed, about, progress)
    return pairs_result(asked, about, found)


def pairs_result(asked: Asked, facts: Facts, found: Values) -> PairAblation:
    """The result of values: those of single heads, then those of pairs."""
    heads = tuple(map(read_head, facts["heads"]))
    count = len(heads)
    change = found.values - found.clean
    one, other = torch.tensor(list(combinations(range(count), 2))).T
    alone, both = change[:count], change[count:]
    apart = asked.interval(both - alone[one] - alone[other])
    single = alone.nanmean(1)

    def square(values: Tensor, diagonal: Tensor) -> Tensor:
        full = torch.diag(diagonal)
        full[one, other] = full[other, one] = values
        return full

    none = torch.zeros(count, dtype=torch.float64)
    return PairAblation(
        asked.task,
        asked.metric,
        Mode(facts["mode"]),
        heads,
        found.clean,
        single,
        square(both.nanmean(1), single),
        square(apart.mean, none),
        square(apart.low, none),
        square(apart.high, none),
        asked.seed,
        asked.confidence,
        (*found.notes, *ablation_notes(len(found.clean))),
    )
