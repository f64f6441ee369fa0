"""Figures of masked heads: what masking costs each text, and what contrast does to each token."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import torch

from attnlens.analyses.attention_influence import AttentionInfluence
from attnlens.analyses.contrast_decoding import Contrast
from attnlens.errors import InputError
from attnlens.views.shown import show
from attnlens.views.theme import colour_axis, styled, token_label

MOST = 2000
"""Texts that are drawn."""
WITH, WITHOUT, MIXED = "#34808b", "#9a3412", "#1f4e79"


@show.register
def show_influence(result: AttentionInfluence) -> go.Figure:
    """Loss of each text with its heads and with some masked; above the line masking costs."""
    order = [number for number in result.ranking.tolist() if result.score[number].isfinite()]
    if not order:
        raise InputError("No text has a score, so there is nothing to draw.")
    # Of more texts than can be told apart, some along the whole ranking.
    order = order[:: -(-len(order) // MOST)]
    losses = torch.cat([result.base[order], result.masked[order]])
    low, high = float(losses.min()), float(losses.max())
    edge = (high - low or 1) * 0.05
    ends = [max(low - edge, 0.0), high + edge]
    largest = float(result.score[order].abs().max()) or 1.0
    figure = go.Figure()
    figure.add_trace(
        go.Scatter(
            x=ends,
            y=ends,
            mode="lines",
            line={"color": "#a9b1b3", "width": 1, "dash": "dot"},
            hoverinfo="skip",
            name="masking changes nothing",
        )
    )
    figure.add_trace(_texts(result, order))
    mean, bounds = float(result.mean.mean), (float(result.mean.low), float(result.mean.high))
    interval = f" ({bounds[0]:+.1%} to {bounds[1]:+.1%})" if bounds[0] == bounds[0] else ""
    title = f"{_named(result)}: {mean:+.1%}{interval} of loss over {result.prompts} texts"
    styled(figure, title, 560)
    figure.update_layout(coloraxis=_colours(largest), legend={"x": 0.01, "y": 0.99})
    figure.update_xaxes(title="loss with all heads (nats a token)", range=ends)
    figure.update_yaxes(title="loss with the heads masked (nats a token)", range=ends)
    return figure


@show.register
def show_contrast(result: Contrast, prompt: int = 0) -> go.Figure:
    """Probability of each written token by the base run, with heads masked, and as contrasted."""
    if not 0 <= prompt < result.prompts:
        raise InputError(f"There is no prompt {prompt}; there are {result.prompts}, from 0.")
    tokens = result.tokens[prompt]
    places = list(range(len(tokens)))
    figure = go.Figure()
    drawn = [
        ("all heads", result.base, WITH, "circle"),
        ("heads masked", result.masked, WITHOUT, "x"),
        ("contrasted", result.contrast, MIXED, "diamond"),
    ]
    strength = result.strength[prompt].tolist()
    for name, values, colour, symbol in drawn:
        figure.add_trace(
            go.Scatter(
                x=places,
                y=torch.exp(values[prompt, : len(tokens)]).tolist(),
                mode="lines+markers",
                line={"color": colour, "width": 1},
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=name,
                customdata=[
                    [token_label(token), f"{a:.2f}"]
                    for token, a in zip(tokens, strength, strict=False)
                ],
                hovertemplate="<b>%{customdata[0]}</b> %{y:.3f}<br>strength %{customdata[1]}"
                f"<extra>{name}</extra>",
            )
        )
    changed = [s for s in places if int(result.likeliest[prompt, s]) != result.answers[prompt][s]]
    for step in changed:
        figure.add_vrect(step - 0.5, step + 0.5, fillcolor="#f2ecdc", line_width=0, layer="below")
    styled(figure, f"Contrast with {_named(result)}: {len(changed)} tokens changed (shaded)", 460)
    labels = [token_label(token) for token in tokens]
    figure.update_xaxes(tickvals=places, ticktext=labels, title="written token", showgrid=False)
    figure.update_yaxes(title="probability", range=[-0.03, 1.03])
    figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    return figure


def _texts(result: AttentionInfluence, order: list[int]) -> go.Scatter:
    """A point a text: its loss with all heads, and with some masked."""
    return go.Scatter(
        x=result.base[order].tolist(),
        y=result.masked[order].tolist(),
        mode="markers",
        marker={
            "size": 9,
            "color": result.score[order].tolist(),
            "coloraxis": "coloraxis",
            "line": {"width": 0.5, "color": "#5d666a"},
        },
        customdata=[
            [
                f"{float(result.score[number]):+.1%}",
                token_label(result.starts[number], 60),
                number,
                int(result.tokens[number]),
            ]
            for number in order
        ],
        hovertemplate="<b>%{customdata[0]}</b> text %{customdata[2]}, %{customdata[3]} tokens"
        "<br>%{customdata[1]}<br>loss %{x:.3f}, masked %{y:.3f}<extra></extra>",
        showlegend=False,
    )


def _named(result: AttentionInfluence | Contrast) -> str:
    """The edit, with its heads where they are few."""
    if len(result.heads) <= 6:
        return result.edit
    return f"{result.edit.partition(' of ')[0]} of {len(result.heads)} heads"


def _colours(largest: float) -> dict[str, Any]:
    settings = colour_axis("diverging", -largest, largest, "score")
    settings["colorbar"] |= {"tickformat": "+.0%"}
    return settings
