"""How good a circuit is: faithfulness against its size, and what it does beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from attnlens.errors import InputError
from attnlens.views.panels import number_text
from attnlens.views.theme import INK, escaped, styled

CHANCE, CHANCE_BAND, BAND = "#7a8488", "rgba(122,132,136,0.20)", "rgba(52,128,139,0.20)"
GRID, LEVEL, REST = "#e4e6e2", "#9aa3a6", "#b4bab6"
CLEAR, UNCLEAR = INK, "#a9c6c9"
MOST_NODES = 40
"""Nodes whose minimality has room; of more the largest are drawn."""

Row = Float[np.ndarray, " number"]


def curve_figure(
    fractions: ArrayLike,
    f: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    random_mean: ArrayLike | None = None,
    random_low: ArrayLike | None = None,
    random_high: ArrayLike | None = None,
    cpr: float | None = None,
    cmd: float | None = None,
    title: str = "Faithfulness of circuits",
) -> go.Figure:
    """Faithfulness `f` of circuits against the share of edges that they keep, on a log axis.

    Bands are intervals; grey is random circuits of the same sizes. A circuit without edges has no
    place on a log axis and is left out.

    Args:
        fractions: share of edges of each circuit, from 0 to 1.
        f: its faithfulness, 1 where it does what the whole model does, 0 where it does nothing.
        low: where its interval begins.
        high: where it ends.
        random_mean: faithfulness of random circuits of the same sizes.
        random_low: where its interval begins.
        random_high: where it ends.
        cpr: the area under the curve.
        cmd: the area between the curve and 1.
        title: of the figure.

    Raises:
        InputError: arrays of other lengths than `fractions`.

    """
    shares = np.asarray(fractions, dtype=float)
    given = {
        "f": f, "low": low, "high": high, "random_mean": random_mean,
        "random_low": random_low, "random_high": random_high,
    }  # fmt: skip
    rows = {name: _row(name, values, len(shares)) for name, values in given.items()}
    order = [number for number in np.argsort(shares, kind="stable") if shares[number] > 0]
    shares, rows = shares[order], {name: row[order] for name, row in rows.items()}
    figure = go.Figure()
    if not np.isnan(rows["random_mean"]).all():
        bounds = rows["random_mean"], rows["random_low"], rows["random_high"]
        figure.add_traces(_curve(shares, *bounds, "random circuits", CHANCE, CHANCE_BAND))
    figure.add_traces(_curve(shares, rows["f"], rows["low"], rows["high"], "circuit", INK, BAND))
    styled(figure, title, 420)
    for level in (0.0, 1.0):
        figure.add_hline(level, line={"color": LEVEL, "width": 1.2}, layer="below")
    _axes_of_curve(figure, shares)
    areas = {"CPR": cpr, "CMD": cmd}
    told = [f"{name} {number_text(area)}" for name, area in areas.items() if area is not None]
    if told:
        figure.add_annotation(
            text="<br>".join(told), x=0.985, y=0.06, xref="paper", yref="paper", xanchor="right",
            yanchor="bottom", align="right", showarrow=False, font={"size": 14, "color": INK},
            bgcolor="rgba(253,253,251,0.85)", borderpad=4,
        )  # fmt: skip
    return figure


def _row(name: str, values: ArrayLike | None, count: int) -> Row:
    """Numbers, NaN where none are given."""
    row = np.full(count, np.nan) if values is None else np.asarray(values, dtype=float)
    if row.shape != (count,):
        raise InputError(f"{name} has shape {row.shape}; needed are {count} numbers.")
    return row


def _curve(
    shares: Row, mean: Row, low: Row, high: Row, name: str, colour: str, band: str
) -> list[go.Scatter]:
    """A line with a dot a circuit, on the band of its interval."""
    known = ~(np.isnan(low) | np.isnan(high))
    x, texts = shares[known], [_interval(*ends) for ends in zip(low, high, strict=True)]
    around = go.Scatter(
        x=[*x, *x[::-1]], y=[*high[known], *low[known][::-1]], mode="lines", fill="toself",
        fillcolor=band, line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=name,
    )  # fmt: skip
    line = go.Scatter(
        x=shares, y=mean, mode="lines+markers", name=name, legendgroup=name, customdata=texts,
        line={"color": colour, "width": 2}, marker={"size": 6},
        hovertemplate="<b>%{x:.3p} of the edges</b><br>"
        f"{name}: %{{y:.3f}}%{{customdata}}<extra></extra>",
    )  # fmt: skip
    return [around, line]


def _interval(low: float, high: float) -> str:
    known = not (np.isnan(low) or np.isnan(high))
    return f"<br>interval {number_text(low)} to {number_text(high)}" if known else ""


def _axes_of_curve(figure: go.Figure, shares: Row) -> None:
    """Shares as round percentages, 1 and 0 always in sight."""
    least = float(shares.min()) if len(shares) else 0.01
    ticks = [t * 10.0**p for p in range(-7, 0) for t in (1, 2, 5)]
    ticks = [tick for tick in [*ticks, 1.0] if tick >= least * 0.9]
    if len(ticks) > 12:
        ticks = [tick for tick in ticks if round(np.log10(tick), 6) % 1 == 0]
    figure.update_xaxes(
        type="log", title="edges in the circuit", gridcolor=GRID, zeroline=False,
        tickvals=ticks, ticktext=[f"{100 * tick:.4g}%" for tick in ticks],
        range=[float(np.log10(least)) - 0.05, 0.05],
    )  # fmt: skip
    data: Any = figure.data
    drawn = [value for trace in data for value in trace.y if np.isfinite(value)]
    low, high = min([0.0, *drawn]), max([1.0, *drawn])
    spare = 0.06 * (high - low)
    figure.update_yaxes(
        title="faithfulness", gridcolor=GRID, zeroline=False, range=[low - spare, high + spare]
    )
    figure.update_layout(
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1.0,
            "yanchor": "bottom",
            "traceorder": "reversed",
        },
        margin={"t": 84},
    )


def evaluation_figure(
    names: Sequence[str],
    values: ArrayLike,
    lows: ArrayLike | None = None,
    highs: ArrayLike | None = None,
    nodes: Sequence[str] = (),
    minimality: ArrayLike = (),
    node_lows: ArrayLike | None = None,
    node_highs: ArrayLike | None = None,
    title: str = "What a circuit does",
    metric: str = "metric",
    lost: str = "faithfulness",
) -> go.Figure:
    """The metric of several runs as bars, and beside them the minimality of each node.

    Args:
        names: of the runs: the full model, the circuit, the model without it, random circuits.
        values: the metric of each run.
        lows: where its interval begins; NaN where there is none.
        highs: where it ends.
        nodes: of the circuit; none leaves the second panel out.
        minimality: what is lost where a node is taken out of the circuit.
        node_lows: where its interval begins.
        node_highs: where it ends.
        title: of the figure.
        metric: what the bars measure.
        lost: what minimality measures.

    Raises:
        InputError: arrays of other lengths than their names.

    """
    columns = 2 if len(nodes) else 1
    figure = make_subplots(
        1,
        columns,
        horizontal_spacing=0.14,
        column_widths=[0.56, 0.44][:columns],
        subplot_titles=["", _node_title(nodes)][:columns],
    )
    own, *bounds = (
        _row(name, given, len(names))
        for name, given in (("values", values), ("lows", lows), ("highs", highs))
    )
    colours = [REST if "random" in name.lower() else INK for name in names]
    figure.add_trace(
        _bars(own, [_narrow(name) for name in names], bounds, colours, False), row=1, col=1
    )
    shown = min(len(nodes), MOST_NODES)
    styled(figure, title, max(400, 20 * shown + 130))
    figure.update_yaxes(title=escaped(metric), gridcolor=GRID, zerolinecolor=CHANCE, row=1, col=1)
    figure.update_xaxes(tickangle=0 if len(names) < 7 else -30, row=1, col=1)
    if len(nodes):
        _add_nodes(figure, nodes, minimality, node_lows, node_highs, lost)
    figure.update_annotations(font_size=13)
    figure.update_layout(bargap=0.35, showlegend=False)
    return figure


def _narrow(name: str) -> str:
    """A name in lines of a word each, which stands below a bar."""
    return "<br>".join(escaped(word) for word in name.split())


def _node_title(nodes: Sequence[str]) -> str:
    most = f"; the {MOST_NODES} largest of {len(nodes)}" if len(nodes) > MOST_NODES else ""
    return f"lost without the node{most}"


def _add_nodes(
    figure: go.Figure,
    nodes: Sequence[str],
    minimality: ArrayLike,
    lows: ArrayLike | None,
    highs: ArrayLike | None,
    lost: str,
) -> None:
    """Horizontal bars, the largest on top; pale where the interval holds 0."""
    values, low, high = (
        _row(name, given, len(nodes))
        for name, given in (("minimality", minimality), ("node_lows", lows), ("node_highs", highs))
    )
    order = np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:MOST_NODES]
    order = order[np.argsort(np.nan_to_num(values[order]), kind="stable")]
    values, low, high = values[order], low[order], high[order]
    unclear = (low <= 0) & (high >= 0)
    labels = [escaped(nodes[number]) for number in map(int, order)]
    colours = [UNCLEAR if pale else CLEAR for pale in unclear]
    figure.add_trace(_bars(values, labels, [low, high], colours, True), row=1, col=2)
    figure.update_xaxes(title=escaped(lost), gridcolor=GRID, zerolinecolor=CHANCE, row=1, col=2)
    figure.update_yaxes(type="category", ticksuffix="  ", dtick=1, row=1, col=2)


def _bars(
    values: Row, labels: Sequence[str], bounds: Sequence[Row], colours: list[str], flat: bool
) -> go.Bar:
    """Bars with their intervals, upright or flat."""
    low, high = bounds
    whiskers = {
        "type": "data", "symmetric": False, "array": np.nan_to_num(high - values),
        "arrayminus": np.nan_to_num(values - low), "color": "#3b4246", "thickness": 1.3, "width": 3,
    }  # fmt: skip
    texts = [
        f"<b>{label.replace('<br>', ' ')}</b> {number_text(value)}{_interval(*ends)}"
        for label, value, *ends in zip(labels, values, low, high, strict=True)
    ]
    along, across = ("x", "y") if flat else ("y", "x")
    return go.Bar(
        {along: values, across: list(labels), f"error_{along}": whiskers},
        orientation="h" if flat else "v",
        marker={"color": colours},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )
