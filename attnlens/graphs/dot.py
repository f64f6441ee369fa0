"""DOT, the language of Graphviz, written and read by hand: no system library is needed.

Only what `to_dot` writes can be read back, one statement a line: numbers and truth values are
bare, text is in quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal

from attnlens.graphs.plain import Attributes, PlainEdge, PlainGraph, Scalar, read_header
from attnlens.graphs.text import escape, unescape

_HEADER = "attnlens"
_TEXT = r'"(?:[^"\\]|\\.)*"'
_STRING = re.compile(_TEXT)
_PAIR = re.compile(rf"({_TEXT})=({_TEXT}|[^\s\",\]]+)(?:, |$)")
_STATEMENT = re.compile(rf"  ({_TEXT})(?: -> ({_TEXT}))? \[(.*)\];")
_HEAD = re.compile(rf"  {_HEADER}=({_TEXT});")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}
_PLAIN = {written[1]: character for character, written in _ESCAPES.items()}


def to_dot(plain: PlainGraph) -> str:
    """DOT that draws every node with its token, in layers from the bottom up."""
    labelled = all("label" not in attributes for attributes in plain.nodes.values())
    lines = ["digraph attention {"]
    lines.append(f"  {_HEADER}={_quote(plain.header(labelled=labelled))};")
    lines.append("  rankdir=BT;")
    for node, attributes in plain.nodes.items():
        shown: Attributes = {"label": str(attributes.get("token", node))} if labelled else {}
        lines.append(f"  {_quote(node)} [{_pairs(shown | attributes)}];")
    for edge in plain.edges:
        attributes: Attributes = {"key": edge.key}
        pairs = _pairs(attributes | edge.attributes)
        lines.append(f"  {_quote(edge.source)} -> {_quote(edge.target)} [{pairs}];")
    return "\n".join([*lines, "}"]) + "\n"


def from_dot(text: str) -> PlainGraph:
    """Read what `to_dot` wrote."""
    first, *lines = text.rstrip("\n").split("\n")
    head = _HEAD.fullmatch(lines[0]) if lines else None
    if first != "digraph attention {" or lines[-1] != "}" or head is None:
        raise ValueError("it is no DOT that attnlens wrote")
    header = read_header(_unquote(head[1]))
    nodes: dict[str, Attributes] = {}
    edges: list[PlainEdge] = []
    for line in lines[2:-1]:
        found = _STATEMENT.fullmatch(line)
        if found is None:
            raise ValueError(f"its line {line[:80]!r} is neither a node nor an edge")
        attributes = dict(_read_pairs(found[3]))
        if found[2] is None:
            if header["labelled"]:
                del attributes["label"]
            nodes[_unquote(found[1])] = attributes
        else:
            key = attributes.pop("key")
            if isinstance(key, float):
                raise ValueError(f"an edge has the key {key!r}")
            edges.append(PlainEdge(_unquote(found[1]), _unquote(found[2]), key, attributes))
    return PlainGraph(header["attributes"], nodes, edges)


def _pairs(attributes: Attributes) -> str:
    return ", ".join(f"{_quote(name)}={_format(value)}" for name, value in attributes.items())


def _read_pairs(text: str) -> Iterator[tuple[str, Scalar]]:
    end = 0
    for found in _PAIR.finditer(text):
        if found.start() != end:
            break
        end = found.end()
        yield _unquote(found[1]), _parse(found[2])
    if end != len(text):
        raise ValueError(f"its attributes {text[end : end + 80]!r} cannot be read")


def _format(value: Scalar) -> str:
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, float):  # DOT's numbers have no exponent
        digits = f"{Decimal(repr(value)):f}"
        return digits if "." in digits else f"{digits}.0"
    return json.dumps(value)


def _parse(written: str) -> Scalar:
    return _unquote(written) if written[0] == '"' else json.loads(written)


def _quote(text: str) -> str:
    return '"' + "".join(_ESCAPES.get(character, character) for character in escape(text)) + '"'


def _unquote(written: str) -> str:
    if not _STRING.fullmatch(written):
        raise ValueError(f"{written[:80]!r} is no quoted text")
    return unescape(re.sub(r"\\(.)", lambda found: _PLAIN[found[1]], written[1:-1]))
