"""Information-flow routes as a graph: streams, what attention made of them, and the edges kept.

Nodes are positions of the stream that enters a layer (`L3P5`, `stage` "stream"), and, in blocks
that add attention and the MLP one after the other, of the stream between the two (`L3P5mid`,
`stage` "attended"). Edges point upwards, the way information flows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import networkx as nx
from jaxtyping import Int
from torch import Tensor

from attnlens.graphs.flow import ATTENTION, RESIDUAL, node_name

MLP = "mlp"
KINDS = (ATTENTION, RESIDUAL, MLP)


class LayerEdges(Protocol):
    """The edges of one layer, a number an edge in each column."""

    @property
    def step(self) -> Int[Tensor, " edge"]:
        """Which of the block's sums the edge enters."""
        ...

    @property
    def kind(self) -> Int[Tensor, " edge"]:
        """Place in `KINDS`."""
        ...

    @property
    def head(self) -> Int[Tensor, " edge"]:
        """Head; -1 of what is no attention."""
        ...

    @property
    def query(self) -> Int[Tensor, " edge"]:
        """Position that reads."""
        ...

    @property
    def source(self) -> Int[Tensor, " edge"]:
        """Position that is read."""
        ...

    @property
    def importance(self) -> Tensor:
        """Share of the sum, before weak parts were dropped."""
        ...

    @property
    def weight(self) -> Tensor:
        """Share among the parts that were kept."""
        ...


def middle_name(layer: int, position: int) -> str:
    """Name of a node between attention and MLP: `L3P5mid`."""
    return f"{node_name(layer, position)}mid"


def route_graph(
    layers: Sequence[LayerEdges],
    names: Sequence[str],
    steps: Sequence[int],
    tokens: Sequence[str],
    attributes: Mapping[str, Any] | None = None,
) -> nx.MultiDiGraph[str]:
    """The graph of the kept edges of one prompt.

    `names` are those of the layers' sites, `steps` how many sums each block has: of two, the first
    leads to the middle node. Edges carry weight, importance, kind, and head where there is one.
    """
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.graph.update(attributes or {})

    def node(layer: int, position: int, middle: bool) -> str:
        name = middle_name(layer, position) if middle else node_name(layer, position)
        if name not in graph:
            stage = "attended" if middle else "stream"
            token = tokens[position]
            graph.add_node(name, layer=layer, position=position, token=token, stage=stage)
        return name

    for layer, (edges, count) in enumerate(zip(layers, steps, strict=True)):
        columns = (edges.step, edges.kind, edges.head, edges.query, edges.source)
        values = zip(edges.importance.tolist(), edges.weight.tolist(), strict=True)
        for (step, kind, head, query, source), (importance, weight) in zip(
            zip(*(column.tolist() for column in columns), strict=True), values, strict=True
        ):
            below = node(layer, source, middle=step > 0)
            last = step == count - 1
            above = node(layer + int(last), query, middle=not last)
            told = {"weight": weight, "importance": importance, "kind": KINDS[kind]}
            if head >= 0:
                told["head"] = f"{names[layer]}H{head}"
            graph.add_edge(below, above, told.get("head", KINDS[kind]), **told)
    return graph
