"""What scores of edges and nodes share: how they are made, and the run of a task's gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.edge_runs import (
    EdgeAblation,
    Progress,
    References,
    encoded,
    known_ablation,
    listened,
    real_positions,
)
from attnlens.analyses.importance import differentiable
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.errors import InputError
from attnlens.hooks.edge_gradients import Asked, ask
from attnlens.hooks.reads import ReadRows
from attnlens.hooks.wiring import Wiring
from attnlens.lens import Inputs, Lens
from attnlens.lens.inputs import Batch
from attnlens.sweeps.patches import Direction
from attnlens.tasks import Task
from attnlens.tasks.task import check_metric

Method = Literal["eap-ig", "eap", "exact"]

Score = Callable[[Wiring, Mapping[str, Tensor], Asked, Mapping[str, Tensor | None]], Tensor]
"""(wiring, change by writer, gradients, real positions by stream) -> a score a prompt and part."""


@dataclass(frozen=True)
class Scoring:
    """How scores were made; a circuit's file says the same.

    Attributes:
        method: "exact", "eap" or "eap-ig".
        ablation: what is read along an edge that is cut.
        direction: which prompts are run; see `Direction`.
        steps: inputs that gradients were averaged over; 1 of the prompt itself; 0 of "exact".
        seed, resamples, confidence: of the bootstrap over prompts.

    """

    task: str
    metric: str
    model: str
    method: Method
    ablation: EdgeAblation
    direction: Direction
    steps: int
    seed: int
    resamples: int
    confidence: float

    def interval(self, by_prompt: Float[Tensor, "prompt any"]) -> Interval:
        """Mean over prompts with its bounds."""
        return bootstrap_mean(by_prompt, self.resamples, self.confidence, self.seed)

    def facts(self) -> dict[str, Any]:
        """As a circuit's file holds it; the bootstrap's settings are the circuit's own."""
        names = ("task", "metric", "model", "method", "direction", "steps")
        return {name: getattr(self, name) for name in names} | {
            "ablation": str(self.ablation),
            "positions": "all",
        }


def scoring_of(
    lens: Lens,
    task: Task,
    method: Method,
    steps: int,
    ablation: EdgeAblation | str,
    direction: Direction,
    metric: str | None,
    seed: int,
    resamples: int,
    confidence: float,
) -> tuple[Scoring, tuple[str, ...]]:
    """What was asked for, checked, and notes on it."""
    check_bootstrap(resamples, confidence)
    if method not in get_args(Method):
        raise InputError(f"There is no method {method!r}; choose {', '.join(get_args(Method))}.")
    if steps < 1:
        raise InputError(f"steps={steps}; a gradient is averaged over one input at least.")
    taken, notes = check_metric(metric or task.metric), ()
    if method != "exact":
        taken, notes = differentiable(task, metric)
    if len(task) < 2:
        notes = (*notes, "One prompt gives no interval over prompts; give several.")
    counted = {"exact": 0, "eap": 1, "eap-ig": steps}[method]
    model, kind = lens.anatomy.model, known_ablation(ablation)
    return Scoring(
        task.name, taken, model, method, kind, direction, counted, seed, resamples, confidence
    ), notes


def first_order(
    lens: Lens,
    task: Task,
    scoring: Scoring,
    score: Score,
    reference: Inputs | None,
    batch_size: int,
    progress: Progress | None,
) -> Float[Tensor, "prompt *scores"]:
    """Scores of each prompt from its gradients, a mean over the inputs that they are taken at."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}; give 1 or more.")
    references = References.of(lens, task, scoring.ablation, reference)
    found: list[Tensor] = []
    for start in range(0, len(task), batch_size):
        part = task.subset(slice(start, start + batch_size))
        found.append(_of_batch(references, part, scoring, score))
        if progress is not None:
            progress(min(start + batch_size, len(task)), len(task))
    return torch.cat(found)


def _of_batch(references: References, part: Task, scoring: Scoring, score: Score) -> Tensor:
    lens = references.lens
    batch = encoded(lens, part)
    real = real_positions(batch)
    if scoring.method == "eap":
        asked = _asked(lens, batch, part, scoring.metric, None)
        clean = asked.activations.written
        change = _change(clean, references.written(part, clean))
        return score(lens.wiring, change, asked, real)
    clean = listened(lens, batch, part)[0].written
    other = references.written(part, clean)
    change = _change(clean, other)
    embeds = [writer.name for writer in lens.wiring.writers if writer.kind == "embed"]
    total: Tensor | None = None
    for step in range(scoring.steps):
        share = (step + 0.5) / scoring.steps
        between = {
            name: torch.lerp(other[name].to(clean[name]), clean[name], share) for name in embeds
        }
        own = score(lens.wiring, change, _asked(lens, batch, part, scoring.metric, between), real)
        total = own if total is None else total + own
    assert total is not None
    return total / scoring.steps


def _asked(
    lens: Lens, batch: Batch, part: Task, metric: str, between: Mapping[str, Tensor] | None
) -> Asked:
    def graded(output: Any) -> Tensor:
        return part.score(output.logits, metric)

    reads = ReadRows(lens.anatomy_for(batch), part.reads)
    return ask(lens.wiring, batch.inputs, graded, (reads,), between)


def _change(clean: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: other[name].to(tensor) - tensor for name, tensor in clean.items()}
