"""Faithfulness on a model of which erasing is linear, by brute force, and on a known circuit."""

from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

import attnlens as al
from attnlens.analyses.attribution import Attribution
from attnlens.analyses.deletion import BINS, FRACTIONS, Ends, delete, most, places, ranks
from attnlens.analyses.erasure import Eraser, leave_one_out, random_attribution
from attnlens.analyses.faithfulness import MEASURES, Faithfulness, faithfulness
from attnlens.analyses.judging import points_at, sources_of
from attnlens.analyses.rank_agreement import spearman
from attnlens.analyses.replacement import Replacement
from attnlens.analyses.target import Target
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.tasks import Task, repeated_tokens
from attnlens.zoo import induction_model
from tests.analyses.conftest import tiny_gpt2
from tests.analyses.test_importance import ragged

NEUTRAL = Replacement("neutral", token=39)


def additive_model() -> nn.Module:
    """M is a constant and a sum over tokens: even attention, no norm, a silent MLP."""
    model = tiny_gpt2(layers=1, sharp=0.0)
    block = model.transformer.h[0]
    model.transformer.ln_f = block.ln_1 = nn.Identity()
    with torch.no_grad():
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
    return model


@pytest.fixture(scope="module")
def additive_lens() -> Lens:
    return al.load(additive_model())


def one_prompt(length: int = 5) -> Task:
    ids = torch.randint(1, 39, (1, length), generator=torch.Generator().manual_seed(2)).tolist()
    return Task.from_prompts("one", ids, ids, [[length - 1]], [[5]], [[6]])


def given_scores(scores: Tensor) -> Callable[..., Attribution]:
    """A method that gives these scores, prompt by prompt."""

    def method(lens: Lens, inputs: Any, target: Any) -> Attribution:
        found = leave_one_out(lens, inputs, target, NEUTRAL)
        return Attribution("given", found.tokens, scores, found.target, found.value)

    return method


def negated(lens: Lens, inputs: Any, target: Any) -> Attribution:
    found = leave_one_out(lens, inputs, target, NEUTRAL)
    return Attribution("negated", found.tokens, -found.scores, found.target, found.value)


def refusing(lens: Lens, inputs: Any, target: Any) -> Attribution:
    raise InputError("not this model.")


def breaking(lens: Lens, inputs: Any, target: Any) -> Attribution:
    raise torch.OutOfMemoryError("Tried to allocate 9 TiB.")


def row(found: Faithfulness, method: str) -> dict[str, float]:
    at = found.methods.index(method)
    return {measure: float(found[measure].mean[at]) for measure in MEASURES}


def test_where_erasing_is_additive_leave_one_out_is_the_best_of_all_orders(
    additive_lens: Lens,
) -> None:
    task = one_prompt()
    methods = {
        str(order): given_scores(torch.tensor([order]).double()) for order in permutations(range(5))
    }
    found = faithfulness(
        additive_lens, task, {"leave_one_out": partial(leave_one_out, replacement=NEUTRAL)}
        | methods, NEUTRAL, resamples=1,
    )  # fmt: skip
    best = row(found, "leave_one_out")
    assert best["loo_spearman"] == pytest.approx(1)
    for measure, more in MEASURES.items():
        if measure in ("deletion", "insertion", "abpc", "comprehensiveness", "sufficiency"):
            values = found[measure].mean
            assert best[measure] == pytest.approx(float(values.max() if more else values.min()))
            assert float(values.max() - values.min()) > 1e-3
    scores = leave_one_out(additive_lens, task.clean, Target.of_task(task), NEUTRAL).scores
    assert torch.allclose(scores.sum(1), found.whole - found.empty)


def test_the_reverse_swaps_the_two_curves(random_lens: Lens) -> None:
    methods = {"forth": partial(leave_one_out, replacement=NEUTRAL), "back": negated}
    found = faithfulness(random_lens, ragged(4), methods, NEUTRAL)
    assert torch.equal(found.morf[0], found.lerf[1])
    assert torch.equal(found.lerf[0], found.morf[1])
    forth, back = row(found, "forth"), row(found, "back")
    assert forth["deletion"] == pytest.approx(back["insertion"])
    assert forth["abpc"] == pytest.approx(-back["abpc"])
    assert forth["loo_spearman"] == pytest.approx(1)
    assert back["loo_spearman"] == pytest.approx(-1)


