"""Heads and layers beside each other: a plane of heads, ordered heat maps, grids of ranks."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from attnlens.analyses.head_similarity import HeadSimilarity
from attnlens.analyses.layer_similarity import LayerSimilarity
from attnlens.analyses.ranks import HeadRanks
from attnlens.errors import InputError
from attnlens.views.panels import Quantity, domains, head_grids, number_text
from attnlens.views.shown import show
from attnlens.views.theme import INK, colour_axis, styled

Colour = Literal["cluster", "layer"]
Kind = Literal["matched", "head_mean", "unmatched"]

# Apart in hue and in lightness, readable on a light and on a dark ground.
CLUSTERS = (
    "#34808b", "#c0622d", "#6b5b95", "#7a9a3a", "#b0406a", "#3f6fb0",
    "#b8912b", "#5f7a6c", "#9c6a4a", "#8a4fb0", "#4aa3a0", "#7d7d7d",
)  # fmt: skip
BASELINE = "#7a8488"
FRAME = "#d5d8d6"
APART = 0.045
"""Share of the plane's width within which only one head is named; hover names every head."""
LABELLED = 64
"""Heads along an axis that have room for a name."""
BOUNDED = 256
"""Heads of which the hover text gives the interval of each pair."""
KINDS = {
    "matched": "head by head",
    "head_mean": "means over heads",
    "unmatched": "each head with the others",
}


@show.register
def show_head_similarity(similarity: HeadSimilarity, colour: Colour = "cluster") -> go.Figure:
    """Heads in a plane, near where their maps are alike, and the divergence of all pairs.

    `colour` paints the points by `"cluster"` or by `"layer"`.
    """
    if colour not in get_args(Colour):
        raise InputError(f"There is no colour by {colour!r}; choose 'cluster' or 'layer'.")
    figure = make_subplots(
        1, 2, horizontal_spacing=0.11, subplot_titles=("Near where alike", "All pairs, in order")
    )
    styled(figure, _title(similarity), 580)
    traces = _by_cluster(similarity) if colour == "cluster" else [_by_layer(similarity)]
    for trace in traces:
        figure.add_trace(trace, row=1, col=1)
    figure.add_trace(_ordered(similarity), row=1, col=2)
    first, second = (f"{share:.0%} of the spread" for share in similarity.shares)
    frame: dict[str, Any] = {
        "showgrid": False, "zeroline": False, "ticks": "", "showticklabels": False,
        "showline": True, "mirror": True, "linecolor": FRAME, "row": 1, "col": 1,
    }  # fmt: skip
    figure.update_xaxes(title=first, **frame)
    figure.update_yaxes(title=second, scaleanchor="x", **frame)
    names: dict[str, Any] = {
        "showticklabels": len(similarity.heads) <= LABELLED,
        "tickfont_size": 9,
    }
    figure.update_xaxes(tickangle=-90, **names, row=1, col=2)
    figure.update_yaxes(autorange="reversed", **names, row=1, col=2)
    top = max(float(similarity.divergence.max()), 1e-6)
    figure.update_layout(
        coloraxis=colour_axis("sequential", 0.0, top, "divergence (nats)"),
        legend={"orientation": "h", "y": -0.1, "yanchor": "top", "x": 0},
        margin={"l": 40, "t": 84, "b": 70},
    )
    _headings(figure)
    if colour == "layer":
        _layer_bar(figure, len(similarity.sites))
    return figure


