"""Which part of a report each kind of ablation makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from attnlens.analyses.ablation import Ablation
from attnlens.analyses.ablation_groups import GroupAblation, SetAblation
from attnlens.analyses.ablation_pairs import PairAblation
from attnlens.analyses.ablation_positions import PositionAblation
from attnlens.analyses.edit_effects import EditEffects
from attnlens.analyses.patching import Patching
from attnlens.analyses.stored import Swept
from attnlens.sweeps.modes import Mode
from attnlens.views.ablation import group_word
from attnlens.views.panels import interval_text, number_text
from attnlens.views.patching import patching_title, share_name
from attnlens.views.ranking import (
    LEAST,
    METRICS,
    NONE_CLEAR,
    ablation_lines,
    change_of,
    cost_text,
    costly,
    mode_name,
    prompts_text,
    ranked,
    show_ranking,
    task_lines,
    task_name,
    with_controls,
)
from attnlens.views.report_parts import Drawn, Part, Table
from attnlens.views.report_results import CELLS, part_of
from attnlens.views.shown import show
from attnlens.views.theme import visible

MOST = 5
"""Findings that are said in a sentence each."""
INSTEAD: Mapping[Mode, str] = {
    Mode.ZERO: "nothing",
    Mode.MEAN: "its mean over all positions of the reference prompts",
    Mode.POSITION_MEAN: "its mean over the reference prompts at the same position",
    Mode.RESAMPLE: "what the head writes on the corrupt twin of the prompt",
    Mode.UNIFORM: "the mean of the values that each row sees",
    Mode.IDENTITY: "the value of each row's own token",
    Mode.FROZEN: "nothing, while all later heads attend as they did before",
}
"""What takes the place of a head's output."""
DIAMONDS = (
    " Grey diamonds are the mean of random other heads of the same layer: what taking out just any "
    "head costs."
)
COLOURS = "Red: the task goes worse; blue: better."
TOWARDS = "Blue: towards the clean run; red: away from it."
BOUNDS = {"effect_low": "from", "effect_high": "to"}


@part_of.register
def _(result: Ablation, vocab: int | None = None) -> Part:
    frame = pd.DataFrame(ranked(result))
    return Part(
        title=f"{mode_name(result.mode)} ablation of heads",
        lines=tuple(ablation_lines(result, vocab, MOST)),
        prose=_prose(result, "Each head is ablated by itself")
        + _by_chance(len(frame), "heads", result)
        + DIAMONDS * with_controls(result),
        figures={
            "effects": Drawn(show(result), f"{CELLS} {COLOURS}"),
            "ranking": Drawn(show_ranking(result), f"The largest effects. {_lines_are(result)}"),
        },
        tables={
            "ablation": Table(
                frame, "effect of each head",
                ("head", "ablated", "effect", "effect_low", "effect_high", "control",
                 "control_low", "control_high"),
                BOUNDS | {"control": "random heads of its layer", "control_low": "from",
                          "control_high": "to"},
            ),
            "prompts": Table(result.prompts_frame(), "the metric of each prompt", None),
        },
        notes=result.notes,
    )  # fmt: skip


@part_of.register
def _(result: GroupAblation, vocab: int | None = None) -> Part:
    frame = result.to_frame()
    found = costly(_records(frame), result.metric)[:MOST]
    lines = [f"Ablating {r['group']} as a whole {cost_text(r, result.metric)}." for r in found]
    word = group_word(result)
    return Part(
        title=f"{mode_name(result.mode)} ablation of {word}s",
        lines=(*task_lines(result, vocab), *(lines or [f"No {word} matters there: {NONE_CLEAR}."])),
        prose=_prose(result, f"All heads of a {word} are ablated at once"),
        figures={"groups": Drawn(show(result), _lines_are(result))},
        tables={"groups": Table(frame, f"effect of each {word}", headings=BOUNDS)},
        notes=result.notes,
    )


