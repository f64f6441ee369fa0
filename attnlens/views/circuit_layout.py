"""Where the nodes and edges of a circuit lie in its drawing, in pixels from below on the left.

Layers go up. Heads of a layer stand side by side, in an order that keeps edges short; its MLP
stands above them, in a column of its own on the right. Embeddings and logits are bars as wide as
the drawing, so that edges leave and reach them where they like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
from jaxtyping import Float
from scipy.optimize import isotonic_regression

LETTER, PADDING, TALL = 6.6, 16, 32
"""Of a node: the width of a letter of its name, the space beside the name, its height."""
BAR = 22
"""Height of the bars of embeddings and logits."""
APART, WIDE_APART = 14, 130
"""Least space between heads side by side, and what they have where there is room."""
NARROWEST = 700
ROW, LOWEST_ROW, TALLEST = 104, 78, 1150
"""Height of a layer, what it may shrink to, and of the whole before layers shrink."""
PORTS = {"q": -1, "k": 0, "v": 1}
PORT = 16
"""How far the ports of a head are apart."""
SWEEPS = 12
DETOURS = (0, 24, 48, 80, 120, 170, 230)
POINTS = 25

Edge = tuple[str, str, Any, Mapping[str, Any]]
Point = tuple[float, float]
Curve = Float[np.ndarray, "point 2"]


@dataclass(frozen=True)
class Box:
    """Where a node is drawn."""

    x: float
    y: float
    width: float
    height: float = TALL

    def clamp(self, x: float) -> float:
        """The place on its edge that is nearest to some x."""
        half = max(self.width / 2 - 10, 0)
        return min(max(x, self.x - half), self.x + half)


@dataclass(frozen=True)
class Layout:
    """A drawing's places.

    Attributes:
        boxes: of every node.
        curves: of every edge, in their order, from below upwards.
        rows: the layers drawn, and where each begins and ends.
        width, height: of the whole.

    """

    boxes: Mapping[str, Box]
    curves: Sequence[Curve]
    rows: Mapping[int, tuple[float, float]]
    width: float
    height: float


def lay_out(graph: nx.MultiDiGraph[str], edges: Sequence[Edge]) -> Layout:
    """Places for some edges of a circuit and the nodes at their ends."""
    named = {node for edge in edges for node in edge[:2]}
    nodes = {node: data for node, data in graph.nodes(data=True) if node in named}
    plan = _Plan.of(nodes)
    between = [(source, target) for source, target, *_ in edges]
    across = _across(plan, between)
    boxes = {node: plan.box(node, across) for node in nodes}
    curves = _curves(boxes, edges, nodes, plan)
    rows = {layer: plan.span(layer) for layer in plan.layers}
    return Layout(boxes, curves, rows, plan.width, plan.height)


@dataclass(frozen=True)
class _Plan:
    """The rows and columns of a drawing."""

    kinds: Mapping[str, str]
    layer_of: Mapping[str, int]
    rows: Mapping[int, list[str]]
    """Heads of each layer that has some."""
    layers: tuple[int, ...]
    pitch: float
    box_width: float
    heads_width: float
    """Width of the columns of heads; that of MLPs is beside it."""
    mlps: frozenset[int] = field(default_factory=frozenset[int])
    """Layers whose MLP is drawn."""

    @classmethod
    def of(cls, nodes: Mapping[str, Mapping[str, Any]]) -> _Plan:
        kinds = {node: str(data["kind"]) for node, data in nodes.items()}
        layer_of = {node: int(data["layer"]) for node, data in nodes.items()}
        inner = [node for node in nodes if kinds[node] in ("head", "mlp")]
        rows: dict[int, list[str]] = defaultdict(list)
        for node in inner:
            if kinds[node] == "head":
                rows[layer_of[node]].append(node)
        layers = tuple(sorted({layer_of[node] for node in inner}))
        box = LETTER * max(map(len, inner), default=5) + PADDING
        box = max(box, 2 * PORT + PADDING)
        most = max(map(len, rows.values()), default=0)
        pitch = float(np.clip(TALLEST / (len(layers) + 1), LOWEST_ROW, ROW))
        mlps = frozenset(layer_of[node] for node in inner if kinds[node] == "mlp")
        width = max(most * (box + APART) + APART, NARROWEST)
        return cls(kinds, layer_of, rows, layers, pitch, box, width, mlps)

    @property
    def width(self) -> float:
        """Of the whole."""
        return self.heads_width + (self.box_width + 5 * APART if self.mlps else 0)

    @property
    def height(self) -> float:
        """Of the whole."""
        return self._bottom(len(self.layers)) + BAR + 26

    def _bottom(self, row: int) -> float:
        """Where a row begins."""
        below = sum(layer in self.mlps for layer in self.layers[:row])
        return BAR + 26 + row * self.pitch + below * 0.45 * self.pitch

    def span(self, layer: int) -> tuple[float, float]:
        """Where a layer begins and ends."""
        row = self.layers.index(layer)
        return self._bottom(row), self._bottom(row + 1)

    def box(self, node: str, across: Mapping[str, float]) -> Box:
        """Where a node is, once it is known where heads stand across."""
        kind = self.kinds[node]
        if kind in ("embed", "logits"):
            y = BAR / 2 + 2 if kind == "embed" else self.height - BAR / 2 - 2
            return Box(self.width / 2, y, self.width - 4, BAR)
        low, high = self.span(self.layer_of[node])
        if kind == "mlp":
            x = self.width - self.box_width / 2 - 2.5 * APART
            return Box(x, high - 0.4 * self.pitch, self.box_width)
        return Box(across[node], low + 0.45 * self.pitch, self.box_width)


def _across(plan: _Plan, between: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Where heads stand across: near the mean of those that they read and write to."""
    at: dict[str, float] = {}
    for row in plan.rows.values():
        at |= dict(zip(row, _spread(plan, np.full(len(row), plan.heads_width / 2)), strict=True))
    below: dict[str, list[str]] = defaultdict(list)
    above: dict[str, list[str]] = defaultdict(list)
    for source, target in between:
        if source in at and target in at:
            below[target].append(source)
            above[source].append(target)
    layers = sorted(plan.rows)
    for sweep in range(SWEEPS):
        last = sweep >= SWEEPS - 2
        up = sweep % 2 == 0
        for layer in layers if up else layers[::-1]:
            row = plan.rows[layer]
            near = {n: below[n] + above[n] if last else (below if up else above)[n] for n in row}
            wish = {n: float(np.mean([at[m] for m in near[n] or [n]])) for n in row}
            row = sorted(row, key=lambda n: (wish[n], at[n]))
            at |= dict(zip(row, _spread(plan, np.array([wish[n] for n in row])), strict=True))
    return at


