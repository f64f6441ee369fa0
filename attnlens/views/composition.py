"""Composition scores: a grid of senders and receivers for each way of reading."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlens.analyses.composition import Composition
from attnlens.anatomy import Head
from attnlens.views.panels import count_text, domains, number_text
from attnlens.views.shown import show
from attnlens.views.theme import colour_axis, styled

KINDS = {"q": "by queries", "k": "by keys", "v": "by values"}
LABELLED = 40
"""Heads along an axis that have room for a name each; of more, layers are named."""
ROOMY = 12
"""Names along the axes of a row of grids, halved, that fit side by side."""
TOLD = 20_000
"""Cells whose hover texts a page can hold; of more the hover says the value."""


@show.register
def show_composition(result: Composition) -> go.Figure:
    """Scores over baseline, senders down and receivers across, one grid a way of reading.

    Pairs that there are not, and heads with weights of 0, are left blank.
    """
    count = len(result.kinds)
    figure = make_subplots(
        1,
        count,
        subplot_titles=[KINDS[kind] for kind in result.kinds],
        shared_yaxes=True,
        horizontal_spacing=0.03,
    )
    rows, columns = len(result.senders), len(result.receivers)
    height = int(np.clip(18 * rows, 220, 620))
    offset = "" if result.offset is None else f", {count_text(result.offset, 'token')} apart"
    styled(
        figure, f"What heads read of earlier heads: composition less chance{offset}", height + 150
    )
    values = result.over_baseline.numpy()
    finite = values[np.isfinite(values)]
    top = max(float(np.abs(finite).max()) if finite.size else 1.0, 1e-6)
    told = values.size <= TOLD
    for number in range(count):
        figure.add_trace(
            go.Heatmap(
                z=values[number].astype(np.float32),
                x=list(range(columns)),
                y=list(range(rows)),
                customdata=_texts(result, number) if told else None,
                coloraxis="coloraxis",
                xgap=1 if columns <= LABELLED else 0,
                ygap=1 if rows <= LABELLED else 0,
                hoverongaps=False,
                hovertemplate="%{customdata}<extra></extra>" if told else "%{z:.3f}<extra></extra>",
            ),
            row=1,
            col=number + 1,
        )
    _label_axes(figure, result)
    figure.update_layout(
        coloraxis=colour_axis("diverging", -top, top, "score less baseline"),
        margin={"l": 76, "r": 60, "b": 70, "t": 90},
        plot_bgcolor="#ecebe6",
    )
    figure.update_annotations(font_size=13, xanchor="left")
    for number, note in enumerate(figure.layout.annotations):
        note.x = domains(figure, 1, number + 1)[0][0]
    return figure


def _label_axes(figure: go.Figure, result: Composition) -> None:
    for number in range(len(result.kinds)):
        places, texts = _ticks(result.receivers)
        figure.update_xaxes(
            title="receiver",
            tickvals=places,
            ticktext=texts,
            tickangle=-90 if len(texts) * len(result.kinds) > 2 * ROOMY else 0,
            row=1,
            col=number + 1,
        )
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="", tickfont_size=10)
    places, texts = _ticks(result.senders)
    figure.update_yaxes(
        tickvals=places,
        ticktext=texts,
        showgrid=False,
        zeroline=False,
        ticks="",
        tickfont_size=10,
        autorange="reversed",
    )
    figure.update_yaxes(title="sender", row=1, col=1)


def _ticks(heads: tuple[Head, ...]) -> tuple[list[int], list[str]]:
    """Where names stand along an axis: every head's, or the first head's of each layer."""
    if len(heads) <= LABELLED:
        return list(range(len(heads))), [str(head) for head in heads]
    first = {head.site: place for place, head in reversed(list(enumerate(heads)))}
    return list(first.values()), list(first)


def _texts(result: Composition, kind: int) -> list[list[str]]:
    """What the hover says of each cell."""
    scores, chance = result.score[kind].tolist(), result.baseline[kind].tolist()
    spread = result.spread[kind].tolist()
    return [
        [
            f"<b>{sender} → {receiver}</b> {KINDS[result.kinds[kind]]}<br>"
            f"score {number_text(scores[a][b])}, by chance {number_text(chance[a][b])}"
            f" ± {number_text(spread[a][b])}"
            for b, receiver in enumerate(result.receivers)
        ]
        for a, sender in enumerate(result.senders)
    ]
