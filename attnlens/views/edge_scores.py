"""Scores of all edges of a model as one heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.anatomy.network import ARROW, Network
from attnlens.errors import InputError
from attnlens.views.panels import count_text
from attnlens.views.theme import colour_axis, escaped, styled

MOST = 120
"""Senders, and receivers, of a heat map of edges; of more those with the strongest edges."""
LABELLED = 50
"""Rows or columns that have room for a name each; of more, layers are named."""
SATURATED = 0.99
"""Share of the edges whose scores the colours tell apart; few larger ones would bleach the rest."""
BETWEEN = "rgba(122,132,136,0.45)"


def edge_scores_figure(
    network: Network, scores: Float[Tensor, "sender receiver"], title: str, most: int = MOST
) -> go.Figure:
    """Scores of all edges, senders down and receivers across, by layer; blank where is no edge.

    Colours end at the 99th percentile of the sizes, since few edges are far larger than the rest.
    Of more than `most` senders or receivers those with the strongest edges are drawn.

    Raises:
        InputError: scores of another shape, most under 1.

    """
    if scores.shape != network.exists.shape or most < 1:
        raise InputError(
            f"scores have shape {tuple(scores.shape)} and most={most}; needed is one score a pair "
            f"of sender and receiver, {tuple(network.exists.shape)}, and at least one to draw."
        )
    values = np.where(network.exists.numpy(), scores.detach().double().cpu().numpy(), np.nan)
    sizes = np.abs(np.nan_to_num(values))
    rows, columns = _largest(sizes.max(1, initial=0), most), _largest(sizes.max(0, initial=0), most)
    shown = values[np.ix_(rows, columns)]
    senders = [network.senders[row] for row in rows]
    receivers = [network.receivers[column] for column in columns]
    top = float(np.quantile(sizes[sizes > 0], SATURATED)) if sizes.any() else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=shown.astype(np.float32), x=list(range(len(columns))), y=list(range(len(rows))),
            customdata=[[escaped(f"{a.name}{ARROW}{b.name}") for b in receivers] for a in senders],
            coloraxis="coloraxis", hoverongaps=False,
            hovertemplate="<b>%{customdata}</b><br>score %{z:.3g}<extra></extra>",
        )
    )  # fmt: skip
    styled(
        figure,
        title,
        int(np.clip((15 if len(rows) <= LABELLED else 6) * len(rows), 240, 760)) + 160,
    )
    _say_what_is_drawn(figure, network, shown.shape)
    _label(figure, "x", [r.name for r in receivers], [r.layer for r in receivers])
    _label(figure, "y", [s.name for s in senders], [s.layer for s in senders])
    figure.update_xaxes(title="receiver")
    figure.update_yaxes(title="sender", autorange="reversed")
    figure.update_layout(
        coloraxis=colour_axis("diverging", -top, top, "score"),
        plot_bgcolor="#ecebe6",
        margin={"l": 84, "r": 60, "b": 76, "t": 76},
    )
    return figure


def _largest(sizes: Float[np.ndarray, " number"], most: int) -> Int[np.ndarray, " number"]:
    """The places of the largest, in their order."""
    return np.sort(np.argsort(-sizes, kind="stable")[:most])


def _say_what_is_drawn(figure: go.Figure, network: Network, shape: tuple[int, int]) -> None:
    """How many senders and receivers are drawn, where not all are, and what colours mean."""
    every = {"sender": len(network.senders), "receiver": len(network.receivers)}
    told = [
        f"{drawn} of {count_text(count, what)}"
        for (what, count), drawn in zip(every.items(), shape, strict=True)
        if drawn < count
    ]
    drawn = f"Drawn: {' and '.join(told)}, those with the strongest edges. " if told else ""
    layout: Any = figure.layout
    layout.title.text += f"<br><sup>{drawn}Colours end at the 99th percentile of sizes.</sup>"


def _label(figure: go.Figure, axis: str, names: Sequence[str], layers: Sequence[int]) -> None:
    """Names along an axis or, where they have no room, layers; and lines between layers."""
    starts = [n for n, layer in enumerate(layers) if n == 0 or layer != layers[n - 1]]
    ends = [*starts[1:], len(layers)]
    places: list[float] = list(range(len(names)))
    texts = [escaped(name) for name in names]
    if len(names) > LABELLED:
        places = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
        texts = [
            texts[start] if end - start == 1 else f"L{layers[start]}"
            for start, end in zip(starts, ends, strict=True)
        ]
    figure.update_layout(
        {
            f"{axis}axis": {
                "tickvals": places, "ticktext": texts, "showgrid": False, "zeroline": False,
                "ticks": "", "tickfont": {"size": 10},
            }
        }
    )  # fmt: skip
    if axis == "x":
        figure.update_xaxes(tickangle=-90 if 8 < len(names) <= LABELLED else 0)
    draw = figure.add_vline if axis == "x" else figure.add_hline
    for start in starts[1:]:
        draw(start - 0.5, line={"color": BETWEEN, "width": 1})
