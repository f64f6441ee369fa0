"""Head ablation: how much worse, or better, a task goes without a head.

A head's output is replaced by zero, by its mean over a reference set, or by the even mean of the
values it sees (`uniform`), and the task is graded again. Papers call different things "masking", so
results say which was done. Michel et al. 2019, Are sixteen heads really better than one?
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.per_head import head_frame
from attnlens.analyses.uncertainty import bootstrap_mean
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit, Mean, Uniform, Zero
from attnlens.lens import Inputs, Lens
from attnlens.tasks import Task

Progress = Callable[[int, int], None]
"""Called with (done, all) after each run of the task."""


class Mode(StrEnum):
    """What takes the place of a head's output z."""

    ZERO = "zero"
    """Nothing."""
    MEAN = "mean"
    """Its mean over all positions of the reference prompts."""
    UNIFORM = "uniform"
    """The mean of the values that each row sees: A = 1 / visible keys."""


@dataclass(frozen=True)
class Ablation:
    """Effect of ablating each head by itself.

    Attributes:
        task, metric, mode: what was graded, by what, and what took the place of a head's output.
        heads: the heads that were ablated, in the order of every `head` axis.
        clean: the metric of each prompt, nothing ablated.
        ablated: the metric of each prompt with one head ablated.
        effect: `mean(ablated - clean)` over prompts, with bounds `low` and `high`; a head that
            helps has a negative effect on accuracy and logit difference, a positive one on loss.
        control: the same for matched random heads, those of `control_heads`: other heads of the
            same layer, averaged; NaN where the layer has no other head.
        seed: of the choice of control heads and of the bootstrap.
        notes: what a reader should know.

    """

    task: str
    metric: str
    mode: Mode
    heads: tuple[Head, ...]
    clean: Float[Tensor, " prompt"]
    ablated: Float[Tensor, "head prompt"]
    effect: Float[Tensor, " head"]
    low: Float[Tensor, " head"]
    high: Float[Tensor, " head"]
    control: Float[Tensor, " head"]
    control_low: Float[Tensor, " head"]
    control_high: Float[Tensor, " head"]
    control_heads: tuple[tuple[Head, ...], ...]
    seed: int
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: ablated metric, effect with bounds, control with bounds."""
        return head_frame(
            self.heads,
            {
                "ablated": self.ablated.mean(1),
                "effect": self.effect,
                "effect_low": self.low,
                "effect_high": self.high,
                "control": self.control,
                "control_low": self.control_low,
                "control_high": self.control_high,
            },
        )


@dataclass(frozen=True)
class SetAblation:
    """Effect of ablating a set of heads at once, beside random sets that do not touch it.

    `control_sets` have as many heads in each layer as the set; `control` is the effect of each.
    """

    task: str
    metric: str
    mode: Mode
    heads: tuple[Head, ...]
    clean: Float[Tensor, " prompt"]
    ablated: Float[Tensor, " prompt"]
    effect: float
    low: float
    high: float
    control: Float[Tensor, " set"]
    control_sets: tuple[tuple[Head, ...], ...]
    seed: int
    notes: tuple[str, ...]


def ablate(
    lens: Lens,
    task: Task,
    heads: HeadSpec = "all",
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    controls: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> Ablation:
    """Ablate each head by itself and grade the task: `effect = mean(M(ablated) - M(clean))`.

    Logits are taken only where the metric reads. `reference` gives the means of mode mean; the
    task's corrupt prompts where not given. Each head's control is the mean effect of up to
    `controls` random other heads of its layer.

    Raises:
        HeadError: a head that the model does not have.
        InputError: an unknown mode, or a model without logits.

    """
    chosen = lens.anatomy.find(heads)
    draw = random.Random(seed)
    matched = tuple(_others(lens, head, controls, draw) for head in chosen)
    grade = _Grader(lens, task, Mode(_known(mode)), metric, reference, batch_size)
    wanted = list(dict.fromkeys([*chosen, *(head for group in matched for head in group)]))
    clean = grade()
    values: dict[Head, Tensor] = {}
    for done, head in enumerate(wanted, 1):
        values[head] = grade([head])
        if progress is not None:
            progress(done, len(wanted))
    ablated = torch.stack([values[head] for head in chosen])
    lost = torch.full_like(clean, torch.nan)
    control = [
        torch.stack([values[h] - clean for h in group]).mean(0) if group else lost
        for group in matched
    ]
    effect = bootstrap_mean((ablated - clean).T, resamples, confidence, seed)
    beside = bootstrap_mean(torch.stack(control).T, resamples, confidence, seed)
    return Ablation(
        task.name,
        metric or task.metric,
        grade.mode,
        chosen,
        clean,
        ablated,
        *effect,
        *beside,
        matched,
        seed,
        _notes(task, [chosen[i] for i, group in enumerate(matched) if not group]),
    )


def ablate_together(
    lens: Lens,
    task: Task,
    heads: HeadSpec,
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    controls: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> SetAblation:
    """Ablate a set of heads at once, and `controls` random sets with as many heads in each layer.

    The random sets exclude the heads of the set; where a layer has too few others there is no
    control, and a note says so. Arguments and errors otherwise as for `ablate`.
    """
    chosen = lens.anatomy.find(heads)
    grade = _Grader(lens, task, Mode(_known(mode)), metric, reference, batch_size)
    sets, notes = _matched_sets(lens, chosen, controls, random.Random(seed))
    clean, ablated = grade(), grade(chosen)
    effect = bootstrap_mean(ablated - clean, resamples, confidence, seed)
    beside: list[float] = []
    for done, group in enumerate(sets, 1):
        beside.append(float((grade(group) - clean).mean()))
        if progress is not None:
            progress(done, len(sets))
    return SetAblation(
        task.name,
        metric or task.metric,
        grade.mode,
        chosen,
        clean,
        ablated,
        float(effect.mean),
        float(effect.low),
        float(effect.high),
        torch.tensor(beside, dtype=torch.float64),
        sets,
        seed,
        (*notes, *_notes(task, [])),
    )


def edit_of(
    mode: Mode, heads: Sequence[Head], means: Mapping[str, Float[Tensor, "head d_v"]] | None
) -> Edit:
    """The edit that ablates the heads; mode mean needs the means of `lens.mean_z`."""
    if mode is Mode.ZERO:
        return Zero(tuple(heads))
    if mode is Mode.UNIFORM:
        return Uniform(tuple(heads))
    if means is None:
        raise InputError("Mean ablation needs the mean z of the heads: lens.mean_z(reference).")
    return Mean(tuple(heads), means)


class _Grader:
    """Grades a task with some heads ablated: the metric of each prompt, in float64 on the CPU."""

    def __init__(
        self,
        lens: Lens,
        task: Task,
        mode: Mode,
        metric: str | None,
        reference: Inputs | None,
        batch_size: int,
    ) -> None:
        self.mode = mode
        self._lens, self._task, self._metric = lens, task, metric
        self._batch_size = batch_size
        self._means: Mapping[str, Tensor] | None = None
        if mode is Mode.MEAN:
            self._means = lens.mean_z(task.corrupt_inputs() if reference is None else reference)

    def __call__(self, heads: Sequence[Head] = ()) -> Float[Tensor, " prompt"]:
        if not heads:
            return self._graded()
        with self._lens.edit(edit_of(self.mode, heads, self._means)):
            return self._graded()

    def _graded(self) -> Float[Tensor, " prompt"]:
        task = self._task
        logits = self._lens.logits(task.clean_inputs(), task.reads, self._batch_size)
        return task.score(logits, self._metric).double().cpu()


def _known(mode: Mode | str) -> str:
    if mode not in list(Mode):
        raise InputError(f"There is no ablation {mode!r}; choose {', '.join(Mode)}.")
    return mode


def _others(lens: Lens, head: Head, count: int, draw: random.Random) -> tuple[Head, ...]:
    """Up to `count` random other heads of the same layer, in order."""
    site = lens.anatomy[head.site]
    others = [site.head(number) for number in range(site.heads) if number != head.head]
    return tuple(sorted(draw.sample(others, min(count, len(others)))))


def _matched_sets(
    lens: Lens, heads: Sequence[Head], count: int, draw: random.Random
) -> tuple[tuple[tuple[Head, ...], ...], tuple[str, ...]]:
    """Random sets with as many heads of each site as `heads` has, none of which is in `heads`."""
    free: dict[str, list[Head]] = {}
    for name in dict.fromkeys(head.site for head in heads):
        site = lens.anatomy[name]
        free[name] = [site.head(n) for n in range(site.heads) if site.head(n) not in heads]
        needed = sum(head.site == name for head in heads)
        if len(free[name]) < needed:
            note = f"No control: {name} has {len(free[name])} heads outside the set, not {needed}."
            return (), (note,)
    sets = [
        tuple(
            picked
            for name, others in free.items()
            for picked in sorted(draw.sample(others, sum(head.site == name for head in heads)))
        )
        for _ in range(count)
    ]
    return tuple(dict.fromkeys(sets)), ()


def _notes(task: Task, alone: Sequence[Head]) -> tuple[str, ...]:
    notes: list[str] = []
    if alone:
        notes.append(f"No control for {', '.join(map(str, alone[:4]))}: none drawn from the layer.")
    if len(task) < 2:
        notes.append("One prompt gives no interval over prompts; give several.")
    return tuple(notes)