@settings(max_examples=20)
@given(count=st.integers(1, 9), steps=st.integers(1, 12), kind=st.sampled_from(["neutral", "mean"]))
def test_curves_and_areas_are_those_of_prompts_erased_by_hand(
    random_lens: Lens, count: int, steps: int, kind: Any
) -> None:
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(1, 39, (1, count), generator=draw)
    scores = torch.randn(1, count, generator=draw)
    way = NEUTRAL if kind == "neutral" else Replacement(kind)
    eraser = Eraser(random_lens, ids, Target(5, 6), way)
    found = delete(eraser, scores, Ends.of(eraser), steps)
    order = scores[0].argsort(descending=True).tolist()

    def without(gone: list[int]) -> float:
        embeddings = random_lens.model.transformer.wte(ids).clone()
        table = random_lens.model.transformer.wte.weight
        embeddings[0, gone] = table[39] if kind == "neutral" else table.mean(0)
        with torch.no_grad():
            logits = random_lens.model(inputs_embeds=embeddings.detach()).logits[0, -1]
        return float(logits[5] - logits[6])

    tops = [without(order[:gone]) for gone in range(count + 1)]
    kept = [without(order[stay:]) for stay in range(count + 1)]
    at = places(count, steps)
    shares = [place / count for place in at]
    deletion = np.trapezoid([tops[place] for place in at], shares)
    insertion = np.trapezoid([kept[place] for place in at], shares)
    assert found.areas[0].tolist() == pytest.approx([deletion, insertion], abs=1e-9)
    assert found.morf[0, [0, -1]].tolist() == pytest.approx([tops[0], tops[-1]], abs=1e-9)
    sizes = [most(share, count) for share in BINS]
    comprehensive = np.mean([tops[0] - tops[size] for size in sizes])
    sufficient = np.mean([tops[0] - kept[size] for size in sizes])
    assert float(found.comprehensiveness) == pytest.approx(comprehensive, abs=1e-9)
    assert float(found.sufficiency) == pytest.approx(sufficient, abs=1e-9)


@settings(max_examples=10)
@given(count=st.integers(2, 8), left=st.integers(0, 3), steps=st.integers(1, 9))
def test_tokens_that_come_back_are_those_of_least_relevant_first_reversed(
    random_lens: Lens, count: int, left: int, steps: int
) -> None:
    """Insertion as it is defined, by hand: prompts that hold the best k tokens and the read one.

    Hidden tokens are tokens that are not there, others keep their positions.
    """
    draw = torch.Generator().manual_seed(10 * count + left)
    ids = torch.randint(1, 39, (1, count), generator=draw)
    scores = torch.randn(1, count, generator=draw)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, left, dtype=torch.long), ids], dim=1),
        "attention_mask": (torch.arange(left + count) >= left).long()[None],
    }
    eraser = Eraser(random_lens, padded, Target(5, 6), Replacement("padding"))
    found = delete(eraser, scores, Ends.of(eraser), steps)
    last, others = count - 1, scores[0, :-1].argsort(descending=True).tolist()

    def holding(best: list[int]) -> float:
        kept = torch.tensor([sorted([*best, last])])
        mask = torch.ones_like(kept)
        with torch.no_grad():
            logits = random_lens.model(
                input_ids=ids[:, kept[0]], position_ids=kept, attention_mask=mask
            ).logits[0, -1]
        return float(logits[5] - logits[6])

    at = places(last, steps)
    shares = [place / last for place in at]
    inserted = [holding(others[:back]) for back in at]
    deleted = [holding(others[gone:]) for gone in at]
    assert found.areas[0].tolist() == pytest.approx(
        [np.trapezoid(deleted, shares), np.trapezoid(inserted, shares)], abs=1e-9
    )
    backwards = np.interp(1 - FRACTIONS.numpy(), shares, inserted)
    assert found.lerf[0].tolist() == pytest.approx(backwards.tolist(), abs=1e-9)


