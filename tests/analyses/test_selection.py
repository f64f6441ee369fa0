"""Choosing edges by score: the largest, over a threshold, and from the logits down."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnlens.analyses.selection import Selection
from attnlens.anatomy.network import LOGITS, Network
from attnlens.errors import InputError
from tests.networks import naming, network


def by_hand(own: Network, sizes: list[float], top: int | None, threshold: float | None) -> set[int]:
    """Greedy choice: among all edges into a node that is there, always the largest, the first."""
    there, chosen = {LOGITS}, set[int]()
    pairs = own.edges.tolist()
    while top is None or len(chosen) < top:
        open_edges = [
            edge
            for edge, (_, receiver) in enumerate(pairs)
            if edge not in chosen and there.intersection(own.receivers[receiver].nodes)
        ]
        if not open_edges:
            break
        best = max(open_edges, key=lambda edge: (sizes[edge], -edge))
        if threshold is not None and sizes[best] < threshold:
            break
        chosen.add(best)
        there.add(own.senders[pairs[best][0]].name)
    return chosen


@st.composite
def scored(draw: st.DrawFn) -> tuple[Network, Tensor]:
    """Small networks, some edges missing, whose scores have ties and both signs."""
    heads = draw(st.sampled_from([1, 2]))
    groups = draw(st.sampled_from([None, 1]))
    own = network(draw(st.integers(1, 2)), heads, groups, mlps=draw(st.booleans()))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    holes = torch.rand(own.exists.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    own = Network(own.senders, own.receivers, own.exists & ~holes)
    scores = torch.randint(-6, 7, (len(own),), generator=generator).double() / 2
    return own, scores


@settings(deadline=None, max_examples=60)
@given(scored(), st.integers(1, 12))
def test_greedy_top_is_that_by_hand(given: tuple[Network, Tensor], top: int) -> None:
    own, scores = given
    picked = Selection(top=top, greedy=True).pick(own, scores)
    wanted = by_hand(own, scores.abs().tolist(), top, None)
    assert set(picked.nonzero()[:, 0].tolist()) == wanted


@settings(deadline=None, max_examples=60)
@given(scored(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5, 9.0]))
def test_greedy_threshold_is_that_by_hand(given: tuple[Network, Tensor], threshold: float) -> None:
    own, scores = given
    picked = Selection(threshold=threshold, greedy=True).pick(own, scores)
    wanted = by_hand(own, scores.abs().tolist(), None, threshold)
    assert set(picked.nonzero()[:, 0].tolist()) == wanted


@settings(deadline=None, max_examples=60)
@given(scored(), st.integers(1, 12))
def test_top_and_threshold_are_those_sorted(given: tuple[Network, Tensor], top: int) -> None:
    own, scores = given
    sizes = scores.abs().tolist()
    ranked = sorted(range(len(own)), key=lambda edge: (-sizes[edge], edge))
    picked = Selection(top=top).pick(own, scores)
    assert set(picked.nonzero()[:, 0].tolist()) == set(ranked[:top])
    picked = Selection(threshold=top / 4).pick(own, scores)
    assert picked.tolist() == [size >= top / 4 for size in sizes]


def test_greedy_leaves_out_what_leads_nowhere() -> None:
    own = network(2, 2, mlps=False)
    scores = torch.zeros(len(own), dtype=torch.float64)
    scores[own.find("embed->L0H0<q>")] = 9
    scores[own.find(["embed->L1H1<v>", "L1H1->logits"])] = torch.tensor([3.0, -1.0]).double()
    plain = Selection(top=2).pick(own, scores)
    greedy = Selection(top=2, greedy=True).pick(own, scores)
    assert set(plain.nonzero()[:, 0].tolist()) == set(
        own.find(["embed->L0H0<q>", "embed->L1H1<v>"]).tolist()
    )
    assert set(greedy.nonzero()[:, 0].tolist()) == set(
        own.find(["embed->L1H1<v>", "L1H1->logits"]).tolist()
    )


def test_a_shared_key_opens_for_each_head_that_reads_by_it() -> None:
    own = network(2, 2, groups=1, mlps=False)
    scores = torch.zeros(len(own), dtype=torch.float64)
    wanted = own.find(["L0H1->L1G0<v>", "L1H0->logits"])
    scores[wanted] = 1
    picked = Selection(top=2, greedy=True).pick(own, scores)
    assert set(picked.nonzero()[:, 0].tolist()) == set(wanted.tolist())


def test_the_known_circuit_by_each_rule() -> None:
    own, truth = naming()
    number = own.numbers(truth)
    scores = torch.zeros(len(own), dtype=torch.float64)
    scores[number] = -torch.arange(1.0, 26, dtype=torch.float64)
    for rule in (
        Selection(top=25),
        Selection(threshold=1.0),
        Selection(top=25, greedy=True),
        Selection(threshold=1.0, greedy=True),
    ):
        assert torch.equal(own.mask(rule.pick(own, scores).nonzero()[:, 0]), truth)
    assert Selection(top=500).pick(own, scores).all()


def test_rules_by_name() -> None:
    assert str(Selection(top=5)) == "top 5"
    assert str(Selection(threshold=0.02)) == "at least 0.02"
    assert str(Selection(top=5, greedy=True)) == "top 5, greedily from the logits"


@pytest.mark.parametrize(
    ("top", "threshold", "said"),
    [
        (None, None, "Say how many edges"),
        (3, 0.1, "Say how many edges"),
        (0, None, "top=0"),
        (None, -0.1, "threshold=-0.1"),
        (None, float("nan"), "threshold=nan"),
    ],
)
def test_refusals(top: int | None, threshold: float | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Selection(top, threshold)
