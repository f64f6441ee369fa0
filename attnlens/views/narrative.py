"""Findings as sentences, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from attnlens.analyses.head_types import HeadTypes
from attnlens.analyses.sinks import Sinks
from attnlens.anatomy import Anatomy
from attnlens.hooks.check import Check
from attnlens.views.panels import interval_text, number_text

THRESHOLD = 0.4
"""A head counts as one of a type from this score on."""
TYPES = {
    "previous_token": "previous-token",
    "induction": "induction",
    "duplicate": "duplicate-token",
}
NAMED = 4
"""So many heads are named in a sentence."""


def model_line(anatomy: Anatomy) -> str:
    """What the model is."""
    parts: list[str] = []
    for stack in anatomy.stacks:
        sites = [site for site in anatomy.sites if site.stack == stack]
        heads = sorted({site.heads for site in sites})
        groups = sorted({site.groups for site in sites})
        part = f"{plural(len(sites), 'layer')} of {_range(heads)} heads"
        if groups != heads:
            part += f" ({_range(groups)} key/value groups)"
        parts.append(f"{stack}: {part}" if stack else part)
    extras = [
        f"width {anatomy.d_model}" if anatomy.d_model else "",
        f"vocabulary {anatomy.vocab:,}" if anatomy.vocab else "",
        f"context {anatomy.context:,}" if anatomy.context else "",
        f"{anatomy.parameters:,} parameters",
    ]
    return f"{anatomy.model}: {', '.join([*parts, *filter(None, extras)])}."


def check_line(check: Check) -> str:
    """Whether the instrument may be believed."""
    if not check.passed:
        return f"Self-check failed: {'. '.join(check.problems)}."
    equal = f"to {check.row_error:.0e}" if check.row_error > 0 else "exactly"
    return (
        f"Self-check passed: at all {len(check.sites)} sites the rows equal the model's own eager "
        f"weights {equal}, in {check.dtype}."
    )


def type_lines(types: HeadTypes) -> list[str]:
    """The strongest heads of each type, or that there is none."""
    frame = types.to_frame()
    return [type_line(frame, name) for name in TYPES if name in frame]


def type_line(frame: pd.DataFrame, name: str) -> str:
    """The heads of one type over the threshold, strongest first."""
    known = strongest(frame, name)
    found = [record for record in known if record[name] >= THRESHOLD]
    title = TYPES[name]
    if not known:
        return f"No head of this model can be asked for the {title} type."
    if not found:
        best = known[0]
        return (
            f"No {title} head: none scores {THRESHOLD} or more "
            f"(best {best['head']}, {number_text(best[name])})."
        )
    return f"{plural(len(found), f'{title} head')}: {_listed(found, name)}."


def strongest(frame: pd.DataFrame, name: str) -> list[dict[str, Any]]:
    """The rows of a table of heads that have a number, the largest first."""
    records: list[dict[str, Any]] = frame.to_dict("records")
    known = [record for record in records if record[name] == record[name]]
    return sorted(known, key=lambda record: -record[name])


def sink_line(sinks: Sinks) -> str:
    """How much attention gathers where."""
    frame = sinks.by_position()
    place = int(frame["share"].fillna(-1).argmax())
    mean = sinks.first_token_all
    many = int((sinks.first_token.mean > 0.5).sum())
    line = (
        f"Sinks: the first token gets {_percent(float(mean.mean))} of all attention on average; "
        f"{many} of {len(sinks.heads)} heads give it more than half."
    )
    if place != 0:
        token = sinks.token_at(place)
        named = f"position {place} ({token!r})" if token else f"position {place}"
        line += f" Most goes to {named}: {_percent(float(frame['share'].to_list()[place]))}."
    return line


def _listed(records: Sequence[dict[str, Any]], name: str) -> str:
    """`L2H5 (0.83), L1H0 (0.61) and 3 more`."""
    shown = [f"{record['head']} ({number_text(record[name])})" for record in records[:NAMED]]
    more = len(records) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _percent(share: float) -> str:
    return "n/a" if share != share else f"{100 * share:.0f} %"


def plural(count: int, noun: str) -> str:
    """`1 head`, `2 heads`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def strongest_line(frame: pd.DataFrame, name: str, most: int = 2) -> str:
    """The heads with the highest scores whatever they are, with intervals."""
    found = [
        f"{record['head']} {number_text(record[name])} ({interval_text(record, name)})"
        for record in strongest(frame, name)[:most]
    ]
    return ", ".join(found) + "." if found else "no head has such a score."
