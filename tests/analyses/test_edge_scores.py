"""Scores of edges: known circuits, and those of every edge cut by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.edge_scores import EdgeScores, stability
from attnlens.analyses.scoring import Method
from attnlens.analyses.selection import Selection
from attnlens.errors import InputError, TaskError
from tests.analyses.known import (
    EDGES,
    in_circuit,
    induction_lens,
    induction_task,
    name_lens,
    name_scores,
    name_task,
)
from tests.networks import network
from tests.oracles import paths

METHODS: tuple[Method, ...] = ("exact", "eap", "eap-ig")


def roc_area(values: Tensor, positive: Tensor) -> float:
    """How often a positive outranks a negative, ties half: `(R - n(n + 1)/2) / (n m)`."""
    less = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    rank = less + (equal + 1) / 2
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * m))


def test_roc_area_of_known_ranks() -> None:
    positive = torch.tensor([True, True, False, False])
    assert roc_area(torch.tensor([3.0, 4.0, 1.0, 2.0]), positive) == 1
    assert roc_area(torch.tensor([1.0, 4.0, 2.0, 3.0]), positive) == 0.5
    assert roc_area(torch.ones(4), positive) == 0.5


def named(edge: paths.Edge) -> str:
    sender, receiver, kind = edge
    return f"{sender}->{receiver}<{kind}>" if kind else f"{sender}->{receiver}"


@pytest.mark.parametrize("method", METHODS)
def test_the_known_edges_come_first(method: Method) -> None:
    scores = name_scores(method)
    assert len(scores.network) == 353
    assert int(in_circuit().sum()) == len(EDGES) == 25
    assert roc_area(scores.score.abs(), in_circuit()) == 1
    assert set(scores.circuit(top=25, resamples=1).edges) == EDGES
    frame = scores.to_frame()
    assert len(frame) == 353
    assert set(frame["edge"][:25]) == EDGES
    assert (frame["score"].abs().diff().dropna() <= 0).all()
    first = frame.iloc[0]
    assert first["edge"] == f"{first['sender']}->{first['receiver']}"
    if method == "exact":  # each helps: cutting it costs logit difference
        assert (scores.score[in_circuit()] < 0).all()


def test_exact_is_a_run_a_cut_edge() -> None:
    """The tests' own forward of the model, edge by edge; edges without effect are exactly 0."""
    task, scores = name_task(), name_scores("exact")
    model = name_lens().model
    with torch.no_grad():
        _, other = paths.run(model, task.corrupt)
        whole = task.score(task.at_reads(paths.run(model, task.clean)[0]))
        for edge in paths.edges_of(model):
            if (found := named(edge)) not in EDGES:
                continue
            logits, _ = paths.run(model, task.clean, edge, other)
            number = int(scores.network.find(found))
            own = task.score(task.at_reads(logits)) - whole
            assert torch.allclose(scores.by_prompt[:, number], own, atol=1e-10, rtol=0)
    assert float(scores.score[~in_circuit()].abs().max()) < 1e-10


def test_eap_is_change_by_gradient() -> None:
    task, scores = name_task(), name_scores("eap")
    estimates = paths.gradient_estimates(
        name_lens().model,
        task.clean,
        task.corrupt,
        lambda logits: task.score(task.at_reads(logits)),
    )
    assert len(estimates) == 353
    for edge, wanted in estimates.items():
        found = scores.by_prompt[:, int(scores.network.find(named(edge)))]
        assert torch.allclose(found, wanted, atol=1e-10, rtol=0)


def test_many_steps_of_eap_ig_are_its_integral() -> None:
    """More steps come nearer to the limit, and twice as many midpoints four times as near."""
    few, middle, many = (
        al.edges(name_lens(), name_task().subset([0]), steps=steps, resamples=1).score
        for steps in (5, 10, 40)
    )
    assert torch.allclose(middle, name_scores("eap-ig").by_prompt[0])
    far, near = ((own - many).abs().max() for own in (few, middle))
    assert near < 0.5 * far
    assert near < 0.02 * many.abs().max()


def test_matrix_and_bounds() -> None:
    scores = name_scores("exact")
    own = scores.network
    for number in (0, 100, 352):
        a, b = own.edges[number].tolist()
        assert scores.matrix[a, b] == scores.score[number]
    assert not scores.matrix[~own.exists].any()
    assert torch.allclose(scores.by_prompt.mean(0), scores.score)
    assert (scores.low <= scores.score).all()
    assert (scores.score <= scores.high).all()
    assert (scores.low < scores.high)[in_circuit()].all()


