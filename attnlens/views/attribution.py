"""An attribution as coloured text over its scores; scores of heads, of layers; its graph."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from attnlens.analyses.attribution import Attribution, Ledger
from attnlens.errors import InputError
from attnlens.views.graph_figure import draw_graph
from attnlens.views.heatmaps import check_prompt

# A logit flow is an attribution, too: its own figure is registered with this one.
from attnlens.views.logit_flow import show_logit_flow as show_logit_flow
from attnlens.views.panels import Quantity, domains, head_grids, number_text
from attnlens.views.shown import show
from attnlens.views.theme import INK, colour_axis, position_labels, styled, token_label, visible

Of = Literal["tokens", "heads", "layers", "graph"]
COLUMNS = (56, 132)
"""Characters of a line of coloured text, at least and at most."""
LINE, BARS, ENTRY = 27, 170, 20
"""Heights in pixels of a line of text, of the bars of the scores, of an entry of the ledger."""
HEADING, TICKS = 44, 96
"""Room over a panel for its heading alone, and for the labels of the panel above it too."""
MOST_TOKENS = 1200
"""Longer texts are bars alone."""
CLIP = 0.97
"""Share of the tokens whose scores the colours tell apart."""
LABELS = 60
GRID, EDGE, REST = "#e4e6e2", "#c9cdc9", "#9aa3a3"
DARK, LETTERS, ON_DARK = 0.5, "#22262a", "#fdfdfb"
"""Share of the largest score whose colour is dark, and colours of letters on light and on dark."""

Scores = Float[np.ndarray, " position"]


@show.register
def show_attribution(found: Attribution, prompt: int = 0, of: Of = "tokens") -> go.Figure:
    """Scores of one prompt: the text in their colours, as bars, and where the value went.

    `of="heads"` shows the scores of heads, `of="layers"` those of the stream at each layer,
    `of="graph"` the graph that the method traced, or that of the edges that it scored (`maps`).
    Raises InputError for what there is none of.
    """
    check_prompt(prompt, len(found.tokens))
    if of not in get_args(Of):
        raise InputError(f"There is no figure of {of!r}; choose {', '.join(get_args(Of))}.")
    if of == "heads":
        return _heads(found, prompt)
    if of == "layers":
        return _layers(found, prompt)
    if of == "graph":
        return draw_graph(found.graph(prompt), title_of(found, prompt, "Graph"))
    return _tokens(found, prompt)


def title_of(found: Attribution, prompt: int, what: str) -> str:
    """What is shown, by which method, of which target."""
    which = f", prompt {prompt}" if len(found.tokens) > 1 else ""
    value = number_text(float(found.value[prompt]))
    return f"{what} by {found.method} for {target_text(found, prompt)} (value {value}{which})"


def target_text(found: Attribution, prompt: int) -> str:
    """What is explained, on one line: `'·Ann' − '·Ben'`."""
    return visible(found.target[prompt], 60).replace("'\u00b7-\u00b7'", "' \u2212 '")


def ledger_heading(found: Attribution, ledger: Ledger, prompt: int) -> str:
    """What the ledger tells; routes share out 1, whatever the value."""
    whole, value = float(ledger.value[prompt]), float(found.value[prompt])
    named = "the value" if abs(whole - value) <= 1e-3 * abs(value) else "the whole"
    return f"Where {named} {number_text(whole)} went"


def _tokens(found: Attribution, prompt: int) -> go.Figure:
    words, scores = found.tokens[prompt], found.of(prompt).double().cpu().numpy()
    written = len(words) <= MOST_TOKENS
    cells = _cells(words) if written else []
    lines = 1 + max((line for line, *_ in cells), default=-1)
    entries = 0 if found.ledger is None else len(found.ledger.entries) + 1
    top, clipped = _colour_end(scores)
    ends = f"; colours end at {'±' * bool((scores < 0).any())}{_exact(top)}" if clipped else ""
    parts = [(f"Text{ends}", LINE * lines)] * written + [("Scores", BARS)]
    if found.ledger is not None:
        parts.append((ledger_heading(found, found.ledger, prompt), ENTRY * entries))
    figure = make_subplots(len(parts), 1, subplot_titles=[name for name, _ in parts])
    gaps = ([HEADING] * written + [TICKS])[: len(parts) - 1]
    height = sum(size for _, size in parts) + sum(gaps)
    bottom = 40 if entries else 84
    styled(figure, title_of(found, prompt, "Scores of tokens"), height + 92 + bottom)
    figure.update_annotations(font_size=13, xanchor="left", x=0)
    _stack(figure, [size for _, size in parts], gaps)
    labels = position_labels(words, len(words))
    if written:
        _add_text(figure, words, cells, scores, top, labels)
    _add_bars(figure, scores, labels, 1 + written)
    if found.ledger is not None:
        _add_ledger(figure, found.ledger, prompt, len(parts))
    signed = bool((scores < 0).any())
    axis = colour_axis("diverging" if signed else "sequential", -top if signed else 0, top, "score")
    row = domains(figure, 1 + written, 1)[1]
    axis["colorbar"] |= {"y": sum(row) / 2, "len": row[1] - row[0], "nticks": 5}
    figure.update_layout(coloraxis=axis, showlegend=False, bargap=0.12, barmode="overlay")
    figure.update_layout(margin={"l": 84, "t": 92, "b": bottom})
    return figure


def _colour_end(scores: Scores) -> tuple[float, bool]:
    """Where the colours end, and whether scores lie beyond.

    A few huge scores, as of a first token, may not leave the rest of a long text without colour.
    """
    sizes = np.abs(scores)
    largest = float(sizes.max(initial=0)) or 1.0
    end = max(float(np.quantile(sizes, CLIP)), largest / 8) if len(sizes) else largest
    return (end, True) if end < largest / 2 else (largest, False)


def _stack(figure: go.Figure, sizes: Sequence[float], gaps: Sequence[float]) -> None:
    """Panels of these heights under one another, each with its heading above it."""
    total, top = sum(sizes) + sum(gaps), 1.0
    layout: Any = figure.layout
    for row, (size, gap) in enumerate(zip(sizes, [*gaps, 0], strict=True), 1):
        low = max(top - size / total, 0.0)
        figure.update_yaxes(domain=[low, top], row=row, col=1)
        layout.annotations[row - 1].y = top
        top = low - gap / total


def _cells(words: Sequence[str]) -> list[tuple[int, int, int]]:
    """Line, start and width of each token in characters; after a line end comes a new line."""
    widths = [_width(visible(word)) + 1 for word in words]
    full = int(np.clip(sum(widths), *COLUMNS))
    cells: list[tuple[int, int, int]] = []
    line = start = 0
    for word, width in zip(words, widths, strict=True):
        if start and start + width > full:
            line, start = line + 1, 0
        cells.append((line, start, width))
        start += width
        if word.endswith("\n"):
            line, start = line + 1, 0
    return cells


def _width(text: str) -> int:
    """Characters, those of East Asian scripts and pictures twice."""
    return sum(2 if ord(character) >= 0x2E80 else 1 for character in text)


def _add_text(
    figure: go.Figure,
    words: Sequence[str],
    cells: Sequence[tuple[int, int, int]],
    scores: Scores,
    top: float,
    labels: Sequence[str],
) -> None:
    """The tokens as cells in the colour of their scores, line under line."""
    lines, starts, widths = (np.array(part) for part in zip(*cells, strict=True))
    figure.add_trace(
        go.Bar(
            x=widths - 0.2,
            base=starts,
            y=lines,
            width=0.84,
            orientation="h",
            marker={"color": scores, "coloraxis": "coloraxis", "line": {"width": 0}},
            text=[token_label(word) for word in words],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            # Named here: plotly's own choice warns in the browser's console.
            textfont={"size": 13, "color": np.where(abs(scores) > DARK * top, ON_DARK, LETTERS)},
            customdata=_hover(labels, scores),
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    bare: dict[str, Any] = {"showticklabels": False, "showgrid": False, "zeroline": False}
    width = max(COLUMNS[0], int((starts + widths).max()))
    figure.update_xaxes(range=[0, width], ticks="", fixedrange=True, row=1, col=1, **bare)
    figure.update_yaxes(
        range=[lines.max() + 0.5, -0.5], ticks="", fixedrange=True, row=1, col=1, **bare
    )


def _add_bars(figure: go.Figure, scores: Scores, labels: Sequence[str], row: int) -> None:
    """The scores as bars over their positions."""
    step = len(labels) // LABELS + 1
    figure.add_trace(
        go.Bar(
            x=list(range(len(scores))),
            y=scores,
            marker={"color": scores, "coloraxis": "coloraxis",
                    "line": {"width": 0.6 if step < 3 else 0, "color": EDGE}},
            customdata=_hover(labels, scores),
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=row,
        col=1,
    )  # fmt: skip
    ends = [-0.6, max(len(scores), 8) - 0.4]  # a few tokens are not a few walls
    figure.update_xaxes(
        tickvals=list(range(len(labels)))[::step], ticktext=list(labels)[::step], tickangle=-60,
        range=ends, showgrid=False, zeroline=False, ticks="", tickfont_size=11, row=row, col=1,
    )  # fmt: skip
    figure.update_yaxes(
        title="score", gridcolor=GRID, zeroline=True, zerolinecolor=REST, nticks=6, row=row, col=1
    )


def _hover(labels: Sequence[str], scores: Scores) -> list[str]:
    return [
        f"<b>{label}</b> {_exact(score)}"
        for label, score in zip(labels, scores.tolist(), strict=True)
    ]


def _exact(value: float) -> str:
    return f"{value:.3g}".replace("-", "\u2212")


def _add_ledger(figure: go.Figure, ledger: Ledger, prompt: int, row: int) -> None:
    """Each entry of the ledger as a bar, and what none accounts for."""
    entries = {name: float(part[prompt]) for name, part in ledger.entries.items()}
    entries["remainder"] = float(ledger.remainder[prompt])
    values = list(entries.values())
    largest = max(map(abs, values)) or 1.0
    figure.add_trace(
        go.Bar(
            x=values,
            y=[html.escape(name) for name in entries],
            orientation="h",
            marker={"color": [INK] * (len(values) - 1) + [REST]},
            text=[number_text(v) if abs(v) > 1e-3 * largest else _exact(v) for v in values],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="<b>%{y}</b> %{x:.6g}<extra></extra>",
        ),
        row=row,
        col=1,
    )
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.12 * ((high - low) or 1.0)
    figure.update_xaxes(
        range=[low - room * (low < 0), high + room], gridcolor=GRID, zeroline=True,
        zerolinecolor=REST, ticks="", row=row, col=1,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", row=row, col=1)


def _heads(found: Attribution, prompt: int) -> go.Figure:
    frame = found.heads_frame(prompt)
    quantity = Quantity("score", "Score", signed=bool((frame["score"] < 0).any()))
    return head_grids(frame, [quantity], title_of(found, prompt, "Scores of heads"))


def _layers(found: Attribution, prompt: int) -> go.Figure:
    if found.layers is None:
        raise InputError(f"{found.method} scores no layers.")
    words = found.tokens[prompt]
    values = found.layers[prompt, :, : len(words)].double().cpu().numpy()
    labels = position_labels(words, len(words))
    names = [html.escape(name) for name in found.layer_names]
    hover = [
        [f"<b>{label}</b> at {name} {_exact(v)}" for label, v in zip(labels, row, strict=True)]
        for name, row in zip(names, values.tolist(), strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32),
            x=list(range(len(words))),
            y=names,
            customdata=hover,
            coloraxis="coloraxis",
            xgap=1 if len(words) <= LABELS else 0,
            ygap=1,
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    title = title_of(found, prompt, "Scores of the stream that enters each layer")
    styled(figure, title, int(np.clip(26 * len(names) + 190, 280, 900)))
    step = len(labels) // LABELS + 1
    figure.update_xaxes(
        tickvals=list(range(len(labels)))[::step], ticktext=labels[::step], tickangle=-60,
        showgrid=False, ticks="",
    )  # fmt: skip
    figure.update_yaxes(showgrid=False, ticks="")
    signed = bool((values < 0).any())
    top = float(np.abs(values).max(initial=0)) or 1.0
    scale = "diverging" if signed else "sequential"
    figure.update_layout(
        coloraxis=colour_axis(scale, -top if signed else 0, top, "score"),
        margin={"l": 70, "b": 100},
    )
    return figure
