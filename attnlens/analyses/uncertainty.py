"""How sure a mean or a rate over prompts is: percentile bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.errors import InputError

_AT_ONCE = 2_000_000  # resampled means held at a time, 16 MB in float64


class Interval(NamedTuple):
    """A mean or a rate over prompts and the bounds of its interval."""

    mean: Float[Tensor, "*statistic"]
    low: Float[Tensor, "*statistic"]
    high: Float[Tensor, "*statistic"]


def check_bootstrap(resamples: int, confidence: float) -> None:
    """Raise InputError for no resamples, or a confidence outside 0 to 1."""
    if resamples < 1 or not 0 < confidence < 1:
        raise InputError(
            f"Cannot bootstrap with {resamples} resamples and confidence {confidence}: give a "
            "resample at least, and 0 < confidence < 1."
        )


def bootstrap_mean(
    values: Float[Tensor, "prompt *statistic"],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over prompts with its percentile bootstrap interval, for each statistic on its own.

    NaN prompts are left out; one set of resampled prompts serves all statistics. The bounds are NaN
    where fewer than two prompts count, the mean too where none does. Float64, on the CPU.
    Efron 1979.

    Raises:
        InputError: no prompts, no resamples, or a confidence outside 0 to 1.

    """
    known = ~values.isnan()
    return bootstrap_ratio(torch.where(known, values, 0.0), known, resamples, confidence, seed)


def bootstrap_ratio(
    numerators: Float[Tensor, "prompt *statistic"],
    denominators: Float[Tensor, "prompt *#statistic"],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    counted: Bool[Tensor, "prompt *#statistic"] | None = None,
) -> Interval:
    """Ratio of sums over prompts, `sum_p n_p / sum_p d_p`, with its percentile bootstrap interval.

    For rates of things of which prompts hold different numbers (arcs, answers): prompts are drawn
    with all that they hold. `counted` says which prompts count; those whose denominator is not 0
    where it is not given. The bounds are NaN where fewer than two prompts count, the ratio too
    where none does. Float64, on the CPU. Efron 1979.

    Raises:
        InputError: no prompts, no resamples, or a confidence outside 0 to 1.

    """
    check_bootstrap(resamples, confidence)
    if numerators.ndim == 0 or not len(numerators):
        raise InputError(
            f"Cannot bootstrap values of shape {list(numerators.shape)}: give a prompt at least."
        )
    shape = numerators.shape[1:]
    above = numerators.detach().double().cpu().reshape(len(numerators), shape.numel())
    below = denominators.detach().double().cpu().expand_as(numerators).reshape(above.shape)
    known = below != 0 if counted is None else counted.cpu().expand_as(numerators)
    known = known.reshape(above.shape)
    above, below = above.masked_fill(~known, 0), below.masked_fill(~known, 0)
    times = _times_drawn(len(above), resamples, seed)
    tail = (1 - confidence) / 2
    bounds = torch.full((2, above.shape[1]), torch.nan, dtype=torch.float64)
    step = max(1, _AT_ONCE // resamples)
    for start in range(0, above.shape[1], step):
        part = slice(start, start + step)
        counts = times @ below[:, part]
        ratios = times @ above[:, part] / counts.masked_fill(counts == 0, torch.nan)
        wanted = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        # A resample that misses every prompt that counts says nothing and is left out.
        quantile = torch.nanquantile if bool((counts == 0).any()) else torch.quantile
        bounds[:, part] = quantile(ratios, wanted, dim=0)
    bounds[:, known.sum(0) < 2] = torch.nan
    ratio = above.sum(0) / below.sum(0)
    return Interval(ratio.view(shape), bounds[0].view(shape), bounds[1].view(shape))


def _times_drawn(prompts: int, resamples: int, seed: int) -> Float[Tensor, "resample prompt"]:
    """How often each prompt is drawn in each resample of as many prompts."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
    times = torch.zeros(resamples, prompts, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
