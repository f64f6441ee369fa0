"""Ablation of heads at single positions: where in a prompt a head's output is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
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
class PositionAblation:
    """Effect of ablating each head at each position by itself.

    Attributes:
        heads, positions: the axes; positions count from the first token, negative from the last.
        tokens: the token texts at the positions in the first prompt.
        effect: `mean(ablated - clean)` over prompts, with bounds `low` and `high` of the interval
            of `confidence`.

    """

    task: str
    metric: str
    mode: Mode
    heads: tuple[Head, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    clean: Float[Tensor, " prompt"]
    ablated: Float[Tensor, "head position prompt"]
    effect: Float[Tensor, "head position"]
    low: Float[Tensor, "head position"]
    high: Float[Tensor, "head position"]
    seed: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a head and position: effect with bounds."""
        return pd.DataFrame(
            [
                {
                    "head": str(head),
                    "position": position,
                    "effect": float(self.effect[i, j]),
                    "effect_low": float(self.low[i, j]),
                    "effect_high": float(self.high[i, j]),
                }
                for i, head in enumerate(self.heads)
                for j, position in enumerate(self.positions)
            ]
        )


def ablate_positions(
    lens: Lens,
    task: Task,
    heads: HeadSpec,
    positions: Sequence[int] | None = None,
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> PositionAblation:
    """Ablate each head at each position: `effect = mean(M(ablated there) - M(clean))`.

    `positions` are those that every prompt has, all where not given; -1 is each prompt's last.
    Arguments and errors otherwise as for `ablate`.
    """
    chosen = lens.anatomy.find(heads)
    where = chosen_positions(task, positions)
    ablator = Ablator.of(lens, task, mode, reference)
    trials = [ablator.trial([h], f"{h} at {p}", p) for h in chosen for p in where]
    first = lens.token_texts(task.clean[0][task.mask[0]].tolist())
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    about = asked.facts(
        "positions",
        mode=str(ablator.mode),
        heads=[str(head) for head in chosen],
        positions=list(where),
        tokens=[first[position] for position in where],
    )
    found = run_trials(lens, task, trials, metric, sweep, seed, about, progress)
    return positions_result(asked, about, found)


def chosen_positions(task: Task, positions: Sequence[int] | None) -> tuple[int, ...]:
    """Positions that every prompt of a task has, all of these where not given.

    Raises:
        InputError: no position, or one that the shortest prompt does not have.

    """
    shortest = int(task.mask.sum(1).min())
    where = tuple(range(shortest)) if positions is None else tuple(positions)
    bad = [p for p in where if not -shortest <= p < shortest]
    if bad or not where:
        raise InputError(
            f"positions={where} asks for one that the shortest prompt, of {shortest} tokens, does "
            f"not have; choose {-shortest} to {shortest - 1}."
        )
    return where


def positions_result(asked: Asked, facts: Facts, found: Values) -> PositionAblation:
    """The result of values, one row a head and position."""
    heads = tuple(map(read_head, facts["heads"]))
    where = tuple(facts["positions"])
    ablated = found.values.unflatten(0, (len(heads), len(where)))
    return PositionAblation(
        asked.task,
        asked.metric,
        Mode(facts["mode"]),
        heads,
        where,
        tuple(facts["tokens"]),
        found.clean,
        ablated,
        *asked.interval(ablated - found.clean),
        asked.seed,
        asked.confidence,
        (*found.notes, *ablation_notes(len(found.clean))),
    )
