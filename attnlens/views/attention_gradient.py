"""Saliency flows over layers: one line a flow, with its interval over prompts."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnlens.analyses.saliency_flows import REST, SaliencyFlows
from attnlens.views.panels import count_text
from attnlens.views.shown import show
from attnlens.views.theme import INK, styled, visible

GREY, GRID = "#7a8488", "#e4e6e2"
COLOURS = (INK, "#9a3412", "#1f4e79", "#8a6d1d", "#6b4a86", "#4d7a3a")
LONGEST = 40


@show.register
def show_flows(found: SaliencyFlows) -> go.Figure:
    """Mean saliency of an edge of each flow, by layer; edges of no flow are the grey line."""
    figure = go.Figure()
    frame = found.to_frame()
    for number, flow in enumerate(found.flows):
        _add_flow(figure, frame.loc[[one == flow for one in frame["flow"]]], _colour(flow, number))
    explained = list(dict.fromkeys(found.target))
    of = f" for {visible(explained[0], LONGEST)}" if len(explained) == 1 else ""
    prompts = count_text(len(found.by_prompt), "prompt")
    interval = f", {found.confidence:.0%} interval" if len(found.by_prompt) > 1 else ""
    styled(figure, f"Saliency of attention{of}, {prompts}{interval}", 440)
    figure.update_xaxes(title="layer", showgrid=False, zeroline=False)
    figure.update_yaxes(
        title="mean |A \u00b7 dM/dA| of an edge, in units of the target",
        rangemode="tozero",
        gridcolor=GRID,
        zerolinecolor=GRID,
    )
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin={"t": 100}
    )
    return figure


def _colour(flow: str, number: int) -> str:
    return GREY if flow == REST else COLOURS[number % len(COLOURS)]


def _add_flow(figure: go.Figure, own: pd.DataFrame, colour: str) -> None:
    """One flow's line; the band of its interval has no hover text and no entry in the legend."""
    records: list[dict[str, Any]] = own.to_dict("records")
    layers = [record["layer"] for record in records]
    name = html.escape(records[0]["flow"])
    low, high = (own[f"saliency_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    known = ~(np.isnan(low) | np.isnan(high))  # one prompt has no interval
    own_layers = [layer for layer, there in zip(layers, known, strict=True) if there]
    if own_layers:
        figure.add_trace(
            go.Scatter(
                x=own_layers + own_layers[::-1],
                y=np.concatenate([high[known], low[known][::-1]]),
                mode="lines",
                fill="toself",
                fillcolor=colour,
                opacity=0.16,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=own["saliency"],
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dot" if colour == GREY else "solid"},
            marker={"size": 6},
            customdata=[_numbers(record) for record in records],
            hovertemplate=f"<b>{name}</b>, %{{x}}<br>%{{customdata}}<extra></extra>",
            name=name,
        )
    )


def _numbers(record: dict[str, Any]) -> str:
    """A mean and its bounds; saliency has any size, so digits are those that tell."""
    mean, low, high = (record[f"saliency{end}"] for end in ("", "_low", "_high"))
    if np.isnan(mean):
        return "no edges"
    bounds = "" if np.isnan(low) else f", interval {low:.3g} to {high:.3g}"
    return f"{mean:.3g}{bounds}"
