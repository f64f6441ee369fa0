"""Importance of heads as a grid beside a ranking, and the curve of a task while heads go."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlens.analyses.importance import Estimator, GradientImportance
from attnlens.analyses.pruning import Pruning
from attnlens.views.panels import (
    Quantity,
    add_grid,
    domains,
    interval_text,
    number_text,
    stack_of,
)
from attnlens.views.shown import show
from attnlens.views.theme import INK, styled

MOST = 16
UNITS = {"loss": "nats", "logit_difference": "logits", "accuracy": ""}
CHANCE, BAND, CHANCE_BAND = "#7a8488", "rgba(52,128,139,0.20)", "rgba(122,132,136,0.20)"
GRID = "#e4e6e2"
ESTIMATES = {
    Estimator.TOKENS: "absolute value by token",
    Estimator.PROMPTS: "absolute value by prompt",
}


@show.register
def show_importance(found: GradientImportance) -> go.Figure:
    """Importance of every head, one grid a stack, beside the most important ones."""
    frame = found.to_frame()
    stacks = list(dict.fromkeys(stack_of(site) for site in frame["site"]))
    unit = "share of the layer's norm" if found.normalised else UNITS[found.metric]
    quantity = Quantity("importance", "Importance", unit)
    ranked = frame.nlargest(MOST, "importance")
    heading = f"The {len(ranked)} most important" if len(ranked) < len(frame) else "Ranked"
    titles = [quantity.heading(stack) for stack in stacks]
    figure = make_subplots(
        len(stacks),
        2,
        horizontal_spacing=0.16,
        vertical_spacing=0.3 / len(stacks),
        specs=[[{}, {"rowspan": len(stacks)} if row == 0 else None] for row in range(len(stacks))],
        subplot_titles=[html.escape(title) for title in [titles[0], heading, *titles[1:]]],
    )
    height = max(22 * len(ranked), 26 * len(set(frame["site"])) + 80 * (len(stacks) - 1))
    metric = found.metric.replace("_", " ")
    title = f"Gradient importance of heads for the {metric} on {found.task.replace('_', ' ')}"
    styled(figure, f"{title}, {ESTIMATES[found.estimator]}", height + 150)
    for row, stack in enumerate(stacks, 1):
        own = frame.loc[[stack_of(site) == stack for site in frame["site"]]]
        add_grid(figure, own, quantity, row, 1, numbers=len(stacks) == 1)
    _add_ranking(figure, ranked, unit)
    layout: Any = figure.layout
    for number, note in enumerate(layout.annotations):
        start = domains(figure, 1, 2 if number == 1 else 1)[0][0]
        note.update(font_size=13, xanchor="left", x=start)
    figure.update_layout(margin={"l": 44, "t": 84, "b": 56}, showlegend=False, bargap=0.3)
    return figure


def _add_ranking(figure: go.Figure, ranked: pd.DataFrame, unit: str) -> None:
    """Bars of the most important heads, the first on top, with their intervals."""
    records: list[dict[str, Any]] = ranked.iloc[::-1].to_dict("records")
    values, low, high = (
        np.array([record[f"importance{end}"] for record in records], dtype=float)
        for end in ("", "_low", "_high")
    )
    texts = [
        f"interval {interval_text(record, 'importance')}<br>without it, to first order: "
        f"{number_text(record['signed'])} ({interval_text(record, 'signed')})"
        for record in records
    ]
    bars = go.Bar(
        x=values,
        y=[record["head"] for record in records],
        orientation="h",
        marker={"color": INK},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": np.nan_to_num(high - values).clip(0),
            "arrayminus": np.nan_to_num(values - low).clip(0),
            "thickness": 1.2,
            "width": 3,
            "color": CHANCE,
        },
        customdata=texts,
        hovertemplate="<b>%{y}</b> importance %{x:.3f}<br>%{customdata}<extra></extra>",
    )
    figure.add_trace(bars, row=1, col=2)
    figure.update_xaxes(
        title=unit, rangemode="tozero", gridcolor=GRID, zerolinecolor=GRID, row=1, col=2
    )
    figure.update_yaxes(tickfont_size=11, showgrid=False, ticks="", row=1, col=2)


@show.register
def show_pruning(found: Pruning) -> go.Figure:
    """The metric against the share of heads kept, beside random orders; from all heads to none."""
    frame = found.to_frame()
    share = frame["share"].to_numpy(dtype=float)
    total = int(found.kept[0])
    figure = go.Figure()
    if len(found.random):
        orders = found.random.mean(-1).numpy()
        _add_band(figure, share, orders.min(0), orders.max(0), CHANCE_BAND)
        name = f"random order, mean and range of {len(orders)}"
        texts = [
            f"{kept} heads, interval {interval_text(row, 'random')}" for kept, row in _rows(frame)
        ]
        _add_line(figure, share, frame["random"], texts, CHANCE, name)
    _add_band(figure, share, found.low.numpy(), found.high.numpy(), BAND)
    texts = [
        f"{kept} heads, interval {interval_text(row, 'metric')}{_taken(row['taken'])}"
        for kept, row in _rows(frame)
    ]
    again = ", anew at each step" if found.recomputed else ""
    name = f"least first, by {found.by}{again}, {found.confidence:.0%} interval over prompts"
    _add_line(figure, share, frame["metric"], texts, INK, name)
    unit = UNITS[found.metric]
    metric = found.metric.replace("_", " ")
    styled(figure, f"Pruning heads on {found.task.replace('_', ' ')}", 460)
    figure.update_xaxes(
        title=f"heads kept (share of {total})",
        range=[1.02, min(share.min(), 0.98) - 0.02],
        tickformat=".0%",
        gridcolor=GRID,
        zeroline=False,
    )
    figure.update_yaxes(
        title=metric + (f" ({unit})" if unit else ""), gridcolor=GRID, zerolinecolor=GRID
    )
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"t": 100},
    )
    return figure


def _rows(frame: pd.DataFrame) -> list[tuple[int, dict[str, Any]]]:
    return [(int(record["kept"]), record) for record in frame.to_dict("records")]


def _taken(heads: str) -> str:
    """The heads that went since the point before, as many as a hover text holds."""
    names = [name for name in heads.split(",") if name]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"<br>gone since: {shown}" if names else ""


def _add_band(
    figure: go.Figure, share: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str
) -> None:
    """A band between two curves, which has no hover text and no entry in the legend."""
    outline = np.concatenate([share, share[::-1]])
    band = np.concatenate([high, low[::-1]])
    if np.isnan(band).any():  # one prompt has no interval
        return
    figure.add_trace(
        go.Scatter(
            x=outline,
            y=band,
            mode="lines",
            fill="toself",
            fillcolor=colour,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        )
    )


def _add_line(
    figure: go.Figure, share: np.ndarray, values: Any, texts: list[str], colour: str, name: str
) -> None:
    figure.add_trace(
        go.Scatter(
            x=share,
            y=values,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 6},
            customdata=texts,
            hovertemplate="%{y:.3f}, %{x:.0%} kept<br>%{customdata}<extra></extra>",
            name=html.escape(name),
            legendrank=1 if colour == INK else 2,
        )
    )
