import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlens.analyses.running import RunningMean, RunningSum, method_note, times_drawn
from attnlens.analyses.uncertainty import bootstrap_mean
from attnlens.errors import InputError


def numbers(prompts: int, *shape: int, seed: int = 0) -> Tensor:
    """Random numbers of which some are missing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(prompts, *shape, dtype=torch.float64, generator=generator)
    return values.masked_fill(torch.rand(values.shape, generator=generator) < 0.2, torch.nan)


def running(parts: list[tuple[Tensor, Tensor]], exact: int, **settings: int) -> RunningMean:
    mean = RunningMean(**settings, exact=exact)  # type: ignore[arg-type]
    for values, prompts in parts:
        mean.add(values, prompts)
    return mean


def pieces(values: Tensor, ends: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The prompts cut at some places."""
    places = sorted({0, len(values), *(end % len(values) for end in ends)})
    index = torch.arange(len(values))
    return [(values[a:b], index[a:b]) for a, b in pairwise(places)]


cuts = st.lists(st.integers(0, 1000), max_size=6)


@given(st.integers(1, 30), cuts, st.integers(0, 5))
def test_held_values_are_resampled_as_ever(prompts: int, ends: list[int], seed: int) -> None:
    values = numbers(prompts, 2, 3, seed=seed)
    found = running(pieces(values, ends)[::-1], exact=30, resamples=20, seed=seed)
    wanted = bootstrap_mean(values, 20, seed=seed)
    for a, b in zip(found.interval(), wanted, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    assert found.method == "bootstrap"
    assert method_note(found) == ()


@given(st.integers(6, 40), cuts, st.integers(0, 5), st.integers(0, 5))
def test_any_split_gives_the_same_sums(
    prompts: int, ends: list[int], exact: int, seed: int
) -> None:
    values = numbers(prompts, 4, seed=seed)
    whole = running(pieces(values, []), exact=0, resamples=20, seed=seed).tensors()
    parts = running(pieces(values, ends), exact, resamples=20, seed=seed).tensors()
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.allclose(whole[name], parts[name], rtol=0, atol=1e-12)


@given(st.integers(3, 12), cuts, st.integers(0, 5))
def test_equals_a_loop_over_prompts(prompts: int, ends: list[int], seed: int) -> None:
    values = numbers(prompts, 3, seed=seed)
    found = running(pieces(values, ends), exact=1, resamples=15, seed=seed).interval()
    times = times_drawn(seed, torch.arange(prompts), 15)
    for column in range(3):
        means: list[float] = []
        for resample in range(15):
            total = count = 0.0
            for prompt in range(prompts):
                value = float(values[prompt, column])
                if not math.isnan(value):
                    total += float(times[resample, prompt]) * value
                    count += float(times[resample, prompt])
            if count:
                means.append(total / count)
        known = int((~values[:, column].isnan()).sum())
        if known < 2:
            assert found.low[column].isnan()
            continue
        drawn = torch.tensor(means, dtype=torch.float64)
        wanted = torch.stack([drawn.quantile(0.025), drawn.quantile(0.975)])
        assert torch.allclose(torch.stack(found[1:])[:, column], wanted, atol=1e-12)
        assert torch.allclose(found.mean, values.nanmean(0), atol=1e-12, equal_nan=True)


def test_draws_are_poisson_and_a_prompts_own() -> None:
    drawn = times_drawn(3, torch.arange(200), 2_000)
    for k in range(6):  # 400,000 draws: 5 standard errors of a share of p are 5 sqrt(p / 400,000)
        p = math.exp(-1) / math.factorial(k)
        assert abs(float((drawn == k).double().mean()) - p) < 5 * math.sqrt(p / 400_000)
    apart = torch.stack([times_drawn(3, torch.tensor([i]), 2_000)[:, 0] for i in (7, 150)], 1)
    assert torch.equal(drawn[:, [7, 150]], apart)
    assert not torch.equal(drawn, times_drawn(4, torch.arange(200), 2_000))
    # Neighbours share nothing: correlations of 2,000 draws have a standard error of 0.022.
    assert drawn.T.corrcoef().fill_diagonal_(0).abs().max() < 0.12
    assert times_drawn(-1, torch.arange(3), 5).shape == (5, 3)


def test_close_to_the_multinomial_bootstrap_of_many_prompts() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(5_000, 40, dtype=torch.float64, generator=generator) ** 3
    values[:, 20:] = values[:, 20:].masked_fill(values[:, 20:] < 0.05, torch.nan)
    resamples = 2_000
    exact = bootstrap_mean(values, resamples)
    found = running(pieces(values, [128 * i for i in range(40)]), 0, resamples=resamples)
    assert found.method == "poisson bootstrap"
    assert torch.allclose(found.interval().mean, exact.mean, atol=1e-12)
    spread = (exact.high - exact.low) / 3.92  # the standard error of each mean
    # A bound is the 2.5 % quantile of 2,000 resamples, whose own standard error is
    # sqrt(.025 * .975 / 2000) / density(1.96) = 0.06 spreads: 0.085 for the difference of two.
    # The largest of 80 differences stays under 4 of these.
    for a, b in zip(found.interval()[1:], exact[1:], strict=True):
        assert float(((a - b).abs() / spread).max()) < 4 * 0.085
    assert float((found.interval().high - exact.high).abs().max()) > 0  # it is another method


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=5))
def test_the_last_axis_grows_to_the_longest(batches: list[list[int]]) -> None:
    longest = max(max(batch) for batch in batches)
    lengths = [length for batch in batches for length in batch]
    whole = numbers(len(lengths), 2, longest)
    for prompt, length in enumerate(lengths):
        whole[prompt, :, length:] = torch.nan
    sums = RunningSum()
    held, drawn = RunningMean(30), RunningMean(30, exact=0)
    start = 0
    for batch in batches:
        part = whole[start : start + len(batch), :, : max(batch)]
        index = torch.arange(start, start + len(batch))
        sums.add(part)
        held.add(part, index)
        drawn.add(part, index)
        start += len(batch)
    wanted = whole.nanmean(0)
    for mean in (sums.mean(), held.interval().mean, drawn.interval().mean):
        assert torch.allclose(mean, wanted, atol=1e-12, equal_nan=True)
    straight = RunningMean(30, exact=0)
    straight.add(whole, torch.arange(len(whole)))
    assert torch.allclose(drawn.interval().low, straight.interval().low, equal_nan=True)


