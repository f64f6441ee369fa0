"""Graphs of the graphs room as layered drawings: information flows upwards, positions go across."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from attnlens.errors import InputError
from attnlens.views.panels import count_text
from attnlens.views.shown import show
from attnlens.views.theme import DIVERGING, INK, styled, token_label

MOST = 120
"""Edges that are drawn beside residual ones; more hide each other."""
RESIDUAL = "residual"
COLOURS = {
    "attention": INK, RESIDUAL: "#b4bab6", "mlp": "#c0622d",
    "query": "#6b5b95", "key": "#7a9a3a", "value": "#b8912b",
}  # fmt: skip
OTHERS = ("#b0406a", "#3f6fb0", "#8a4fb0", "#5f7a6c", "#9c6a4a")
MORE, LESS = str(DIVERGING[-1][1]), str(DIVERGING[0][1])
DASHES = {"attention": "solid", RESIDUAL: "dot", "mlp": "dash"}
THINNEST, WIDEST, WIDEST_RESIDUAL = 0.7, 6.0, 1.6
CLASSES = 6
"""Widths that are told apart; a trace each."""
LABELS = 60
"""Tokens along the axis that have room for a label."""

Edge = tuple[str, str, Any, Mapping[str, Any]]
Point = tuple[float, float]
Line = tuple[list[float | None], list[float | None]]


@show.register(nx.MultiDiGraph)
def show_graph(
    graph: nx.MultiDiGraph[str], title: str | None = None, most: int = MOST
) -> go.Figure:
    """A graph of flow, routes or relevance in layers from below, `draw_graph` of it."""
    return draw_graph(graph, title or _title(graph), most)


def draw_graph(graph: nx.MultiDiGraph[str], title: str, most: int = MOST) -> go.Figure:
    """Nodes by layer (upwards) and position (across), edges as wide as their weight is large.

    Of a flow the width is what an edge carries.

    The `most` strongest edges are drawn, and the residual edges of the positions that they touch;
    the title says of how many. Colours tell kinds apart; where weights have signs, the sign.

    Raises:
        InputError: a graph without edges, a node without layer and position, an edge without a
            weight.

    """
    _check(graph, most)
    edges = _strongest(graph, most)
    place = _Place.of(graph, edges)
    lines = _Lines.of(edges, place)
    figure = go.Figure([*lines.traces(), lines.hover(graph), *_nodes(graph, place)])
    drawn = _drawn_text(graph, edges)
    levels = len(place.levels)
    styled(figure, title, int(np.clip(64 * levels + 190, 330, 1100)))
    layout: Any = figure.layout
    layout.title.text += f"<br><sup>{html.escape(drawn)}</sup>"
    step = len(place.positions) // LABELS + 1
    labels = [
        f"{token_label(token)}<sub> {position}</sub>" if token is not None else f"#{position}"
        for token, position in zip(place.tokens, place.positions, strict=True)
    ]
    figure.update_xaxes(
        tickvals=list(range(len(labels)))[::step], ticktext=labels[::step], tickangle=-60,
        range=[-0.7, len(labels) - 0.3], showgrid=False, zeroline=False, ticks="",
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(levels)), ticktext=place.level_names, range=[-0.4, levels - 0.6],
        gridcolor="#eceeea", zeroline=False, ticks="",
    )  # fmt: skip
    figure.update_layout(
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        margin={"l": 60, "t": 92, "b": 100},
        hovermode="closest",
    )
    return figure


def _title(graph: nx.MultiDiGraph[str]) -> str:
    method, target = (graph.graph.get(name) for name in ("method", "target"))
    named = f"Graph of {method}" if method else "Graph"
    return f"{named} to {target}" if target is not None else named


def _check(graph: nx.MultiDiGraph[str], most: int) -> None:
    if most < 1:
        raise InputError(f"most={most}; draw at least one edge.")
    if not graph.number_of_edges():
        raise InputError("The graph has no edges to draw; a lower threshold keeps some.")
    for node, data in graph.nodes(data=True):
        if not all(isinstance(data.get(name), int | float) for name in ("layer", "position")):
            raise InputError(
                f"Node {node!r} has no layer and position, so it has no place in the drawing. "
                "Graphs of rollout, flow, routes and relevance have them."
            )
    for source, target, data in graph.edges(data=True):
        if not isinstance(data.get("weight"), int | float) or data["weight"] != data["weight"]:
            raise InputError(f"The edge {source!r} -> {target!r} has no weight to draw it by.")


def _kind(data: Mapping[str, Any]) -> str:
    return str(data.get("kind", "edge"))


def _size(data: Mapping[str, Any]) -> float:
    """What the width shows: what flows through an edge where that is told, else its weight."""
    return float(data.get("flow", data["weight"]))


def _strongest(graph: nx.MultiDiGraph[str], most: int) -> list[Edge]:
    """The strongest edges, weakest first, after the residual edges of their positions."""
    every: list[Edge] = list(graph.edges(keys=True, data=True))
    own = [edge for edge in every if _kind(edge[3]) != RESIDUAL]
    own = sorted(own, key=lambda edge: -abs(_size(edge[3])))[:most]
    touched = {graph.nodes[node]["position"] for edge in own for node in edge[:2]}
    beside = [
        edge
        for edge in every
        if _kind(edge[3]) == RESIDUAL and (not own or graph.nodes[edge[0]]["position"] in touched)
    ]
    return [*beside, *own[::-1]]


def _drawn_text(graph: nx.MultiDiGraph[str], edges: Sequence[Edge]) -> str:
    """How many edges are drawn, and of how many."""
    total, residual = graph.number_of_edges(), sum(_kind(edge[3]) == RESIDUAL for edge in edges)
    if len(edges) == total:
        return f"All {count_text(total, 'edge')}; wider is larger."
    beside = f", and {count_text(residual, 'residual edge')} of their positions" if residual else ""
    others = sum(_kind(data) != RESIDUAL for *_, data in graph.edges(data=True))
    return (
        f"Drawn: the {len(edges) - residual:,} largest of {count_text(others, 'edge')}{beside}; "
        "wider is larger."
    )


@dataclass(frozen=True)
class _Place:
    """Where nodes are drawn."""

    points: Mapping[str, Point]
    levels: tuple[tuple[float, int], ...]
    """Layer, and how many steps within it."""
    positions: tuple[int, ...]
    tokens: tuple[str | None, ...]

    @property
    def level_names(self) -> list[str]:
        """A name at the lowest level of each layer."""
        return [f"L{layer:g}" if step == 0 else "" for layer, step in self.levels]

    @property
    def bow(self) -> float:
        """How far, in columns, parallel edges may bow: about as much ink in every figure."""
        return min(0.3, 0.03 * len(self.positions))

    @classmethod
    def of(cls, graph: nx.MultiDiGraph[str], edges: Iterable[Edge]) -> _Place:
        """Levels and columns of the nodes at the edges' ends; those of one place stand apart."""
        nodes = dict.fromkeys(node for edge in edges for node in edge[:2])
        steps = _steps(graph.subgraph(nodes))
        data = {node: graph.nodes[node] for node in nodes}
        level_of = {node: (data[node]["layer"], steps[node]) for node in nodes}
        levels = tuple(sorted(set(level_of.values())))
        positions = tuple(sorted({own["position"] for own in data.values()}))
        tokens = {own["position"]: own.get("token") for own in data.values()}
        at: dict[tuple[int, int], list[str]] = defaultdict(list)
        for node in nodes:
            column = positions.index(data[node]["position"])
            at[column, levels.index(level_of[node])].append(node)
        points: dict[str, Point] = {}
        for (column, level), there in at.items():
            for number, node in enumerate(there):
                apart = 0.6 * (number - (len(there) - 1) / 2) / len(there)
                points[node] = column + apart, float(level)
        return cls(points, levels, positions, tuple(tokens[p] for p in positions))


