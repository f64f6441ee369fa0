"""Graphs to files and back; the file's suffix says the format.

| suffix | format |
|---|---|
| `.graphml` | GraphML |
| `.gexf` | GEXF 1.2 (Gephi) |
| `.json` | node-link JSON (networkx, D3) |
| `.cyjs` | Cytoscape JSON |
| `.dot`, `.gv` | Graphviz |
| `.csv` | edge list |

Every file holds a schema version and the graph's attributes, is written whole or not at all, and
reads back as the same graph; tuples among the graph's attributes come back as lists.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from attnlens.errors import FileError
from attnlens.files import write_atomically
from attnlens.graphs.csv_format import from_csv, to_csv
from attnlens.graphs.dot import from_dot, to_dot
from attnlens.graphs.json_formats import from_json, to_cytoscape, to_node_link
from attnlens.graphs.plain import PlainGraph, from_plain, to_plain
from attnlens.graphs.xml_formats import from_gexf, from_graphml, to_gexf, to_graphml


@dataclass(frozen=True)
class _Format:
    write: Callable[[PlainGraph], str]
    read: Callable[[str], PlainGraph]


_FORMATS = {
    ".graphml": _Format(to_graphml, from_graphml),
    ".gexf": _Format(to_gexf, from_gexf),
    ".json": _Format(to_node_link, from_json),
    ".cyjs": _Format(to_cytoscape, from_json),
    ".dot": _Format(to_dot, from_dot),
    ".gv": _Format(to_dot, from_dot),
    ".csv": _Format(to_csv, from_csv),
}
# What the readers meet in a file that is something else; XML's and JSON's errors are among them.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, csv.Error)
SUFFIXES = tuple(_FORMATS)
"""Suffixes that `export_graph` and `load_graph` know."""


def export_graph(graph: nx.MultiDiGraph[Any], path: str | Path) -> Path:
    """Write a graph to a file in the format of its suffix.

    Raises:
        InputError: a value that is NaN or infinite, or of a type that files do not hold; the
            message names the node or edge.
        FileError: an unknown suffix, or a file that cannot be written.

    """
    text = _format_of(path).write(to_plain(graph))
    return write_atomically(path, text)


def load_graph(path: str | Path) -> nx.MultiDiGraph[str]:
    """Read a graph that `export_graph` wrote.

    Raises:
        FileError: a missing or damaged file, an unknown suffix, a newer schema version.

    """
    form = _format_of(path)
    try:
        text = Path(path).read_bytes().decode()  # line ends as they are
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is damaged: it is no UTF-8 text ({error.reason}).") from error
    try:
        return from_plain(form.read(text))
    except _DAMAGE as error:
        what = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else error
        raise FileError(f"{path} is no {Path(path).suffix} file of attnlens: {what}.") from error


def _format_of(path: str | Path) -> _Format:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise FileError(
            f"{path} has the suffix {suffix!r}; graphs are files with {', '.join(SUFFIXES)}."
        )
    return _FORMATS[suffix]
