"""Removal of edges one after another: the known circuit, side by side, and from a state file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import attnlens as al
from attnlens.analyses.circuit import Circuit
from attnlens.analyses.edge_runs import EdgeRuns
from attnlens.analyses.greedy_edges import Order, remove_edges
from attnlens.errors import FileError, InputError
from tests.analyses.known import (
    EDGES,
    in_circuit,
    induction_lens,
    induction_task,
    name_lens,
    name_scores,
    name_task,
)

ORDERS: tuple[Order, ...] = ("from logits", "from embeddings", "random", "scores")


@cache
def removed() -> Circuit:
    return remove_edges(name_lens(), name_task().subset([0, 1]), 0.02)


@cache
def some() -> Circuit:
    """The known edges with some more, that removal may begin with: fewer to try."""
    own = name_lens().wiring.network
    others = (~in_circuit()).nonzero()[:, 0][::30]
    return Circuit.of(own, [*sorted(EDGES), *(own.edge_names[n] for n in others)])


def remove(order: Order = "from logits", **settings: Any) -> Circuit:
    scores = name_scores("eap-ig").score if order == "scores" else None
    two = name_task().subset([0, 1])
    return remove_edges(name_lens(), two, 0.02, order, scores, **{"start": some()} | settings)


def test_removal_finds_the_known_edges() -> None:
    circuit = removed()
    assert set(circuit.edges) == EDGES
    assert circuit.about["began with"] == 353
    assert circuit.about["forward passes"] < 353
    assert circuit.about["method"] == "removal"
    assert circuit.chosen.isnan().all()
    found = circuit.evaluate(name_lens(), name_task(), draws=0)
    assert float(found.faithfulness.mean) == pytest.approx(1, abs=1e-9)


def test_scores_are_what_edges_cost_when_they_were_tried() -> None:
    """In this model nothing else was there to lose: as if each alone were cut."""
    found, exact = removed(), name_scores("exact")
    assert torch.allclose(found.score[~in_circuit()], torch.zeros(328).double(), atol=1e-9)
    assert torch.allclose(found.score, exact.by_prompt[:2].mean(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_each_order_finds_them_from_some_edges(order: Order) -> None:
    circuit = remove(order)
    assert set(circuit.edges) == EDGES
    assert circuit.about["order"] == order
    assert circuit.about["began with"] == len(some())


def visits(order: Order, circuit: Circuit, scores: torch.Tensor) -> list[int]:
    """The order as its words say."""
    own = circuit.network
    numbers = own.numbers(circuit.kept).tolist()
    if order == "from logits":
        return sorted(numbers, key=lambda n: (-int(own.edges[n, 1]), -int(own.edges[n, 0])))
    if order == "from embeddings":
        return sorted(numbers, key=lambda n: (int(own.edges[n, 1]), int(own.edges[n, 0])))
    if order == "scores":
        return sorted(numbers, key=lambda n: (abs(float(scores[n])), n))
    drawn = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    return [numbers[n] for n in drawn.tolist()]


def random_task() -> tuple[al.Lens, al.tasks.Task]:
    """A random model, in which every edge does a little and the order matters."""
    from tests.analyses.conftest import tiny_gpt2

    lens = al.load(tiny_gpt2(layers=2, heads=2))
    draw = torch.Generator().manual_seed(4)
    clean, corrupt = torch.randint(1, 40, (2, 2, 7), generator=draw).tolist()
    task = al.tasks.Task.from_prompts("random", clean, corrupt, [[6]] * 2, [[5]] * 2, [[6]] * 2)
    return lens, task


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threshold", [0.03, 0.2])
def test_decisions_are_those_of_trying_one_by_one(
    order: Order, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a loop of a run an edge, written here, and the same code with one choice a run."""
    lens, task = random_task()
    own = lens.wiring.network
    scores = al.edges(lens, task, "eap", resamples=1).score if order == "scores" else None
    found = remove_edges(lens, task, threshold, order, scores)

    runs = EdgeRuns(lens, task)
    full, empty = runs.run([own.exists, torch.zeros_like(own.exists)]).mean(1).tolist()
    kept, value = own.exists.clone(), 1.0
    every = Circuit.of(own, own.edge_names)
    for edge in visits(order, every, torch.zeros(len(own)) if scores is None else scores):
        a, b = own.edges[edge].tolist()
        kept[a, b] = False
        after = (float(runs.run([kept]).mean()) - empty) / (full - empty)
        assert float(found.score[edge]) == pytest.approx((after - value) * (full - empty))
        if value - after >= threshold:
            kept[a, b] = True
        else:
            value = after
    assert torch.equal(found.kept, own.alive(kept))
    assert 0 < int(kept.sum()) < len(own)

    monkeypatch.setattr(EdgeRuns, "side_by_side", lambda self, batch=None: 1)
    slow = remove_edges(lens, task, threshold, order, scores)
    assert torch.equal(slow.kept, found.kept)
    assert torch.allclose(slow.score, found.score, atol=1e-9, rtol=0)
    assert slow.about["forward passes"] == len(own)
    assert found.about["forward passes"] < len(own)


def test_orders_differ_where_edges_do_the_same() -> None:
    lens, task = random_task()
    kept = {order: remove_edges(lens, task, 0.2, order).edges for order in ORDERS[:3]}
    assert len(set(kept.values())) > 1


def test_the_random_order_is_by_the_seed() -> None:
    lens, task = random_task()

    def found(seed: int) -> tuple[str, ...]:
        return remove_edges(lens, task, 0.2, "random", seed=seed).edges

    assert found(3) == found(3)
    assert len({found(seed) for seed in range(4)}) > 1