def _steps(graph: nx.MultiDiGraph[str]) -> dict[str, int]:
    """How many edges within its own layer lead to each node, at most."""
    layer = {node: data["layer"] for node, data in graph.nodes(data=True)}
    within: nx.DiGraph[str] = nx.DiGraph()
    within.add_nodes_from(graph)
    within.add_edges_from((s, t) for s, t in graph.edges() if layer[s] == layer[t] and s != t)
    if not nx.is_directed_acyclic_graph(within):
        return dict.fromkeys(graph, 0)
    steps: dict[str, int] = {}
    for node in nx.topological_sort(within):
        steps[node] = 1 + max((steps[below] for below in within.predecessors(node)), default=-1)
    return steps


@dataclass
class _Lines:
    """Lines of edges, by kind, sign and width."""

    signed: bool
    largest: Mapping[str, float]
    lines: dict[tuple[str, int, int], Line] = field(default_factory=dict[Any, Line])
    """Kind, sign, class of width."""
    middles: list[tuple[Point, Edge]] = field(default_factory=list[tuple[Point, Edge]])

    @classmethod
    def of(cls, edges: Sequence[Edge], place: _Place) -> _Lines:
        """The lines of edges, those of parallel ones bowed apart."""
        largest: dict[str, float] = defaultdict(float)
        for *_, data in edges:
            largest[_kind(data)] = max(largest[_kind(data)], abs(_size(data)))
        own = cls(any(_size(d) < 0 for *_, d in edges if _kind(d) != RESIDUAL), largest)
        beside: dict[tuple[str, str], int] = defaultdict(int)
        straight = {edge[:2] for edge in edges if _kind(edge[3]) == RESIDUAL}
        for *ends, _, data in edges:
            beside[ends[0], ends[1]] += _kind(data) != RESIDUAL
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for edge in edges:
            ends, bow = edge[:2], 0.0
            if _kind(edge[3]) != RESIDUAL:
                bow = _bow(seen[ends], beside[ends], ends in straight)
                seen[ends] += 1
            own.add(edge, place.points[edge[0]], place.points[edge[1]], bow * place.bow)
        return own

    def add(self, edge: Edge, start: Point, end: Point, bow: float) -> None:
        """One edge as a line; it bows where others run beside it or nodes stand in its way."""
        kind, weight = _kind(edge[3]), _size(edge[3])
        share = abs(weight) / self.largest[kind] if self.largest[kind] else 0.0
        sign = 0 if not self.signed or kind == RESIDUAL else 1 if weight >= 0 else -1
        if start[0] == end[0] and end[1] - start[1] > 1.5 and bow == 0 and kind != RESIDUAL:
            bow = 0.15  # not through the nodes between
        xs, ys = _curve(start, end, bow)
        line = self.lines.setdefault((kind, sign, round(share * (CLASSES - 1))), ([], []))
        line[0].extend([*xs, None])
        line[1].extend([*ys, None])
        self.middles.append(((xs[len(xs) // 2], ys[len(ys) // 2]), edge))

    def traces(self) -> list[go.Scatter]:
        """A trace a kind, sign and width; one of each kind and sign stands in the legend."""
        kinds = list(dict.fromkeys(kind for kind, *_ in self.lines))
        rank = {kind: number for number, kind in enumerate([RESIDUAL, *COLOURS, *kinds])}
        order = sorted(self.lines, key=lambda key: (key[0] != RESIDUAL, key[2], rank[key[0]]))
        strongest = {key[:2]: key for key in order}
        traces: list[go.Scatter] = []
        for key in order:
            kind, sign, width = key
            share = width / (CLASSES - 1)
            widest = WIDEST_RESIDUAL if kind == RESIDUAL else WIDEST
            name = html.escape(kind) + {1: ", positive", 0: "", -1: ", negative"}[sign]
            traces.append(
                go.Scatter(
                    x=self.lines[key][0],
                    y=self.lines[key][1],
                    mode="lines",
                    line={
                        "color": self._colour(kind, sign, kinds),
                        "width": THINNEST + share * (widest - THINNEST),
                        "dash": DASHES.get(kind, "longdash") if sign else "solid",
                    },
                    opacity=0.45 + 0.5 * share,
                    hoverinfo="skip",
                    name=name,
                    legendgroup=name,
                    showlegend=strongest[key[:2]] == key,
                )
            )
        return traces

    def hover(self, graph: nx.MultiDiGraph[str]) -> go.Scatter:
        """Points without ink in the middle of edges that say what they are."""
        return go.Scatter(
            x=[x for (x, _), _ in self.middles],
            y=[y for (_, y), _ in self.middles],
            mode="markers",
            marker={"size": 9, "opacity": 0, "color": INK},
            customdata=[_edge_text(graph, edge) for _, edge in self.middles],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )

    @staticmethod
    def _colour(kind: str, sign: int, kinds: Sequence[str]) -> str:
        if sign:
            return MORE if sign > 0 else LESS
        others = [name for name in kinds if name not in COLOURS]
        return COLOURS[kind] if kind in COLOURS else OTHERS[others.index(kind) % len(OTHERS)]


def _bow(number: int, count: int, straight: bool) -> float:
    """How far, from -1 to 1, an edge bows among `count` parallel ones; 0 may be taken."""
    if not straight:
        return 0.0 if count == 1 else 2 * number / (count - 1) - 1
    side = 1 if number % 2 == 0 else -1
    return side * (number // 2 + 1) / ((count + 1) // 2)


def _curve(start: Point, end: Point, bow: float) -> tuple[list[float], list[float]]:
    """Points of an edge: its middle among them, pushed aside by `bow` where it is not 0."""
    at = np.linspace(0, 1, 3 if bow == 0 else 21)
    (x0, y0), (x1, y1) = start, end
    xs = x0 + (x1 - x0) * at + 4 * bow * at * (1 - at)
    return xs.tolist(), (y0 + (y1 - y0) * at).tolist()


def _nodes(graph: nx.MultiDiGraph[str], place: _Place) -> list[go.Scatter]:
    """Nodes as points; those that have scores in the colour of their score."""
    scored = [node for node in place.points if "score" in graph.nodes[node]]
    plain = [node for node in place.points if "score" not in graph.nodes[node]]
    dark = {"size": 8, "color": "#3b4246", "line": {"width": 1, "color": "#fdfdfb"}}
    scores = [float(graph.nodes[node]["score"]) for node in scored]
    top = max(map(abs, scores), default=0.0) or 1.0
    tinted = {
        "size": 11, "color": scores, "colorscale": DIVERGING, "cmin": -top, "cmax": top,
        "line": {"width": 1, "color": "#7a8488"},
        "colorbar": {"title": {"text": "score of a node", "side": "right"}, "thickness": 12,
                     "outlinewidth": 0},
    }  # fmt: skip
    return [
        go.Scatter(
            x=[place.points[node][0] for node in nodes],
            y=[place.points[node][1] for node in nodes],
            mode="markers",
            marker=marker,
            customdata=[_node_text(graph, node) for node in nodes],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        )
        for nodes, marker in ((plain, dark), (scored, tinted))
        if nodes
    ]


def _named(graph: nx.MultiDiGraph[str], node: str) -> str:
    token = graph.nodes[node].get("token")
    return f"<b>{token_label(node, 24)}</b>" + (f" {token_label(token)}" if token else "")


def _node_text(graph: nx.MultiDiGraph[str], node: str) -> str:
    return "<br>".join([_named(graph, node), *_attributes(graph.nodes[node], ("token",))])


def _edge_text(graph: nx.MultiDiGraph[str], edge: Edge) -> str:
    source, target, _, data = edge
    between = f"{_named(graph, source)} → {_named(graph, target)}"
    return "<br>".join([between, *_attributes(data, ("sign",))])


def _attributes(data: Mapping[str, Any], but: Sequence[str]) -> list[str]:
    return [
        f"{html.escape(str(name))} {_value(value)}"
        for name, value in data.items()
        if name not in but
    ]


def _value(value: Any) -> str:
    shown = f"{value:.3g}".replace("-", "\u2212") if isinstance(value, float) else str(value)
    return token_label(shown, 40)
