"""Nodes and edges: their order and names, masks, and which edges lie on a way through the model."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import attnlens as al
from attnlens.anatomy.network import Network
from attnlens.errors import InputError
from tests.networks import network, random_mask

# Keys and values of one head each, shared by two, and shared by all; with MLPs and without.
SHAPES = [(1, 1, None, True), (2, 2, None, False), (3, 4, 2, True), (2, 3, 1, False)]
NETWORKS = [network(layers, heads, groups, mlps) for layers, heads, groups, mlps in SHAPES]


@st.composite
def masks(draw: st.DrawFn) -> tuple[Network, Tensor]:
    """A network and some of its edges: few, half of them or nearly all."""
    own = draw(st.sampled_from(NETWORKS))
    count = draw(st.integers(0, len(own)))
    return own, random_mask(own, count, draw(st.integers(0, 2**20)))


def alive_by_search(own: Network, mask: Tensor) -> set[str]:
    """Names of the edges on a path from embeddings to logits, found by search."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(own.nodes)
    pairs = [(own.senders[a].name, own.receivers[b]) for a, b in mask.nonzero().tolist()]
    graph.add_edges_from((sender, node) for sender, receiver in pairs for node in receiver.nodes)
    starts = [sender.name for sender in own.senders if sender.kind == "embed"]
    return {
        f"{sender}->{receiver.name}"
        for sender, receiver in pairs
        if any(nx.has_path(graph, start, sender) for start in starts)
        and any(nx.has_path(graph, node, "logits") for node in receiver.nodes)
    }


def names(own: Network, mask: Tensor) -> set[str]:
    return {own.edge_names[number] for number in own.numbers(mask)}