@pytest.mark.parametrize("exact", [0, 100])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_number_may_come_in_later(exact: int, share: float) -> None:
    values = numbers(9, 2, 3)
    late = torch.cat([values[..., :1], values[..., 2:] * share, values[..., 1:]], -1)
    late[5:, :, 1] = numbers(4, 2, seed=8)
    mean = RunningMean(50, exact=exact)
    mean.add(values[:5], torch.arange(5))
    mean.insert(1, 2, share)
    mean.add(late[5:], torch.arange(5, 9))
    wanted = RunningMean(50, exact=exact)
    wanted.add(late[:5], torch.arange(5))
    wanted.add(late[5:], torch.arange(5, 9))
    for a, b in zip(mean.interval(), wanted.interval(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("after", [2, 6, 9])
def test_going_on_from_what_was_saved(after: int) -> None:
    values = numbers(12, 3)
    parts = pieces(values, [2, 4, 6, 9])
    whole = running(parts, exact=5, resamples=40)
    broken = running([part for part in parts if part[1][0] < after], exact=5, resamples=40)
    again = RunningMean(40, exact=5)
    again.restore({name: tensor.clone() for name, tensor in broken.tensors().items()})
    for part in parts:
        if part[1][0] >= after:
            again.add(*part)
    for a, b in zip(again.interval(), whole.interval(), strict=True):
        assert torch.equal(a, b)


def test_what_is_kept_stops_growing() -> None:
    def size(prompts: int) -> int:
        mean = RunningMean(100, exact=40)
        for values, index in pieces(numbers(prompts, 7), list(range(0, prompts, 8))):
            mean.add(values, index)
        return sum(tensor.nbytes for tensor in mean.tensors().values())

    assert size(20) < size(40) < size(60) == size(1200)


def test_values_are_held_up_to_a_number_of_prompts() -> None:
    mean = RunningMean(30, exact=5)
    mean.add(numbers(5, 2), torch.arange(5))
    assert mean.method == "bootstrap"
    assert "values" in mean.tensors()
    mean.add(numbers(1, 2), torch.tensor([5]))
    assert mean.method == "poisson bootstrap"
    assert "values" not in mean.tensors()
    assert "more than 5 texts" in method_note(mean)[0]


def test_no_prompts_are_refused() -> None:
    for empty in (RunningMean().interval, RunningSum().mean):
        with pytest.raises(InputError, match="No prompt was counted"):
            empty()
    assert RunningMean().tensors() == RunningSum().tensors() == {}
