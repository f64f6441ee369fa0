"""Faithfulness against the share of edges kept, and the areas under it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

import attnlens as al
from attnlens.analyses.circuit_curve import (
    FRACTIONS,
    FaithfulnessCurve,
    _areas,
    area,
    faithfulness_curve,
)
from attnlens.analyses.circuit_evaluation import Faithfulness
from attnlens.analyses.edge_runs import EdgeRuns
from attnlens.errors import InputError
from tests.analyses.known import (
    EDGES,
    induction_lens,
    induction_task,
    name_lens,
    name_scores,
    name_task,
)

SHARES = (0.02, 25 / 353, 0.1, 1.0)


@cache
def curve() -> FaithfulnessCurve:
    return faithfulness_curve(
        name_lens(), name_task(), name_scores("exact"), SHARES, draws=2, resamples=200
    )


def test_area_is_by_trapezoids() -> None:
    """(0 + .5)/2 * .1 + (.5 + 1)/2 * .4 + (1 + .8)/2 * .5 = .025 + .3 + .45."""
    f = torch.tensor([[0.0, 0.5, 1.0, 0.8], [1.0, 1.0, 1.0, 1.0]]).double()
    assert area(f, (0.0, 0.1, 0.5, 1.0)).tolist() == pytest.approx([0.775, 1.0])
    assert area(f[:, :1], (0.3,)).tolist() == [0, 0]


def by_hand(values: list[float], fractions: tuple[float, ...]) -> float:
    pairs = zip(values, values[1:], fractions, fractions[1:], strict=False)
    return sum((b - a) * (one + two) / 2 for one, two, a, b in pairs)


def test_areas_of_the_curve() -> None:
    found = curve()
    f = found.faithfulness.mean.tolist()
    assert float(found.cpr.mean) == pytest.approx(by_hand(f, SHARES))
    assert float(found.cmd.mean) == pytest.approx(by_hand([abs(1 - x) for x in f], SHARES))
    for row, cpr, cmd in zip(
        found.random.tolist(), found.random_cpr, found.random_cmd, strict=True
    ):
        assert float(cpr) == pytest.approx(by_hand(row, SHARES))
        assert float(cmd) == pytest.approx(by_hand([abs(1 - x) for x in row], SHARES))
    for bounds in (found.cpr, found.cmd):
        assert bounds.low <= bounds.mean <= bounds.high
    # Chance has less of the task, and is farther from it.
    assert (found.random_cpr < found.cpr.mean).all()
    assert (found.random_cmd > found.cmd.mean).all()


def test_more_than_the_model_does_is_as_far_off_as_less() -> None:
    """f of 1.5 and .5 is .5 off each, and the trapezoid between them .5: not 0."""
    full, empty = torch.ones(2).double(), torch.zeros(2).double()
    share = Faithfulness(full, empty, seed=0, resamples=9, confidence=0.9)
    values = torch.tensor([[1.5, 1.5], [0.5, 0.5]]).double()
    cpr, cmd = _areas(share, values, (0.2, 0.8))
    assert [float(bound) for bound in cpr] == pytest.approx([0.6] * 3)
    assert [float(bound) for bound in cmd] == pytest.approx([0.3] * 3)


def test_the_known_edges_and_any_more_do_all() -> None:
    found = curve()
    assert found.edges == (7, 25, 35, 353)
    assert found.faithfulness.mean[1:].tolist() == pytest.approx([1, 1, 1], abs=1e-9)
    assert float(found.faithfulness.mean[0]) < 0.9
    assert found.random[:, -1].tolist() == pytest.approx([1, 1])


def test_each_point_is_the_circuit_of_so_many_edges() -> None:
    scores = name_scores("exact")
    runs = EdgeRuns(name_lens(), name_task())
    for number, count in enumerate(curve().edges[:3]):
        kept = scores.circuit(top=count, resamples=1).kept
        full, empty, inside = runs.run([runs.network.exists, torch.zeros_like(kept), kept]).mean(1)
        f = float((inside - empty) / (full - empty))
        assert float(curve().faithfulness.mean[number]) == pytest.approx(f, abs=1e-9)


def test_greedy_reaches_the_logits_with_few_edges() -> None:
    """Of the 7 largest edges some lead nowhere; chosen from the logits down all do lead there."""
    found = faithfulness_curve(
        name_lens(), name_task(), name_scores("exact"), SHARES[:2], greedy=True, draws=0
    )
    kept = name_scores("exact").circuit(top=7, greedy=True, resamples=1)
    inside = kept.evaluate(name_lens(), name_task(), draws=0).faithfulness.mean
    assert float(found.faithfulness.mean[0]) == pytest.approx(float(inside), abs=1e-9)
    assert float(found.faithfulness.mean[1]) == pytest.approx(1)
    assert found.random.shape == (0, 2)
    assert found.to_frame()["random"].isna().all()


def test_the_smallest_share_keeps_an_edge() -> None:
    found = faithfulness_curve(
        name_lens(), name_task(), name_scores("eap"), (1e-6, 1.0), draws=0, resamples=2
    )
    assert found.edges == (1, 353)
    assert found.method == "eap"


def test_eap_and_eap_ig_under_a_saturated_softmax() -> None:
    """The four edges of induction: EAP-IG has them by then, EAP not the key."""
    own = induction_lens().wiring.network
    share = (4 / len(own), 1.0)
    found = {
        method: faithfulness_curve(
            induction_lens(),
            induction_task(),
            al.edges(induction_lens(), induction_task(), method, resamples=1),
            share,
            draws=0,
            resamples=2,
        ).faithfulness.mean[0]
        for method in ("exact", "eap", "eap-ig")
    }
    assert float(found["exact"]) > 0.99
    assert float(found["eap-ig"]) > 0.99
    assert float(found["eap"]) < 0.5


def test_frame_and_record() -> None:
    found = curve()
    frame = found.to_frame()
    assert frame["fraction"].tolist() == list(SHARES)
    assert frame["random"].tolist() == pytest.approx(found.random.mean(0).tolist())
    record = found.to_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["cpr"]["mean"] == pytest.approx(float(found.cpr.mean))
    assert len(record["curve"]) == 4
    assert len(record["random cmd"]) == 2
    assert (record["task"], record["method"]) == ("other_name", "exact")


def test_one_prompt_has_no_bounds() -> None:
    found = faithfulness_curve(
        name_lens(), name_task().subset([0]), name_scores("exact"), (0.1, 1.0), draws=0
    )
    assert found.cpr.low.isnan()
    assert found.cmd.high.isnan()
    assert found.faithfulness.low.isnan().all()
    assert float(found.cpr.mean) == pytest.approx(0.9)
    assert found.notes == ("One prompt gives no interval over prompts; give several.",)
    record = found.to_record()
    json.dumps(record, allow_nan=False)
    assert set(record["cpr"]) == {"mean"}


def test_progress_counts_all_circuits() -> None:
    seen: list[tuple[int, int]] = []
    faithfulness_curve(
        name_lens(),
        name_task(),
        name_scores("exact"),
        (0.1, 1.0),
        draws=1,
        progress=lambda *at: seen.append(at),
    )
    assert seen[-1] == (6, 6)


def test_draws_are_by_the_seed() -> None:
    def random(seed: int) -> torch.Tensor:
        return faithfulness_curve(
            name_lens(), name_task(), name_scores("exact"), (0.5, 0.8), draws=1, seed=seed
        ).random

    assert torch.equal(random(1), random(1))
    assert not torch.equal(random(1), random(2))


@pytest.mark.parametrize(
    "fractions",
    [(), (0.0, 0.5), (-0.1, 1.0), (0.5, 0.2), (0.5, 0.5), (0.5, 1.1), (float("nan"), 1.0)],
)
def test_fractions_that_are_none(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="shares of edges over 0, up to 1, rising"):
        faithfulness_curve(name_lens(), name_task(), name_scores("exact"), fractions)


def test_scores_of_another_model_or_nothing_to_explain() -> None:
    with pytest.raises(InputError, match="of another model"):
        faithfulness_curve(induction_lens(), induction_task(), name_scores("exact"))
    task = name_task()
    same = replace(task, corrupt=task.clean)
    with pytest.raises(InputError, match="nothing that a circuit could explain"):
        faithfulness_curve(name_lens(), same, name_scores("exact"))


def test_default_fractions_are_those_of_the_benchmark() -> None:
    assert FRACTIONS[0] == 0.001
    assert FRACTIONS[-1] == 1
    assert len(EDGES) / 353 < FRACTIONS[6]
