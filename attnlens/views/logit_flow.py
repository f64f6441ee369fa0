"""Logit flow as bars by layer, the logit as it grows upwards, and the parts that weigh most."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlens.analyses.logit_flow import LogitFlow, Part
from attnlens.errors import InputError
from attnlens.views.shown import show
from attnlens.views.theme import INK, styled, visible

MOST, LISTED = 14, 8
GRID, AXIS = "#e4e6e2", "#7a8488"
KINDS = {
    "embeddings": ("embeddings", "#b9a44c"),
    "head": ("heads", INK),
    "mlp": ("MLP", "#9a3412"),
    "bias": ("biases", "#a9b1b4"),
}
START, END = "embeddings", "after the layers"


@dataclass(frozen=True)
class _Share:
    """A part and what it adds."""

    part: Part
    share: float

    @property
    def row(self) -> str:
        """The row of the figure that it is drawn in."""
        if self.part.kind == "embeddings":
            return START
        return self.part.layer or END


@show.register
def show_logit_flow(found: LogitFlow, prompt: int = 0) -> go.Figure:
    """What each layer's heads, MLP and biases add to the logit of one prompt, and the largest."""
    count = len(found.target)
    if not -count <= prompt < count:
        raise InputError(f"There is no prompt {prompt}; the result has {count}, from 0.")
    shares: list[float] = found.shares[prompt].tolist()
    written = [_Share(part, share) for part, share in zip(found.parts, shares, strict=True)]
    rows = list(dict.fromkeys(own.row for own in written))
    figure = make_subplots(
        1,
        3,
        horizontal_spacing=0.1,
        column_widths=[0.36, 0.26, 0.38],
        subplot_titles=["added by layer", "sum so far", "largest parts"],
    )
    _add_layers(figure, written)
    _add_sum(figure, written, rows)
    _add_largest(figure, written)
    value = float(found.value[prompt])
    target = visible(found.target[prompt], 60).replace("\u00b7", " ")
    height = max(26 * len(rows), 24 * min(MOST, len(written))) + 184
    styled(figure, f"Direct contributions to the logit of {target}: {value:.2f} in all", height)
    layout: Any = figure.layout
    for note in layout.annotations:
        note.update(font_size=13)
    for column in (1, 2):
        figure.update_yaxes(categoryorder="array", categoryarray=rows, row=1, col=column)
        figure.update_yaxes(range=[-0.5, len(rows) - 0.5], row=1, col=column)
    figure.update_yaxes(showticklabels=False, row=1, col=2)
    figure.update_yaxes(showgrid=False, ticks="", automargin=True)
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=AXIS, zerolinewidth=1, title="logits")
    figure.update_layout(
        barmode="relative",
        bargap=0.3,
        margin={"l": 90, "t": 84, "b": 100},
        legend={"orientation": "h", "y": -64 / (height - 184), "yanchor": "top", "x": 0},
    )
    return figure


def _add_layers(figure: go.Figure, written: Sequence[_Share]) -> None:
    """One bar a layer and kind; a head or bias by itself is in the hover text."""
    for kind, (name, colour) in KINDS.items():
        own = [share for share in written if share.part.kind == kind]
        rows = list(dict.fromkeys(share.row for share in own))
        parts = [[share for share in own if share.row == row] for row in rows]
        bars = go.Bar(
            x=[sum(share.share for share in part) for part in parts],
            y=rows,
            orientation="h",
            marker={"color": colour},
            name=name,
            customdata=[
                "<br>".join(f"{html.escape(one.part.name)} {one.share:+.3f}" for one in part)
                for part in (_largest(part, LISTED) for part in parts)
            ],
            hovertemplate=f"<b>%{{y}}</b> {name} %{{x:.3f}}<br>%{{customdata}}<extra></extra>",
        )
        figure.add_trace(bars, row=1, col=1)


def _add_sum(figure: go.Figure, written: Sequence[_Share], rows: Sequence[str]) -> None:
    """The logit that would be read after each layer, with the norm's statistics of the end."""
    added = [sum(own.share for own in written if own.row == row) for row in rows]
    line = go.Scatter(
        x=list(accumulate(added)),
        y=list(rows),
        mode="lines+markers",
        line={"color": INK, "width": 2},
        marker={"size": 7},
        showlegend=False,
        hovertemplate="up to <b>%{y}</b>: %{x:.3f}<extra></extra>",
    )
    figure.add_trace(line, row=1, col=2)


def _add_largest(figure: go.Figure, written: Sequence[_Share]) -> None:
    """Bars of the parts that add or take most, the largest on top."""
    largest = _largest(written, MOST)[::-1]
    bars = go.Bar(
        x=[own.share for own in largest],
        y=[_short(own.part.name) for own in largest],
        orientation="h",
        marker={"color": [KINDS[own.part.kind][1] for own in largest]},
        showlegend=False,
        customdata=[html.escape(own.part.name) for own in largest],
        hovertemplate="<b>%{customdata}</b> %{x:.3f}<extra></extra>",
    )
    figure.add_trace(bars, row=1, col=3)


def _largest(written: Sequence[_Share], most: int) -> list[_Share]:
    return sorted(written, key=lambda own: -abs(own.share))[:most]


def _short(name: str) -> str:
    """A part's name; of a bias's path in the model the end, which is told apart by the layer."""
    shown = name if len(name) <= 24 else "\u2026" + name[-23:]
    return html.escape(shown)
