"""Circuits as graphs: every kept edge once, drawn to each kept head that reads it."""

from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlens.errors import InputError
from attnlens.graphs import export_graph, load_graph, prune_graph
from attnlens.graphs.circuit import circuit_graph
from attnlens.graphs.export import SUFFIXES
from attnlens.graphs.plain import to_plain
from attnlens.zoo.naming import name_circuit
from tests.networks import naming, network, random_mask


def test_the_known_circuit_has_its_nodes_and_edges() -> None:
    own, kept = naming()
    graph = circuit_graph(own, kept, attributes={"model": "names"})
    edges = {(s, t, "" if key == "logits" else key) for s, t, key in graph.edges(keys=True)}
    assert edges == {tuple(edge) for edge in name_circuit()}
    assert tuple(graph) == own.nodes_of(kept)
    assert graph.nodes["embed"] == {"layer": -1, "kind": "embed"}
    assert graph.nodes["logits"] == {"layer": 4, "kind": "logits"}
    assert {data["kind"] for node, data in graph.nodes(data=True) if node[0] == "L"} == {"head"}
    assert graph.graph == {"model": "names"}


def test_an_edge_carries_score_sign_and_how_often_it_was_chosen() -> None:
    own = network(2, 2)
    kept = own.mask(own.find(["L0H1->L1H0<k>", "L0.mlp->L1.mlp", "L1H0->logits"]))
    scores = torch.full(kept.shape, torch.nan)
    scores[kept] = torch.tensor([-0.5, 2.0, 0.0])  # by sender, then receiver
    graph = circuit_graph(own, kept, scores, torch.where(kept, 0.75, torch.nan))
    assert list(graph) == ["L0H1", "L0.mlp", "L1H0", "L1.mlp", "logits"]
    assert graph.edges["L0H1", "L1H0", "k"] == {
        "weight": -0.5, "sign": -1, "input": "k", "name": "L0H1->L1H0<k>", "chosen": 0.75
    }  # fmt: skip
    assert graph.edges["L0.mlp", "L1.mlp", "mlp"]["weight"] == 2.0
    assert graph.edges["L1H0", "logits", "logits"]["sign"] == 1
    plain = circuit_graph(own, kept)
    assert {data["weight"] for *_, data in plain.edges(data=True)} == {1.0}
    assert not any("chosen" in data for *_, data in plain.edges(data=True))


def test_a_shared_key_is_drawn_to_the_heads_that_write_on() -> None:
    own = network(2, 4, groups=2)
    into = ["embed->L0G1<k>", "embed->L1G0<v>"]
    kept = own.mask(own.find([*into, "L0H2->L1H0<q>", "L0H3->logits"]))
    graph = circuit_graph(own, kept)
    shared = {(s, t): d["shared"] for s, t, d in graph.edges(data=True) if "shared" in d}
    assert shared == {
        ("embed", "L0H2"): 2, ("embed", "L0H3"): 2,
        ("embed", "L1H0"): 2, ("embed", "L1H1"): 2,  # none writes on: to all
    }  # fmt: skip
    names = [data["name"] for *_, data in graph.edges(data=True)]
    assert names.count("embed->L0G1<k>") == 2
    alone = circuit_graph(own, own.mask(own.find(["embed->L0G1<k>", "L0H3->logits"])))
    assert list(alone) == ["embed", "L0H3", "logits"]


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(0, 60), st.integers(0, 99))
def test_random_circuits(layers: int, groups: int, count: int, seed: int) -> None:
    own = network(layers, 4, groups)
    kept = random_mask(own, count, seed)
    graph = circuit_graph(own, kept, torch.randn(kept.shape), torch.rand(kept.shape))
    writing = {own.senders[i].name for i in kept.any(1).nonzero()[:, 0]}
    copies = 0
    for _, receiver in kept.nonzero().tolist():
        nodes = own.receivers[receiver].nodes
        copies += len(writing.intersection(nodes)) or len(nodes)
    assert graph.number_of_edges() == copies
    assert {data["name"] for *_, data in graph.edges(data=True)} == {
        own.edge_names[number] for number in own.numbers(kept)
    }
    assert tuple(graph) == own.nodes_of(kept)
    assert nx.is_directed_acyclic_graph(graph)
    assert not list(nx.isolates(graph))
    to_plain(graph)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_circuit_reads_back(suffix: str, tmp_path: Any) -> None:
    own = network(3, 4, groups=2)
    kept = own.alive(random_mask(own, 40))
    graph = circuit_graph(own, kept, torch.randn(kept.shape), attributes={"task": "a <b>"})
    back = load_graph(export_graph(graph, tmp_path / f"g{suffix}"))
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert nx.to_dict_of_dicts(back) == nx.to_dict_of_dicts(graph)
    assert back.graph == graph.graph


def test_the_strongest_ways_are_left_by_pruning() -> None:
    own, kept = naming()
    scores = torch.zeros(kept.shape)
    names = ["embed->L0H2<v>", "L0H2->L1H0<k>", "L1H0->L2H1<v>", "L2H1->L3H0<q>", "L3H0->logits"]
    scores[own.mask(own.find(names))] = -2.0
    graph = prune_graph(circuit_graph(own, kept, scores), "logits", "embed", top=1)
    assert [data["name"] for *_, data in graph.edges(data=True)] == names


def test_a_circuit_without_edges_is_an_empty_graph() -> None:
    own = network(1, 1)
    graph = circuit_graph(own, torch.zeros_like(own.exists))
    assert (len(graph), graph.number_of_edges()) == (0, 0)
    to_plain(graph)


def test_what_is_no_circuit_is_refused() -> None:
    own = network(2, 2)
    kept = own.exists
    with pytest.raises(InputError, match=r"kept has shape \(1, 2\); needed is .* \(7, 15\)"):
        circuit_graph(own, torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="scores has shape"):
        circuit_graph(own, kept, torch.ones(3))
    with pytest.raises(InputError, match="no edge L0H0->L0H0<q>: keep edges within"):
        circuit_graph(own, torch.ones_like(kept))
    with pytest.raises(InputError, match="scores of the kept edge embed->L0H0<q> is nan"):
        circuit_graph(own, kept, torch.full(kept.shape, torch.nan))
    with pytest.raises(InputError, match="chosen of the kept edge"):
        circuit_graph(own, kept, None, torch.full(kept.shape, torch.inf))
