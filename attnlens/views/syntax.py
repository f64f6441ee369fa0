"""Figures of heads and word pairs: syntax beside fixed offsets, the attention probe, alignment."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlens.analyses.alignment import PropertyAlignment
from attnlens.analyses.attention_probe import AttentionProbe
from attnlens.analyses.syntax import DIRECTIONS, SyntaxHeads
from attnlens.errors import InputError
from attnlens.views.panels import Quantity, head_grids, interval_text, number_text
from attnlens.views.shown import show
from attnlens.views.theme import INK, styled

MOST = 16
CONTROL = "#aab4b7"
BOUNDS = "#4a5358"
AXIS: dict[str, Any] = {"tickformat": ".1f", "gridcolor": "#e6e5df"}
PANELS = {"to_head": "from a word to its head", "to_dependent": "from a head to its dependent"}


@show.register
def show_syntax_heads(syntax: SyntaxHeads, relations: int = MOST) -> go.Figure:
    """The best head of each relation beside the best fixed offset, relations with most arcs first.

    `relations` is how many are drawn.
    """
    frame = syntax.to_frame()
    names = list(dict.fromkeys(frame["relation"]))[:relations]
    if not names:
        raise InputError("There is nothing to draw: no relation has an arc that heads could find.")
    every: list[dict[str, Any]] = frame.to_dict("records")
    records = [record for record in every if record["relation"] in names]
    panels = [d for d in DIRECTIONS if any(record["direction"] == d for record in records)]
    figure = make_subplots(
        1,
        len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[PANELS[direction] for direction in panels],
    )
    for column, direction in enumerate(panels, start=1):
        own = [record for record in records if record["direction"] == direction]
        for bar in _pair(own, first=column == 1):
            figure.add_trace(bar, row=1, col=column)
    sentences = f"{syntax.sentences:,} sentence{'s' * (syntax.sentences != 1)}"
    styled(figure, f"Heads that follow syntax, over {sentences}", 40 * len(names) + 170)
    figure.update_xaxes(range=[0, 1], title="share of arcs found", **AXIS)
    labels = [html.escape(name) for name in names]
    figure.update_yaxes(categoryorder="array", categoryarray=labels[::-1], automargin=True)
    figure.update_annotations(font_size=13)
    return _legend(figure)


@show.register
def show_attention_probe(probe: AttentionProbe) -> go.Figure:
    """Accuracy of the probe and of simpler ways to find a word's head, with intervals."""
    records: list[dict[str, Any]] = probe.to_frame().to_dict("records")
    detail = {
        "best head": f"best head ({probe.best}, {PANELS[probe.direction]})",
        "best offset": f"best offset ({_offset(probe.offset)})",
    }
    names = [detail.get(record["method"], record["method"]) for record in records]
    figure = go.Figure(
        go.Bar(
            x=[record["accuracy"] for record in records],
            y=names,
            orientation="h",
            marker={"color": [INK, *[CONTROL] * (len(records) - 1)]},
            error_x=_error_bars(records, "accuracy"),
            customdata=[_probe_text(record) for record in records],
            hovertemplate="<b>%{y}</b><br>%{customdata}<extra></extra>",
        )
    )
    title = f"Words whose head is found, in {probe.test_sentences:,} sentences not learned from"
    styled(figure, title, 40 * len(records) + 130)
    figure.update_xaxes(range=[0, 1], title="share of arcs found", **AXIS)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(bargap=0.35)


@show.register
def show_property_alignment(alignment: PropertyAlignment) -> go.Figure:
    """Share of each head's arcs where the property holds, and how far that is from the chance."""
    quantities = [
        Quantity("aligned", "arcs where the property holds", mass=True),
        Quantity("gain", "above the rate of all pairs", signed=True),
        Quantity("arcs", "number of arcs"),
    ]
    frame = alignment.to_frame()
    known = [q for q in quantities if bool(frame[q.column].notna().any())]
    prompts = f"{alignment.prompts:,} prompt{'s' * (alignment.prompts != 1)}"
    title = f"Arcs (weights of {alignment.threshold:g} or more) over {prompts}"
    if len(known) == len(quantities) and bool(frame["aligned"].isna().any()):
        title += f"; blank where a head has fewer than {alignment.least}"
    return head_grids(frame, known, title)


def _pair(records: Sequence[Mapping[str, Any]], first: bool) -> list[go.Bar]:
    """The bars of the best heads and of the best offsets in one panel."""
    labels = [html.escape(record["relation"]) for record in records]
    kinds = (
        ("baseline", "best fixed offset", CONTROL, [_offset(r["offset"]) for r in records]),
        ("accuracy", "best head", INK, [record["head"] for record in records]),
    )
    return [
        go.Bar(
            x=[record[column] for record in records],
            y=labels,
            orientation="h",
            name=name,
            legendgroup=name,
            showlegend=first,
            marker={"color": colour},
            error_x=_error_bars(records, column),
            text=texts,
            textposition="inside",
            insidetextanchor="start",
            constraintext="none",
            textfont={"size": 11, "color": _text_colours(records, column)},
            customdata=[_relation_text(record, column) for record in records],
            hovertemplate="<b>%{y}</b> %{customdata}<extra></extra>",
        )
        for column, name, colour, texts in kinds
    ]


def _text_colours(records: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    """White on the dark bars that are long enough to hold their text, else dark."""
    dark = column == "accuracy"
    return ["#ffffff" if dark and record[column] > 0.1 else "#22262a" for record in records]


def _relation_text(record: Mapping[str, Any], column: str) -> str:
    """What a bar stands for, in the words of a hover text."""
    who = record["head"] if column == "accuracy" else f"offset {_offset(record['offset'])}"
    text = f"{who} {number_text(record[column])}<br>interval {interval_text(record, column)}"
    text += f"<br>{record['arcs']:,} arcs"
    if column == "accuracy":
        gain = number_text(record["gain"])
        text += f"<br>over the offset {gain} ({interval_text(record, 'gain')})"
    return text


def _probe_text(record: Mapping[str, Any]) -> str:
    text = f"{number_text(record['accuracy'])}, interval {interval_text(record, 'accuracy')}"
    if record["gain"] == 0:
        return text
    return (
        f"{text}<br>probe over it {number_text(record['gain'])} ({interval_text(record, 'gain')})"
    )


def _offset(offset: int) -> str:
    """`+2`, or `-1` with a true minus sign."""
    return f"{offset:+d}".replace("-", "\u2212")


def _error_bars(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Error bars from the bounds of an interval; none where there is no interval."""
    values, low, high = (
        np.array([record[f"{name}{end}"] for record in records], dtype=float)
        for end in ("", "_low", "_high")
    )
    return {
        "type": "data",
        "symmetric": False,
        "array": np.nan_to_num(high - values).clip(0),
        "arrayminus": np.nan_to_num(values - low).clip(0),
        "thickness": 1.2,
        "width": 2,
        "color": BOUNDS,
    }


def _legend(figure: go.Figure) -> go.Figure:
    """The legend under the panels, in the order of the bars from the top."""
    legend = {"orientation": "h", "x": 0, "traceorder": "reversed"}
    legend |= {"y": 0, "yref": "container", "yanchor": "bottom"}
    return figure.update_layout(legend=legend, margin_b=80, bargap=0.2, bargroupgap=0.04)
