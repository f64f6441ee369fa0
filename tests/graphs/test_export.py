"""Graph files read back as the same graph, whatever the tokens; NaN does not get in."""

import csv
import json
import tempfile
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlens.errors import FileError, InputError
from attnlens.graphs import attention_graph, export_graph, load_graph
from attnlens.graphs.export import SUFFIXES
from attnlens.graphs.text import escape, unescape

ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
NASTY = st.sampled_from(
    [
        *[
            "",
            " ",
            "\n",
            "\r\n",
            "\t",
            "\x00",
            "\x07",
            "\x1b[0m",
            "\x85",
            "\u2028",
            "\ud800",
            "\ufffe",
        ],
        *['"', "'", '\\"', "\\", "\\n", "<s>", "&amp;", "]]>", "-->", ",", ";", "];", "->", "a=b"],
        *["🙂", "👩‍👩‍👧", "Ġthe", "▁the", "null", "true", "1", "0.5", "1e5", "NaN", "#", "=1+1"],
        *["_x0007_", "_x005F_", "_x005F", "_x0007\x07", "_"],
    ]
)
TEXTS = NASTY | st.text(ANY_CHARACTER, max_size=8) | st.text("_x05F\x07\r", max_size=9)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = TEXTS | FLOATS | st.integers(-(2**63), 2**63 - 1) | st.booleans()
NAMES = st.sampled_from(
    ["weight", "kind", "token", "layer", "label", "ä b", "x:y", '"q"', "_x0007_"]
)
ATTRIBUTES = st.dictionaries(NAMES, SCALARS, max_size=4)
JSON = st.recursive(
    st.none() | SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def graphs(draw: st.DrawFn) -> nx.MultiDiGraph:
    graph = nx.MultiDiGraph()
    graph.graph.update(draw(st.dictionaries(TEXTS.filter(bool), JSON, max_size=3)))
    names = draw(st.lists(TEXTS, unique=True, max_size=5))
    for name in names:
        graph.add_node(name)
        graph.nodes[name].update(draw(ATTRIBUTES))
    if names:
        ends = st.tuples(st.sampled_from(names), st.sampled_from(names))
        keys = st.integers(0, 3) | TEXTS
        for source, target in draw(st.lists(ends, max_size=6)):
            key = draw(keys)
            graph.add_edge(source, target, key)
            graph.edges[source, target, key].update(draw(ATTRIBUTES))
    return graph


def exact(graph: nx.MultiDiGraph) -> object:
    """All that a graph says, types included (1, 1.0 and True are equal in Python)."""

    def typed(value: object) -> object:
        if isinstance(value, dict):
            return {key: typed(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [typed(inner) for inner in value]
        return type(value).__name__, repr(value)

    nodes = {name: typed(data) for name, data in graph.nodes(data=True)}
    edges = {
        (source, target, repr(key)): typed(data)
        for source, target, key, data in graph.edges(keys=True, data=True)
    }
    return typed(graph.graph), nodes, edges


def there_and_back(graph: nx.MultiDiGraph, suffix: str) -> nx.MultiDiGraph:
    with tempfile.TemporaryDirectory() as folder:
        return load_graph(export_graph(graph, Path(folder) / f"graph{suffix}"))


def small_graph(
    tokens: tuple[str, ...] = ("<s>", "a", "a"), **attributes: object
) -> nx.MultiDiGraph:
    uniform = np.tril(np.ones((2, 3, 3))) / np.arange(1, 4)[:, None]
    return attention_graph(torch.tensor(uniform), tokens, attributes=attributes)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(graph=graphs())
def test_any_graph_comes_back_as_it_was(suffix: str, graph: nx.MultiDiGraph) -> None:
    assert exact(there_and_back(graph, suffix)) == exact(graph)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(tokens=st.lists(TEXTS, min_size=3, max_size=3))
def test_any_tokens_come_back_in_a_flow_graph(suffix: str, tokens: list[str]) -> None:
    graph = small_graph(tuple(tokens), model="m", method="rollout")
    back = there_and_back(graph, suffix)
    assert exact(back) == exact(graph)
    assert [back.nodes[f"L1P{i}"]["token"] for i in range(3)] == tokens
    assert back.graph["method"] == "rollout"


@given(TEXTS)
def test_escaped_text_is_legal_and_comes_back(text: str) -> None:
    assert unescape(escape(text)) == text
    escape(text).encode("utf-8")
    assert "\r" not in escape(text)


@pytest.mark.parametrize("text", ['the 🙂 "quoted" \\ token', "_x_", "a_x00", "\n\t", ""])
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert escape(text) == text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numpy_scalars_become_pythons(suffix: str) -> None:
    graph = nx.MultiDiGraph(heads=np.int64(4), share=(np.float32(0.5), None))
    graph.add_node("a", layer=np.int32(3), token=np.str_("x"), real=np.bool_(True))
    graph.add_edge("a", "a", np.int64(2), weight=np.float32(0.25))
    back = there_and_back(graph, suffix)
    none = ("NoneType", "None")
    assert exact(back)[0] == {"heads": ("int", "4"), "share": [("float", "0.5"), none]}
    values = {"layer": ("int", "3"), "token": ("str", "'x'"), "real": ("bool", "True")}
    assert exact(back)[1] == {"a": values}
    assert exact(back)[2] == {("a", "a", "2"): {"weight": ("float", "0.25")}}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_what_is_no_number_is_refused_by_name(suffix: str, value: float, tmp_path: Path) -> None:
    graph = small_graph()
    graph.edges["L0P0", "L1P2", "attention"]["weight"] = value
    path = tmp_path / f"graph{suffix}"
    with pytest.raises(
        InputError, match=r"'L0P0' -> 'L1P2' \('attention'\): weight is -?(nan|inf)"
    ):
        export_graph(graph, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.add_node(("a", 1)), r"\('a', 1\) is no text"),
        (lambda g: g.nodes["L0P0"].update(head=None), "node 'L0P0': head is a NoneType"),
        (lambda g: g.nodes["L0P0"].update(id="x"), "'id', a name that graph files need"),
        (lambda g: g.nodes["L0P0"].update({1: "x"}), "named 1"),
        (
            lambda g: g.add_edge("L0P0", "L0P1", (1, 2)),
            r"key of edge 'L0P0' -> 'L0P1' \(\(1, 2\)\)",
        ),
        (lambda g: g.graph.update(bad=object()), "graph: bad is a object"),
        (lambda g: g.graph.update(deep=[{"a": float("nan")}]), r"graph: deep\[0\]: a is nan"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(change, message: str, tmp_path: Path) -> None:
    graph = small_graph()
    change(graph)
    with pytest.raises(InputError, match=message):
        export_graph(graph, tmp_path / "graph.json")


def test_only_directed_multigraphs() -> None:
    with pytest.raises(InputError, match="A DiGraph cannot"):
        export_graph(nx.DiGraph(), "graph.json")


def test_other_programs_read_the_files(tmp_path: Path) -> None:
    graph = small_graph(model="m")
    edges = {(s, t, d["kind"], d["weight"]) for s, t, d in graph.edges(data=True)}

    def same(other: nx.Graph) -> bool:
        found = {(s, t, d["kind"], float(d["weight"])) for s, t, d in other.edges(data=True)}
        return found == edges and other.nodes["L1P2"]["token"] == "a"

    path = export_graph(graph, tmp_path / "g.graphml")
    assert same(nx.read_graphml(path, force_multigraph=True))
    assert same(nx.read_gexf(export_graph(graph, tmp_path / "g.gexf")))
    data = json.loads(export_graph(graph, tmp_path / "g.json").read_text())
    assert same(nx.node_link_graph(data, edges="edges"))
    with export_graph(graph, tmp_path / "g.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["source"], r["target"], r["kind"], float(r["weight"])) for r in rows}
    assert found == edges
    assert rows[0]["source.token"] == "<s>"
    drawn = export_graph(graph, tmp_path / "g.dot").read_text()
    assert '  "L1P2" ["label"="a", ' in drawn
    cytoscape = json.loads(export_graph(graph, tmp_path / "g.cyjs").read_text())
    ids = [element["data"]["id"] for part in cytoscape["elements"].values() for element in part]
    assert len(ids) == len(set(ids)) == len(graph) + len(edges)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_twice_gives_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    one = export_graph(small_graph(), tmp_path / f"one{suffix}").read_bytes()
    assert one == export_graph(small_graph(), tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("cut", [0, 10, 200, -30])
def test_a_damaged_file_is_named(suffix: str, cut: int, tmp_path: Path) -> None:
    path = export_graph(small_graph(), tmp_path / f"graph{suffix}")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FileError, match=f"graph{suffix} is no"):
        load_graph(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("version", ["2", "null", '"1"'])
def test_a_file_of_another_schema_is_refused(suffix: str, version: str, tmp_path: Path) -> None:
    path = export_graph(small_graph(), tmp_path / f"graph{suffix}")
    text = path.read_text()
    changed = text
    for before in ('schema": 1', 'schema"": 1', 'schema\\": 1', "schema&quot;: 1"):
        changed = changed.replace(before, before[:-1] + version)
    assert changed != text
    path.write_text(changed)
    with pytest.raises(FileError, match="schema"):
        load_graph(path)


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none.json cannot be read: No such file"):
        load_graph(tmp_path / "none.json")
    with pytest.raises(FileError, match=r"suffix '.txt'; graphs are files with .graphml"):
        export_graph(small_graph(), tmp_path / "graph.txt")
    (tmp_path / "latin.dot").write_bytes(b"\xff")
    with pytest.raises(FileError, match="no UTF-8"):
        load_graph(tmp_path / "latin.dot")


def test_names_that_belong_to_csv_are_refused(tmp_path: Path) -> None:
    graph = small_graph()
    graph.edges["L0P0", "L1P2", "attention"]["source.token"] = "x"
    with pytest.raises(InputError, match=r"'source.token'"):
        export_graph(graph, tmp_path / "graph.csv")
    graph = small_graph(("<s>", "a", "b" * 200_000))
    with pytest.raises(InputError, match="CSV readers take at most"):
        export_graph(graph, tmp_path / "graph.csv")
