"""Figures of retrieval: who looks at the needle, and where in the text the model finds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlens.analyses.query_focused import QueryFocusedHeads
from attnlens.analyses.retrieval import RetrievalHeads
from attnlens.views.panels import Quantity, add_grid, domains, head_grids
from attnlens.views.shown import show
from attnlens.views.theme import colour_axis, styled

SCORE = Quantity("score", "Retrieval score")
RECALL = "Recall by length of the prompt and depth of the needle"


@show.register
def show_retrieval(result: RetrievalHeads) -> go.Figure:
    """Score of every head, beside the recall of the answers at each length and depth."""
    layers = len({head.layer for head in result.heads})
    height = int(np.clip(26 * max(layers, len(result.depths)) + 60, 220, 520))
    titles = [SCORE.heading(""), RECALL]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.16)
    runs = f"{result.prompts} of {len(result.runs)} runs"
    styled(figure, f"Retrieval heads, over the {runs} that count", height + 120)
    add_grid(figure, result.to_frame(), SCORE, 1, 1)
    figure.update_layout({"coloraxis": {"cmin": 0.0, "cmax": max(1.0, _most(result))}})
    _add_recall(figure, result)
    figure.update_annotations(font_size=13, xanchor="left")
    layout: Any = figure.layout
    for number, note in enumerate(layout.annotations):
        note.x = domains(figure, 1, number + 1)[0][0]
    figure.update_layout(margin={"l": 44, "r": 70, "b": 56})
    return figure


@show.register
def show_query_focused(result: QueryFocusedHeads) -> go.Figure:
    """Weight on the gold documents less that of the null query, and the two by themselves."""
    quantities = [
        Quantity("score", "Gold document, less null query", signed=True),
        Quantity("gold", "Gold document", mass=True),
        Quantity("null", "Gold document, null query", mass=True),
    ]
    title = f"Query-focused heads over {result.prompts} examples"
    if result.accuracy.mean.isfinite():
        ranked = f"the best {result.top} rank a gold document first in"
        title += f": {ranked} {float(result.accuracy.mean):.0%} (chance {result.chance:.0%})"
    figure = head_grids(result.to_frame(), quantities, title)
    layout: Any = figure.layout
    most = max(layout.coloraxis2.cmax, layout.coloraxis3.cmax)  # the two compare by eye
    figure.update_layout(coloraxis2_cmax=most, coloraxis3_cmax=most)
    return figure


def _add_recall(figure: go.Figure, result: RetrievalHeads) -> None:
    """The table of recalls: lengths across, depths down, as needle tests are drawn."""
    hover = [
        [
            f"length {length}, depth {depth:g}<br>recall {float(result.recall[i, j]):.2f}<br>"
            f"{int(result.counted[i, j])} of {int(result.asked[i, j])} runs count"
            if result.asked[i, j]
            else ""
            for i, length in enumerate(result.lengths)
        ]
        for j, depth in enumerate(result.depths)
    ]
    figure.add_trace(
        go.Heatmap(
            z=result.recall.T.float().numpy(),
            x=[str(length) for length in result.lengths],
            y=[f"{depth:g}" for depth in result.depths],
            customdata=hover,
            coloraxis="coloraxis2",
            texttemplate="%{z:.2f}" if len(result.lengths) <= 12 else None,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=1,
        col=2,
    )
    settings = colour_axis("sequential", 0.0, 1.0, "")
    across, up = domains(figure, 1, 2)
    settings["colorbar"] |= {
        "x": across[1] + 0.005,
        "y": (up[0] + up[1]) / 2,
        "len": up[1] - up[0],
        "thickness": 8,
        "nticks": 4,
        "tickfont": {"size": 10},
    }
    figure.update_layout(coloraxis2=settings)
    figure.update_xaxes(title="length (tokens)", type="category", showgrid=False, row=1, col=2)
    figure.update_yaxes(
        title="depth", type="category", autorange="reversed", showgrid=False, row=1, col=2
    )


def _most(result: RetrievalHeads) -> float:
    """The largest score; over 1 only where copies repeat."""
    return float(result["score"].mean.nan_to_num(0.0).max())
