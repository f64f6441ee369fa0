"""The graph of nodes and edges: names, numbers, counts, and which edges lie on a way."""

from __future__ import annotations

from itertools import product

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import attnlens as al
from attnlens.anatomy.network import Network
from attnlens.errors import InputError
from tests.networks import network

SHAPES = [(2, 2, 1, True), (2, 2, 2, True), (3, 4, 2, False), (2, 4, 2, True), (3, 2, 1, True)]
NETWORKS = [network(*shape) for shape in SHAPES]


def masks(own: Network, share: float, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return own.exists & (torch.rand(own.exists.shape, generator=draw) < share)


def serial(layers: int, heads: int) -> int:
    """Number of edges of a decoder whose MLPs read the heads of their own layer, by its formula."""
    inside = sum(
        3 * heads * (1 + at * (heads + 1)) + 1 + at * (heads + 1) + heads for at in range(layers)
    )
    return inside + 1 + layers * (heads + 1)


def ways(own: Network, mask: torch.Tensor) -> torch.Tensor:
    """The edges that lie on a way from embeddings to logits, by search in a graph."""
    graph = nx.DiGraph()
    graph.add_nodes_from(own.nodes)
    pairs = mask.nonzero().tolist()
    for a, b in pairs:
        graph.add_edges_from((own.senders[a].name, node) for node in own.receivers[b].nodes)
    starts = [sender.name for sender in own.senders if sender.kind == "embed"]
    fed = set(starts).union(*(nx.descendants(graph, start) for start in starts))
    heard = nx.ancestors(graph, "logits") | {"logits"}
    found = torch.zeros_like(mask)
    for a, b in pairs:
        found[a, b] = own.senders[a].name in fed and bool(heard & set(own.receivers[b].nodes))
    return found


def test_edges_go_by_receiver_then_sender() -> None:
    own = network(1, 2)
    assert own.edge_names == (
        "embed->L0H0<q>", "embed->L0H1<q>", "embed->L0H0<k>", "embed->L0H1<k>",
        "embed->L0H0<v>", "embed->L0H1<v>",
        "embed->L0.mlp", "L0H0->L0.mlp", "L0H1->L0.mlp",
        "embed->logits", "L0H0->logits", "L0H1->logits", "L0.mlp->logits",
    )  # fmt: skip
    assert len(own) == 13
    pairs = own.edges.tolist()
    assert pairs == sorted(pairs, key=lambda pair: pair[::-1])
    assert own.nodes == ("embed", "L0H0", "L0H1", "L0.mlp", "logits")
    assert own.layers == {"embed": -1, "L0H0": 0, "L0H1": 0, "L0.mlp": 0, "logits": 1}


def test_edges_are_found_by_name() -> None:
    own = network(2, 2)
    names = ["L0H1->L1H0<k>", "embed->logits"]
    assert [own.edge_names[number] for number in own.find(names)] == names
    assert own.find("embed->logits").tolist() == own.find(["embed->logits"]).tolist()
    assert len(own.find([])) == 0
    # L1 writes after L0 has read; heads of one layer do not read each other.
    for name in ("L1H0->L0H0<q>", "L1H0->L1H1<q>", "L0H1", "embed->L0H0", "L0H0<q>->logits"):
        with pytest.raises(InputError, match=r"no edge.*sender->receiver") as error:
            own.find(["embed->logits", name])
        assert repr(name) in str(error.value)


@given(st.sampled_from(NETWORKS), st.data())
def test_masks_and_numbers_are_one_choice(own: Network, data: st.DataObject) -> None:
    numbers = data.draw(st.sets(st.integers(0, len(own) - 1)))
    mask = own.mask(sorted(numbers))
    assert int(mask.sum()) == len(numbers)
    assert not bool((mask & ~own.exists).any())
    assert own.numbers(mask).tolist() == sorted(numbers)
    assert own.mask(own.numbers(mask)).equal(mask)
    names = [own.edge_names[number] for number in sorted(numbers)]
    wanted = [
        f"{own.senders[a].name}->{own.receivers[b].name}"
        for b, a in product(range(len(own.receivers)), range(len(own.senders)))
        if mask[a, b]
    ]
    assert names == wanted


@given(
    st.sampled_from(NETWORKS), st.sampled_from([0.02, 0.1, 0.2, 0.4, 0.9]), st.integers(0, 10_000)
)
def test_alive_edges_lie_on_a_way(own: Network, share: float, seed: int) -> None:
    mask = masks(own, share, seed)
    found = own.alive(mask)
    assert found.equal(ways(own, mask))
    assert own.alive(found).equal(found)


def test_pairs_that_are_no_edges_are_not_alive() -> None:
    own = network(2, 2)
    assert own.alive(torch.ones_like(own.exists)).equal(own.exists)


def test_a_shared_key_feeds_all_its_heads() -> None:
    own = network(2, 2, groups=1)
    for head in (0, 1):
        mask = own.mask(own.find(["embed->L0G0<k>", f"L0H{head}->logits"]))
        assert own.alive(mask).equal(mask)
        heard = own.mask(own.find(["embed->L0H0<q>", "L0H0->L1G0<v>", f"L1H{head}->logits"]))
        assert own.alive(heard).equal(heard)
    lost = own.mask(own.find(["embed->L0H0<q>", "L0H1->logits"]))
    assert not bool(own.alive(lost).any())


def test_between_are_all_edges_of_some_nodes() -> None:
    own = network(2, 2)
    found = own.between(["embed", "L0H1", "L1H0", "logits"])
    names = {own.edge_names[number] for number in own.numbers(found)}
    assert names == {
        *(f"embed->{head}<{kind}>" for head in ("L0H1", "L1H0") for kind in "qkv"),
        *(f"L0H1->L1H0<{kind}>" for kind in "qkv"),
        *(f"{sender}->logits" for sender in ("embed", "L0H1", "L1H0")),
    }
    assert own.between(own.nodes).equal(own.exists)
    assert not bool(own.between([]).any())
    with pytest.raises(InputError, match="no node 'L5H0'"):
        own.between(["embed", "L5H0"])


def test_nodes_are_the_ends_of_edges() -> None:
    own = network(2, 2)
    mask = own.mask(own.find(["embed->L0H1<v>", "L0H1->L1.mlp", "L1.mlp->logits"]))
    assert own.nodes_of(mask) == ("embed", "L0H1", "L1.mlp", "logits")
    assert own.nodes_of(torch.zeros_like(mask)) == ()
    assert own.nodes_of(own.exists) == own.nodes


def test_of_heads_that_share_a_key_those_that_write_are_in_the_circuit() -> None:
    own = network(2, 2, groups=1)
    shared = "embed->L0G0<k>"
    one = own.mask(own.find([shared, "L0H1->logits"]))
    assert own.nodes_of(one) == ("embed", "L0H1", "logits")
    none = own.mask(own.find([shared]))
    assert own.nodes_of(none) == ("embed", "L0H0", "L0H1")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 4), (3, 2), (12, 12)])
def test_the_number_of_edges_of_serial_blocks(layers: int, heads: int) -> None:
    assert len(network(layers, heads)) == serial(layers, heads)


def test_gpt2_small_has_32491_edges() -> None:
    """The shape counts, not the width; the number is that of the literature."""
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=48, n_layer=12, n_head=12, bos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    own = al.load(model).wiring.network
    assert len(own) == serial(12, 12) == 32_491
    by_hand = network(12, 12)
    assert set(own.edge_names) == set(by_hand.edge_names)
    assert own.nodes == by_hand.nodes
