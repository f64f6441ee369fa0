"""Path patching: what one component tells another, with everything between them held as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.ablation import ablation_notes
from attnlens.analyses.asked import Asked, Facts
from attnlens.analyses.direct_paths import direct_values
from attnlens.analyses.frozen_paths import frozen_trials
from attnlens.analyses.path_ends import End, EndSpec, receivers_of, senders_of
from attnlens.anatomy import Anatomy
from attnlens.errors import InputError
from attnlens.hooks.edits import Patch
from attnlens.lens import Lens
from attnlens.sweeps.clean_run import TOLERANCES
from attnlens.sweeps.patches import Direction, swapped, whole_trial
from attnlens.sweeps.run import Values, run_trials
from attnlens.sweeps.sweep import Progress, SweepSettings
from attnlens.tasks import Task

Form = Literal["frozen", "direct"]
"""What lies between sender and receivers. `frozen`: all heads held, MLPs computed anew. `direct`:
nothing; the receivers alone read what the sender writes in the other run."""

_NO_SHARES = (
    "No shares: the two runs do not differ in the metric, or this model's last layer cannot be "
    "given all of the other run."
)


@dataclass(frozen=True)
class PathEffects:
    """Effect of the path from each sender to the receivers.

    The run that is patched is that of the clean prompts, under `denoise` that of the corrupt ones;
    the sender writes what it writes in the other. Answers are those of the clean prompts.

    Attributes:
        receivers, senders: by name, as `L3H5<k>`, `L3H5`, `L3.mlp`, `embed`, `logits`.
        clean, corrupt: the metric of each prompt as it is, and of its corrupt twin.
        patched: the metric of each prompt with the path from each sender as in the other run.
        effect: `mean(patched - M(the run that is patched))` over prompts, with bounds `low` and
            `high` of the interval of `confidence`.
        share: `effect / mean(M(the other run) - M(the run that is patched))`, the share of the gap
            that the path closes alone; NaN where there is none.

    """

    task: str
    metric: str
    form: Form
    direction: Direction
    receivers: tuple[str, ...]
    senders: tuple[str, ...]
    clean: Float[Tensor, " prompt"]
    corrupt: Float[Tensor, " prompt"]
    patched: Float[Tensor, "sender prompt"]
    effect: Float[Tensor, " sender"]
    low: Float[Tensor, " sender"]
    high: Float[Tensor, " sender"]
    share: Float[Tensor, " sender"]
    seed: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a sender: the metric with its path patched, effect with bounds, share."""
        return pd.DataFrame(
            {
                "sender": list(self.senders),
                "receivers": ", ".join(self.receivers),
                "patched": self.patched.nanmean(1).tolist(),
                "effect": self.effect.tolist(),
                "effect_low": self.low.tolist(),
                "effect_high": self.high.tolist(),
                "share": self.share.tolist(),
            }
        )


