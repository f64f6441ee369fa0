"""GraphML and GEXF: attributes with their types; what else there is to say in one line of JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from xml.etree import ElementTree as ET

from attnlens.graphs.plain import Attributes, PlainEdge, PlainGraph, Scalar, read_header
from attnlens.graphs.text import escape, unescape

_GRAPHML = "http://graphml.graphdrawing.org/xmlns"
_GEXF = "http://www.gexf.net/1.2draft"
_HEADER = "attnlens"
_GEXF_KEY = "networkx_key"  # networkx's reader takes no attribute named "key"


class _Columns:
    """Declared attributes: an id for every name and type."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.ids: dict[tuple[str, str], str] = {}

    def id_of(self, name: str, value: Scalar) -> str:
        """The id of an attribute's name with the type of this value."""
        return self.ids.setdefault((name, _type_name(value)), f"{self._prefix}{len(self.ids)}")


def to_graphml(plain: PlainGraph) -> str:
    """GraphML (Brandes et al. 2002)."""
    nodes, edges = _Columns("n"), _Columns("e")
    graph = ET.Element("graph", edgedefault="directed")
    ET.SubElement(graph, "data", key=_HEADER).text = escape(plain.header())
    for node, attributes in plain.nodes.items():
        _add_data(ET.SubElement(graph, "node", id=escape(node)), nodes, attributes)
    for number, edge in enumerate(plain.edges):
        ends = {"source": escape(edge.source), "target": escape(edge.target)}
        element = ET.SubElement(graph, "edge", {"id": f"edge{number}"} | ends)
        _add_data(element, edges, {"key": edge.key} | edge.attributes)
    root = ET.Element("graphml", xmlns=_GRAPHML)
    declared = {"id": _HEADER, "for": "graph", "attr.name": _HEADER, "attr.type": "string"}
    ET.SubElement(root, "key", declared)
    for of, columns in (("node", nodes), ("edge", edges)):
        for (name, kind), key in columns.ids.items():
            declared = {"id": key, "for": of, "attr.name": escape(name), "attr.type": kind}
            ET.SubElement(root, "key", declared)
    root.append(graph)
    return _text(root)


def from_graphml(text: str) -> PlainGraph:
    """Read what `to_graphml` wrote."""
    root = ET.fromstring(text)
    space = {"": _GRAPHML}
    keys = {
        key.attrib["id"]: (unescape(key.attrib["attr.name"]), key.attrib["attr.type"])
        for key in root.findall("key", space)
    }

    def values(element: ET.Element) -> Attributes:
        found = ((*keys[d.attrib["key"]], d.text or "") for d in element.findall("data", space))
        return {name: _parse(kind, value) for name, kind, value in found}

    graph = _only(root.findall("graph", space), "graph")
    header = read_header(str(values(graph).get(_HEADER, "{}")))
    nodes = {unescape(n.attrib["id"]): values(n) for n in graph.findall("node", space)}
    edges: list[PlainEdge] = []
    for element in graph.findall("edge", space):
        attributes = values(element)
        edges.append(_edge(element, attributes.pop("key"), attributes))
    return PlainGraph(header["attributes"], nodes, edges)


def to_gexf(plain: PlainGraph) -> str:
    """GEXF 1.2, with the token of a node as its label."""
    nodes, edges = _Columns("n"), _Columns("e")
    root = ET.Element("gexf", xmlns=_GEXF, version="1.2")
    meta = ET.SubElement(root, "meta")
    ET.SubElement(meta, "creator").text = _HEADER
    ET.SubElement(meta, "description").text = escape(plain.header())
    graph = ET.SubElement(root, "graph", defaultedgetype="directed", mode="static")
    declared = {of: ET.SubElement(graph, "attributes", {"class": of}) for of in ("node", "edge")}
    own = ET.SubElement(graph, "nodes")
    for node, attributes in plain.nodes.items():
        label = escape(str(attributes.get("token", node)))
        element = ET.SubElement(own, "node", id=escape(node), label=label)
        _add_values(element, nodes, attributes)
    own = ET.SubElement(graph, "edges")
    for number, edge in enumerate(plain.edges):
        ends = {"source": escape(edge.source), "target": escape(edge.target)}
        element = ET.SubElement(own, "edge", {"id": str(number)} | ends)
        attributes = {_GEXF_KEY: edge.key} | edge.attributes
        weight = attributes.get("weight")
        if isinstance(weight, float):  # GEXF's own place for it
            element.set("weight", repr(weight))
            del attributes["weight"]
        _add_values(element, edges, attributes)
    for of, columns in (("node", nodes), ("edge", edges)):
        for (name, kind), key in columns.ids.items():
            ET.SubElement(declared[of], "attribute", id=key, title=escape(name), type=kind)
    return _text(root)


def from_gexf(text: str) -> PlainGraph:
    """Read what `to_gexf` wrote."""
    root = ET.fromstring(text)
    space = {"": _GEXF}
    columns = {
        (of.attrib["class"], a.attrib["id"]): (unescape(a.attrib["title"]), a.attrib["type"])
        for of in root.findall("graph/attributes", space)
        for a in of.findall("attribute", space)
    }

    def values(element: ET.Element, of: str) -> Attributes:
        found = (
            (*columns[of, value.attrib["for"]], value.attrib["value"])
            for value in element.findall("attvalues/attvalue", space)
        )
        return {name: _parse(kind, value) for name, kind, value in found}

    header = read_header(unescape(root.findtext("meta/description", "{}", space)))
    graph = _only(root.findall("graph", space), "graph")
    nodes = {
        unescape(n.attrib["id"]): values(n, "node") for n in graph.findall("nodes/node", space)
    }
    edges: list[PlainEdge] = []
    for element in graph.findall("edges/edge", space):
        attributes = values(element, "edge")
        edge = _edge(element, attributes.pop(_GEXF_KEY), attributes)
        if "weight" in element.attrib:
            edge.attributes["weight"] = float(element.attrib["weight"])
        edges.append(edge)
    return PlainGraph(header["attributes"], nodes, edges)


def _add_data(element: ET.Element, columns: _Columns, attributes: Attributes) -> None:
    for name, value in attributes.items():
        data = ET.SubElement(element, "data", key=columns.id_of(name, value))
        data.text = _format(value)


def _add_values(element: ET.Element, columns: _Columns, attributes: Attributes) -> None:
    values = ET.SubElement(element, "attvalues")
    for name, value in attributes.items():
        key = columns.id_of(name, value)
        ET.SubElement(values, "attvalue", {"for": key, "value": _format(value)})


def _edge(element: ET.Element, key: Scalar, attributes: Attributes) -> PlainEdge:
    if isinstance(key, float):
        raise ValueError(f"an edge has the key {key!r}")
    ends = unescape(element.attrib["source"]), unescape(element.attrib["target"])
    return PlainEdge(*ends, key, attributes)


def _only(found: Iterable[ET.Element], what: str) -> ET.Element:
    elements: Iterator[ET.Element] = iter(found)
    first = next(elements, None)
    if first is None or next(elements, None) is not None:
        raise ValueError(f"it does not hold exactly one {what}")
    return first


def _type_name(value: Scalar) -> str:
    """The type's name in GraphML and in GEXF."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "long"
    return "double" if isinstance(value, float) else "string"


def _format(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return escape(value) if isinstance(value, str) else repr(value)


def _parse(kind: str, text: str) -> Scalar:
    if kind == "boolean":
        return {"true": True, "false": False}[text]
    if kind == "long":
        return int(text)
    return float(text) if kind == "double" else unescape(text)


def _text(root: ET.Element) -> str:
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"
