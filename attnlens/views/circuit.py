"""Circuits in layers: embeddings below, logits on top, and a port for each input of a head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from attnlens.anatomy.network import ARROW
from attnlens.errors import InputError
from attnlens.views.circuit_layout import PORT, PORTS, TALL, Box, Edge, Layout, lay_out
from attnlens.views.panels import count_text, number_text
from attnlens.views.theme import DIVERGING, escaped, styled

MOST = 300
"""Edges that are drawn; more hide each other."""
MORE, LESS = str(DIVERGING[-1][1]), str(DIVERGING[0][1])
WHOLE = "MLP, logits"
COLOURS: Mapping[int, Mapping[str, str]] = {
    1: {"q": "#d08a1d", "k": "#c2562a", "v": "#a11a5b", WHOLE: MORE},
    -1: {"q": "#2f9a94", "k": "#3f7fc0", "v": "#6247b5", WHOLE: LESS},
}
"""Warm above 0, cold below."""
DASHES = {"q": "dot", "k": "dash", "v": "solid", WHOLE: "solid"}
THINNEST, WIDEST = 1.1, 5.5
FAINTEST, CLEAREST = 0.22, 0.88
CLASSES = 5
"""Widths, and opacities, that are told apart."""
FILLS = {"head": "#ffffff", "mlp": "#e8eeec", "embed": "#3b4246", "logits": "#3b4246"}
RIM, BAND, DARK, PALE = "#8a9498", "rgba(122,132,136,0.09)", "#22262a", "#fdfdfb"


def circuit_figure(graph: nx.MultiDiGraph[str], title: str, most: int = MOST) -> go.Figure:
    """A circuit in layers from below, edges ending at the input that reads them.

    Dash and shade tell q, k and v apart, warm colours are positive scores and cold ones negative;
    an edge is as wide as its score is large and as clear as it was chosen often. Of more than
    `most` edges the strongest are drawn, and the title says so.

    Raises:
        InputError: a graph that `circuit_graph` did not make, most under 1.

    """
    _check(graph, most)
    every: list[Edge] = list(graph.edges(keys=True, data=True))
    edges = sorted(every, key=lambda edge: -abs(edge[3]["weight"]))[:most][::-1]
    layout = lay_out(graph, edges)
    figure = go.Figure()
    figure.add_traces([*_lines(edges, layout), *_legend(edges), *_nodes(graph, layout)])
    figure.add_traces([_ports(edges, layout), _hover(edges, layout)])
    for number, (low, high) in enumerate(layout.rows.values()):
        if number % 2 == 0:
            figure.add_hrect(low, high, fillcolor=BAND, line_width=0, layer="below")
    _frame(figure, layout, title, _said(every, edges, len(layout.boxes)))
    return figure


def _check(graph: nx.MultiDiGraph[str], most: int) -> None:
    if most < 1:
        raise InputError(f"most={most}; draw at least one edge.")
    nodes = all({"layer", "kind"} <= data.keys() for _, data in graph.nodes(data=True))
    if not nodes or not all({"weight", "input"} <= d.keys() for *_, d in graph.edges(data=True)):
        raise InputError(
            "The graph is of no circuit: its nodes need layer and kind, its edges weight and "
            "input. circuit_graph makes one; show draws graphs of other kinds."
        )


def _said(every: Sequence[Edge], edges: Sequence[Edge], nodes: int) -> str:
    """What is drawn, and what width and opacity mean."""
    if not every:
        return "No edge is kept."
    all_names, names = ({_name(edge) for edge in some} for some in (every, edges))
    what = f"{count_text(len(names), 'edge')} between {count_text(nodes, 'node')}"
    if len(edges) < len(every):
        what = f"The {len(names):,} strongest of {count_text(len(all_names), 'edge')}"
    if len(names) < len(edges):
        what += ", some read by several heads together"
    sizes = {abs(data["weight"]) for *_, data in edges}
    wide = "; wider: larger score" if len(sizes) > 1 else ""
    faint = "; fainter: chosen less often" if any("chosen" in d for *_, d in edges) else ""
    return f"{what}{wide}{faint}."


def _style(data: Mapping[str, Any]) -> tuple[int, str]:
    """Sign and input of an edge."""
    kind = str(data["input"])
    return (-1 if data["weight"] < 0 else 1), kind if kind in PORTS else WHOLE


def _lines(edges: Sequence[Edge], layout: Layout) -> list[go.Scatter]:
    """A trace a style, wide lines above narrow ones."""
    top = max((abs(data["weight"]) for *_, data in edges), default=0.0)
    same = len({abs(data["weight"]) for *_, data in edges}) == 1
    classes: dict[tuple[int, int, int, str], list[int]] = defaultdict(list)
    for number, (*_, data) in enumerate(edges):
        share = 0.25 if same else abs(data["weight"]) / top
        wide, clear = (
            round((CLASSES - 1) * min(max(part, 0.0), 1.0))
            for part in (share, float(data.get("chosen", 1.0)))
        )
        classes[wide, clear, *_style(data)].append(number)
    return [
        go.Scatter(
            **_path([layout.curves[number].tolist() for number in numbers]),
            mode="lines",
            line={
                "color": COLOURS[sign][kind],
                "width": THINNEST + (WIDEST - THINNEST) * wide / (CLASSES - 1),
                "dash": DASHES[kind],
            },
            opacity=FAINTEST + (CLEAREST - FAINTEST) * clear / (CLASSES - 1),
            hoverinfo="skip",
            legendgroup=f"{kind} {sign}",
            showlegend=False,
        )
        for (wide, clear, sign, kind), numbers in sorted(classes.items())
    ]


def _path(curves: Sequence[Sequence[Sequence[float]]]) -> dict[str, list[float | None]]:
    """Curves one after the other, as plotly reads several lines of one trace."""
    points = [point for curve in curves for point in (*curve, (None, None))]
    return {"x": [x for x, _ in points], "y": [y for _, y in points]}


def _legend(edges: Sequence[Edge]) -> list[go.Scatter]:
    """An entry a style that is drawn; negative ones in a second line."""
    there = {_style(data) for *_, data in edges}
    return [
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"color": COLOURS[sign][kind], "width": 2.6, "dash": DASHES[kind]},
            name=kind,
            legend="legend" if sign > 0 else "legend2",
            legendgroup=f"{kind} {sign}",
        )
        for sign in (1, -1)
        for kind in DASHES
        if (sign, kind) in there
    ]


def _nodes(graph: nx.MultiDiGraph[str], layout: Layout) -> list[go.Scatter]:
    """Boxes by kind, and their names."""
    traces: list[go.Scatter] = []
    for kind, fill in FILLS.items():
        own = [(n, box) for n, box in layout.boxes.items() if graph.nodes[n]["kind"] == kind]
        if not own:
            continue
        traces.append(
            go.Scatter(
                **_path([_outline(box) for _, box in own]),
                mode="lines",
                fill="toself",
                fillcolor=fill,
                line={"color": RIM if kind in ("head", "mlp") else fill, "width": 1},
                hoverinfo="skip",
                showlegend=False,
            )
        )
        up = 5 if kind == "head" else 0  # ports are named below
        traces.append(
            go.Scatter(
                x=[box.x for _, box in own],
                y=[box.y + up for _, box in own],
                text=[escaped(name) for name, _ in own],
                mode="text",
                textfont={"size": 11, "color": DARK if fill in ("#ffffff", "#e8eeec") else PALE},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    return traces


def _outline(box: Box, round_by: float = 6) -> list[list[float]]:
    """A rectangle with round corners."""
    across, up = box.width / 2 - round_by, box.height / 2 - round_by
    points: list[list[float]] = []
    for quarter, (sx, sy) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        for turn in np.linspace(0, np.pi / 2, 5) + quarter * np.pi / 2:
            x = box.x + sx * across + round_by * np.cos(turn)
            points.append([x, box.y + sy * up + round_by * np.sin(turn)])
    return [*points, points[0]]


def _ports(edges: Sequence[Edge], layout: Layout) -> go.Scatter:
    """The letters of the inputs at which edges end."""
    used = dict.fromkeys((t, str(d["input"])) for _, t, _, d in edges if d["input"] in PORTS)
    return go.Scatter(
        x=[layout.boxes[node].x + PORT * PORTS[port] for node, port in used],
        y=[layout.boxes[node].y - TALL / 2 + 7 for node, _ in used],
        text=[port for _, port in used],
        mode="text",
        textfont={"size": 9, "color": "#6b7478"},
        hoverinfo="skip",
        showlegend=False,
    )


def _hover(edges: Sequence[Edge], layout: Layout) -> go.Scatter:
    """Points without ink in the middle of edges that say what they are."""
    middles = [curve[len(curve) // 2].tolist() for curve in layout.curves]
    return go.Scatter(
        x=[x for x, _ in middles],
        y=[y for _, y in middles],
        mode="markers",
        marker={"size": 10, "opacity": 0, "color": RIM},
        customdata=[_text(edge) for edge in edges],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
    )


def _text(edge: Edge) -> str:
    """What the hover says of an edge."""
    _, target, _, data = edge
    name = escaped(_name(edge).replace(ARROW, " \u2192 "))
    lines = [f"<b>{name}</b>", f"score {number_text(float(data['weight']))}"]
    if "chosen" in data:
        lines.append(f"chosen in {float(data['chosen']):.0%} of resamples")
    if "shared" in data:
        lines.append(f"read by {data['shared']} heads together, {escaped(target)} among them")
    return "<br>".join(lines)


def _name(edge: Edge) -> str:
    """The name of an edge, which lines to several heads may share."""
    source, target, key, data = edge
    return str(data.get("name", f"{source}{ARROW}{target}" + f"<{key}>" * (key in PORTS)))


def _frame(figure: go.Figure, layout: Layout, title: str, said: str) -> None:
    """Title, legends, and axes that are pixels."""
    traces: Any = figure.data
    legends = {trace.legend for trace in traces if trace.legend}
    left, right, below, above = 44, 24, 20, 90 + 22 * (len(legends) > 1)
    styled(figure, title, round(layout.height + below + above), round(layout.width + left + right))
    whole: Any = figure.layout
    whole.title.update(
        text=f"{whole.title.text}<br><sup>{said}</sup>", yanchor="top", yref="container"
    )
    whole.title.update(y=1 - 18 / whole.height)
    ticks = {f"L{layer}": (low + high) / 2 for layer, (low, high) in layout.rows.items()}
    figure.update_xaxes(range=[0, layout.width], visible=False, fixedrange=False)
    figure.update_yaxes(
        range=[0, layout.height], tickvals=list(ticks.values()), ticktext=list(ticks),
        showgrid=False, zeroline=False, ticks="",
    )  # fmt: skip
    entry: dict[str, Any] = {
        "orientation": "h", "x": 0, "xanchor": "left", "yref": "paper", "yanchor": "bottom",
        "itemwidth": 36, "bgcolor": "rgba(0,0,0,0)",
    }  # fmt: skip
    signs = ("positive  ", "negative  ") if "legend2" in legends else ("", "")
    figure.update_layout(
        legend=entry
        | {
            "y": 1 + (24 if len(legends) > 1 else 2) / layout.height,
            "title": {"text": signs[0], "font": {"size": 12}},
        },
        legend2=entry
        | {"y": 1 + 2 / layout.height, "title": {"text": signs[1], "font": {"size": 12}}},
        margin={"l": left, "r": right, "t": above, "b": below},
        hovermode="closest",
    )
