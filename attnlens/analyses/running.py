"""Means over prompts that come a few at a time, with intervals, in memory that stops growing.

Up to `EXACT_PROMPTS` prompts their values are held and resampled as `bootstrap_mean` does. Beyond
that every prompt is drawn Poisson(1) times in each resample, which needs nothing but weighted sums:
Hanley and MacGibbon 2006, Creating non-parametric bootstrap samples using Poisson frequencies;
Chamandy et al. 2012, Estimating uncertainty for massive data streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, factorial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.errors import InputError
from attnlens.hooks.measure import join_ragged

EXACT_PROMPTS = 2048
"""Prompts whose values are held. 1,000 resamples keep as many sums and counts."""

Method = Literal["bootstrap", "poisson bootstrap"]

_POISSON = np.cumsum([exp(-1) / factorial(k) for k in range(20)])


def times_drawn(
    seed: int, prompts: Int[Tensor, " prompt"], resamples: int
) -> Float[Tensor, "resample prompt"]:
    """How often each prompt is drawn in each resample: Poisson(1), from seed and prompt alone."""
    drawn = np.empty((resamples, len(prompts)))
    for place, prompt in enumerate(prompts.tolist()):
        bits = np.random.Philox(key=seed % 2**64, counter=[0, 0, 0, prompt]).random_raw(resamples)
        # Through the distribution's own steps: the same draws with every version of numpy.
        drawn[:, place] = np.searchsorted(_POISSON, (bits >> np.uint64(11)) * 2.0**-53, "right")
    return torch.from_numpy(drawn)


class RunningSum:
    """Sums and counts of numbers over prompts, NaN left out; a longer last axis makes it grow."""

    def __init__(self) -> None:
        self.total: Float[Tensor, "*statistic"] | None = None
        self.count: Float[Tensor, "*statistic"] | None = None

    def add(self, values: Float[Tensor, "prompt *statistic"]) -> None:
        """Add some prompts."""
        total, count = values.nansum(0, dtype=torch.float64), (~values.isnan()).sum(0)
        self.total = total if self.total is None else _plus(self.total, total)
        self.count = count.double() if self.count is None else _plus(self.count, count.double())

    def mean(self) -> Float[Tensor, "*statistic"]:
        """Sum by count; NaN where no prompt counts."""
        if self.total is None or self.count is None:
            raise _nothing()
        return self.total / self.count

    def tensors(self) -> dict[str, Tensor]:
        """What to save."""
        found = {"total": self.total, "count": self.count}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was saved."""
        self.total, self.count = tensors.get("total"), tensors.get("count")


