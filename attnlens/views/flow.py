"""Attention flow: maps of all targets beside rollout, or one target's sources with their bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlens.analyses.attention_flow import AttentionFlow
from attnlens.errors import InputError
from attnlens.views.heatmaps import check_prompt
from attnlens.views.panels import domains
from attnlens.views.shown import show
from attnlens.views.theme import INK, colour_axis, position_labels, styled, token_label, visible

SATURATED, ROLLOUT, BOUND, GRID = "#a9c8c9", "#c0622d", "#6a7478", "#e4e6e2"
LABELS = 56
"""Tokens along an axis that have room for a label."""
FEW = 26
"""Tokens along an axis of one of two maps that have room for a label."""


@show.register
def show_flow(found: AttentionFlow, prompt: int = 0, target: int | None = None) -> go.Figure:
    """Flow of one prompt: of one target's sources between its bounds, or of all pairs as a map.

    `target` is a position among the prompt's tokens, negative from the end; it may be left out
    where the result has one alone. Raises InputError for a prompt or target that is not there.
    """
    check_prompt(prompt, len(found.tokens))
    length, targets = len(found.tokens[prompt]), found.targets[prompt]
    if target is None:
        return _maps(found, prompt) if len(targets) > 1 else _sources(found, prompt, 0)
    place = target + length if target < 0 else target
    if place not in targets:
        raise InputError(f"There is no flow to the target {target}; the targets are {targets}.")
    return _sources(found, prompt, targets.index(place))


def _sources(found: AttentionFlow, prompt: int, row: int) -> go.Figure:
    """Bars of the flow from each source, with rollout and the upper bound as marks."""
    words, place = found.tokens[prompt], found.targets[prompt][row]
    sources = found.sources[prompt]
    every = position_labels(words, len(words))
    flow, low, high, full = (
        values[prompt, row, : len(sources)].numpy()
        for values in (found.flow, found.rollout, found.bound, found.saturated)
    )
    texts = [
        f"<b>{token_label(words[source])} {source}</b><br>flow {own:.3f}"
        f"{', saturated' if filled else ''}<br>rollout {below:.3f}<br>upper bound {above:.3f}"
        for source, own, below, above, filled in zip(sources, flow, low, high, full, strict=True)
    ]
    figure = go.Figure()
    for name, kept, colour in (
        ("flow", ~full, INK),
        ("flow, saturated: all that the ends let through", full, SATURATED),
    ):
        if kept.any():
            figure.add_trace(
                go.Bar(
                    x=np.flatnonzero(kept), y=flow[kept], name=name, marker={"color": colour},
                    customdata=[text for text, own in zip(texts, kept, strict=True) if own],
                    hovertemplate="%{customdata}<extra></extra>",
                )
            )  # fmt: skip
    for name, values, colour in (("upper bound", high, BOUND), ("rollout", low, ROLLOUT)):
        figure.add_trace(_marks(name, values, colour, texts))
    title = f"Attention flow to \u201c{visible(words[place])}\u201d at {place}"
    styled(figure, f"{title}, {_layers(found)}", 400)
    step = len(sources) // LABELS + 1
    figure.update_xaxes(
        tickvals=list(range(len(sources)))[::step],
        ticktext=[every[source] for source in sources][::step],
        tickangle=-60 if len(sources) > 8 else 0,
        range=[-0.7, len(sources) - 0.3],
        showgrid=False,
    )
    figure.update_yaxes(title="flow", rangemode="tozero", gridcolor=GRID, zerolinecolor=GRID)
    figure.update_layout(
        barmode="overlay",
        bargap=0.35,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"t": 92, "b": 90},
    )
    return figure


def _marks(name: str, values: np.ndarray, colour: str, texts: list[str]) -> go.Scatter:
    """A short line at each source's bound."""
    size = float(np.clip(420 / max(len(values), 1), 5, 22))
    return go.Scatter(
        x=np.arange(len(values)), y=values, mode="markers", name=name, customdata=texts,
        marker={"symbol": "line-ew", "size": size, "line": {"width": 2, "color": colour}},
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _maps(found: AttentionFlow, prompt: int) -> go.Figure:
    """Flow and rollout of all pairs; each has its own colours, since rollout is far below."""
    words, targets, sources = found.tokens[prompt], found.targets[prompt], found.sources[prompt]
    labels = position_labels(words, len(words))
    size = (slice(prompt, prompt + 1), slice(len(targets)), slice(len(sources)))
    flow, low, high = (t[size][0].numpy() for t in (found.flow, found.rollout, found.bound))
    full = found.saturated[size][0].numpy()
    joined = high > 0
    figure = make_subplots(
        1, 2, horizontal_spacing=0.2, subplot_titles=("Attention flow", "Attention rollout")
    )
    rows, columns = [labels[t] for t in targets], [labels[s] for s in sources]
    for number, values in enumerate((flow, low), 1):
        figure.add_trace(_heat(values, joined, full, (flow, low, high), rows, columns, number))
        figure.update_xaxes(title="source", row=1, col=number)
    side = int(np.clip(11 * max(len(targets), 14) + 210, 380, 900))
    told = f"{full.sum():,} of {joined.sum():,} pairs saturated"
    styled(figure, f"Attention flow and rollout, {_layers(found)}: {told}", side)
    for ticks, every in ((figure.update_xaxes, columns), (figure.update_yaxes, rows)):
        step = -(-len(every) // FEW)
        shown: dict[str, Any] = {
            "tickvals": list(range(len(every)))[::step],
            "ticktext": every[::step],
        }
        ticks(**shown, showgrid=False, zeroline=False, ticks="", tickfont_size=10)
    figure.update_xaxes(tickangle=-60)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title="target", row=1, col=1)
    axes: dict[str, Any] = {}
    for number, (name, values) in enumerate((("flow", flow), ("rollout", low)), 1):
        across, up = domains(figure, 1, number)
        axis = colour_axis("sequential", 0.0, max(float(values.max()), 1e-6), name)
        axis["colorbar"] |= {"x": across[1] + 0.005, "y": up[0], "yanchor": "bottom"}
        axis["colorbar"] |= {"len": up[1] - up[0], "thickness": 9}
        axes["coloraxis" if number == 1 else f"coloraxis{number}"] = axis
    figure.update_layout(**axes, margin={"l": 100, "t": 84, "b": 100})
    layout: Any = figure.layout
    for number, note in enumerate(layout.annotations, 1):
        note.update(font_size=13, xanchor="left", x=domains(figure, 1, number)[0][0])
    return figure


def _heat(
    values: np.ndarray,
    joined: np.ndarray,
    full: np.ndarray,
    told: tuple[np.ndarray, ...],
    rows: list[str],
    columns: list[str],
    number: int,
) -> go.Heatmap:
    """One map; pairs that no path joins are left blank."""
    texts = [
        [
            f"from <b>{source}</b> to <b>{target}</b><br>flow {told[0][t, s]:.3f}"
            f"{', saturated' if full[t, s] else ''}<br>rollout {told[1][t, s]:.3f}"
            f"<br>upper bound {told[2][t, s]:.3f}"
            for s, source in enumerate(columns)
        ]
        for t, target in enumerate(rows)
    ]
    return go.Heatmap(
        z=np.where(joined, values, np.nan).astype(np.float32),
        customdata=texts,
        coloraxis="coloraxis" if number == 1 else f"coloraxis{number}",
        hoverongaps=False,
        hovertemplate="%{customdata}<extra></extra>",
        xaxis="x" if number == 1 else f"x{number}",
        yaxis="y" if number == 1 else f"y{number}",
    )


def _layers(found: AttentionFlow) -> str:
    """The layers that it goes through."""
    first, last = found.layers[0], found.layers[-1]
    return first if first == last else f"{first} to {last}"
