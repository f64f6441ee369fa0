"""Any edits on a task: the effect of each named list of edits, beside the model as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.ablation import ablation_notes
from attnlens.analyses.asked import Asked, Facts
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from attnlens.sweeps.run import Values, run_trials
from attnlens.sweeps.sweep import Progress, SweepSettings
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task


@dataclass(frozen=True)
class EditEffects:
    """Effect of each list of edits on a task.

    Attributes:
        names, edits: what each list is called, and what its edits say they are.
        clean: the metric of each prompt, nothing edited.
        edited: the metric of each prompt under each list.
        effect: `mean(edited - clean)` over prompts, with bounds `low` and `high` of the interval of
            `confidence`.

    """

    task: str
    metric: str
    names: tuple[str, ...]
    edits: tuple[str, ...]
    clean: Float[Tensor, " prompt"]
    edited: Float[Tensor, "list prompt"]
    effect: Float[Tensor, " list"]
    low: Float[Tensor, " list"]
    high: Float[Tensor, " list"]
    seed: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a list: its name, its edits, the metric, effect with bounds."""
        return pd.DataFrame(
            {
                "name": list(self.names),
                "edits": list(self.edits),
                "edited": self.edited.nanmean(1).tolist(),
                "effect": self.effect.tolist(),
                "effect_low": self.low.tolist(),
                "effect_high": self.high.tolist(),
            }
        )


def try_edits(
    lens: Lens,
    task: Task,
    edits: Mapping[str, Edit | Sequence[Edit]],
    metric: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> EditEffects:
    """Grade a task under each named list of edits: `effect = mean(M(edited) - M(clean))`.

    Edits that hold tensors of prompts (`Patch`) hold those of all prompts of the task, in order.

    Raises:
        InputError: no edits, or as for `ablate`.

    """
    if not edits:
        raise InputError("No edits were given: {'quiet': al.Scale('L3', 0.5), ...}.")
    lists = {
        name: (given,) if isinstance(given, Edit) else tuple(given) for name, given in edits.items()
    }
    trials = [Trial(name, own) for name, own in lists.items()]
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    texts = {name: "; ".join(map(str, own)) for name, own in lists.items()}
    about = asked.facts("edits", edits=texts)
    found = run_trials(lens, task, trials, metric, sweep, seed, about, progress)
    return edits_result(asked, about, found)


def edits_result(asked: Asked, facts: Facts, found: Values) -> EditEffects:
    """The result of values, one row a list of edits."""
    return EditEffects(
        asked.task,
        asked.metric,
        tuple(facts["edits"]),
        tuple(facts["edits"].values()),
        found.clean,
        found.values,
        *asked.interval(found.values - found.clean),
        asked.seed,
        asked.confidence,
        (*found.notes, *ablation_notes(len(found.clean))),
    )
