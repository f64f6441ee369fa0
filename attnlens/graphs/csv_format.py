"""A CSV edge list: one row an edge, with both ends' attributes beside it.

Columns: source, target, key, the edge's attributes, `source.<attribute>` and `target.<attribute>`
of its ends, and last `attnlens`, which holds schema version, graph attributes and column types in
the first row and is empty elsewhere. A node without edges has a row with an empty target.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from attnlens.errors import InputError
from attnlens.graphs.plain import Attributes, PlainEdge, PlainGraph, Scalar, read_header
from attnlens.graphs.text import escape, unescape

_HEADER = "attnlens"
_ENDS = ("source", "target", "key")
_NOT_THERE = object()


def to_csv(plain: PlainGraph) -> str:
    """The edge list of a graph, for pandas, spreadsheets and Gephi."""
    rows = [_row(plain, edge) for edge in plain.edges]
    with_edges = {end for edge in plain.edges for end in (edge.source, edge.target)}
    for node, attributes in plain.nodes.items():
        if node not in with_edges:
            rows.append({"source": node} | _prefixed("source", attributes))
    columns = [*_ENDS, *dict.fromkeys(name for row in rows for name in row if name not in _ENDS)]
    if _HEADER in columns:
        raise InputError(f"An edge has an attribute {_HEADER!r}, a name that CSV files need.")
    kinds = {name: _kind([row.get(name, _NOT_THERE) for row in rows]) for name in columns}
    header = plain.header(columns=kinds)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([escape(name) for name in (*columns, _HEADER)])
    for number, row in enumerate(rows or [{}]):
        cells = [_format(kinds[name], row.get(name, _NOT_THERE)) for name in columns]
        cells.append("" if number else escape(header))
        _check_lengths(cells, row)
        writer.writerow(cells)
    return buffer.getvalue()


def from_csv(text: str) -> PlainGraph:
    """Read what `to_csv` wrote."""
    table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    if len(table) < 2 or not table[0] or table[0][-1] != _HEADER:
        raise ValueError(f"its last column is not {_HEADER!r}")
    columns = [unescape(name) for name in table[0][:-1]]
    header = read_header(unescape(table[1][-1]))
    kinds = header["columns"]
    nodes: dict[str, Attributes] = {}
    edges: list[PlainEdge] = []
    for cells in table[1:]:
        if len(cells) != len(columns) + 1:
            raise ValueError(f"a row has {len(cells)} cells and the first {len(columns) + 1}")
        row = {
            name: value
            for name, cell in zip(columns, cells[:-1], strict=True)
            if (value := _parse(kinds[name], cell)) is not _NOT_THERE
        }
        _take_row(row, nodes, edges)
    return PlainGraph(header["attributes"], nodes, edges)


def _row(plain: PlainGraph, edge: PlainEdge) -> dict[str, Any]:
    """An edge as a row; its own attributes may not look like those of its ends."""
    clash = [name for name in edge.attributes if name.startswith(("source.", "target."))]
    if clash:
        raise InputError(
            f"edge {edge.source!r} -> {edge.target!r} has an attribute {clash[0]!r}; in CSV such "
            "names belong to the edge's ends. Rename it, or export to another format."
        )
    return (
        {"source": edge.source, "target": edge.target, "key": edge.key}
        | edge.attributes
        | _prefixed("source", plain.nodes[edge.source])
        | _prefixed("target", plain.nodes[edge.target])
    )


def _check_lengths(cells: Sequence[str], row: Mapping[str, Any]) -> None:
    """Raise InputError for a cell that no CSV reader would take."""
    longest = max(map(len, cells))
    if longest > csv.field_size_limit():
        ends = f"{row.get('source')!r} -> {row.get('target')!r}"
        raise InputError(
            f"The row of {ends} has a cell of {longest} characters; CSV readers take at most "
            f"{csv.field_size_limit()}. Export to another format."
        )


def _prefixed(end: str, attributes: Attributes) -> dict[str, Any]:
    return {f"{end}.{name}": value for name, value in attributes.items()}


def _take_row(row: dict[str, Any], nodes: dict[str, Attributes], edges: list[PlainEdge]) -> None:
    """Add what a row says to the nodes and edges."""
    for end in ("source", "target"):
        if end in row:
            own = {k.removeprefix(f"{end}."): v for k, v in row.items() if k.startswith(f"{end}.")}
            nodes[row[end]] = own
    if "key" in row:
        own = {
            name: value
            for name, value in row.items()
            if name not in _ENDS and not name.startswith(("source.", "target."))
        }
        edges.append(PlainEdge(row["source"], row["target"], row["key"], own))


_KINDS: Mapping[type, str] = {bool: "bool", int: "int", float: "float", str: "str"}


def _kind(values: Sequence[object]) -> str:
    """The type of a column's values.

    `str+` is text in every row, some of it empty; `json` is for types that differ, and for text of
    which some is empty and some not there.
    """
    present = {type(value) for value in values if value is not _NOT_THERE}
    if len(present) != 1:
        return "json"
    kind = _KINDS[present.pop()]
    if kind != "str" or "" not in values:
        return kind
    return "json" if _NOT_THERE in values else "str+"


def _format(kind: str, value: Any) -> str:
    if value is _NOT_THERE:
        return ""
    if kind == "json":
        return escape(json.dumps(value, ensure_ascii=False))
    return escape(value) if kind in ("str", "str+") else json.dumps(value)


def _parse(kind: str, cell: str) -> Scalar | object:
    if kind == "str+":  # text that may be empty but is always there
        return unescape(cell)
    if cell == "":
        return _NOT_THERE
    if kind == "str":
        return unescape(cell)
    value = json.loads(unescape(cell))
    if kind != "json" and type(value) is not {"bool": bool, "int": int, "float": float}[kind]:
        raise ValueError(f"the cell {cell!r} is no {kind}")
    return value
