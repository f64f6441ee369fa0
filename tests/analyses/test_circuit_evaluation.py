"""What a circuit does by itself, taken out, without a node, and beside chance."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import attnlens as al
from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_evaluation import (
    CircuitEvaluation,
    Faithfulness,
    inner_nodes,
    random_circuits,
)
from attnlens.errors import InputError
from tests.analyses.known import (
    EDGES,
    HEADS,
    induction_lens,
    induction_task,
    name_lens,
    name_task,
)
from tests.networks import network


def known() -> Circuit:
    return Circuit.of(name_lens().wiring.network, sorted(EDGES))


@cache
def evaluated() -> CircuitEvaluation:
    return known().evaluate(name_lens(), name_task(), draws=6)


def whole(lens: al.Lens) -> Circuit:
    own = lens.wiring.network
    return Circuit.of(own, own.edge_names)


def test_the_known_circuit_does_all_and_leaves_nothing() -> None:
    found = evaluated()
    assert (found.edges, found.of) == (25, 353)
    for bound in found.faithfulness:
        assert float(bound) == pytest.approx(1, abs=1e-9)
    for bound in found.completeness:
        assert float(bound) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(found.inside, found.full, atol=1e-9, rtol=0)
    assert torch.allclose(found.outside, found.empty, atol=1e-9, rtol=0)
    task = name_task()
    clean, corrupt = (
        task.score(name_lens().logits(inputs, task.reads))
        for inputs in (task.clean_inputs(), task.corrupt_inputs())
    )
    assert torch.allclose(found.full, clean, atol=1e-9, rtol=0)
    assert torch.allclose(found.empty, corrupt, atol=1e-9, rtol=0)


def test_each_of_its_heads_is_needed() -> None:
    found = evaluated()
    assert found.nodes == HEADS
    assert (found.minimality.mean > 0.3).all()
    assert (found.minimality.low > 0.3).all()
    # Either mover brings half of the answer's logit, whatever the prompt.
    movers = dict(zip(found.nodes, found.minimality.mean.tolist(), strict=True))
    assert movers["L3H0"] == pytest.approx(0.5, abs=1e-6)
    assert movers["L3H2"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("head", ["L0H1", "L3H2"])
def test_minimality_is_what_the_circuit_without_the_node_loses(head: str) -> None:
    found = evaluated()
    less = known().without(head).evaluate(name_lens(), name_task(), draws=0)
    lost = found.faithfulness.mean - less.faithfulness.mean
    assert float(found.minimality.mean[HEADS.index(head)]) == pytest.approx(float(lost))


def test_a_head_that_is_not_needed_has_no_minimality() -> None:
    own = name_lens().wiring.network
    more = Circuit.of(own, [*sorted(EDGES), "embed->L3H3<v>", "L3H3->logits"])
    found = more.evaluate(name_lens(), name_task(), draws=0)
    assert found.nodes[-1] == "L3H3"
    assert float(found.minimality.mean[-1]) == pytest.approx(0, abs=1e-9)


def test_full_and_empty() -> None:
    full = whole(name_lens())
    found = full.evaluate(name_lens(), name_task(), draws=1)
    assert float(found.faithfulness.mean) == pytest.approx(1, abs=1e-12)
    assert float(found.completeness.mean) == pytest.approx(0, abs=1e-12)
    assert float(found.random[0]) == pytest.approx(1, abs=1e-12)
    assert float(found.random_outside[0]) == pytest.approx(0, abs=1e-12)
    empty = full.without("logits").evaluate(name_lens(), name_task(), draws=1)
    assert empty.edges == 0
    assert float(empty.faithfulness.mean) == pytest.approx(0, abs=1e-12)
    assert float(empty.completeness.mean) == pytest.approx(1, abs=1e-12)
    assert empty.nodes == ()


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations(ablation: str) -> None:
    """The whole model is itself whatever stands in for edges, of which there are none then."""
    found = whole(induction_lens()).evaluate(
        induction_lens(), induction_task(), ablation=ablation, draws=0
    )
    assert found.ablation == ablation
    assert float(found.faithfulness.mean) == pytest.approx(1, abs=1e-9)
    assert float(found.completeness.mean) == pytest.approx(0, abs=1e-9)


def test_two_heads_of_induction_do_all() -> None:
    own = induction_lens().wiring.network
    kept = own.between(["embed", "L0H1", "L1H2", "logits"])
    circuit = Circuit.of(own, [own.edge_names[n] for n in own.numbers(kept)])
    found = circuit.evaluate(induction_lens(), induction_task(), draws=4)
    assert found.metric == "loss"
    assert float(found.faithfulness.mean) > 0.99
    assert abs(float(found.completeness.mean)) < 0.01
    assert found.nodes == ("L0H1", "L1H2")
    assert (found.minimality.mean > 0.5).all()
    few = Circuit.of(own, ["embed->L0H1<v>", "L0H1->L1H2<k>", "embed->L1H2<v>", "L1H2->logits"])
    assert float(few.evaluate(induction_lens(), induction_task()).faithfulness.mean) > 0.99


def test_random_circuits_have_as_many_edges() -> None:
    own = network(2, 2)
    drawn = random_circuits(own, 9, 300, seed=0)
    assert [int(kept.sum()) for kept in drawn] == [9] * 300
    assert not any((kept & ~own.exists).any() for kept in drawn)
    # Each edge as likely as another: 9 of 26 or so, within five standard errors.
    share = torch.stack(drawn).double().mean(0)[own.exists]
    p = 9 / len(own)
    assert (share - p).abs().max() < 5 * (p * (1 - p) / 300) ** 0.5
    again = random_circuits(own, 9, 300, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert random_circuits(own, 9, 0, seed=0) == []


def test_chance_is_far_below_the_known_circuit() -> None:
    found = evaluated()
    assert found.random.shape == found.random_outside.shape == (6,)
    assert float(found.random.mean()) < 0.3
    kept = random_circuits(name_lens().wiring.network, 25, 6, 0)[0]
    own = name_lens().wiring.network
    alone = Circuit.of(own, [own.edge_names[n] for n in own.numbers(kept)])
    again = alone.evaluate(name_lens(), name_task(), draws=0)
    assert float(again.faithfulness.mean) == pytest.approx(float(found.random[0]), abs=1e-9)
    assert float(again.completeness.mean) == pytest.approx(float(found.random_outside[0]), abs=1e-9)


def test_metric_and_ablation_are_those_it_was_found_by() -> None:
    own = induction_lens().wiring.network
    about = {"task": "repeated_tokens", "metric": "logit_difference", "ablation": "zero"}
    circuit = Circuit.of(own, own.edge_names, about)
    task = induction_task()
    found = circuit.evaluate(induction_lens(), task, draws=0)
    assert (found.metric, found.ablation) == ("logit_difference", "zero")
    told = circuit.evaluate(induction_lens(), task, draws=0, metric="accuracy", ablation="resample")
    assert (told.metric, told.ablation) == ("accuracy", "resample")
    other = Circuit.of(own, own.edge_names, about | {"task": "another"})
    assert other.evaluate(induction_lens(), task, draws=0).metric == "loss"


def test_frame_and_record() -> None:
    found = evaluated()
    frame = found.to_frame()
    assert frame["measure"].tolist()[:9] == ["faithfulness", "completeness"] + ["minimality"] * 7
    assert frame["node"].tolist()[2:9] == list(HEADS)
    row = frame.iloc[4]
    assert (row["value"], row["low"], row["high"]) == tuple(
        float(bound[2]) for bound in found.minimality
    )
    record = found.to_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["task"] == "other_name"
    assert record["prompts"] == 4
    assert record["random draws"] == 6
    assert record["means"]["full"] == pytest.approx(float(found.full.mean()))
    assert len(record["measures"]) == len(frame)


def test_one_prompt_has_no_bounds() -> None:
    found = known().evaluate(name_lens(), name_task().subset([0]), draws=0)
    assert float(found.faithfulness.mean) == pytest.approx(1)
    assert found.faithfulness.low.isnan()
    assert found.minimality.high.isnan().all()
    assert found.notes == ("One prompt gives no interval over prompts; give several.",)
    record = found.to_record()
    json.dumps(record, allow_nan=False)
    assert "low" not in record["measures"][0]


def test_faithfulness_by_hand() -> None:
    """f is a ratio of means, not a mean of ratios: (3 + 1) / (8 + 2), not (3/8 + 1/2) / 2."""
    full, empty = torch.tensor([9.0, 3.0]).double(), torch.tensor([1.0, 1.0]).double()
    share = Faithfulness(full, empty, seed=0, resamples=2000, confidence=0.9)
    values = torch.tensor([4.0, 2.0]).double()
    assert share.gap == 5
    assert float(share.share(values)) == 0.4
    found = share.of(values)
    assert [float(bound) for bound in found] == pytest.approx([0.4, 0.375, 0.5])
    many = share.of(torch.stack([values, full, empty]))
    assert many.mean.tolist() == pytest.approx([0.4, 1, 0])
    assert many.low.tolist() == pytest.approx([0.375, 1, 0])


def test_a_gap_that_may_be_none_is_noted() -> None:
    empty = torch.zeros(4).double()
    unsure = Faithfulness(torch.tensor([5.0, -4.0, 3.0, -3.0]).double(), empty, 0, 9, 0.9)
    assert "twice the standard error" in unsure.notes()[0]
    sure = Faithfulness(torch.tensor([5.0, 4.0, 5.0, 4.0]).double(), empty, 0, 9, 0.9)
    assert sure.notes() == ()


def test_nothing_to_explain_is_refused() -> None:
    task = name_task()
    same = al.tasks.Task.from_prompts(
        "same",
        task.clean.tolist(),
        task.clean.tolist(),
        task.reads.tolist(),
        task.answers.tolist(),
        task.wrong.tolist(),
    )
    with pytest.raises(InputError, match="nothing that a circuit could explain"):
        known().evaluate(name_lens(), same, draws=0)
    with pytest.raises(InputError, match="nothing that a circuit could explain"):
        Faithfulness(torch.tensor([2.0, -2.0]), torch.zeros(2), 0, 9, 0.9)
    with pytest.raises(InputError, match="0 resamples"):
        Faithfulness(torch.ones(2), torch.zeros(2), 0, 0, 0.9)


def test_refusals() -> None:
    with pytest.raises(InputError, match="with 17 nodes and 353 edges"):
        known().evaluate(induction_lens(), induction_task())
    with pytest.raises(InputError, match="draws=-1"):
        known().evaluate(name_lens(), name_task(), draws=-1)
    with pytest.raises(InputError, match="takes no reference"):
        known().evaluate(name_lens(), name_task(), reference=[[5, 6]])
    with pytest.raises(InputError, match="choose resample, mean, zero"):
        known().evaluate(name_lens(), name_task(), ablation="noise")


def test_inner_nodes_are_heads_and_mlps() -> None:
    own = network(1, 2)
    assert inner_nodes(Circuit.of(own, own.edge_names)) == ("L0H0", "L0H1", "L0.mlp")
    assert inner_nodes(Circuit.of(own, ["embed->logits"])) == ()