class RunningMean:
    """Mean over prompts and its interval, for each number of a prompt on its own.

    The last axis may grow from one addition to the next (positions of longer texts); a number that
    is not there counts as NaN, and NaN prompts are left out.
    """

    def __init__(
        self,
        resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
        exact: int | None = None,
    ) -> None:
        check_bootstrap(resamples, confidence)  # now, not after all texts
        self.resamples, self.confidence, self.seed = resamples, confidence, seed
        self.exact = EXACT_PROMPTS if exact is None else exact
        self.prompts = 0
        self._held: list[tuple[Tensor, Tensor]] = []
        """Prompt numbers and values, while they are held."""
        self._all = RunningSum()
        self._sums: Float[Tensor, "resample *statistic"] | None = None
        self._counts: Float[Tensor, "resample *statistic"] | None = None

    @property
    def method(self) -> Method:
        """How the interval is made."""
        return "bootstrap" if self.prompts <= self.exact else "poisson bootstrap"

    def add(
        self, values: Float[Tensor, "prompt *statistic"], prompts: Int[Tensor, " prompt"]
    ) -> None:
        """Add some prompts by their numbers; each number comes once, in any order."""
        self._held.append((prompts, values.detach().double().cpu()))
        self.prompts += len(prompts)
        if self.method == "poisson bootstrap":
            self._draw(*self._in_order())
            self._held = []

    def _in_order(self) -> tuple[Tensor, Tensor]:
        """Numbers and values of the prompts that are held, by number, whenever they came."""
        numbers = torch.cat([prompts for prompts, _ in self._held])
        order = numbers.argsort()
        return numbers[order], join_ragged([values for _, values in self._held])[order]

    def _draw(self, prompts: Tensor, values: Tensor) -> None:
        self._all.add(values)
        times = times_drawn(self.seed, prompts, self.resamples)
        flat = values.reshape(len(values), -1)
        shape = (self.resamples, *values.shape[1:])
        if self._sums is None or self._counts is None:
            self._sums = torch.zeros(shape, dtype=torch.float64)
            self._counts = torch.zeros(shape, dtype=torch.float64)
        self._sums, self._counts = _grown(self._sums, shape), _grown(self._counts, shape)
        if shape[-1] < self._sums.shape[-1] and values.ndim > 1:
            flat = pad(values, (0, self._sums.shape[-1] - shape[-1]), value=torch.nan).flatten(1)
        self._sums.view(self.resamples, -1).addmm_(times, flat.nan_to_num(0.0))
        self._counts.view(self.resamples, -1).addmm_(times, (~flat.isnan()).double())

    def interval(self) -> Interval:
        """The mean and its percentile interval, as `bootstrap_mean` gives them."""
        if not self.prompts:
            raise _nothing()
        if self._held:
            return bootstrap_mean(self._in_order()[1], self.resamples, self.confidence, self.seed)
        assert self._sums is not None
        assert self._counts is not None
        assert self._all.count is not None
        tail = (1 - self.confidence) / 2
        wanted = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        flat = zip(
            self._sums.view(self.resamples, -1).T,
            self._counts.view(self.resamples, -1).T,
            strict=True,
        )
        # A number at a time: means of all resamples at once would double what is held.
        bounds = torch.stack([torch.nanquantile(s / n, wanted) for s, n in flat], -1)
        mean = self._all.mean()
        bounds = bounds.view(2, *mean.shape)
        bounds[:, self._all.count < 2] = torch.nan
        return Interval(mean, bounds[0], bounds[1])

    def insert(self, place: int, like: int, share: float) -> None:
        """Put a number into the last axis that was `share` times number `like` in all prompts."""

        def widened(tensor: Tensor, by: float) -> Tensor:
            new = tensor[..., like : like + 1] * by
            return torch.cat([tensor[..., :place], new, tensor[..., place:]], -1).contiguous()

        self._held = [(numbers, widened(values, share)) for numbers, values in self._held]
        if self._sums is None or self._counts is None:
            return
        assert self._all.total is not None
        assert self._all.count is not None
        self._sums, self._counts = widened(self._sums, share), widened(self._counts, 1)
        self._all.total = widened(self._all.total, share)
        self._all.count = widened(self._all.count, 1)

    def tensors(self) -> dict[str, Tensor]:
        """What to save; its size stops growing once values are no longer held."""
        if self._held:
            numbers, values = self._in_order()
            return {"numbers": numbers, "values": values}
        if self._sums is None or self._counts is None:
            return {}
        prompts = torch.tensor(self.prompts)
        return {
            "sums": self._sums,
            "counts": self._counts,
            "prompts": prompts,
            **self._all.tensors(),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was saved."""
        if "values" in tensors:
            self._held = [(tensors["numbers"], tensors["values"])]
            self.prompts = len(tensors["numbers"])
        elif "sums" in tensors:
            self.prompts = int(tensors["prompts"])
            self._sums, self._counts = tensors["sums"], tensors["counts"]
            self._all.restore(tensors)


def method_note(mean: RunningMean) -> tuple[str, ...]:
    """What a reader should know where intervals are not the plain bootstrap."""
    if mean.method == "bootstrap":
        return ()
    note = (
        f"There are more than {mean.exact} texts: intervals are of the Poisson bootstrap, which "
        "holds no values."
    )
    return (note,)


def _plus(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two tensors, the shorter last axis filled up with 0."""
    return _grown(a, b.shape) + _grown(b, a.shape)


def _grown(tensor: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The tensor with a last axis at least as long as that of `shape`, filled up with 0."""
    missing = shape[-1] - tensor.shape[-1] if shape else 0
    return pad(tensor, (0, missing)) if missing > 0 else tensor


def _nothing() -> InputError:
    return InputError("No prompt was counted: give a text at least.")
