"""Activation patching: which activations carry the difference between a prompt and its twin.

A run is given what another run had at one place, and graded again. Vig et al. 2020, Causal
mediation analysis for interpreting neural NLP; Meng et al. 2022, Locating and editing factual
associations; Heimersheim and Nanda 2024, How to use and interpret activation patching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.ablation import ablation_notes
from attnlens.analyses.ablation_positions import chosen_positions
from attnlens.analyses.asked import Asked, Facts
from attnlens.analyses.uncertainty import Interval, bootstrap_ratio
from attnlens.anatomy import Head, HeadSpec
from attnlens.anatomy.sites import read_head
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.sweeps.clean_run import TOLERANCES
from attnlens.sweeps.patches import WHOLE, Direction, Kind, patch_trials, places_of, swapped
from attnlens.sweeps.run import Values, run_trials
from attnlens.sweeps.sweep import Progress, SweepSettings
from attnlens.tasks import Task


@dataclass(frozen=True)
class Patching:
    """What patching each place does, over the whole prompt or at each position.

    Attributes:
        task, metric: what was graded, and by what.
        kind, direction: what was patched, and into which run: `denoise` clean activations into the
            corrupt prompts, `noise` corrupt ones into the clean prompts.
        places: heads (`L3H5`; `L3H4-7` where heads share keys and values) or layers (`L3`).
        sites: the site of each place.
        heads: all heads that move at each place; none where it is a layer.
        positions: the last axis, from the first token, negative from the last; None where the whole
            prompt was patched at once, and there is no such axis. Rows; of k and v keys.
        tokens: the token texts at the positions in the first clean prompt.
        clean, corrupt: the metric of each prompt as it is, and of its corrupt twin.
        patched: the metric of each prompt, patched; NaN where a store has none yet.
        effect: `mean(patched - M(the run that was patched))`, in the metric's unit, with bounds
            `low` and `high` of the interval of `confidence`.
        share: `effect / mean(M(the other run) - M(the run that was patched))` with its bounds. Of
            `denoise` the recovery, 1 where a place brings back all; of `noise` what is lost. NaN
            where clean and corrupt prompts do not differ.
        gap: `mean(clean - corrupt)` with its bounds.
        seed: of the bootstrap.
        notes: what a reader should know.

    """

    task: str
    metric: str
    kind: str
    direction: str
    places: tuple[str, ...]
    sites: tuple[str, ...]
    heads: tuple[tuple[Head, ...], ...]
    positions: tuple[int, ...] | None
    tokens: tuple[str, ...]
    clean: Float[Tensor, " prompt"]
    corrupt: Float[Tensor, " prompt"]
    patched: Float[Tensor, "place *position prompt"]
    effect: Float[Tensor, "place *position"]
    low: Float[Tensor, "place *position"]
    high: Float[Tensor, "place *position"]
    share: Float[Tensor, "place *position"]
    share_low: Float[Tensor, "place *position"]
    share_high: Float[Tensor, "place *position"]
    gap: Float[Tensor, ""]
    gap_low: Float[Tensor, ""]
    gap_high: Float[Tensor, ""]
    seed: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a place (and position): the metric patched, effect and share with bounds."""
        named: list[dict[str, Any]] = [
            {"place": place, "site": site}
            for place, site in zip(self.places, self.sites, strict=True)
        ]
        if self.positions is not None:
            at = list(zip(self.positions, self.tokens, strict=True))
            named = [row | {"position": p, "token": token} for row in named for p, token in at]
        numbers = {
            "patched": self.patched.nanmean(-1),
            "effect": self.effect,
            "effect_low": self.low,
            "effect_high": self.high,
            "share": self.share,
            "share_low": self.share_low,
            "share_high": self.share_high,
        }
        columns = {name: tensor.flatten().tolist() for name, tensor in numbers.items()}
        return pd.DataFrame(named).assign(**columns)


