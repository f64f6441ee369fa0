"""Greedy pruning: how many heads a task needs, taking out the least important first.

Michel et al. 2019 (Are sixteen heads really better than one?) prune in steps by gradient
importance. Pruned heads write nothing (`Zero`); no weight is changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analyses.importance import (
    Estimator,
    differentiable,
    head_gradients,
    known_estimator,
    layer_norms,
)
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import Anatomy, Head
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit, Zero
from attnlens.lens import Lens
from attnlens.tasks import Task
from attnlens.tasks.task import check_metric

Ranking = Callable[[Sequence[Head]], Mapping[Head, float]]
"""From the heads that are gone to a score of every head; the least goes next."""


@dataclass(frozen=True)
class Pruning:
    """The metric while heads are taken out, and beside it random orders.

    Attributes:
        task, metric: what was graded, by what.
        by: what ranked the heads: "gradient of the loss", "given scores", ...
        recomputed: whether they were ranked anew before each step.
        least: heads kept in every layer.
        order: heads in the order in which they went, `scores` what each had then.
        kept: number of heads left at each point of the curve; the first has all.
        values: the metric of each prompt at each point.
        mean, low, high: its mean over prompts, with bounds.
        random: the metric in random orders, as many heads a step, with the same minimum.
        random_mean, random_low, random_high: mean over these orders and over prompts, bounds over
            prompts; NaN without random orders.
        seed, resamples, confidence: of the random orders and of the bootstrap.
        notes: what a reader should know.

    """

    task: str
    metric: str
    by: str
    recomputed: bool
    least: int
    order: tuple[Head, ...]
    scores: Float[Tensor, " removed"]
    kept: Int[Tensor, " point"]
    values: Float[Tensor, "point prompt"]
    mean: Float[Tensor, " point"]
    low: Float[Tensor, " point"]
    high: Float[Tensor, " point"]
    random: Float[Tensor, "order point prompt"]
    random_mean: Float[Tensor, " point"]
    random_low: Float[Tensor, " point"]
    random_high: Float[Tensor, " point"]
    seed: int
    resamples: int
    confidence: float
    notes: tuple[str, ...]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return self.values.shape[1]

    def to_frame(self) -> pd.DataFrame:
        """One row a point: heads kept, those taken out since the last one, metric with bounds."""
        gone = (self.kept[0] - self.kept).tolist()
        starts = [0, *gone[:-1]]
        taken = [self.order[a:b] for a, b in zip(starts, gone, strict=True)]
        columns = {
            "kept": self.kept,
            "share": self.kept / self.kept[0],
            "metric": self.mean,
            "metric_low": self.low,
            "metric_high": self.high,
            "random": self.random_mean,
            "random_low": self.random_low,
            "random_high": self.random_high,
        }
        frame = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
        frame["taken"] = [",".join(map(str, heads)) for heads in taken]
        return frame


def prune_heads(
    lens: Lens,
    task: Task,
    step: int | float = 0.1,
    recompute: bool = True,
    least: int = 0,
    scores: Sequence[float] | Float[Tensor, " head"] | None = None,
    metric: str | None = None,
    estimator: Estimator | str = Estimator.TOKENS,
    normalise: bool = False,
    controls: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Pruning:
    """Take heads out, the least important first, and grade the task after each step.

    `step` is a number of heads, or a share of all of them (at least one head). Heads go by gradient
    importance (see `gradient_importance` for `estimator` and `normalise`), computed anew before
    each step with those that are gone at zero, or once where `recompute` is False; or by `scores`,
    one a head, which stay. Every layer keeps `least` heads. `controls` random orders are graded
    beside it. `progress` is called with (done, all) gradings. Michel et al. 2019, Are sixteen heads
    really better than one?

    Raises:
        InputError: a step of no head, scores that are not one a head, nothing that may be pruned,
            or what `gradient_importance` refuses.

    """
    check_bootstrap(resamples, confidence)
    if controls < 0:
        raise InputError(f"controls={controls}: give 0 or more random orders.")
    anatomy = lens.anatomy_for(lens.encode(task.clean_inputs()))
    graded = check_metric(metric or task.metric)
    if scores is not None:
        by, ranking, notes = "given scores", _given(anatomy, scores), ()
    else:
        taken, notes = differentiable(task, graded)
        by = f"gradient of the {taken.replace('_', ' ')}"
        how = known_estimator(estimator), batch_size
        ranking = _ByGradient(lens, task, taken, normalise, *how)
    again = recompute and scores is None
    count = _heads_a_step(step, len(anatomy.heads))
    steps, scored = _greedy(anatomy, ranking if again else _constant(ranking(())), count, least)
    orders = [_random_steps(anatomy, seed + number, count, least) for number in range(controls)]
    grader = _Grader(lens, task, graded, batch_size, progress, (1 + controls) * (1 + len(steps)))
    values = grader.curve(steps)
    beside = [grader.curve(order) for order in orders]
    chance = torch.stack(beside) if beside else values.new_zeros(0, *values.shape)
    if len(task) < 2:
        notes = (*notes, "One prompt gives no interval over prompts; give several.")
    return Pruning(
        task=task.name,
        metric=graded,
        by=by,
        recomputed=again,
        least=least,
        order=tuple(head for heads in steps for head in heads),
        scores=torch.tensor(scored, dtype=torch.float64),
        kept=len(anatomy.heads) - torch.tensor([0, *map(len, steps)]).cumsum(0),
        values=values,
        **_named("", bootstrap_mean(values.T, resamples, confidence, seed)),
        random=chance,
        **_named("random_", bootstrap_mean(chance.mean(0).T, resamples, confidence, seed)),
        seed=seed,
        resamples=resamples,
        confidence=confidence,
        notes=notes,
    )


def heads_needed(pruning: Pruning, share: float = 0.95) -> int:
    """The smallest number of heads on the curve that keeps `share` of the whole model's metric.

    That is M >= share * M(all heads), and for the loss, which is better when lower,
    M <= M(all heads) / share. A curve may fall below that on the way and rise again.

    Raises:
        InputError: a share outside 0 to 1, or a metric of the whole model that is not above 0.

    """
    if not 0 < share <= 1:
        raise InputError(f"share={share:g}: give a share of the metric between 0 and 1.")
    whole = float(pruning.mean[0])
    lower_is_better = pruning.metric == "loss"
    if whole < 0 or (whole == 0 and not lower_is_better):
        raise InputError(
            f"The model's own {pruning.metric.replace('_', ' ')} is {whole:.3g}, and a share of "
            "that means nothing: it does not solve the task."
        )
    enough = pruning.mean <= whole / share if lower_is_better else pruning.mean >= whole * share
    return int(pruning.kept[enough].min())


class _ByGradient:
    """Ranks heads by gradient importance, with some heads gone."""

    def __init__(
        self,
        lens: Lens,
        task: Task,
        metric: str,
        normalise: bool,
        estimator: Estimator,
        batch_size: int,
    ) -> None:
        self._lens, self._normalise = lens, normalise
        self._how = task, metric, estimator, batch_size

    def __call__(self, gone: Sequence[Head]) -> Mapping[Head, float]:
        with self._lens.edit(Zero(tuple(gone))) if gone else nullcontext():
            heads, importance, _ = head_gradients(self._lens, *self._how)
        mean = importance.mean(0)
        if self._normalise:
            mean = mean / layer_norms(heads, mean)
        return dict(zip(heads, mean.tolist(), strict=True))


class _Grader:
    """Grades a task along an order of pruning; a set of heads is graded once."""

    def __init__(
        self,
        lens: Lens,
        task: Task,
        metric: str,
        batch_size: int,
        progress: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self._how = lens, task, metric, batch_size
        self._progress, self._total, self._done = progress, total, 0
        self._known: dict[frozenset[Head], Tensor] = {}

    def curve(self, steps: Sequence[Sequence[Head]]) -> Float[Tensor, "point prompt"]:
        """The metric with all heads, and after each step."""
        gone: list[Head] = []
        points: list[Tensor] = []
        for heads in [(), *steps]:
            gone += heads
            found = frozenset(gone)
            if found not in self._known:
                lens, task, metric, batch_size = self._how
                edits = [Zero(tuple(gone))] if gone else []
                self._known[found] = grade(lens, task, edits, metric, batch_size)
            points.append(self._known[found])
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)
        return torch.stack(points)


def grade(
    lens: Lens, task: Task, edits: Sequence[Edit], metric: str, batch_size: int
) -> Float[Tensor, " prompt"]:
    """The metric of each clean prompt under edits; float64, on the CPU."""
    with lens.edit(*edits) if edits else nullcontext():
        logits = lens.logits(task.clean_inputs(), task.reads, batch_size)
    return task.score(logits, metric).double().cpu()


def _greedy(
    anatomy: Anatomy, ranking: Ranking, count: int, least: int
) -> tuple[list[list[Head]], list[float]]:
    """Heads by step, and the score that each had when it went."""
    room = {site.name: max(site.heads - least, 0) for site in anatomy.sites}
    if least < 0 or not any(room.values()):
        raise InputError(
            f"least={least} heads a layer leaves nothing to prune; the layers have "
            f"{max(site.heads for site in anatomy.sites)} heads at most. Give a number from 0 up."
        )
    gone: list[Head] = []
    steps: list[list[Head]] = []
    scored: list[float] = []
    while any(room.values()):
        scores = ranking(gone)
        taken: list[Head] = []
        for head in sorted(set(scores) - set(gone), key=lambda head: (scores[head], head)):
            if room[head.site] and len(taken) < count:
                room[head.site] -= 1
                taken.append(head)
        gone += taken
        steps.append(taken)
        scored += [scores[head] for head in taken]
    return steps, scored


def _random_steps(anatomy: Anatomy, seed: int, count: int, least: int) -> list[list[Head]]:
    draw = random.Random(seed)
    scores = {head: draw.random() for head in anatomy.heads}
    return _greedy(anatomy, _constant(scores), count, least)[0]


def _constant(scores: Mapping[Head, float]) -> Ranking:
    return lambda _: scores


def _given(anatomy: Anatomy, scores: Sequence[float] | Float[Tensor, " head"]) -> Ranking:
    way = (
        f"give one number for each of the {len(anatomy.heads)} heads, in the order of "
        "lens.anatomy.heads."
    )
    try:
        values = torch.as_tensor(scores, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"scores is no list of numbers ({error}): {way}") from error
    if values.shape != (len(anatomy.heads),) or bool(values.isnan().any()):
        nan = " and NaN" if values.isnan().any() else ""
        raise InputError(f"scores has shape {list(values.shape)}{nan}; {way}")
    return _constant(dict(zip(anatomy.heads, values.tolist(), strict=True)))


def _heads_a_step(step: int | float, heads: int) -> int:
    if isinstance(step, int) and step >= 1:
        return step
    if isinstance(step, float) and 0 < step <= 1:
        return max(1, round(step * heads))
    raise InputError(f"step={step}: give a number of heads from 1 up, or a share such as 0.1.")


def _named(prefix: str, interval: Interval) -> dict[str, Tensor]:
    return {
        f"{prefix}mean": interval.mean,
        f"{prefix}low": interval.low,
        f"{prefix}high": interval.high,
    }
