"""Gradient importance: what each head's output is worth to a task, from one backward pass.

`z . dM/dz` is the first-order change of the metric M when a head's output z is taken away. Michel
et al. 2019 (Are sixteen heads really better than one?) rank heads by its size. It is an estimate: a
head whose softmax is saturated, or whose work another would take over, is not what it seems; exact
effects are those of `ablate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.per_head import head_frame
from attnlens.analyses.uncertainty import bootstrap_mean, check_bootstrap
from attnlens.anatomy import Head, Site
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit, Editor, HeadEdit
from attnlens.hooks.gradients import ZGradient, z_gradients
from attnlens.hooks.reads import ReadRows
from attnlens.hooks.seam import Call
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch, split
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task
from attnlens.tasks.task import check_metric


class Estimator(StrEnum):
    """Where the absolute value is taken; each head's values are then averaged over prompts."""

    TOKENS = "tokens"
    """`sum_t |z_t . dM/dz_t|`: what a head does for one token and against another adds up."""
    PROMPTS = "prompts"
    """`|sum_t z_t . dM/dz_t|`: the paper's formula; never more than `tokens`."""


@dataclass(frozen=True)
class GradientImportance:
    """Importance of each head, and the first-order effect of zero ablation.

    Attributes:
        task: what was graded.
        metric: whose gradient was taken: "loss" (nats) or "logit_difference" (logits).
        estimator, normalised: how it was computed; normalised ones are shares of the layer's L2
            norm, their bounds too.
        heads: every head, in the order of every `head` axis.
        importance: mean over prompts, with bounds `low` and `high`.
        signed: `mean(-sum_t z_t . dM/dz_t)` over prompts, with its bounds: how the metric would
            change without the head, were it linear. Never normalised.
        by_prompt, signed_by_prompt: of each prompt; not normalised.
        seed, resamples, confidence: of the bootstrap.
        notes: what a reader should know.

    """

    task: str
    metric: str
    estimator: Estimator
    normalised: bool
    heads: tuple[Head, ...]
    importance: Float[Tensor, " head"]
    low: Float[Tensor, " head"]
    high: Float[Tensor, " head"]
    signed: Float[Tensor, " head"]
    signed_low: Float[Tensor, " head"]
    signed_high: Float[Tensor, " head"]
    by_prompt: Float[Tensor, "head prompt"]
    signed_by_prompt: Float[Tensor, "head prompt"]
    seed: int
    resamples: int
    confidence: float
    notes: tuple[str, ...]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return self.by_prompt.shape[1]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: importance and signed first-order effect, each with bounds."""
        return head_frame(
            self.heads,
            {
                "importance": self.importance,
                "importance_low": self.low,
                "importance_high": self.high,
                "signed": self.signed,
                "signed_low": self.signed_low,
                "signed_high": self.signed_high,
            },
        )


def gradient_importance(
    lens: Lens,
    task: Task,
    metric: str | None = None,
    estimator: Estimator | str = Estimator.TOKENS,
    normalise: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> GradientImportance:
    """Importance of every head: `I_h = mean over prompts of sum_t |z_h,t . dM/dz_h,t|`.

    One forward and one backward a batch, whatever the number of heads. `estimator` says where the
    absolute value is taken; `normalise` divides by the L2 norm of the layer's importances, as the
    paper does before it compares layers. Where the metric has no gradient (accuracy), that of the
    loss is taken and a note says so. Inside `lens.edit` it is the edited model's. Michel et al.
    2019, Are sixteen heads really better than one?

    Raises:
        InputError: an unknown estimator, a model without logits, or a gradient that is not finite.
        UnsupportedModelError: a part of the model runs without gradients.

    """
    chosen = known_estimator(estimator)
    check_bootstrap(resamples, confidence)
    taken, notes = differentiable(task, metric)
    heads, importance, signed = head_gradients(lens, task, taken, chosen, batch_size)
    found = bootstrap_mean(importance, resamples, confidence, seed)
    effect = bootstrap_mean(signed, resamples, confidence, seed)
    norms = layer_norms(heads, found.mean) if normalise else torch.ones_like(found.mean)
    if len(task) < 2:
        notes = (*notes, "One prompt gives no interval over prompts; give several.")
    return GradientImportance(
        task=task.name,
        metric=taken,
        estimator=chosen,
        normalised=normalise,
        heads=heads,
        importance=found.mean / norms,
        low=found.low / norms,
        high=found.high / norms,
        signed=effect.mean,
        signed_low=effect.low,
        signed_high=effect.high,
        by_prompt=importance.T,
        signed_by_prompt=signed.T,
        seed=seed,
        resamples=resamples,
        confidence=confidence,
        notes=notes,
    )


def first_order_effects(
    lens: Lens,
    task: Task,
    trials: Sequence[Trial],
    metric: str | None = None,
    batch_size: int = 8,
) -> Float[Tensor, "trial prompt"]:
    """Estimated effect of trials on each prompt's metric: `sum_t (z'_t - z_t) . dM/dz_t`.

    z' is what a trial's edits make of each of their sites in the clean run, so the effects of
    several sites add up, and one site's change does not reach another. One forward and backward a
    batch serves all trials.

    Raises:
        InputError: a trial that edits a residual stream or an MLP, which no z stands for.

    """
    taken, _ = differentiable(task, metric)
    effects = torch.zeros(len(trials), len(task), dtype=torch.float64)
    for prompts, part, gradients in task_gradients(lens, task, taken, batch_size):
        anatomy = lens.anatomy_for(part)
        assert part.ids is not None
        for number, trial in enumerate(trials):
            edits = trial.of_prompts(lens, prompts, part.ids.shape[1])
            editor = Editor(anatomy, _of_heads(trial, edits))
            editor.running.begin(part.inputs)
            for name in sorted(editor.sites):
                site, found = anatomy[name], gradients[name]
                change = _edited(editor, site, found.call) - found.z
                effect = _products(site, part, change, found.gradient).sum((1, 2))
                effects[number, prompts] += effect.cpu().double()
    return effects


def head_gradients(
    lens: Lens, task: Task, metric: str, estimator: Estimator, batch_size: int
) -> tuple[tuple[Head, ...], Float[Tensor, "prompt head"], Float[Tensor, "prompt head"]]:
    """All heads, their importance, and the first-order effect of taking each away; float64."""
    heads: tuple[Head, ...] = ()
    sizes: list[Tensor] = []
    signed: list[Tensor] = []
    for _, part, gradients in task_gradients(lens, task, metric, batch_size):
        sites = lens.anatomy_for(part).sites
        heads = tuple(site.head(number) for site in sites for number in range(site.heads))
        tokens: list[Tensor] = []
        sums: list[Tensor] = []
        for site in sites:
            found = gradients[site.name]
            products = _products(site, part, found.z, found.gradient)
            tokens.append(products.abs().sum(1).cpu().double())
            sums.append(products.sum(1).cpu().double())
        signed.append(-torch.cat(sums, dim=1))
        whole = estimator is Estimator.PROMPTS
        sizes.append(signed[-1].abs() if whole else torch.cat(tokens, dim=1))
    return heads, torch.cat(sizes), torch.cat(signed)


def task_gradients(
    lens: Lens, task: Task, metric: str, batch_size: int
) -> Iterator[tuple[slice, Batch, dict[str, ZGradient]]]:
    """A task's clean prompts a batch at a time: which they are, the batch, z and dM/dz by site."""
    whole = lens.encode(task.clean_inputs())
    start = 0
    for part in split(whole, batch_size, by_length=False)[0]:
        prompts = slice(start, start + part.size)
        start = prompts.stop
        own = task.subset(prompts)
        anatomy = lens.anatomy_for(part)
        if anatomy.unembedding is None:
            raise InputError(
                f"{lens.anatomy.model} has no logits: it has no language-model head. Load the "
                "model with its head to grade its answers."
            )

        def graded(output: Any, own: Task = own) -> Tensor:
            return own.score(output.logits, metric)

        reads = ReadRows(anatomy, own.reads)
        yield prompts, part, z_gradients(lens.model, anatomy, part.inputs, graded, None, [reads])


def differentiable(task: Task, metric: str | None) -> tuple[str, tuple[str, ...]]:
    """The metric whose gradient is taken, and a note where it is not the one asked for."""
    asked = check_metric(metric or task.metric)
    if asked != "accuracy":
        return asked, ()
    return "loss", ("Accuracy has no gradient; that of the loss is taken.",)


def known_estimator(estimator: Estimator | str) -> Estimator:
    """The estimator of a name; InputError for another."""
    if estimator not in list(Estimator):
        raise InputError(f"There is no estimator {estimator!r}; choose {', '.join(Estimator)}.")
    return Estimator(estimator)


def layer_norms(
    heads: Sequence[Head], importance: Float[Tensor, " head"]
) -> Float[Tensor, " head"]:
    """Of each head the L2 norm of its layer's importances; 1 where all of them are 0."""
    norms = torch.ones_like(importance)
    for name in dict.fromkeys(head.site for head in heads):
        own = torch.tensor([head.site == name for head in heads])
        norm = importance[own].norm()
        norms[own] = norm if norm > 0 else 1.0
    return norms


def _of_heads(trial: Trial, edits: Sequence[Edit]) -> Sequence[Edit]:
    other = [edit for edit in edits if not isinstance(edit, HeadEdit)]
    if other:
        raise InputError(
            f"Trial {trial.name!r} has no first-order effect by z: {other[0]} changes a stream. "
            "Grade it exactly instead, in a sweep."
        )
    return edits


def _products(
    site: Site,
    part: Batch,
    values: Float[Tensor, "batch query head d_v"],
    gradient: Float[Tensor, "batch query head d_v"],
) -> Float[Tensor, "batch query head"]:
    """`values . gradient` of each token and head, in float32 at least; 0 at padding."""
    wide = torch.promote_types(values.dtype, torch.float32)
    products = (values.to(wide) * gradient.to(wide)).sum(-1)
    real = part.sides.queries(site).real
    return products if real is None else products.masked_fill(~real[:, :, None], 0)


@torch.no_grad()
def _edited(editor: Editor, site: Site, call: Call) -> Float[Tensor, "batch query head d_v"]:
    """z as the edits make it of a clean call."""
    asked = editor.enter(site, call)
    return editor.see(site, call if asked is call else Call.of(asked)).output