def gpt2(layers: int, heads: int, width: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=width or 4 * heads,
        n_layer=layers,
        n_head=heads,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def test_every_edge_of_a_small_network_in_order() -> None:
    own = network(1, 2)
    assert own.nodes == ("embed", "L0H0", "L0H1", "L0.mlp", "logits")
    assert own.edge_names == (
        "embed->L0H0<q>",
        "embed->L0H1<q>",
        "embed->L0H0<k>",
        "embed->L0H1<k>",
        "embed->L0H0<v>",
        "embed->L0H1<v>",
        "embed->L0.mlp",
        "L0H0->L0.mlp",
        "L0H1->L0.mlp",
        "embed->logits",
        "L0H0->logits",
        "L0H1->logits",
        "L0.mlp->logits",
    )
    assert own.layers == {"embed": -1, "L0H0": 0, "L0H1": 0, "L0.mlp": 0, "logits": 1}


@pytest.mark.parametrize("own", NETWORKS)
def test_edges_go_by_receiver_then_sender(own: Network) -> None:
    edges = own.edges.tolist()
    assert len(own) == len(edges) == len(own.edge_names) == int(own.exists.sum())
    assert edges == sorted(edges, key=lambda edge: (edge[1], edge[0]))
    assert {tuple(edge) for edge in edges} == {tuple(e) for e in own.exists.nonzero().tolist()}
    assert len(set(own.edge_names)) == len(own)


@pytest.mark.parametrize("own", NETWORKS)
def test_names_and_numbers_are_each_others(own: Network) -> None:
    assert torch.equal(own.find(own.edge_names), torch.arange(len(own)))
    assert torch.equal(own.find(reversed(own.edge_names)), torch.arange(len(own)).flip(0))
    assert own.find(own.edge_names[-1]).tolist() == [len(own) - 1]
    assert own.find([]).tolist() == []


@pytest.mark.parametrize(
    "name",
    [
        "L0H0->L1H0",  # no input
        "L1H0->L0H0<q>",  # against the order
        "L0H0->L0H1<k>",  # within a layer
        "L0H0->L9H0<q>",
        "L0H0",
        "",
    ],
)
def test_unknown_edges_are_refused_by_name(name: str) -> None:
    own = network(2, 2)
    with pytest.raises(InputError, match="There is no edge") as caught:
        own.find([own.edge_names[0], name])
    assert repr(name) in str(caught.value)
    assert own.edge_names[0] in str(caught.value)


def test_a_group_has_edges_of_its_own_and_its_heads_have_none() -> None:
    own = network(2, 4, groups=2)
    group = next(r for r in own.receivers if r.name == "L1G1<k>")
    assert group.nodes == ("L1H2", "L1H3")
    assert own.find("L0H0->L1G1<v>").shape == (1,)
    with pytest.raises(InputError, match="L1H2<k>"):
        own.find("L0H0->L1H2<k>")


@given(masks())
@settings(deadline=None)
def test_masks_and_numbers_are_each_others(case: tuple[Network, Tensor]) -> None:
    own, mask = case
    numbers = own.numbers(mask)
    assert torch.equal(own.mask(numbers), mask)
    assert torch.equal(own.mask(numbers.flip(0).tolist()), mask)
    pairs = {tuple(pair) for pair in own.edges[numbers].tolist()}
    assert pairs == {tuple(pair) for pair in mask.nonzero().tolist()}


def test_no_edges_and_all_edges() -> None:
    own = network(2, 2)
    assert not own.mask([]).any()
    assert torch.equal(own.mask(range(len(own))), own.exists)
    # What is no edge has no number.
    assert torch.equal(own.numbers(torch.ones_like(own.exists)), torch.arange(len(own)))


@given(masks())
@settings(deadline=None, max_examples=200)
def test_alive_edges_are_those_that_a_search_finds(case: tuple[Network, Tensor]) -> None:
    own, mask = case
    before = mask.clone()
    kept = own.alive(mask)
    assert names(own, kept) == alive_by_search(own, mask)
    assert torch.equal(mask, before)
    assert torch.equal(own.alive(kept), kept)
    assert not (kept & ~mask).any()


def test_all_edges_are_alive_and_pairs_that_are_no_edge_never() -> None:
    for own in NETWORKS:
        assert torch.equal(own.alive(own.exists), own.exists)
        assert torch.equal(own.alive(torch.ones_like(own.exists)), own.exists)


@pytest.mark.parametrize(
    ("edges", "kept"),
    [
        # A way through; one that ends early; one that begins in a head that reads nothing.
        (["embed->L0H0<v>", "L0H0->L1H1<q>", "L1H1->logits"], [0, 1, 2]),
        (["embed->L0H0<v>", "L0H0->L1H1<q>", "L0H0->logits"], [0, 2]),
        (["embed->logits", "L0H1->L1H1<v>", "L1H1->logits"], [0]),
        (["embed->L0H0<v>", "L0H0->L1H1<q>"], []),
    ],
)
def test_alive_by_hand(edges: list[str], kept: list[int]) -> None:
    own = network(2, 2)
    found = own.alive(own.mask(own.find(edges)))
    assert names(own, found) == {edges[number] for number in kept}


def test_a_shared_key_is_alive_by_any_of_its_heads() -> None:
    own = network(2, 4, groups=2)
    edges = ["embed->L0G0<k>", "L0H1->L1G1<v>", "L1H3->logits"]
    mask = own.mask(own.find(edges))
    assert names(own, own.alive(mask)) == set(edges)
    # The other group's head feeds nobody: nor do its keys then.
    cut = own.mask(own.find(["embed->L0G1<k>", "L0H1->L1G1<v>", "L1H3->logits"]))
    assert not own.alive(cut).any()


def test_nodes_at_the_ends_of_edges() -> None:
    own = network(2, 4, groups=2)
    assert own.nodes_of(torch.zeros_like(own.exists)) == ()
    assert own.nodes_of(own.exists) == own.nodes
    assert own.nodes_of(own.mask(own.find("L0.mlp->L1H3<q>"))) == ("L0.mlp", "L1H3")
    # Nobody of the group writes: all that read there are at its end.
    shared = own.mask(own.find("embed->L1G1<k>"))
    assert own.nodes_of(shared) == ("embed", "L1H2", "L1H3")
    # One writes: it is the one.
    wrote = own.mask(own.find(["embed->L1G1<k>", "L1H3->logits"]))
    assert own.nodes_of(wrote) == ("embed", "L1H3", "logits")


@given(masks())
@settings(deadline=None)
def test_nodes_of_a_mask_hold_every_end(case: tuple[Network, Tensor]) -> None:
    own, mask = case
    senders = {own.senders[a].name for a, _ in mask.nonzero().tolist()}
    wanted = set(senders)
    for _, b in mask.nonzero().tolist():
        nodes = set(own.receivers[b].nodes)
        wanted |= (nodes & senders) or nodes
    found = own.nodes_of(mask)
    assert set(found) == wanted
    assert list(found) == [node for node in own.nodes if node in wanted]
    assert not (mask & ~own.between(found)).any()


@given(st.sampled_from(NETWORKS), st.data())
@settings(deadline=None)
def test_edges_between_nodes(own: Network, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(own.nodes)))
    wanted = {
        own.edge_names[number]
        for number, (a, b) in enumerate(own.edges.tolist())
        if own.senders[a].name in chosen and chosen & set(own.receivers[b].nodes)
    }
    assert names(own, own.between(chosen)) == wanted


def test_edges_between_all_nodes_are_all_and_unknown_nodes_refused() -> None:
    own = network(2, 2)
    assert torch.equal(own.between(own.nodes), own.exists)
    assert not own.between(["embed"]).any()
    assert names(own, own.between(["embed", "logits"])) == {"embed->logits"}
    with pytest.raises(InputError, match=r"no node 'L7H0'.*embed, L0H0"):
        own.between(["embed", "L7H0"])


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 4), (2, 2), (3, 5)])
def test_gpt2_has_as_many_edges_as_counting_says(layers: int, heads: int) -> None:
    own = al.load(gpt2(layers, heads)).wiring.network
    wanted = 1 + layers * (heads + 1)  # into the logits
    for layer in range(layers):
        before = 1 + layer * (heads + 1)
        wanted += 3 * heads * before + before + heads
    assert len(own) == wanted
    by_hand = network(layers, heads)
    assert own.nodes == by_hand.nodes
    assert set(own.edge_names) == set(by_hand.edge_names)


def test_gpt2_of_twelve_layers_has_the_edges_of_gpt2_small() -> None:
    assert len(al.load(gpt2(12, 12, 48)).wiring.network) == 32_491
