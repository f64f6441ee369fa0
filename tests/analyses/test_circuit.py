"""A circuit: by name, without a node, as a table, and to a file and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import attnlens as al
from attnlens.analyses.circuit import SCHEMA, Circuit
from attnlens.errors import FileError, InputError
from tests.analyses.known import EDGES, HEADS, in_circuit, name_lens, name_scores, name_task
from tests.networks import naming, network, random_mask

Content = dict[str, Any]


@cache
def known() -> Circuit:
    return name_scores("exact").circuit(top=25)


def test_of_names() -> None:
    own, truth = naming()
    circuit = Circuit.of(own, sorted(EDGES), {"task": "other_name"})
    assert torch.equal(circuit.kept, truth)
    assert len(circuit) == 25
    assert circuit.share == 25 / 353
    assert set(circuit.edges) == EDGES
    assert circuit.nodes == ("embed", *HEADS, "logits")
    assert circuit.about == {
        "granularity": "edges",
        "selection": "given by name",
        "task": "other_name",
    }
    assert circuit.score.isnan().all()
    assert circuit.to_frame()["score"].isna().all()


def test_of_refuses() -> None:
    own = network(1, 2)
    with pytest.raises(InputError, match="There is no edge 'L0H5->logits'"):
        Circuit.of(own, ["embed->L0H1<v>", "L0H5->logits"])
    with pytest.raises(InputError, match="one edge at least"):
        Circuit.of(own, [])


def test_without_a_node() -> None:
    circuit = known()
    for head in HEADS:
        left = circuit.without(head)
        assert head not in left.nodes
        assert not any(head in edge for edge in left.edges)
        assert set(left.edges) < EDGES
        assert torch.equal(left.kept, left.network.alive(left.kept))
    # Nobody but L1H0 reads what L0H2 writes, so that what L0H2 reads leads nowhere then.
    gone = EDGES - set(circuit.without("L1H0").edges)
    assert {edge for edge in gone if "L1H0" not in edge} == {"embed->L0H2<v>"}
    assert circuit.without("L0H0").edges == circuit.edges
    assert len(circuit.without("logits")) == 0


def test_without_forgets_what_was_found_of_the_whole() -> None:
    circuit = Circuit(
        known().network, known().kept, known().score, known().chosen, {}, {"f": 1}, {"cpr": 1}
    )
    left = circuit.without("L0H1")
    assert left.evaluation is None
    assert left.curve is None


def test_frame_is_by_size() -> None:
    circuit = known()
    frame = circuit.to_frame()
    assert set(frame["edge"]) == EDGES
    assert (frame["score"].abs().diff().dropna() <= 0).all()
    assert (frame["chosen"] == 1).all()
    for row in frame.itertuples():
        assert row.edge == f"{row.sender}->{row.receiver}"
        assert row.score == float(circuit.score[circuit.network.find(str(row.edge))])


def test_graph_has_its_edges() -> None:
    graph = known().to_graph()
    assert graph.number_of_edges() == 25
    assert graph.graph["edges"] == 25
    assert graph.graph["of"] == 353
    assert {*HEADS, "embed", "logits"} == set(graph.nodes)
    # Not known: no scores, but the same edges.
    assert Circuit.of(naming()[0], sorted(EDGES)).to_graph().number_of_edges() == 25


def test_round_trip(tmp_path: Path) -> None:
    circuit = known()
    evaluation = circuit.evaluate(name_lens(), name_task(), draws=2, resamples=20)
    curve = al.faithfulness_curve(
        name_lens(), name_task(), name_scores("exact"), (0.1, 1.0), draws=1, resamples=20
    )
    path = circuit.save(tmp_path / "circuit.json", evaluation, curve)
    again = Circuit.load(path)
    assert again.network.senders == circuit.network.senders
    assert again.network.receivers == circuit.network.receivers
    assert torch.equal(again.network.exists, circuit.network.exists)
    assert torch.equal(again.kept, circuit.kept)
    assert torch.equal(again.score, circuit.score)
    assert torch.equal(again.chosen, circuit.chosen)
    assert dict(again.about) == dict(circuit.about)
    assert again.evaluation == evaluation.to_record()
    assert again.curve == curve.to_record()
    # What it holds travels on, and a second writing is the first, byte for byte.
    assert again.save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    found = again.evaluate(name_lens(), name_task(), draws=0)
    assert float(found.faithfulness.mean) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("groups", [None, 1])
def test_round_trip_of_any_network(tmp_path: Path, groups: int | None) -> None:
    own = network(2, 2, groups)
    circuit = Circuit.of(own, [own.edge_names[n] for n in own.numbers(random_mask(own, 9))])
    again = Circuit.load(circuit.save(tmp_path / "c.json"))
    assert torch.equal(again.kept, circuit.kept)
    assert again.score.isnan().all()
    assert again.chosen.isnan().all()
    assert again.evaluation is None
    assert again.curve is None
    assert again.nodes == circuit.nodes


def test_an_empty_circuit_travels_too(tmp_path: Path) -> None:
    empty = known().without("logits")
    assert len(Circuit.load(empty.save(tmp_path / "c.json"))) == 0


def test_a_file_is_strict_json(tmp_path: Path) -> None:
    text = Circuit.of(naming()[0], sorted(EDGES)).save(tmp_path / "c.json").read_text()
    assert "NaN" not in text
    content = json.loads(text)
    assert content["attnlens circuit"] == SCHEMA
    assert set(content["edges"]) == EDGES


def test_a_missing_file_or_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        Circuit.load(tmp_path / "none.json")
    with pytest.raises(FileError, match="cannot be read"):
        Circuit.load(tmp_path)
    with pytest.raises(FileError, match="folder does not exist"):
        known().save(tmp_path / "none" / "c.json")


def put(*keys: Any, value: Any) -> Callable[[Content], Any]:
    """Set one value of a file's content, by its keys."""

    def change(content: Content) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("attnlens circuit", value=SCHEMA + 1), "update it"),
        (put("attnlens circuit", value=0), "its version is 0"),
        (put("attnlens circuit", value="1"), "its version is '1'"),
        (put("edges", 0, value="embed->L9H9<v>"), "There is no edge 'embed->L9H9<v>'"),
        (put("edges", value=7), "damaged"),
        (put("edges", 0, value=["embed"]), "damaged"),
        (put("score", value=[1.0, 2.0]), "score holds 2 numbers for 353 edges"),
        (put("chosen", value="many"), "damaged"),
        (put("score", 3, value="large"), "damaged"),
        (put("score", value=3.0), "damaged"),
        (put("about", value=5), "damaged"),
        (put("about", value=None), "damaged"),
        (put("evaluation", value=5), "evaluation"),
        (put("curve", value=[1]), "curve"),
        (put("network", value=[]), "damaged"),
        (put("network", "exists", value=[]), "what every input may see"),
        (put("network", "exists", 0, value=[99]), "damaged"),
        (put("network", "exists", 0, value=["embed"]), "damaged"),
        (put("network", "senders", 0, value=["embed"]), "damaged"),
        (put("network", "senders", 1, 0, value=["L0H0"]), "name is no text"),
        (put("network", "receivers", 0, value=["a", "q", "L0", 0, 0, ["nobody"]]), "a is no input"),
        (put("network", "receivers", 0, 5, value=[]), "is no input of its nodes"),
        (put("network", "receivers", 0, value=["a", "q", "L0", 0, 0, 3]), "damaged"),
        (lambda content: content.pop("edges"), "damaged"),
        (lambda content: content.pop("evaluation"), "damaged"),
        (lambda content: content.clear(), "damaged"),
    ],
)
def test_a_damaged_file(tmp_path: Path, change: Callable[[Content], Any], said: str) -> None:
    path = known().save(tmp_path / "c.json")
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match=said):
        Circuit.load(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{}", "", "\x00", "{"])
def test_a_file_of_something_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(FileError, match="no circuit file"):
        Circuit.load(path)


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    own = network(1, 1)
    path = Circuit.of(own, ["embed->logits"]).save(tmp_path / "c.json")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="no circuit file"):
            Circuit.load(path)
    path.write_bytes(b"\xff\xfe" + whole)
    with pytest.raises(FileError, match="no circuit file"):
        Circuit.load(path)


def test_a_circuit_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = known().save(tmp_path / "c.json")
    before = path.read_bytes()
    bad = Circuit(known().network, known().kept, known().score, known().chosen, {"x": object()})
    with pytest.raises(InputError, match="about"):
        bad.save(path)
    assert path.read_bytes() == before


def test_the_25_edges_by_each_way_of_saying_so() -> None:
    assert torch.equal(known().network.numbers(known().kept), in_circuit().nonzero()[:, 0])