def patch(
    lens: Lens,
    task: Task,
    kind: Kind | str = "z",
    places: HeadSpec | int | None = None,
    positions: Sequence[int] | Literal["each"] | None = None,
    direction: Direction | str = "denoise",
    metric: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> Patching:
    """Give a run what its twin had at each place: `share = mean(M(patched) - M) / mean(M' - M)`.

    M is the metric of the run that is patched, M' of the one that activations come from: of
    `denoise` the corrupt and the clean prompts, of `noise` the other way round. Answers are those
    of the clean prompts in both. `kind` is q, k, v, z, pattern (places are heads, one a group for
    k and v), residual or mlp (places are layers; what enters a block, and what its MLP adds).
    Positions are `"each"` that every prompt has, or some, -1 the last; keys for k and v, else rows.

    Raises:
        HeadError: a head or layer that the model does not have.
        InputError: an unknown kind or direction, positions that a prompt does not have, a layer
            without an MLP or stream; otherwise as for `ablate`.
        FileError: the store is of another sweep, or cannot be written.

    """
    if direction not in get_args(Direction):
        known = " or ".join(get_args(Direction))
        raise InputError(f"There is no direction {direction!r} to patch in; choose {known}.")
    where = _positions(task, positions)
    chosen = places_of(lens, kind, places)
    run = swapped(task) if direction == "denoise" else task
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    trials = patch_trials(lens, run, kind, chosen, where)
    first = lens.token_texts(task.clean[0][task.mask[0]].tolist())
    about = asked.facts(
        "patching",
        patched=kind,
        direction=direction,
        places=[place.name for place in chosen],
        sites=[place.site for place in chosen],
        heads=[[str(head) for head in place.heads] for place in chosen],
        positions=None if where is None else list(where),
        tokens=[first[position] for position in where or ()],
        both_runs=trials[-1].name == WHOLE,
        rounding=TOLERANCES.get(next(lens.model.parameters()).dtype, 1e-2),
    )
    found = run_trials(lens, run, trials, metric, sweep, seed, about, progress)
    return patching_result(asked, about, found)


def patching_result(asked: Asked, facts: Facts, found: Values) -> Patching:
    """The result of values, one row a place and position, then the whole other run."""
    where = None if facts["positions"] is None else tuple(facts["positions"])
    heads = tuple(tuple(map(read_head, own)) for own in facts["heads"])
    values = found.values
    other = torch.full_like(found.clean, torch.nan)
    if facts["both_runs"]:
        values, other = values[:-1], values[-1]
    if where is not None:
        values = values.unflatten(0, (len(heads), len(where)))
    denoise = facts["direction"] == "denoise"
    clean, corrupt = (other, found.clean) if denoise else (found.clean, other)
    gap = asked.interval(clean - corrupt)
    scale = max(1.0, *(float(own.nan_to_num(0).abs().max()) for own in (clean, corrupt)))
    differ = float(gap.mean.abs()) > facts["rounding"] * scale
    change = values - found.clean
    share = _share(asked, change, other - found.clean, differ)
    return Patching(
        asked.task,
        asked.metric,
        facts["patched"],
        facts["direction"],
        tuple(facts["places"]),
        tuple(facts["sites"]),
        heads,
        where,
        tuple(facts["tokens"]),
        clean,
        corrupt,
        values,
        *asked.interval(change),
        *share,
        *gap,
        asked.seed,
        asked.confidence,
        (
            *found.notes,
            *_gap_notes(asked.metric, gap, differ, facts["both_runs"]),
            *_group_notes(facts["places"], heads),
            *ablation_notes(len(found.clean)),
        ),
    )


def _positions(task: Task, positions: Sequence[int] | str | None) -> tuple[int, ...] | None:
    if isinstance(positions, str):
        if positions != "each":
            raise InputError(f'positions={positions!r}: give "each", some numbers, or nothing.')
        return chosen_positions(task, None)
    return None if positions is None else chosen_positions(task, positions)


def _share(
    asked: Asked,
    change: Float[Tensor, "*trial prompt"],
    gap: Float[Tensor, " prompt"],
    differ: bool,
) -> Interval:
    """Mean change over mean gap, of the prompts of which both are known; NaN without a gap."""
    above = change.movedim(-1, 0)
    below = gap.view(-1, *[1] * (above.ndim - 1)).expand_as(above)
    known = ~(above.isnan() | below.isnan()) & differ
    ratio = bootstrap_ratio(
        above, below, asked.resamples, asked.confidence, asked.seed, counted=known
    )
    return Interval(*(bound.masked_fill(~bound.isfinite(), torch.nan) for bound in ratio))


def _gap_notes(metric: str, gap: Interval, differ: bool, both_runs: bool) -> tuple[str, ...]:
    """What a reader should know where there is no gap to take a share of, or hardly one."""
    if not both_runs:
        return ("No shares: this model's last layer cannot be given all of the other run.",)
    if not differ and not bool(gap.mean.isnan()):
        return (f"No shares: {metric} is the same of clean and corrupt prompts, but for rounding.",)
    if bool(gap.low <= 0) and bool(gap.high >= 0):
        mean, low, high = (f"{float(value):.3g}" for value in gap)
        note = (
            f"Shares mean little: clean less corrupt {metric} is {mean} on average, and its "
            f"interval ({low} to {high}) holds 0. Read effects."
        )
        return (note,)
    return ()


def _group_notes(places: Sequence[str], heads: Sequence[Sequence[Head]]) -> tuple[str, ...]:
    shared = [(place, own) for place, own in zip(places, heads, strict=True) if len(own) > 1]
    if not shared:
        return ()
    place, own = shared[0]
    named = ", ".join(map(str, own))
    return (f"Heads that share keys and values move together: {place} is {named}.",)