@part_of.register
def _(result: EditEffects, vocab: int | None = None) -> Part:
    frame = result.to_frame()
    found = costly(_records(frame), result.metric)[:MOST]
    lines = [f"{r['name']} {cost_text(r, result.metric)}." for r in found]
    return Part(
        title="Effects of edits",
        lines=(*task_lines(result, vocab), *(lines or [f"Nothing matters there: {NONE_CLEAR}."])),
        prose=_graded(result, "Under each list of edits"),
        figures={"edits": Drawn(show(result), _lines_are(result))},
        tables={"edits": Table(frame, "effect of each list of edits", headings=BOUNDS)},
        notes=result.notes,
    )


@part_of.register
def _(result: SetAblation, vocab: int | None = None) -> Part:
    record = {"effect": result.effect, "effect_low": result.low, "effect_high": result.high}
    metric, unit, _ = METRICS[result.metric]
    line = (
        f"Ablating the {len(result.heads)} heads at once changes {metric} by "
        f"{number_text(result.effect)}{f' {unit}' if unit else ''} "
        f"({interval_text(record, 'effect')}"
    )
    if len(result.control):
        line += f"; random sets {number_text(float(result.control.nanmean()))}"
    sets = [result.heads, *result.control_sets]
    frame = pd.DataFrame(
        {
            "set": ["the set", *(f"random {i}" for i in range(1, len(sets)))],
            "heads": [", ".join(map(str, heads)) for heads in sets],
            "effect": [result.effect, *result.control.tolist()],
        }
    )
    return Part(
        title=f"{mode_name(result.mode)} ablation of a set",
        lines=(*task_lines(result, vocab), line + ")."),
        prose=_prose(
            result, "The set is ablated at once, and so are random sets of as many heads a layer"
        ),
        figures={"set": Drawn(show(result), _lines_are(result))},
        tables={"set": Table(frame, "effect of the set and of each random set")},
        notes=result.notes,
    )


@part_of.register
def _(result: PairAblation, vocab: int | None = None) -> Part:
    frame = _by_size(result.to_frame(), "interaction")
    clear = [r for r in _records(frame) if r["interaction_low"] > 0 or r["interaction_high"] < 0]
    lines = [
        f"{r['head']} and {r['other']}: both {number_text(r['joint'])}, by themselves "
        f"{number_text(r['effect'])} and {number_text(r['other_effect'])}; interaction "
        f"{number_text(r['interaction'])} ({interval_text(r, 'interaction')})."
        for r in clear[:MOST]
    ]
    metric, unit, _ = METRICS[result.metric]
    of = f"Changes of {metric}{f' in {unit}' if unit else ''}, the largest interactions first:"
    none = ["No pair's interaction has an interval clear of 0."]
    return Part(
        title=f"{mode_name(result.mode)} ablation of pairs",
        lines=(*task_lines(result, vocab), *([of, *lines] if lines else none)),
        prose=_prose(result, "Heads are ablated one at a time and two at a time")
        + " Interaction is the effect of both less the sum of their single effects: 0 where the "
        "two act independently, of the sign opposite to the effects where one does for both."
        + _by_chance(len(frame), "pairs", result, sides=2),
        figures={
            "pairs": Drawn(
                show(result),
                "Interaction of two heads; on the diagonal the effect of one. Red: the task goes "
                "worse than by the sum of both, or without the one head; blue: better.",
            )
        },
        tables={
            "pairs": Table(
                frame, "every pair", headings={"interaction_low": "from", "interaction_high": "to"}
            )
        },
        notes=result.notes,
    )