def _spread(plan: _Plan, wished: Float[np.ndarray, " node"]) -> list[float]:
    """The places nearest to some, in their order, that leave each node its room."""
    count, room = len(wished), plan.heads_width - plan.box_width - APART
    least = plan.box_width + APART
    gap = min(plan.box_width + WIDE_APART, max(room / max(count - 1, 1), least))
    steps = gap * np.arange(count)
    start = plan.box_width / 2 + APART / 2
    fitted = isotonic_regression(wished - steps).x
    return (np.clip(fitted, start, start + room - steps[-1]) + steps).tolist()


def _curves(
    boxes: Mapping[str, Box],
    edges: Sequence[Edge],
    nodes: Mapping[str, Mapping[str, Any]],
    plan: _Plan,
) -> list[Curve]:
    """A curve an edge, from port to port, around the nodes between."""
    ends = [_arrival(boxes, edge, nodes) for edge in edges]
    starts = _departures(boxes, edges, ends, nodes)
    inner = [n for n in boxes if nodes[n]["kind"] in ("head", "mlp")]
    blocks = np.array([(boxes[n].x, boxes[n].y, boxes[n].width) for n in inner]).reshape(-1, 3)
    names = np.array(inner, dtype=object)
    curves: list[Curve] = []
    for start, end, edge in zip(starts, ends, edges, strict=True):
        others = blocks[(names != edge[0]) & (names != edge[1])]
        loose = nodes[edge[0]]["kind"] == "embed", nodes[edge[1]]["kind"] == "logits"
        curves.append(_around(start, end, loose, others, plan.width))
    return curves


def _arrival(boxes: Mapping[str, Box], edge: Edge, nodes: Mapping[str, Mapping[str, Any]]) -> Point:
    """Where an edge ends: a head has a port for each of its inputs."""
    source, target, _, data = edge
    box = boxes[target]
    if nodes[target]["kind"] == "logits":
        x = box.clamp(boxes[source].x)
    else:
        x = box.x + PORT * PORTS.get(str(data["input"]), 0)
    return x, box.y - box.height / 2


def _departures(
    boxes: Mapping[str, Box],
    edges: Sequence[Edge],
    ends: Sequence[Point],
    nodes: Mapping[str, Mapping[str, Any]],
) -> list[Point]:
    """Where each edge begins: side by side on top of its node, in the order of their ends."""
    leaving: dict[str, list[int]] = defaultdict(list)
    for number, edge in enumerate(edges):
        leaving[edge[0]].append(number)
    starts: list[Point] = [(0.0, 0.0)] * len(edges)
    for source, numbers in leaving.items():
        box = boxes[source]
        top = box.y + box.height / 2
        if nodes[source]["kind"] == "embed":
            for number in numbers:
                starts[number] = box.clamp(ends[number][0]), top
            continue
        gap = min(8.0, (box.width - PADDING) / len(numbers))
        for place, number in enumerate(sorted(numbers, key=lambda n: ends[n])):
            starts[number] = box.x + gap * (place - (len(numbers) - 1) / 2), top
    return starts


def _around(
    start: Point,
    end: Point,
    loose: tuple[bool, bool],
    blocks: Float[np.ndarray, "node 3"],
    width: float,
) -> Curve:
    """The least bent curve that passes fewest nodes; a loose end may lie elsewhere on its bar."""
    bends = np.array([side * bend for bend in DETOURS for side in (1, -1)][1:])
    curves = _bezier(start, end, loose, bends)
    x, y = curves[..., 0], curves[..., 1]
    hits = ((x < BAR) | (x > width - BAR)).any(1)
    for at, up, wide in blocks:
        hits = hits + ((abs(x - at) < wide / 2 + 4) & (abs(y - up) < TALL / 2 + 3)).any(1)
    return curves[np.argmin(hits + abs(bends) / 1000)]


def _bezier(
    start: Point, end: Point, loose: tuple[bool, bool], bends: Float[np.ndarray, " bend"]
) -> Float[np.ndarray, "bend point 2"]:
    """Curves that leave and arrive upwards, their middles pushed aside by so much."""
    (x0, y0), (x1, y1) = start, end
    t = np.linspace(0, 1, POINTS)
    lift = 0.5 * (y1 - y0)
    weights = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    # The control points are 3/4 of the middle; with one end, or both, they are 7/8, or all of it.
    aside = bends / (0.75 + 0.125 * sum(loose))
    xs = [x0 + loose[0] * aside, x0 + aside, x1 + aside, x1 + loose[1] * aside]
    ys = np.array([y0, y0 + lift, y1 - lift, y1])
    along = np.stack(xs, -1) @ weights
    return np.stack([along, np.broadcast_to(ys @ weights, along.shape)], -1)