def moved() -> Tensor:
    """At which reads of the induction task the token stands elsewhere in the corrupt first copy."""
    task = induction_task()
    period = task.reads.shape[1] + 1
    return (task.clean[:, 1 : period + 1] != task.corrupt[:, 1 : period + 1])[:, :-1]


def test_exact_finds_the_induction_edge() -> None:
    """With key and previous token of the other prompt the head copies what follows there.

    A wrong token's logit of 16 makes the loss 16 nats, wherever the token has moved; elsewhere
    the head looks where it did.
    """
    scores = al.edges(induction_lens(), induction_task(), "exact")
    own = scores.network
    key = int(own.find("L0H1->L1H2<k>"))
    wanted = 16 * moved().double().mean(1)
    assert torch.allclose(scores.by_prompt[:, key], wanted, atol=2e-4, rtol=0)
    assert float(scores.score[key]) == pytest.approx(13.4544, abs=1e-3)
    others = [
        number
        for number, name in enumerate(own.edge_names)
        if name.startswith("L0H") and "->L1H2<" in name and number != key
    ]
    assert len(others) == 11
    assert float(scores.score[others].abs().max()) < 1e-9


def test_what_gradients_see_of_the_induction_edge() -> None:
    """A limit: the head's softmax is saturated, and its gradient on the prompt itself is none.

    EAP gives the edge nothing. Averaged over ten inputs between the prompts EAP-IG gives it a good
    part of what cutting it does, 13.45 nats, and puts it among the first.
    """
    key = int(induction_lens().wiring.network.find("L0H1->L1H2<k>"))
    flat = al.edges(induction_lens(), induction_task(), "eap")
    assert abs(float(flat.score[key])) < 1e-6
    averaged = al.edges(induction_lens(), induction_task(), "eap-ig", steps=10)
    assert float(averaged.score[key]) == pytest.approx(5.2714, abs=1e-3)
    assert "L0H1->L1H2<k>" in averaged.to_frame()["edge"][:4].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_denoising_is_noising_the_other_way_round(method: Method) -> None:
    task = name_task().subset([0, 1])
    swapped = replace(task, clean=task.corrupt, corrupt=task.clean)
    if method == "exact":
        # A small model is enough: all edges twice.
        lens, task = induction_lens(), induction_task().subset([0, 1])
        swapped = replace(task, clean=task.corrupt, corrupt=task.clean)
    else:
        lens = name_lens()
    found = al.edges(lens, task, method, direction="denoise", resamples=1)
    wanted = al.edges(lens, swapped, method, resamples=1)
    assert torch.equal(found.by_prompt, wanted.by_prompt)
    assert found.scoring.direction == "denoise"
    plain = al.edges(lens, task, method, resamples=1)
    assert not torch.allclose(found.score, plain.score)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations_by_gradients(ablation: str) -> None:
    """Into the logits an edge is linear, up to the norm: zero takes off just what was written."""
    scores = al.edges(name_lens(), name_task(), "eap", ablation=ablation, resamples=1)
    exact = al.edges(induction_lens(), induction_task(), "exact", ablation=ablation, resamples=1)
    assert scores.scoring.ablation == ablation
    assert float(scores.score[scores.network.find("L3H0->logits")]) < -0.1
    assert float(exact.score[exact.network.find("L0H1->L1H2<k>")]) > 1


def test_the_mean_is_of_the_prompts_given() -> None:
    task = name_task()
    own = al.edges(name_lens(), task, "eap", ablation="mean", resamples=1)
    same = al.edges(
        name_lens(), task, "eap", ablation="mean", reference=task.corrupt_inputs(), resamples=1
    )
    other = al.edges(
        name_lens(), task, "eap", ablation="mean", reference=[[0, 5, 1, 9, 20]], resamples=1
    )
    assert torch.equal(own.score, same.score)
    assert not torch.allclose(own.score, other.score)


def test_batches_change_nothing() -> None:
    found = al.edges(name_lens(), name_task(), "eap", batch_size=3)
    assert torch.allclose(found.by_prompt, name_scores("eap").by_prompt, atol=1e-12, rtol=0)


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    al.edges(name_lens(), name_task(), "eap", batch_size=3, progress=lambda *at: seen.append(at))
    assert seen == [(3, 4), (4, 4)]
    seen.clear()
    al.edges(induction_lens(), induction_task(), "exact", progress=lambda *at: seen.append(at))
    edges = len(induction_lens().wiring.network)
    assert seen[-1] == (edges, edges)
    assert seen == sorted(seen)