@show.register
def show_layer_similarity(similarity: LayerSimilarity, kind: Kind = "matched") -> go.Figure:
    """Cosines of all pairs of layers, and of neighbours with intervals beside the baseline.

    `kind` chooses the heat map: `"matched"`, `"head_mean"` or `"unmatched"`.
    """
    if kind not in KINDS:
        raise InputError(f"There is no kind {kind!r}; choose {', '.join(map(repr, KINDS))}.")
    figure = make_subplots(
        1,
        2,
        column_widths=[0.42, 0.58],
        horizontal_spacing=0.17,
        subplot_titles=(f"All pairs, {KINDS[kind]}", "Neighbouring layers"),
    )
    texts = f"{similarity.prompts} text{'s' * (similarity.prompts != 1)}"
    styled(figure, f"Cosine of the maps of layers, over {texts}", 460)
    figure.add_trace(_cosines(similarity, kind), row=1, col=1)
    figure.update_xaxes(showgrid=False, ticks="", tickfont_size=10, row=1, col=1)
    figure.update_yaxes(
        showgrid=False, ticks="", tickfont_size=10, autorange="reversed", row=1, col=1
    )
    for trace in _neighbours(similarity):
        figure.add_trace(trace, row=1, col=2)
    figure.update_yaxes(title="cosine", rangemode="tozero", row=1, col=2)
    x, y = domains(figure, 1, 1)
    axis = colour_axis("sequential", 0.0, 1.0, "")
    axis["colorbar"] |= {"x": x[1] + 0.005, "len": y[1] - y[0], "thickness": 8}
    legend = {"orientation": "h", "y": -0.12, "yanchor": "top", "x": x[1] + 0.17}
    figure.update_layout(coloraxis=axis, legend=legend, margin={"l": 50, "t": 84})
    _headings(figure)
    return figure


@show.register
def show_head_ranks(ranks: HeadRanks) -> go.Figure:
    """Effective ranks, one grid a matrix and stack."""
    titles = {
        "qk_rank": f"rank of W_Q W_K^T, at most {max(ranks.d_qk)}",
        "ov_rank": f"rank of W_V W_O, at most {max(ranks.d_v)}",
        "pattern_rank": f"rank of the map, at most {max(ranks.lengths, default=0)}",
    }
    known = [name for name in ranks.names if not bool(ranks[name].mean.isnan().all())]
    certain = [f"{name}_{end}" for name in ("qk_rank", "ov_rank") for end in ("low", "high")]
    quantities = [Quantity(name, titles[name]) for name in known]
    return head_grids(ranks.to_frame().drop(columns=certain), quantities, "Effective ranks")


def _title(similarity: HeadSimilarity) -> str:
    texts = f"{similarity.prompts} text{'s' * (similarity.prompts != 1)}"
    return f"How alike heads are, over {similarity.rows:,} rows of {texts}"


def _by_cluster(similarity: HeadSimilarity) -> list[go.Scatter]:
    """One trace a cluster, in the order of the heat map."""
    traces: list[go.Scatter] = []
    for cluster in range(max(similarity.clusters) + 1):
        own = [head for head, label in enumerate(similarity.clusters) if label == cluster]
        trace = _points(similarity, own)
        colour = CLUSTERS[cluster % len(CLUSTERS)]
        trace.update(marker={"color": colour, "size": 9}, name=f"cluster {cluster} ({len(own)})")
        traces.append(trace)
    return traces


def _by_layer(similarity: HeadSimilarity) -> go.Scatter:
    """All heads, coloured by the number of their site."""
    sites = [similarity.sites.index(head.site) for head in similarity.heads]
    line = {"width": 1, "color": INK}
    marker = {"color": sites, "coloraxis": "coloraxis2", "size": 9, "line": line}
    return _points(similarity, list(range(len(sites)))).update(marker=marker, showlegend=False)