@settings(max_examples=20)
@given(scores=st.lists(st.integers(-2, 2), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_order_is_the_scores_and_reversed_with_them(scores: list[int], seed: int) -> None:
    values = torch.tensor([scores]).double()
    among = torch.arange(len(scores))[None] % 3 != 1
    rank, back = ranks(values, among, seed)[0], ranks(-values, among, seed)[0]
    own = among[0].nonzero()[:, 0]
    assert sorted(rank[own].tolist()) == list(range(len(own)))
    assert bool((rank[~among[0]] == len(scores)).all())
    for one in own.tolist():
        for other in own.tolist():
            if scores[one] > scores[other]:
                assert rank[one] < rank[other]
                assert back[one] > back[other]


def test_places_are_as_many_from_either_end() -> None:
    for count in range(1, 60):
        for steps in range(1, 13):
            found = places(count, steps)
            assert found == [count - place for place in reversed(found)]
            assert found[0] == 0
            assert found[-1] == count
    assert places(7, 10) == list(range(8))
    assert places(100, 10) == list(range(0, 101, 10))
    assert [most(share, 10) for share in (0.01, 0.3, 0.31, 1)] == [1, 3, 4, 10]
    assert most(0.7, 10) == 7  # 0.7 * 10 is 7.000000000000001


def test_all_of_a_prompt_is_worth_all_of_its_value(random_lens: Lens) -> None:
    found = faithfulness(random_lens, ragged(4), ["random"], NEUTRAL, bins=(1.0,))
    drop = float((found.whole - found.empty).mean())
    assert row(found, "random")["comprehensiveness"] == pytest.approx(drop)
    assert row(found, "random")["sufficiency"] == pytest.approx(0)


def test_random_scores_agree_with_nothing(random_lens: Lens) -> None:
    ids = torch.randint(1, 39, (48, 9), generator=torch.Generator().manual_seed(0)).tolist()
    task = Task.from_prompts("many", ids, ids, [[8]] * 48, [[5]] * 48, [[6]] * 48)
    found = faithfulness(random_lens, task, ["random"], NEUTRAL)
    for measure in ("loo_spearman", "abpc"):
        assert float(found[measure].low[0]) < 0 < float(found[measure].high[0]), measure
    assert float(found["loo_spearman"].high[0]) < 0.2
    zero = found.over_random("abpc")
    assert [float(bound) for bound in zero] == [0, 0, 0]


def test_random_scores_are_means_over_draws(random_lens: Lens) -> None:
    task, asked = ragged(4), {"methods": ["random"], "replacement": NEUTRAL, "resamples": 1}
    both = faithfulness(random_lens, task, **asked, draws=2)
    for measure in ("deletion", "insertion", "comprehensiveness", "sufficiency", "loo_spearman"):
        alone = [
            faithfulness(
                random_lens,
                task,
                {"drawn": partial(random_attribution, seed=draw)},
                NEUTRAL,
                resamples=1,
            ).by_prompt[measure][0]
            for draw in (0, 1)
        ]
        assert not torch.allclose(*alone), measure
        assert torch.allclose(both.by_prompt[measure][0], sum(alone) / 2), measure
    assert both.settings["draws"] == 2


@pytest.mark.parametrize("kind", ["padding", "mean", NEUTRAL])
def test_prompts_together_are_prompts_one_by_one(random_lens: Lens, kind: Any) -> None:
    task = ragged(4)
    methods = ["leave_one_out", "random"]
    sources = [[0, 1, 2, 3], [9], [6], [4]]  # all tokens of the first, the read one of the others
    together = faithfulness(random_lens, task, methods, kind, sources)
    alone = faithfulness(random_lens, task, methods, kind, sources, batch_size=1, tokens=1)
    assert together.forwards < alone.forwards
    for measure in MEASURES:
        one, other = together.by_prompt[measure], alone.by_prompt[measure]
        assert torch.allclose(one, other, atol=1e-6, equal_nan=True), measure
    assert torch.allclose(together.morf, alone.morf)


def test_the_circuits_source_is_pointed_at() -> None:
    lens = al.load(induction_model())
    task = repeated_tokens(lens, 6, period=8)
    last = task.reads[0, -1].item()
    found = faithfulness(lens, task, ["leave_one_out"])
    # The pair (b, c): c is what is copied, b what finds it; either one alone is worth all.
    pair = [[int(place), int(place) - 1] for place in _sources(task)]
    either = faithfulness(lens, task, ["leave_one_out"], sources=pair)
    assert row(either, "leave_one_out")["pointing"] == 1
    assert row(either, "random")["pointing"] < 0.7
    assert 0 <= row(found, "leave_one_out")["pointing"] <= 1
    assert "Pointing: at the answer's own token" in found.notes[-1]
    assert last == 15
    assert row(found, "leave_one_out")["abpc"] > row(found, "random")["abpc"] + 4


def _sources(task: Task) -> list[int]:
    """Where each answer of the last read stands in the first copy."""
    return [
        int((ids == answer).nonzero()[0])
        for ids, answer in zip(task.clean, task.answers[:, -1], strict=True)
    ]


def test_an_answer_that_stands_after_the_read_is_no_source(random_lens: Lens) -> None:
    clean = [[5, 9, 5, 8, 5], [9, 9, 7, 8, 5]]
    task = Task.from_prompts("early", clean, clean, [[2], [2]], [[5], [5]], [[6], [6]])
    known, said = sources_of(random_lens, task, None)
    assert known is not None
    assert known.int().tolist() == [[1, 0, 1, 0, 0], [0] * 5]
    assert "own token" in said


def test_ties_share_a_point() -> None:
    scores = torch.tensor([[3.0, -3.0, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 9.0]])
    real = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    known = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0]]).bool()
    assert points_at(scores, real, known).tolist() == pytest.approx([1 / 2, 1 / 3, 1])
    assert bool(points_at(scores, real, None).isnan().all())


