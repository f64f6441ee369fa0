"""Ablation of several heads at once: sets beside matched random sets, groups, whole layers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
class SetAblation:
    """Effect of ablating a set of heads at once, beside random sets that do not touch it.

    `control_sets` have as many heads in each layer as the set; `control` is the effect of each.
    """

    task: str
    metric: str
    mode: Mode
    heads: tuple[Head, ...]
    clean: Float[Tensor, " prompt"]
    ablated: Float[Tensor, " prompt"]
    effect: float
    low: float
    high: float
    control: Float[Tensor, " set"]
    control_sets: tuple[tuple[Head, ...], ...]
    seed: int
    confidence: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GroupAblation:
    """Effect of ablating each group of heads at once.

    Attributes:
        names, groups: what each group is called, and its heads.
        clean: the metric of each prompt, nothing ablated.
        ablated: the metric of each prompt with one group ablated.
        effect: `mean(ablated - clean)` over prompts, with bounds `low` and `high` of the interval
            of `confidence`.

    """

    task: str
    metric: str
    mode: Mode
    names: tuple[str, ...]
    groups: tuple[tuple[Head, ...], ...]
    clean: Float[Tensor, " prompt"]
    ablated: Float[Tensor, "group prompt"]
    effect: Float[Tensor, " group"]
    low: Float[Tensor, " group"]
    high: Float[Tensor, " group"]
    seed: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a group: its name, number of heads, ablated metric, effect with bounds."""
        return pd.DataFrame(
            {
                "group": list(self.names),
                "heads": [len(group) for group in self.groups],
                "ablated": self.ablated.nanmean(1).tolist(),
                "effect": self.effect.tolist(),
                "effect_low": self.low.tolist(),
                "effect_high": self.high.tolist(),
            }
        )


def ablate_together(
    lens: Lens,
    task: Task,
    heads: HeadSpec,
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    controls: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> SetAblation:
    """Ablate a set of heads at once, and `controls` random sets with as many heads in each layer.

    The random sets exclude the heads of the set; where a layer has too few others there is no
    control, and a note says so. Arguments and errors otherwise as for `ablate`.
    """
    chosen = lens.anatomy.find(heads)
    ablator = Ablator.of(lens, task, mode, reference)
    sets, notes = _matched_sets(lens, chosen, controls, random.Random(seed))
    trials = [
        ablator.trial(chosen, "set"),
        *(ablator.trial(group, f"control {i}") for i, group in enumerate(sets)),
    ]
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    about = asked.facts(
        "a set",
        mode=str(ablator.mode),
        heads=[str(head) for head in chosen],
        controls=[[str(head) for head in group] for group in sets],
        notes=list(notes),
    )
    found = run_trials(lens, task, trials, metric, sweep, seed, about, progress)
    return set_result(asked, about, found)


def set_result(asked: Asked, facts: Facts, found: Values) -> SetAblation:
    """The result of values: the set's, then one row a control."""
    change = found.values - found.clean
    effect = asked.interval(change[0])
    return SetAblation(
        asked.task,
        asked.metric,
        Mode(facts["mode"]),
        tuple(map(read_head, facts["heads"])),
        found.clean,
        found.values[0],
        float(effect.mean),
        float(effect.low),
        float(effect.high),
        change[1:].nanmean(1),
        tuple(tuple(map(read_head, group)) for group in facts["controls"]),
        asked.seed,
        asked.confidence,
        (*facts["notes"], *found.notes, *ablation_notes(len(found.clean))),
    )


def ablate_groups(
    lens: Lens,
    task: Task,
    groups: Mapping[str, HeadSpec],
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> GroupAblation:
    """Ablate each group of heads at once: `effect = mean(M(group ablated) - M(clean))`.

    `groups` are specifications by name. Arguments and errors otherwise as for `ablate`.
    """
    if not groups:
        raise InputError("No group was given: {'induction': 'L2H3,L2H5', ...}.")
    found_heads = {name: lens.anatomy.find(spec) for name, spec in groups.items()}
    ablator = Ablator.of(lens, task, mode, reference)
    trials = [ablator.trial(heads, name) for name, heads in found_heads.items()]
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    about = asked.facts(
        "groups",
        mode=str(ablator.mode),
        groups={name: [str(head) for head in heads] for name, heads in found_heads.items()},
    )
    found = run_trials(lens, task, trials, metric, sweep, seed, about, progress)
    return groups_result(asked, about, found)


def groups_result(asked: Asked, facts: Facts, found: Values) -> GroupAblation:
    """The result of values, one row a group."""
    groups = facts["groups"]
    return GroupAblation(
        asked.task,
        asked.metric,
        Mode(facts["mode"]),
        tuple(groups),
        tuple(tuple(map(read_head, heads)) for heads in groups.values()),
        found.clean,
        found.values,
        *asked.interval(found.values - found.clean),
        asked.seed,
        asked.confidence,
        (*found.notes, *ablation_notes(len(found.clean))),
    )


def ablate_layers(
    lens: Lens,
    task: Task,
    layers: HeadSpec | int | None = None,
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    seed: int = 0,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> GroupAblation:
    """Ablate all heads of each layer at once; see `ablate_groups`."""
    sites = lens.anatomy.layers(layers)
    groups = {site.name: site.name for site in sites}
    return ablate_groups(
        lens, task, groups, mode, metric, seed=seed, sweep=sweep, progress=progress
    )


def _matched_sets(
    lens: Lens, heads: Sequence[Head], count: int, draw: random.Random
) -> tuple[tuple[tuple[Head, ...], ...], tuple[str, ...]]:
    """Random sets with as many heads of each site as `heads` has, none of which is in `heads`."""
    free: dict[str, list[Head]] = {}
    for name in dict.fromkeys(head.site for head in heads):
        site = lens.anatomy[name]
        free[name] = [site.head(n) for n in range(site.heads) if site.head(n) not in heads]
        needed = sum(head.site == name for head in heads)
        if len(free[name]) < needed:
            note = f"No control: {name} has {len(free[name])} heads outside the set, not {needed}."
            return (), (note,)
    sets = [
        tuple(
            picked
            for name, others in free.items()
            for picked in sorted(draw.sample(others, sum(head.site == name for head in heads)))
        )
        for _ in range(count)
    ]
    return tuple(dict.fromkeys(sets)), ()
