"""Greedy pruning: the hand-wired circuit goes last, and every step is what a loop would do."""

import pytest
import torch

import attnlens as al
from attnlens.analyses.importance import gradient_importance
from attnlens.analyses.pruning import Pruning, heads_needed, prune_heads
from attnlens.errors import InputError, TaskError
from attnlens.lens import Lens
from attnlens.tasks import Task, repeated_tokens
from tests.analyses.conftest import tiny_gpt2


@pytest.fixture(scope="module")
def task(induction_lens: Lens) -> Task:
    return repeated_tokens(induction_lens, prompts=4, period=8)


@pytest.fixture
def small(random_lens: Lens) -> Task:
    return repeated_tokens(random_lens, prompts=3, period=5)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("metric", ["accuracy", "logit_difference"])
def test_the_circuit_goes_last(
    induction_lens: Lens, task: Task, metric: str, recompute: bool
) -> None:
    found = prune_heads(induction_lens, task, 1, recompute, metric=metric)
    assert found.kept.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert {str(head) for head in found.order[-2:]} == {"L0H1", "L1H2"}
    assert (found.values[:7] == found.values[0]).all()  # two heads are the whole model
    assert (found.mean[7:] < found.mean[0] / 2).all()
    if metric == "accuracy":
        assert (found.values[:7] == 1).all()
        assert "Accuracy has no gradient" in found.notes[0]
    assert heads_needed(found) == 2
    assert (found.scores[:6] == 0).all()
    # a random order loses one of the two sooner
    assert found.random.shape == (8, 9, 4)
    assert found.random_mean[4] < found.mean[4]
    assert torch.equal(found.random[:, -1], found.values[-1:].expand(8, -1))


def one_by_one(task: Task, steps: list[int]) -> tuple[list[str], list[float]]:
    """The slow way: a fresh model whose W_O rows are zeroed, ranked and graded by itself."""
    order: list[str] = []
    losses: list[float] = []
    model = tiny_gpt2()
    for count in [*steps, 0]:
        now = al.load(model, check=False)  # which refuses a model without any head
        logits = now.logits(task.clean_inputs(), task.reads)
        losses.append(float(task.score(logits).mean()))
        frame = gradient_importance(now, task).to_frame()
        frame = frame[~frame["head"].isin(order)].sort_values("importance")
        for head, layer, index in frame[["head", "layer", "index"]].head(count).values.tolist():
            order.append(head)
            with torch.no_grad():
                projection = model.transformer.h[layer].attn.c_proj
                projection.weight[8 * index : 8 * index + 8] = 0
    return order, losses


def test_recomputed_pruning_is_the_slow_loop(random_lens: Lens, small: Task) -> None:
    found = prune_heads(random_lens, small, 0.25, controls=0)
    order, losses = one_by_one(small, [3, 3, 3, 3])
    assert [str(head) for head in found.order] == order
    assert found.kept.tolist() == [12, 9, 6, 3, 0]
    assert found.mean.tolist() == pytest.approx(losses, abs=1e-12)
    assert found.random.shape == (0, 5, 3)
    assert found.random_mean.isnan().all()
    assert found.by == "gradient of the loss"
    once = prune_heads(random_lens, small, 0.25, recompute=False, controls=0)
    assert once.order != found.order  # heads are worth something else when others are gone
    importance = gradient_importance(random_lens, small)
    ranked = sorted(zip(importance.importance.tolist(), importance.heads, strict=True))
    assert once.order == tuple(head for _, head in ranked)
    assert once.scores.tolist() == [score for score, _ in ranked]


@pytest.mark.parametrize("step", [1, 2, 5, 0.3, 1.0])
@pytest.mark.parametrize("least", [0, 1, 3])
def test_every_layer_keeps_the_least(
    random_lens: Lens, small: Task, step: int | float, least: int
) -> None:
    scores = torch.arange(12.0).flip(0)  # the last layer first
    found = prune_heads(random_lens, small, step, least=least, scores=scores, controls=2)
    assert int(found.kept[-1]) == 3 * least
    size = step if isinstance(step, int) else max(1, round(step * 12))
    assert (found.kept.diff().neg() <= size).all()
    assert (found.kept[:-1].diff().neg() == size).all()
    for layer in range(3):
        assert sum(head.layer == layer for head in found.order) == 4 - least
    assert len(set(found.order)) == len(found.order)
    assert found.recomputed is False
    assert found.by == "given scores"
    # within the minimum the lowest score goes first
    wanted = sorted(found.order, key=lambda head: scores[4 * head.layer + head.head])
    assert list(found.order) == wanted