def test_ranks_are_scipys() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randint(0, 4, (2, 6, 9), generator=draw).double()
    counted = torch.rand(6, 9, generator=draw) < 0.8
    found = spearman(one, other, counted)
    for prompt in range(6):
        own = counted[prompt]
        wanted = spearmanr(one[prompt][own], other[prompt][own]).statistic
        assert float(found[prompt]) == pytest.approx(wanted)
    assert bool(spearman(torch.ones(1, 9), other[:1], counted[:1]).isnan().all())


def test_a_method_that_refuses_is_told_of_and_the_others_go_on(random_lens: Lens) -> None:
    short = given_scores(torch.zeros(4, 3))

    def fewer(lens: Lens, inputs: Any, target: Any) -> Attribution:
        found = short(lens, inputs, target)
        return Attribution(
            "f", tuple(w[:3] for w in found.tokens), found.scores, ("",), found.value
        )

    nowhere = given_scores(torch.full((4, 10), torch.nan))
    methods = {"no": refusing, "fewer": fewer, "nan": nowhere, "large": breaking}
    seen: list[tuple[int, int]] = []
    found = faithfulness(
        random_lens, ragged(4), methods, NEUTRAL, progress=lambda *done: seen.append(done)
    )
    assert found.methods == ("random",)
    assert found.failed["no"] == "not this model."
    assert "it scores 3 tokens where" in found.failed["fewer"]
    assert "not all finite" in found.failed["nan"]
    assert found.failed["large"] == "OutOfMemoryError: Tried to allocate 9 TiB."
    assert any("no did not score: not this model." in note for note in found.notes)
    assert seen[-1] == (20, 20)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_tables_have_a_row_a_method(random_lens: Lens) -> None:
    found = faithfulness(random_lens, ragged(4), ["leave_one_out"], NEUTRAL)
    frame = found.to_frame()
    assert frame["method"].tolist() == ["leave_one_out", "random"]
    assert list(frame)[1:4] == ["loo_spearman", "loo_spearman_low", "loo_spearman_high"]
    assert frame.loc[0, "abpc"] == pytest.approx(float(found["abpc"].mean[0]))
    assert len(found.curves_frame()) == 2 * len(found.fractions)
    prompts = found.prompts_frame()
    assert len(prompts) == 2 * 4
    assert prompts.groupby("method")["abpc"].mean()["random"] == pytest.approx(frame.loc[1, "abpc"])
    assert "Of the 2 reads of a prompt the last is explained." in found.notes
    assert found.settings["replacement"]["token"] == 39
    with pytest.raises(InputError, match="no measure 'trust'; there is loo_spearman"):
        found["trust"]


def test_what_cannot_be_judged_is_refused(random_lens: Lens) -> None:
    task = ragged(4)
    for match, asked in {
        "no attribution method 'lrq'": {"methods": ["lrq"]},
        "steps=0": {"steps": 0},
        "draws=0": {"draws": 0},
        "bins=": {"bins": (0.0,)},
        "names 1 prompts": {"sources": [[1]]},
        "has no position 4": {"sources": [[4], [0], [0], [0]]},
        "resamples": {"resamples": 0},
    }.items():
        with pytest.raises(InputError, match=match):
            faithfulness(random_lens, task, **{"methods": ["random"], **asked})
    with pytest.raises(InputError, match="choose padding, mean, neutral"):
        faithfulness(random_lens, task, ["random"], "blank")
