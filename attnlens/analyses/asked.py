"""What a sweep was asked for: enough to make its result from values, with or without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.sweeps.manifest import Manifest
from attnlens.sweeps.run import Values

Facts = Mapping[str, Any]
"""What a store tells beside its trials, as JSON holds it; results are made of it and of values."""


@dataclass(frozen=True)
class Asked:
    """What all kinds of sweeps are asked for.

    Raises:
        InputError: intervals that cannot be taken; said before anything runs.

    """

    task: str
    metric: str
    seed: int
    resamples: int
    confidence: float

    def __post_init__(self) -> None:
        check_bootstrap(self.resamples, self.confidence)

    @classmethod
    def of(cls, manifest: Manifest) -> Asked:
        """What the sweep of a store was asked for."""
        facts, task = manifest.settings, manifest.task
        how = int(facts["resamples"]), float(facts["confidence"])
        return cls(task["name"], task["metric"], manifest.seed, *how)

    def facts(self, kind: str, **more: Any) -> Facts:
        """What a store is told; `kind` says which result its values make."""
        how = {"resamples": self.resamples, "confidence": self.confidence}
        return {"kind": kind, **more, **how}

    def interval(self, change: Float[Tensor, "*trial prompt"]) -> Interval:
        """Mean over prompts with its bounds; prompts that are not done are left out."""
        return bootstrap_mean(change.movedim(-1, 0), self.resamples, self.confidence, self.seed)


def missing_note(values: Values) -> tuple[str, ...]:
    """How much of a sweep is missing, where it is not finished."""
    left = int(values.values.isnan().sum() + values.clean.isnan().sum())
    if not left:
        return ()
    total = values.values.numel() + values.clean.numel()
    return (
        f"Not finished: {left:,} of {total:,} values are missing; resume the sweep to get them.",
    )
