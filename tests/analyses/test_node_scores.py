"""Scores of nodes: heads of the known circuit, and circuits of nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnlens as al
from attnlens.analyses.edge_runs import EdgeRuns
from attnlens.analyses.node_scores import NodeScores
from attnlens.analyses.scoring import Method
from attnlens.errors import InputError
from tests.analyses.known import (
    HEADS,
    induction_lens,
    induction_task,
    name_lens,
    name_nodes,
    name_task,
)
from tests.networks import network

METHODS: tuple[Method, ...] = ("exact", "eap", "eap-ig")


@pytest.mark.parametrize("method", METHODS)
def test_the_heads_of_the_circuit_come_first(method: Method) -> None:
    scores = name_nodes(method)
    frame = scores.to_frame()
    assert len(frame) == len(scores.network.senders)
    inner = frame[frame["kind"] == "head"]
    assert set(inner["node"][:7]) == set(HEADS)
    if method == "exact":
        assert inner["score"][7:].abs().max() < 1e-10
        assert (inner["score"][:7] < -0.5).all()
    assert (frame["score"].abs().diff().dropna() <= 0).all()
    assert frame[frame["node"] == "L3H2"]["layer"].item() == 3


def test_exact_is_all_edges_out_of_a_node_cut() -> None:
    task = induction_task().subset([0, 1])
    found = al.nodes(induction_lens(), task, "exact", resamples=1)
    runs = EdgeRuns(induction_lens(), task)
    own = runs.network
    whole = runs.run([own.exists])[0]
    for number, sender in enumerate(own.senders):
        without = own.exists & own.between([n for n in own.nodes if n != sender.name])
        # What a node reads matters no more once nobody hears it.
        value = runs.run([without])[0] - whole
        assert torch.allclose(found.by_prompt[:, number], value, atol=1e-10, rtol=0)


def test_eap_of_a_node_that_only_the_logits_read_is_that_of_its_edge() -> None:
    own = name_lens().wiring.network
    for method in ("eap", "eap-ig"):
        by_node = al.nodes(name_lens(), name_task(), method, resamples=1)
        by_edge = al.edges(name_lens(), name_task(), method, resamples=1)
        for head in ("L3H0", "L3H1", "L3H2", "L3H3"):
            sender = own.nodes.index(head)
            edge = int(own.find(f"{head}->logits"))
            assert torch.allclose(
                by_node.by_prompt[:, sender], by_edge.by_prompt[:, edge], atol=1e-12, rtol=0
            )


def test_eap_of_a_node_is_the_sum_of_its_edges() -> None:
    """To first order: the gradient of what a node wrote is the sum of those of its readers."""
    by_node, by_edge = name_nodes("eap"), al.edges(name_lens(), name_task(), "eap", resamples=1)
    sums = by_edge.matrix.sum(1)
    assert torch.allclose(by_node.score, sums, atol=1e-10, rtol=0)


def test_the_circuit_of_seven_heads_does_all() -> None:
    scores = name_nodes("exact")
    circuit = scores.circuit(7)
    assert set(circuit.nodes) == {"embed", *HEADS, "logits"}
    own = scores.network
    assert torch.equal(circuit.kept, own.alive(own.between(["embed", *HEADS, "logits"])))
    assert circuit.about["granularity"] == "nodes"
    assert circuit.about["selection"] == "top 7"
    assert (circuit.chosen[own.numbers(circuit.kept)] == 1).all()
    senders = own.edges[:, 0]
    assert torch.equal(circuit.score, scores.score[senders])
    found = circuit.evaluate(name_lens(), name_task(), draws=0)
    assert float(found.faithfulness.mean) == pytest.approx(1, abs=1e-9)
    assert float(found.completeness.mean) == pytest.approx(0, abs=1e-9)


def test_two_heads_of_induction() -> None:
    scores = al.nodes(induction_lens(), induction_task(), "exact")
    circuit = scores.circuit(2)
    assert circuit.nodes == ("embed", "L0H1", "L1H2", "logits")
    found = circuit.evaluate(induction_lens(), induction_task(), draws=0)
    assert float(found.faithfulness.mean) > 0.99


def hand_made(by_prompt: list[list[float]]) -> NodeScores:
    """Scores of embed and three heads, of two layers of one and two, per prompt."""
    values = torch.tensor(by_prompt, dtype=torch.float64)
    base = name_nodes("exact")
    own = network(1, 3, mlps=False)
    mean = values.mean(0)
    return replace(base, network=own, score=mean, low=mean, high=mean, by_prompt=values)


def test_chosen_is_how_often_both_ends_are_among_the_first() -> None:
    """Of two prompts drawn twice both draws are the first in 1 of 4, and only then L0H0 leads.

    Embeddings are in every circuit whatever they score.
    """
    scores = hand_made([[9.0, 1.0, 0.0, 0.0], [9.0, 0.0, 3.0, 0.0]])
    circuit = scores.circuit(1, resamples=4000)
    assert circuit.nodes == ("embed", "L0H1", "logits")
    chosen = dict(zip(scores.network.edge_names, circuit.chosen.tolist(), strict=True))
    assert chosen["L0H1->logits"] == pytest.approx(0.75, abs=0.03)
    assert chosen["L0H0->logits"] == pytest.approx(0.25, abs=0.03)
    assert chosen["embed->L0H1<q>"] == chosen["L0H1->logits"]
    assert chosen["embed->L0H2<v>"] == 0
    assert chosen["embed->logits"] == 1


def test_more_nodes_than_there_are_keep_all() -> None:
    scores = hand_made([[9.0, 1.0, 0.0, 0.0], [9.0, 0.0, 3.0, 0.0]])
    assert torch.equal(scores.circuit(99, resamples=2).kept, scores.network.exists)
    with pytest.raises(InputError, match="top=0"):
        scores.circuit(0)


@pytest.mark.parametrize("method", METHODS)
def test_denoising_is_noising_the_other_way_round(method: Method) -> None:
    task = name_task().subset([0, 1])
    swapped = replace(task, clean=task.corrupt, corrupt=task.clean)
    found = al.nodes(name_lens(), task, method, direction="denoise", resamples=1)
    wanted = al.nodes(name_lens(), swapped, method, resamples=1)
    assert torch.equal(found.by_prompt, wanted.by_prompt)


def test_progress_and_notes() -> None:
    seen: list[tuple[int, int]] = []
    found = al.nodes(
        induction_lens(),
        induction_task().subset([0]),
        "eap",
        metric="accuracy",
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(1, 1)]
    assert found.notes == (
        "Accuracy has no gradient; that of the loss is taken.",
        "One prompt gives no interval over prompts; give several.",
    )
    assert found.low.isnan().all()
    assert found.scoring.metric == "loss"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "patching"}, "There is no method 'patching'"),
        ({"steps": 0}, "steps=0"),
        ({"ablation": "noise"}, "choose resample, mean, zero"),
        ({"direction": "denoise", "ablation": "zero"}, "none to put"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refusals(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        al.nodes(name_lens(), name_task(), **settings)
