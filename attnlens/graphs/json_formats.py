"""JSON: node-link, as networkx reads it, and the form of Cytoscape and cytoscape.js."""

from __future__ import annotations

import json
from typing import Any

from attnlens.graphs.plain import SCHEMA_VERSION, PlainEdge, PlainGraph, check_schema

_SCHEMA = "attnlens_schema"


def to_node_link(plain: PlainGraph) -> str:
    """Node-link JSON; `networkx.node_link_graph(data, edges="edges")` reads it too."""
    data = {
        "directed": True,
        "multigraph": True,
        _SCHEMA: SCHEMA_VERSION,
        "graph": plain.attributes,
        "nodes": [{"id": node} | attributes for node, attributes in plain.nodes.items()],
        "edges": [_ends(edge) | edge.attributes for edge in plain.edges],
    }
    return _lines(data)


def to_cytoscape(plain: PlainGraph) -> str:
    """Cytoscape JSON: `elements.nodes` and `elements.edges`, each with its `data`."""
    nodes = [{"data": {"id": node} | attributes} for node, attributes in plain.nodes.items()]
    edges = [
        {"data": {"id": f"edge{number}"} | _ends(edge) | edge.attributes}
        for number, edge in enumerate(plain.edges)
    ]
    data = {
        "directed": True,
        "multigraph": True,
        _SCHEMA: SCHEMA_VERSION,
        "data": plain.attributes,
        "elements": {"nodes": nodes, "edges": edges},
    }
    return _lines(data)


def from_json(text: str) -> PlainGraph:
    """Read what `to_node_link` or `to_cytoscape` wrote."""
    data = json.loads(text, parse_constant=_refuse)
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    check_schema(data.get(_SCHEMA))
    if "elements" in data:
        attributes = data["data"]
        nodes = [node["data"] for node in data["elements"]["nodes"]]
        edges = [edge["data"] for edge in data["elements"]["edges"]]
        for edge in edges:
            del edge["id"]
    else:
        attributes, nodes, edges = data["graph"], data["nodes"], data["edges"]
    return PlainGraph(
        attributes,
        {node.pop("id"): node for node in nodes},
        [PlainEdge(e.pop("source"), e.pop("target"), e.pop("key"), e) for e in edges],
    )


def _ends(edge: PlainEdge) -> dict[str, Any]:
    return {"source": edge.source, "target": edge.target, "key": edge.key}


def _lines(data: dict[str, Any]) -> str:
    # Escapes all but ASCII: a lone surrogate has no other form.
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}")
