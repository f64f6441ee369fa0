import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlens.analyses.uncertainty import bootstrap_mean, bootstrap_ratio
from attnlens.errors import InputError


def by_hand(values: list[float], resamples: int, seed: int) -> list[float]:
    """Means of resampled prompts, one prompt at a time."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator).tolist()
    means: list[float] = []
    for draw in drawn:
        kept = [values[i] for i in draw if not math.isnan(values[i])]
        if kept:
            means.append(sum(kept) / len(kept))
    return means


@given(
    st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=2, max_size=7),
    st.integers(0, 100),
)
def test_equals_a_loop_over_resamples(values: list[float], seed: int) -> None:
    found = bootstrap_mean(torch.tensor(values, dtype=torch.float64), 50, 0.9, seed)
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        assert found.low.isnan()
        assert found.high.isnan()
        return
    means = torch.tensor(by_hand(values, 50, seed), dtype=torch.float64)
    assert torch.isclose(found.mean, torch.tensor(sum(known) / len(known), dtype=torch.float64))
    assert torch.isclose(found.low, means.quantile(0.05))
    assert torch.isclose(found.high, means.quantile(0.95))


@given(st.integers(2, 6), st.lists(st.integers(1, 4), max_size=3))
def test_each_statistic_stands_by_itself(prompts: int, shape: list[int]) -> None:
    values = torch.randn(prompts, *shape, generator=torch.Generator().manual_seed(0))
    whole = bootstrap_mean(values, 40)
    assert whole.mean.shape == tuple(shape)
    for index in torch.ones(shape).nonzero().tolist():
        one = bootstrap_mean(values[(slice(None), *index)], 40)
        assert torch.allclose(torch.stack(one), torch.stack([part[tuple(index)] for part in whole]))


def test_many_statistics_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    whole = bootstrap_mean(values, 30)
    monkeypatch.setattr("attnlens.analyses.uncertainty._AT_ONCE", 60)
    assert torch.equal(torch.stack(whole), torch.stack(bootstrap_mean(values, 30)))


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    draws = torch.randn(60, 2000, generator=torch.Generator().manual_seed(5))
    found = bootstrap_mean(draws, 400, 0.9)
    covered = ((found.low <= 0) & (found.high >= 0)).double().mean()
    assert 0.86 < float(covered) < 0.92


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    found = bootstrap_mean(torch.tensor([[2.0]]))
    assert float(found.mean) == 2
    assert found.low.isnan().all()


@pytest.mark.parametrize("values", [torch.zeros(0, 3), torch.tensor(1.0)])
def test_no_prompts_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(InputError, match="Cannot bootstrap"):
        bootstrap_mean(values)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=7),
    st.integers(0, 100),
)
def test_a_ratio_equals_a_loop_over_resamples(pairs: list[tuple[int, int]], seed: int) -> None:
    hits, asked = (torch.tensor(part, dtype=torch.float64) for part in zip(*pairs, strict=True))
    found = bootstrap_ratio(hits, asked, 50, 0.9, seed)
    pairs = [(n if d else 0, d) for n, d in pairs]  # a prompt that was asked nothing
    hits = hits * (asked > 0)
    if int((asked > 0).sum()) < 2:
        assert found.low.isnan()
        return
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(pairs), (50, len(pairs)), generator=generator).tolist()
    sums = [(sum(pairs[i][0] for i in draw), sum(pairs[i][1] for i in draw)) for draw in drawn]
    ratios = torch.tensor([n / d for n, d in sums if d], dtype=torch.float64)
    assert float(found.mean) == pytest.approx(float(hits.sum() / asked.sum()))
    assert float(found.low) == pytest.approx(float(ratios.quantile(0.05)))
    assert float(found.high) == pytest.approx(float(ratios.quantile(0.95)))


def test_one_denominator_serves_many_numerators() -> None:
    hits = torch.tensor([[1.0, 4.0], [0.0, 2.0], [3.0, 3.0]])
    asked = torch.tensor([4.0, 2.0, 4.0])
    both = bootstrap_ratio(hits, asked[:, None])
    assert both.mean.tolist() == [0.4, 0.9]
    for column in (0, 1):
        one = bootstrap_ratio(hits[:, column], asked)
        assert torch.equal(torch.stack(one), torch.stack(both)[:, column])


def test_a_ratio_of_long_and_short_prompts_covers_the_true_rate() -> None:
    generator = torch.Generator().manual_seed(5)
    asked = torch.randint(1, 30, (60, 1500), generator=generator).double()
    hits = torch.binomial(asked, torch.full_like(asked, 0.3), generator=generator)
    found = bootstrap_ratio(hits, asked, 400, 0.9)
    covered = ((found.low <= 0.3) & (found.high >= 0.3)).double().mean()
    assert 0.86 < float(covered) < 0.92


def test_a_rate_of_nothing_is_unknown() -> None:
    found = bootstrap_ratio(torch.zeros(3), torch.zeros(3))
    assert found.mean.isnan()
    assert found.low.isnan()


def test_prompts_that_are_counted_by_name_count_with_a_denominator_of_0() -> None:
    above, below = torch.tensor([3.0, 1.0, 5.0]), torch.tensor([0.0, 2.0, 2.0])
    counted = torch.tensor([True, True, False])
    found = bootstrap_ratio(above, below, 200, counted=counted)
    assert found.mean == 2  # (3 + 1) / (0 + 2)
    # Resamples that hold no denominator say nothing: the least that is left is all of the second.
    assert found.low == 0.5
    assert found.high > 2
    assert bootstrap_ratio(above, below).mean == 1.5