def test_accuracy_has_no_gradient() -> None:
    task = induction_task().subset([0, 1])
    found = al.edges(induction_lens(), task, "eap", metric="accuracy", resamples=1)
    wanted = al.edges(induction_lens(), task, "eap", metric="loss", resamples=1)
    assert found.scoring.metric == "loss"
    assert found.notes == ("Accuracy has no gradient; that of the loss is taken.",)
    assert torch.equal(found.score, wanted.score)
    assert wanted.notes == ()
    exact = al.edges(induction_lens(), task, "exact", metric="accuracy", resamples=1)
    assert exact.scoring.metric == "accuracy"
    key = int(exact.network.find("L0H1->L1H2<k>"))
    assert float(exact.score[key]) == pytest.approx(-float(moved()[:2].double().mean()))


def test_one_prompt_has_no_bounds() -> None:
    found = al.edges(name_lens(), name_task().subset([0]), "eap")
    assert found.low.isnan().all()
    assert found.high.isnan().all()
    assert found.score.isfinite().all()
    assert found.notes == ("One prompt gives no interval over prompts; give several.",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "eapig"}, "There is no method 'eapig'; choose eap-ig, eap, exact"),
        ({"steps": 0}, "steps=0"),
        ({"ablation": "noise"}, "choose resample, mean, zero"),
        ({"direction": "both"}, "noise or denoise"),
        ({"direction": "denoise", "ablation": "mean"}, "none to put"),
        ({"reference": [[5, 6]]}, "takes no reference"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 0, "method": "exact"}, "batch_size=0"),
        ({"resamples": 0}, "0 resamples"),
        ({"confidence": 1.0}, "confidence 1.0"),
    ],
)
def test_refusals(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        al.edges(name_lens(), name_task(), **settings)


def test_edits_and_unknown_metrics_are_refused() -> None:
    with pytest.raises(TaskError, match="unknown metric"):
        al.edges(name_lens(), name_task(), metric="margin")
    with pytest.raises(InputError, match="leave the block"), name_lens().edit(al.Zero("L0H0")):
        al.edges(name_lens(), name_task(), "eap")


@pytest.mark.parametrize("method", METHODS)
def test_known_edges_are_always_chosen(method: Method) -> None:
    scores = name_scores(method)
    circuit = scores.circuit(top=25)
    assert (circuit.chosen[in_circuit()] == 1).all()
    assert not circuit.chosen[~in_circuit()].any()
    assert circuit.about["method"] == method
    assert circuit.about["selection"] == "top 25"
    assert circuit.about["granularity"] == "edges"
    assert circuit.about["steps"] == {"exact": 0, "eap": 1, "eap-ig": 10}[method]


def test_stability_by_hand() -> None:
    """Of two prompts drawn twice the second is drawn at all in three of four cases.

    Edge 0 is the largest of the first prompt, edge 1 of the second, and both together: edge 1.
    """
    own = network(1, 1)
    by_prompt = torch.zeros(2, len(own), dtype=torch.float64)
    by_prompt[0, 0], by_prompt[1, 1] = 1, -3
    found = stability(own, by_prompt, Selection(top=1), 4000, seed=0)
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[1]) == pytest.approx(0.75, abs=0.03)
    assert float(found[0]) == pytest.approx(0.25, abs=0.03)
    over = stability(own, by_prompt, Selection(threshold=2.0), 4000, seed=0)
    assert float(over[1]) == pytest.approx(0.25, abs=0.03)
    assert float(over[0]) == 0


def test_stability_repeats_the_draws() -> None:
    """The same resamples, counted here one by one."""
    own = network(2, 2)
    draw = torch.Generator().manual_seed(5)
    by_prompt = torch.randn(5, len(own), generator=draw, dtype=torch.float64)
    rule = Selection(top=7, greedy=True)
    again = torch.Generator().manual_seed(9)
    wanted = torch.zeros(len(own), dtype=torch.float64)
    for _ in range(20):
        rows = torch.randint(5, (5,), generator=again)
        wanted += rule.pick(own, by_prompt[rows].mean(0)).double()
    assert torch.allclose(stability(own, by_prompt, rule, 20, seed=9), wanted / 20)


def test_edges_that_lead_nowhere_are_dropped() -> None:
    scores = name_scores("exact")
    own = scores.network
    score = torch.zeros_like(scores.score)
    score[own.find(["embed->L3H0<v>", "L3H0->logits", "embed->L0H0<q>"])] = torch.tensor(
        [3.0, 2.0, 5.0], dtype=score.dtype
    )
    made: EdgeScores = replace(scores, score=score, by_prompt=score.expand(4, -1))
    circuit = made.circuit(top=3, resamples=2)
    assert set(circuit.edges) == {"embed->L3H0<v>", "L3H0->logits"}
    assert float(circuit.chosen[own.find("embed->L0H0<q>")]) == 1