def _points(similarity: HeadSimilarity, own: list[int]) -> go.Scatter:
    """Some heads in the plane; the hover text gives cluster and nearest head."""
    points = similarity.plane.numpy()
    named = _with_room(points)
    records: list[dict[str, Any]] = similarity.to_frame().iloc[own].to_dict("records")
    texts = [
        f"<b>{row['head']}</b> cluster {row['cluster']}, silhouette "
        f"{number_text(row['silhouette'])}<br>nearest {row['nearest']}, "
        f"{number_text(row['nearest_divergence'])} nats"
        for row in records
    ]
    return go.Scatter(
        x=points[own, 0],
        y=points[own, 1],
        mode="markers+text",
        text=[str(similarity.heads[head]) if named[head] else "" for head in own],
        textposition="top center",
        textfont={"size": 9},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _with_room(points: Float[np.ndarray, "head 2"]) -> list[bool]:
    """Which heads have room for a name: no point where it stands, no other name close by."""
    width = max(float(np.ptp(points, axis=0).max()), 1e-12)
    named: list[int] = []
    for head in np.argsort(-points[:, 1], kind="stable").tolist():
        across, up = ((points - points[head]) / width).T
        covered = (np.abs(across) < APART) & (up > 0) & (up < APART)
        crowded = (np.abs(across) < 2 * APART) & (np.abs(up) < APART)
        if not covered.any() and not crowded[named].any():
            named.append(head)
    return [head in named for head in range(len(points))]


def _ordered(similarity: HeadSimilarity) -> go.Heatmap:
    """The divergence of all pairs, similar heads side by side."""
    order = list(similarity.order)
    names = [str(similarity.heads[head]) for head in order]
    hover, bounds = "<b>%{y}</b> and <b>%{x}</b> %{z:.3f} nats", None
    if similarity.low is not None and similarity.high is not None and len(order) <= BOUNDED:
        both = np.stack([similarity.low.numpy(), similarity.high.numpy()], -1)
        bounds = both[order][:, order].astype(np.float32)
        if not np.isnan(bounds).any():
            hover += "<br>interval %{customdata[0]:.3f} to %{customdata[1]:.3f}"
    return go.Heatmap(
        z=similarity.divergence.numpy()[order][:, order].astype(np.float32),
        x=names,
        y=names,
        customdata=bounds,
        coloraxis="coloraxis",
        hovertemplate=hover + "<extra></extra>",
    )


def _headings(figure: go.Figure) -> None:
    """Titles of the two panels at their left edges."""
    figure.update_annotations(font_size=13, xanchor="left")
    layout: Any = figure.layout
    for column, note in enumerate(layout.annotations, 1):
        note.x = domains(figure, 1, column)[0][0]


def _layer_bar(figure: go.Figure, layers: int) -> None:
    """A second colour bar, for the layers, left of the heat map."""
    x, _ = domains(figure, 1, 1)
    axis = colour_axis("sequential", 0.0, max(layers - 1, 1), "layer")
    axis["colorbar"] |= {"x": x[1] + 0.005, "len": 0.6, "thickness": 8, "nticks": 5}
    figure.update_layout(coloraxis2=axis)


def _cosines(similarity: LayerSimilarity, kind: Kind) -> go.Heatmap:
    interval = getattr(similarity, kind)
    texts = [
        [
            f"<b>{a}</b> and <b>{b}</b> {number_text(float(interval.mean[i, j]))}<br>interval "
            f"{number_text(float(interval.low[i, j]))} to {number_text(float(interval.high[i, j]))}"
            for j, b in enumerate(similarity.sites)
        ]
        for i, a in enumerate(similarity.sites)
    ]
    return go.Heatmap(
        z=interval.mean.numpy().astype(np.float32),
        x=list(similarity.sites),
        y=list(similarity.sites),
        customdata=texts,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _neighbours(similarity: LayerSimilarity) -> list[go.Scatter]:
    """One line a kind of cosine over neighbouring layers, with error bars."""
    frame = similarity.neighbours()
    looks = {
        "matched": {"color": INK},
        "head_mean": {"color": "#c0622d"},
        "unmatched": {"color": BASELINE, "dash": "dot"},
    }
    traces: list[go.Scatter] = []
    for name, line in looks.items():
        middle, low, high = (frame[name + end].to_numpy() for end in ("", "_low", "_high"))
        traces.append(
            go.Scatter(
                x=frame["site"] + "–" + frame["other"],
                y=middle,
                mode="lines+markers",
                line=line,
                name=KINDS[name],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (high - middle).clip(0),
                    "arrayminus": (middle - low).clip(0),
                    "thickness": 1.2,
                    "width": 3,
                },
                hovertemplate="<b>%{x}</b> %{y:.3f}<extra>" + KINDS[name] + "</extra>",
            )
        )
    return traces