def path_patch(
    lens: Lens,
    task: Task,
    receivers: EndSpec = "logits",
    senders: EndSpec | None = None,
    form: Form = "frozen",
    direction: Direction = "noise",
    metric: str | None = None,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    sweep: SweepSettings | None = None,
    progress: Progress | None = None,
) -> PathEffects:
    """Patch the path from each sender to the receivers: `effect = mean(M(in_R := r_s) - M(x))`.

    `r_s` is what the receivers R read in the run of x in which sender s writes what it writes on x'
    (its z, what an MLP adds, or the stream that enters the first layer) and all other heads write
    what they write on x, MLPs computed anew. With those inputs x runs again, all else computed;
    where R is the logits the first run is the answer. In the `direct` form `r_s = r + s(x') - s(x)`
    of the stream that R reads, MLPs held, too. Under `denoise` x and x' change places.

    `receivers` are `"logits"`, heads (`"L3H5"`), inputs of heads (`"L3H5<q>"`, `<k>`, `<v>`) and
    MLPs (`"L3.mlp"`), several with commas or in a list; `senders` heads (all where not given), MLPs
    and `"embed"`, one a path. A sender that stands below no receiver has no effect. Heads that
    share keys and values receive them together; a note says so.

    Raises:
        InputError: ends that are none, no sender below a receiver, an unknown form or direction, or
            as for `ablate`.
        HeadError: a head or layer that the model does not have.
        UnsupportedModelError: an MLP or a stream that cannot be edited; for `direct` a model whose
            residual stream is no sum of what its parts wrote.

    Wang et al. 2022, Interpretability in the Wild; Goldowsky-Dill et al. 2023, Localizing Model
    Behavior with Path Patching.

    """
    if form not in get_args(Form):
        raise InputError(f"There is no form {form!r} of path patching; choose frozen or direct.")
    if direction not in get_args(Direction):
        raise InputError(f"There is no direction {direction!r}; choose noise or denoise.")
    to, of = receivers_of(lens, receivers), senders_of(lens, senders)
    below = sorted((s for s in of if any(map(s.precedes, to))), key=lambda s: s.place)
    if not below:
        raise InputError(
            f"No sender stands below a receiver ({', '.join(end.name for end in to)}): name "
            "senders of earlier layers, or later receivers."
        )
    asked = Asked(task.name, metric or task.metric, seed, resamples, confidence)
    run = swapped(task) if direction == "denoise" else task
    settings = sweep or SweepSettings()
    whole = None if form == "direct" else whole_trial(lens, run)
    about = asked.facts(
        "paths",
        form=form,
        direction=direction,
        receivers=[end.name for end in to],
        senders=[end.name for end in of],
        run=[end.name for end in below],
        both_runs=form == "direct" or whole is not None,
        rounding=TOLERANCES.get(next(lens.model.parameters()).dtype, 1e-2),
        notes=_notes(lens.anatomy, of, below, to),
    )
    if form == "direct":
        found = direct_values(lens, run, below, to, metric, settings, progress)
    else:
        trials = frozen_trials(lens, run, below, to, settings)
        trials += [] if whole is None else [whole]
        found = run_trials(lens, run, trials, metric, sweep, seed, about, progress)
    return paths_result(asked, about, found)


def paths_result(asked: Asked, facts: Facts, found: Values) -> PathEffects:
    """The result of values: a row a sender below a receiver, then the other run if it is there."""
    own = dict(zip(facts["run"], found.values, strict=False))
    patched = torch.stack([own.get(name, found.clean) for name in facts["senders"]])
    other = found.values[-1] if facts["both_runs"] else torch.full_like(found.clean, torch.nan)
    clean, corrupt = found.clean, other
    if facts["direction"] == "denoise":
        clean, corrupt = other, found.clean
    interval, gap = asked.interval(patched - found.clean), (other - found.clean).nanmean()
    scale = max(1.0, *(float(run.nan_to_num(0).abs().max()) for run in (clean, corrupt)))
    differ = abs(gap) > facts["rounding"] * scale
    shares = facts["both_runs"] and (bool(differ) or bool(gap.isnan()))
    return PathEffects(
        asked.task,
        asked.metric,
        facts["form"],
        facts["direction"],
        tuple(facts["receivers"]),
        tuple(facts["senders"]),
        clean,
        corrupt,
        patched,
        *interval,
        interval.mean / gap if differ else torch.full_like(interval.mean, torch.nan),
        asked.seed,
        asked.confidence,
        (
            *facts["notes"],
            *found.notes,
            *(() if shares else (_NO_SHARES,)),
            *ablation_notes(len(found.clean)),
        ),
    )


def _notes(
    anatomy: Anatomy, senders: Sequence[End], below: Sequence[End], receivers: Sequence[End]
) -> list[str]:
    """What was shared and what was left out."""
    notes: list[str] = []
    above = [end.name for end in senders if end not in below]
    if above:
        notes.append(f"No effect by definition, below no receiver: {', '.join(above)}.")
    for part in ("k", "v"):
        heads = [end.head for end in receivers if end.head is not None and part in end.inputs]
        moved = Patch(heads, part, {}).moved(anatomy) if heads else ()
        more = [str(head) for head in moved if head not in heads]
        if more:
            notes.append(
                f"{', '.join(more)} read the same {part} as receivers, and receive it too."
            )
    return notes
