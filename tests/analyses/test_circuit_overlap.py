"""Overlap of circuits: counts beside chance, and whether shared edges help in both."""

import math
import random
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_overlap import Shared
from attnlens.anatomy.network import Network, Receiver, Sender
from attnlens.errors import InputError
from tests import networks
from tests.networks import naming


@pytest.fixture
def network() -> Network:
    senders = Sender("embed", "embed", "embed", -1), Sender("L0H0", "head", "L0", 0)
    receivers = (
        Receiver("L0H0<v>", "v", "L0", 0, 0, ("L0H0",)),
        Receiver("logits", "logits", "logits", 1, 0, ("logits",)),
    )
    return Network(senders, receivers, torch.tensor([[True, True], [False, True]]))


@pytest.mark.parametrize(
    ("metric", "direction", "turned"),
    [
        ("logit_difference", "noise", False),
        ("loss", "noise", True),
        ("logit_difference", "denoise", True),
        ("loss", "denoise", False),
    ],
)
def test_an_edge_that_helps_in_both_has_the_same_sign(
    network: Network, metric: str, direction: str, turned: bool
) -> None:
    def circuit(score: list[float], **about: str) -> Circuit:
        chosen = torch.ones(len(network), dtype=torch.float64)
        return Circuit(
            network, network.exists, torch.tensor(score, dtype=torch.float64), chosen, about
        )

    first = circuit([-3.0, -2.0, 1.0], metric="logit_difference", direction="noise")
    other = [-1.0, 5.0, 4.0]
    second = circuit(
        [-value if turned else value for value in other], metric=metric, direction=direction
    )
    assert first.compare(second).same_sign == pytest.approx(2 / 3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 10_000))
def test_counts_and_chance_by_going_through_all_sets(a: int, b: int, seed: int) -> None:
    """Of all sets of b out of 7 things: how many share as many with a given one, or more."""
    things = [f"e{number}" for number in range(7)]
    draw = random.Random(seed)
    first, second = tuple(draw.sample(things, a)), tuple(draw.sample(things, b))
    found = Shared.of(first, second, 7)
    both = set(first) & set(second)
    assert set(found.names) == both
    assert (found.first, found.second, found.total) == (a, b, 7)
    counts = [len(set(first).intersection(other)) for other in combinations(things, b)]
    assert found.p == pytest.approx(sum(n >= len(both) for n in counts) / len(counts))
    assert found.expected == pytest.approx(sum(counts) / len(counts))
    either = set(first) | set(second)
    assert found.jaccard == (len(both) / len(either) if either else 0)
    assert found.of_smaller == (len(both) / min(a, b) if min(a, b) else 0)


def test_two_circuits_of_the_name_model() -> None:
    own, truth = naming()
    names = [own.edge_names[number] for number in own.numbers(truth).tolist()]
    # Fewer: all but the last mover's edges; more: with a head that is not in the circuit.
    fewer = Circuit.of(own, [name for name in names if "L3H2" not in name], {"task": "a"})
    more = Circuit.of(own, [*names, "embed->L3H3<v>", "L3H3->logits"], {"method": "exact"})
    found = fewer.compare(more)
    assert (found.first, found.second) == ("a, given by name", "exact, given by name")
    gone = sum("L3H2" in name for name in names)
    assert gone == 5
    assert (found.edges.first, found.edges.second, found.edges.total) == (20, 27, 353)
    assert set(found.edges.names) == set(fewer.edges)
    assert found.edges.jaccard == 20 / 27
    # Embeddings and logits are in every circuit: 6 and 8 of 16 heads.
    assert (found.nodes.first, found.nodes.second, found.nodes.total) == (6, 8, 16)
    assert "embed" not in found.nodes.names
    assert found.nodes.of_smaller == 1
    assert found.nodes.expected == 3
    # All sets of 8 out of 16 that hold 6 given ones.
    assert found.nodes.p == pytest.approx(math.comb(10, 2) / math.comb(16, 8))
    assert math.isnan(found.same_sign)
    frame = found.to_frame()
    assert frame["of"].tolist() == ["nodes", "edges"]
    assert frame["shared"].tolist() == [6, 20]


def test_circuits_of_two_models_are_refused() -> None:
    one, other = networks.network(1, 2), networks.network(2, 2)
    edge = ["embed->logits"]
    with pytest.raises(InputError, match="of two models"):
        Circuit.of(one, edge).compare(Circuit.of(other, edge))


def test_what_is_not_there_shares_nothing() -> None:
    found = Shared.of((), (), 0)
    assert (found.jaccard, found.of_smaller, found.expected, found.p) == (0, 0, 0, 1)
