"""Screened ablation: every head is estimated from one gradient, the leading ones are ablated.

The estimate is the first-order effect `sum_t (z'_t - z_t) . dM/dz_t` (attribution patching, Nanda
2023; for zero ablation the signed importance of Michel et al. 2019). It costs one forward and one
backward for all heads together; how far it can be trusted on this model and task is told by how it
ranks the heads that were ablated for certain.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.ablation import Ablation, ablate
from attnlens.analyses.importance import differentiable, first_order_effects
from attnlens.analyses.per_head import head_frame
from attnlens.analyses.uncertainty import bootstrap_mean
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.sweep import Progress, SweepSettings
from attnlens.tasks import Task


@dataclass(frozen=True)
class ScreenedAblation:
    """Estimated effects of all heads, and exact ones of those with the largest estimates.

    Attributes:
        heads: the heads that were estimated, in the order of the `head` axis.
        estimated: the metric of the estimates, that of `exact` unless it has no gradient.
        estimate: first-order effect of each on that metric, with bounds `low` and `high`.
        exact: the ablation of the `top` heads by absolute estimate, largest first.
        agreement: Spearman's rank correlation of estimate and exact effect over those; NaN of fewer
            than three, or where all are equal.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    estimated: str
    estimate: Float[Tensor, " head"]
    low: Float[Tensor, " head"]
    high: Float[Tensor, " head"]
    exact: Ablation
    agreement: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: estimate with bounds, exact effect where it was computed."""
        known = dict(zip(self.exact.heads, self.exact.effect.tolist(), strict=True))
        numbers = {
            "estimate": self.estimate,
            "estimate_low": self.low,
            "estimate_high": self.high,
            "effect": [known.get(head, float("nan")) for head in self.heads],
        }
        return head_frame(self.heads, numbers)


def ablate_screened(
    lens: Lens,
    task: Task,
    heads: HeadSpec = "all",
    top: int = 16,
    mode: Mode | str = Mode.ZERO,
    metric: str | None = None,
    reference: Inputs | None = None,
    controls: int = 0,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> ScreenedAblation:
    """Estimate each head's effect from one gradient, and ablate the `top` heads exactly.

    What a head does through a saturated softmax no gradient tells: its estimate may be 0, or of the
    wrong sign. `agreement` and the exact effects tell how much that matters here. `controls` random
    heads of the same layers are ablated beside the leading ones (none where not asked; the
    estimates of all heads stand beside them). Arguments and errors otherwise as for `ablate`.
    """
    if top < 1:
        raise InputError(f"top={top} verifies nothing; give 1 or more.")
    chosen = lens.anatomy.find(heads)
    ablator = Ablator.of(lens, task, mode, reference)
    trials = [ablator.trial([head]) for head in chosen]
    size = (sweep or SweepSettings()).batch_size
    effects = first_order_effects(lens, task, trials, metric, size)
    estimate = bootstrap_mean(effects.T, resamples, confidence, seed)
    order = estimate.mean.abs().argsort(descending=True)[:top].tolist()
    leading = [chosen[i] for i in order]
    exact = ablate(
        lens, task, leading, mode, metric, reference, controls, seed, resamples, confidence,
        sweep, progress,
    )  # fmt: skip
    taken, notes = differentiable(task, metric)
    if exact.mode is Mode.FROZEN:
        notes = (
            *notes,
            "Estimates are those of mode zero: in a first-order effect later heads look elsewhere.",
        )
    agreement = float("nan")
    if taken == exact.metric:
        agreement = _rank_correlation(estimate.mean[order], exact.effect)
    else:
        notes = (*notes, "Estimates are of another metric than effects: ranks are not compared.")
    return ScreenedAblation(chosen, taken, *estimate, exact, agreement, notes)


def _rank_correlation(estimate: Float[Tensor, " head"], effect: Float[Tensor, " head"]) -> float:
    """Spearman's; NaN of fewer than three heads, and where all are equal."""
    if len(estimate) < 3 or min(len(values.unique()) for values in (estimate, effect)) < 2:
        return float("nan")
    return float(pd.Series(estimate.numpy()).corr(pd.Series(effect.numpy()), method="spearman"))