def test_random_orders_keep_the_least_too(induction_lens: Lens, task: Task) -> None:
    found = prune_heads(induction_lens, task, 2, least=3, controls=6, metric="accuracy")
    assert found.kept.tolist() == [8, 6]
    # of each layer one of four heads went: the circuit is whole in (3/4)^2 of the orders
    whole = found.random[:, 1].mean(1)
    assert set(whole.gt(0.9).tolist()) == {True, False}
    again = prune_heads(induction_lens, task, 2, least=3, controls=6, metric="accuracy")
    assert torch.equal(found.random, again.random)


def test_normalising_by_layer_changes_who_goes(random_lens: Lens, small: Task) -> None:
    importance = gradient_importance(random_lens, small, normalise=True)
    found = prune_heads(
        random_lens, small, recompute=False, normalise=True, controls=0, estimator="tokens"
    )
    ranked = sorted(zip(importance.importance.tolist(), importance.heads, strict=True))
    assert found.order == tuple(head for _, head in ranked)


def test_the_table_and_progress(random_lens: Lens, small: Task) -> None:
    seen: list[tuple[int, int]] = []
    found = prune_heads(
        random_lens, small, 5, controls=1, progress=lambda *at: seen.append(at), seed=3
    )
    assert seen == [(done, 8) for done in range(1, 9)]
    frame = found.to_frame()
    assert frame["kept"].tolist() == [12, 7, 2, 0]
    assert frame["share"].tolist() == pytest.approx([1, 7 / 12, 1 / 6, 0])
    assert frame["taken"][0] == ""
    taken = [head for heads in frame["taken"][1:] for head in heads.split(",")]
    assert taken == [str(head) for head in found.order]
    assert torch.allclose(found.mean, found.values.mean(1))
    assert (found.low <= found.mean).all()
    assert (found.mean <= found.high).all()
    assert found.prompts == 3


def test_the_model_is_as_before(random_lens: Lens, small: Task) -> None:
    before = random_lens.logits(small.clean_inputs(), small.reads)
    prune_heads(random_lens, small, 6, controls=0)
    assert torch.equal(before, random_lens.logits(small.clean_inputs(), small.reads))
    assert not random_lens.edited


def pruning(metric: str, means: list[float]) -> Pruning:
    mean = torch.tensor(means, dtype=torch.float64)
    lost = torch.full_like(mean, torch.nan)
    return Pruning(
        "t", metric, "given scores", False, 0, (), mean[:0], torch.tensor([4, 3, 2, 1, 0]),
        mean[:, None], mean, lost, lost, mean.new_zeros(0, 5, 1), lost, lost, lost, 0, 1, 0.9, (),
    )  # fmt: skip


def test_heads_needed_knows_which_way_is_better() -> None:
    assert heads_needed(pruning("accuracy", [1.0, 0.99, 0.96, 0.9, 0.1])) == 2
    assert heads_needed(pruning("accuracy", [1.0, 0.5, 0.4, 0.9, 0.1]), share=0.9) == 1
    assert heads_needed(pruning("logit_difference", [8.0, 8.5, 7.0, 1.0, 0.0])) == 3
    assert heads_needed(pruning("loss", [1.0, 0.8, 1.05, 1.06, 4.0])) == 2
    assert heads_needed(pruning("loss", [1.0, 2.0, 3.0, 4.0, 5.0])) == 4
    with pytest.raises(InputError, match="does not solve the task"):
        heads_needed(pruning("logit_difference", [-1.0, 0.0, 0.0, 0.0, 0.0]))
    with pytest.raises(InputError, match=r"share=1\.5"):
        heads_needed(pruning("loss", [1.0] * 5), share=1.5)


def test_bad_requests_are_named(random_lens: Lens, small: Task) -> None:
    for step in (0, 0.0, 1.5, -2):
        with pytest.raises(InputError, match="give a number of heads from 1 up"):
            prune_heads(random_lens, small, step)
    for least in (4, -1):
        with pytest.raises(InputError, match=f"least={least} .* nothing to prune"):
            prune_heads(random_lens, small, least=least)
    with pytest.raises(InputError, match="one number for each of the 12 heads"):
        prune_heads(random_lens, small, scores=[1.0, 2.0])
    with pytest.raises(InputError, match="NaN"):
        prune_heads(random_lens, small, scores=[torch.nan] * 12)
    for scores in (["a"] * 12, [[1.0], [2.0, 3.0]], {"L0H0": 1.0}):
        with pytest.raises(InputError, match=r"no list of numbers .* 12 heads"):
            prune_heads(random_lens, small, scores=scores)
    with pytest.raises(InputError, match="controls=-1"):
        prune_heads(random_lens, small, controls=-1)
    with pytest.raises(TaskError, match="unknown metric"):
        prune_heads(random_lens, small, metric="f1")
    with pytest.raises(InputError, match="tokens, prompts"):
        prune_heads(random_lens, small, estimator="none")