def test_induction_by_removal() -> None:
    found = remove_edges(induction_lens(), induction_task(), 0.1)
    assert set(found.edges) == {
        "embed->L0H1<v>",
        "L0H1->L1H2<k>",
        "embed->L1H2<v>",
        "L1H2->logits",
    }
    assert found.about["metric"] == "loss"


def stopped(path: Path, at: int) -> Callable[[int, int], None]:
    def progress(done: int, _: int) -> None:
        assert path.exists()
        if done >= at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("order", ["from logits", "scores"])
def test_a_removal_goes_on_where_it_was_stopped(order: Order, tmp_path: Path) -> None:
    whole, path = remove(order), tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        remove(order, state=path, progress=stopped(path, 20))
    decided = len(json.loads(path.read_text())["stays"])
    assert 20 <= decided < len(some())
    seen: list[tuple[int, int]] = []
    again = remove(order, state=path, progress=lambda *at: seen.append(at))
    assert seen[0][0] > decided
    assert seen[-1] == (len(some()), len(some()))
    assert again.edges == whole.edges
    assert torch.allclose(again.score, whole.score, atol=1e-9, rtol=0)
    assert again.about["forward passes"] < whole.about["forward passes"]
    # All decided: nothing is left to run.
    last = remove(order, state=path)
    assert last.edges == whole.edges
    assert last.about["forward passes"] == 0


def test_going_on_reckons_from_the_circuit_as_it_is_by_then(tmp_path: Path) -> None:
    """Where edges that went did a little: f has moved away from 1 when it is stopped."""
    lens, task = random_task()
    path = tmp_path / "state.json"
    whole = remove_edges(lens, task, 0.2)
    with pytest.raises(KeyboardInterrupt):
        remove_edges(lens, task, 0.2, state=path, progress=stopped(path, 15))
    again = remove_edges(lens, task, 0.2, state=path)
    assert again.edges == whole.edges
    assert torch.allclose(again.score, whole.score, atol=1e-9, rtol=0)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    path = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        remove(state=path, progress=stopped(path, 20))
    return path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"order": "from embeddings"}, "order, visited differ"),
        ({"seed": 1}, "seed differ"),
        ({"metric": "loss"}, "task differ"),
        ({"ablation": "zero"}, "ablation differ"),
        ({"start": None}, "visits, visited differ"),
    ],
)
def test_the_state_of_other_settings(half: Path, settings: dict[str, Any], said: str) -> None:
    before = half.read_bytes()
    with pytest.raises(FileError, match=said):
        remove(state=half, **settings)
    assert half.read_bytes() == before


def test_the_state_of_another_threshold_task_or_model(half: Path) -> None:
    lens, task = name_lens(), name_task().subset([0, 1])
    with pytest.raises(FileError, match="threshold differ"):
        remove_edges(lens, task, 0.03, start=some(), state=half)
    with pytest.raises(FileError, match="task differ"):
        remove_edges(lens, task.subset([0]), 0.02, start=some(), state=half)
    with pytest.raises(FileError, match="model, task"):
        remove_edges(induction_lens(), induction_task(), 0.02, state=half)


def test_a_damaged_state(half: Path) -> None:
    good = json.loads(half.read_text())

    def refused(content: str | bytes) -> None:
        half.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(FileError):
            remove(state=half)

    whole = half.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        refused(whole[:length])
    for changed in (
        {},
        [],
        3,
        None,
        good | {"format": "attnlens sweep 1"},
        good | {"stays": good["stays"][:-1]},
        good | {"stays": 5},
        good | {"stays": [*good["stays"], *[False] * 999], "costs": [*good["costs"], *[0] * 999]},
        good | {"costs": ["much"] * len(good["costs"])},
        good | {"costs": None},
        good | {"facts": None},
        good | {"facts": []},
        good | {"facts": {}},
        {name: value for name, value in good.items() if name != "facts"},
    ):
        refused(json.dumps(changed))
    half.write_bytes(whole)
    assert set(remove(state=half).edges) == EDGES


def test_a_state_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="folder does not exist"):
        remove(state=tmp_path / "none" / "state.json")


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_none(threshold: float) -> None:
    with pytest.raises(InputError, match="over 0"):
        remove_edges(name_lens(), name_task(), threshold)


def test_refusals() -> None:
    lens, task = name_lens(), name_task()
    with pytest.raises(InputError, match="no order 'backwards'"):
        remove_edges(lens, task, 0.1, "backwards")  # type: ignore[arg-type]
    with pytest.raises(InputError, match='order="scores"'):
        remove_edges(lens, task, 0.1, "scores")
    with pytest.raises(InputError, match='order="scores"'):
        remove_edges(lens, task, 0.1, scores=name_scores("eap").score)
    same = al.tasks.Task.from_prompts(
        "same",
        task.clean.tolist(),
        task.clean.tolist(),
        task.reads.tolist(),
        task.answers.tolist(),
        task.wrong.tolist(),
    )
    with pytest.raises(InputError, match="nothing that a circuit could explain"):
        remove_edges(lens, same, 0.1)
    other = Circuit.of(induction_lens().wiring.network, ["embed->logits"])
    with pytest.raises(InputError, match="of a model with 9 nodes"):
        remove_edges(lens, task, 0.1, start=other)
    with pytest.raises(InputError, match="353"):
        remove_edges(lens, task, 0.1, "scores", name_scores("eap").score[:9])
