"""An attribution as a part of a report, and its findings as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from attnlens.analyses.attribution import Attribution
from attnlens.views.attribution import (
    ledger_heading,
    show_attribution,
    target_text,
    title_of,
)
from attnlens.views.panels import number_text
from attnlens.views.report_parts import Drawn, Part, Table
from attnlens.views.theme import visible

MOST = 5


def attribution_part(found: Attribution, prompt: int = 0) -> Part:
    """What one prompt's scores show: figures and tables of tokens, heads, layers, the ledger."""
    figures = {
        "tokens": Drawn(
            show_attribution(found, prompt),
            "Each token in the colour of its score, the scores as bars, and what the explained "
            "value went to where the method accounts for it.",
        )
    }
    tables = {"tokens": Table(ranked(found, prompt), "scores of tokens", bars=("score",))}
    if found.heads is not None:
        figures["heads"] = Drawn(
            show_attribution(found, prompt, "heads"), "Scores of heads, summed over positions."
        )
        tables["heads"] = Table(
            _by_size(found.heads_frame(prompt)),
            "scores of heads",
            ("head", "score"),
            bars=("score",),
        )
    if found.layers is not None:
        figures["layers"] = Drawn(
            show_attribution(found, prompt, "layers"),
            "Scores of the stream as it enters each layer, the input at the bottom.",
        )
        tables["layers"] = Table(found.layers_frame(prompt), "scores of layers", None)
    if found.make_graph is not None or found.maps is not None:
        figures["graph"] = Drawn(
            show_attribution(found, prompt, "graph"), "The strongest edges, information upwards."
        )
    if found.ledger is not None:
        frame = found.ledger.to_frame().iloc[[prompt]]
        tables["ledger"] = Table(frame, "where the value went")
    return Part(
        title=title_of(found, prompt, "Scores"),
        lines=tuple(attribution_lines(found, prompt)),
        prose=(
            "A score says how much a token counts for the explained value, by this method; those "
            "below 0 speak against it. Methods differ, and none is right by its name: attnlens "
            "faithfulness tells which to believe on a task."
        ),
        figures=figures,
        tables=tables,
        notes=found.notes,
    )  # fmt: skip


def ranked(found: Attribution, prompt: int = 0) -> pd.DataFrame:
    """The table of tokens, the largest score in either direction first."""
    return _by_size(found.to_frame(prompt))


def attribution_lines(found: Attribution, prompt: int = 0, tokens: bool = True) -> list[str]:
    """What is explained, by which tokens and heads, and where the rest of the value went.

    Tokens are left out where a table beside the lines has them.
    """
    records = ranked(found, prompt).to_dict("records")
    value = number_text(float(found.value[prompt]))
    lines = [
        f"Explained by {found.method}: {target_text(found, prompt)}, value {value}.",
        *(_sides(records) if tokens else ()),
    ]
    if found.ledger is not None:
        lines.append(_ledger_line(found, prompt))
    if found.heads is not None:
        heads = _by_size(found.heads_frame(prompt)).head(MOST).to_dict("records")
        named = ", ".join(f"{head['head']} {number_text(head['score'])}" for head in heads)
        lines.append(f"Heads with the largest scores: {named}.")
    return lines


def _by_size(frame: pd.DataFrame) -> pd.DataFrame:
    order = np.argsort(-np.abs(frame["score"].to_numpy(dtype=float)), kind="stable")
    return frame.iloc[order].reset_index(drop=True)


def _sides(records: Sequence[dict[Any, Any]]) -> list[str]:
    """The tokens that speak for the value and against it."""
    signed = any(record["score"] < 0 for record in records)
    lines: list[str] = []
    for sign, name in ((1, "For it" if signed else "Largest"), (-1, "Against it")):
        own = [record for record in records if record["score"] * sign > 0][:MOST]
        if own:
            named = ", ".join(
                f"{visible(r['token'])} at {r['position']} ({number_text(r['score'])})" for r in own
            )
            lines.append(f"{name}: {named}.")
    return lines


def _ledger_line(found: Attribution, prompt: int) -> str:
    assert found.ledger is not None
    parts = [(name, float(part[prompt])) for name, part in found.ledger.entries.items()]
    told = ", ".join(f"{name} {number_text(part)}" for name, part in parts)
    remainder, error = (
        float(part[prompt]) for part in (found.ledger.remainder, found.ledger.error)
    )
    rest = number_text(remainder) if error > 1e-3 else f"{remainder:.1g}".replace("-", "\u2212")
    return f"{ledger_heading(found, found.ledger, prompt)}: {told}; remainder {rest}."
