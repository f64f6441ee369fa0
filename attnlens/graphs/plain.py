"""A graph as plain checked values: what every file format writes, and what it reads back.

Node names are text; attributes of nodes and edges are text, whole numbers, floats or truth values;
attributes of the graph are anything that JSON can say. NumPy scalars become Python's. Nothing that
a format would have to guess at passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import networkx as nx
import numpy as np

from attnlens.errors import InputError

SCHEMA_VERSION = 1
"""Version of what the files say; raised when an older attnlens could misread a newer file."""

Scalar = bool | int | float | str
Attributes = dict[str, Scalar]

# Names that the formats use for themselves.
_RESERVED = {"node": {"id"}, "edge": {"id", "source", "target", "key", "networkx_key"}}


@dataclass(frozen=True)
class PlainEdge:
    """An edge: `key` tells parallel edges between the same nodes apart."""

    source: str
    target: str
    key: int | str
    attributes: Attributes


@dataclass(frozen=True)
class PlainGraph:
    """A directed multigraph as plain values, in the order of the graph."""

    attributes: dict[str, Any]
    nodes: dict[str, Attributes]
    edges: list[PlainEdge]

    def header(self, **more: Any) -> str:
        """Schema version and graph attributes as one line of JSON, for formats without a place."""
        return json.dumps({"schema": SCHEMA_VERSION, "attributes": self.attributes} | more)


def to_plain(graph: nx.MultiDiGraph[Any]) -> PlainGraph:
    """Check a graph and convert its values.

    Raises:
        InputError: not a directed multigraph, a node whose name is no text, a value that is NaN,
            infinite or of another type; the message names the node or edge.

    """
    if not (isinstance(graph, nx.MultiDiGraph)):
        raise InputError(
            f"A {type(graph).__name__} cannot be exported, only a networkx.MultiDiGraph; "
            "networkx.MultiDiGraph(graph) makes one."
        )
    nodes: dict[str, Attributes] = {}
    for node, data in graph.nodes(data=True):
        if not isinstance(node, str):
            raise InputError(
                f"Node {node!r} is no text; networkx.relabel_nodes(graph, str) names nodes by text."
            )
        nodes[str(node)] = _attributes(data, "node", f"node {node!r}")
    edges: list[PlainEdge] = []
    for source, target, key, data in graph.edges(keys=True, data=True):
        where = f"edge {source!r} -> {target!r} ({key!r})"
        plain_key = _item(key)
        if not isinstance(plain_key, int | str) or isinstance(plain_key, bool):
            raise InputError(f"The key of {where} is neither text nor a whole number.")
        edges.append(PlainEdge(source, target, plain_key, _attributes(data, "edge", where)))
    return PlainGraph(json_value(graph.graph, "graph"), nodes, edges)


def from_plain(plain: PlainGraph) -> nx.MultiDiGraph[str]:
    """The graph of plain values."""
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.graph.update(plain.attributes)
    for node, attributes in plain.nodes.items():
        graph.add_node(node)
        graph.nodes[node].update(attributes)
    for edge in plain.edges:
        for end in (edge.source, edge.target):
            if end not in plain.nodes:
                raise ValueError(f"an edge names the node {end!r}, which is not there")
        if graph.has_edge(edge.source, edge.target, edge.key):
            raise ValueError(f"two edges {edge.source!r} -> {edge.target!r} have key {edge.key!r}")
        graph.add_edge(edge.source, edge.target, edge.key)
        graph.edges[edge.source, edge.target, edge.key].update(edge.attributes)
    return graph


def read_header(text: str) -> dict[str, Any]:
    """What `PlainGraph.header` wrote; ValueError where it is something else or too new."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    check_schema(header.get("schema"))
    return header


def check_schema(version: object) -> None:
    """ValueError unless this attnlens understands the schema version of a file."""
    if version is None:
        raise ValueError("it has no attnlens schema version; networkx reads other programs' files")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"it has schema version {version!r} and this attnlens reads {SCHEMA_VERSION}; update it"
        )


def json_value(value: Any, where: str) -> Any:
    """A value as JSON gives it back: tuples and sets become lists, NumPy scalars Python's."""
    value = _item(value)
    if value is None or _is_scalar(value):
        return _finite(value, where)
    if isinstance(value, Mapping):
        return {_name(k, where): json_value(v, f"{where}: {k}") for k, v in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [json_value(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise InputError(f"{where} is a {type(value).__name__}, which a graph file cannot hold.")


def _attributes(data: Mapping[Any, Any], of: str, where: str) -> Attributes:
    """The attributes of a node or an edge, checked."""
    plain: Attributes = {}
    for name, given in data.items():
        value = _item(given)
        if _name(name, where) in _RESERVED[of]:
            raise InputError(f"{where} has an attribute {name!r}, a name that graph files need.")
        if not _is_scalar(value):
            raise InputError(
                f"{where}: {name} is a {type(value).__name__}; a graph file holds text, numbers "
                "and truth values there. Leave out what has no value."
            )
        plain[name] = _finite(value, f"{where}: {name}")
    return plain


def _item(value: Any) -> Any:
    """A NumPy scalar as Python's own; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


def _is_scalar(value: Any) -> TypeGuard[Scalar]:
    return isinstance(value, bool | int | float | str)


def _finite(value: Any, where: str) -> Any:
    """Refuse NaN and infinity, which XML and JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}; a graph file holds finite numbers only.")
    return value


def _name(name: object, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise InputError(f"{where} has an attribute named {name!r}; names are text.")
    return name