@part_of.register
def _(result: PositionAblation, vocab: int | None = None) -> Part:
    frame = result.to_frame()
    tokens = dict(zip(result.positions, result.tokens, strict=True))
    frame.insert(2, "token", [tokens[position] for position in frame["position"]])
    frame = _by_size(frame, "effect")
    found = costly(_records(frame), result.metric)[:MOST]
    lines = [
        f"Ablating {r['head']} at position {r['position']} ({visible(r['token'])}) "
        f"{cost_text(r, result.metric)}."
        for r in found
    ]
    return Part(
        title=f"{mode_name(result.mode)} ablation by position",
        lines=(*task_lines(result, vocab), *(lines or [f"Nothing matters there: {NONE_CLEAR}."])),
        prose=_prose(result, "Each head is ablated at one position at a time")
        + _by_chance(len(frame), "heads and positions", result)
        + " Tokens are those of the first prompt.",
        figures={"positions": Drawn(show(result), "Heads down, positions across. " + COLOURS)},
        tables={"positions": Table(frame, "effect of each head at each position", headings=BOUNDS)},
        notes=result.notes,
    )


@part_of.register
def _(result: Patching, vocab: int | None = None) -> Part:
    known = bool((~result.share.isnan()).any())
    column = "share" if known else "effect"
    frame = _by_size(result.to_frame(), column)
    clear = [
        r
        for r in _records(frame)
        if abs(r[column]) >= LEAST and (r[f"{column}_low"] > 0 or r[f"{column}_high"] < 0)
    ]
    called = share_name(result) if known else change_of(result.metric)
    lines = [
        f"{_place(r)}: {called} {number_text(r[column])} ({interval_text(r, column)})."
        for r in clear[:MOST]
    ]
    none = f"No {called} of {LEAST:g} or more has an interval clear of 0."
    given, run = ("clean", "corrupt") if result.direction == "denoise" else ("corrupt", "clean")
    return Part(
        title=patching_title(result),
        lines=(*task_lines(result, vocab), *(lines or [none])),
        prose=_graded(
            result,
            f"Each place in turn, {run} prompts are given the {result.kind} of their {given} "
            "twins. Then",
        )
        + f" The {share_name(result)} is the effect as a share of what the two runs differ by."
        + _by_chance(len(frame), "places", result, sides=2),
        figures={"patching": Drawn(show(result), TOWARDS if known else COLOURS)},
        tables={
            "patching": Table(
                frame, "effect and share of each place",
                headings={"share_low": "from", "share_high": "to"} | BOUNDS,
            )
        },
        notes=result.notes,
    )  # fmt: skip


def _place(record: dict[str, Any]) -> str:
    """`L3H5`, or `L3H5 at position 4 (the)`."""
    if "position" not in record:
        return record["place"]
    return f"{record['place']} at position {record['position']} ({visible(record['token'])})"


def _prose(
    result: Ablation | SetAblation | GroupAblation | PairAblation | PositionAblation, what: str
) -> str:
    """What was done and how effects read."""
    return _graded(
        result, f"{what}: in place of a head's output stands {INSTEAD[result.mode]}. Then"
    )


def _graded(result: Swept, done: str) -> str:
    metric, unit, worse = METRICS[result.metric]
    direction = "rises" if worse > 0 else "falls"
    return (
        f"{done} the task ({task_name(result)}, {prompts_text(result)}) is graded again. An effect "
        f"is the change of {metric}{f' in {unit}' if unit else ''}, a mean over prompts with its "
        f"{_sure(result)} bootstrap interval; where {metric} {direction}, the task goes worse."
    )


def _lines_are(result: Swept) -> str:
    """What a caption says of bars."""
    return f"Lines are {_sure(result)} intervals. {COLOURS}"


def _sure(result: Swept) -> str:
    return f"{100 * result.confidence:g} %"


def _by_chance(count: int, what: str, result: Swept, sides: int = 1) -> str:
    """How many intervals of many miss 0 by chance, on the bad side alone or on both."""
    if count < 2 or len(result.clean) < 2:
        return ""
    share = (1 - result.confidence) / 2 * sides
    where = "on that side of 0" if sides == 1 else "clear of 0"
    return (
        f" Of {count:,} {what} without any effect, about {number_text(share * count)} would have "
        f"an interval {where} by chance."
    )


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return frame.to_dict("records")


def _by_size(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The largest in either direction first, unknown ones last."""
    order = np.argsort(-np.abs(frame[column].to_numpy(dtype=float)), kind="stable")
    return frame.iloc[order].reset_index(drop=True)
