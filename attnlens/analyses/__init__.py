"""The methods, one file each: a function from a lens, or from tensors, to a small frozen result.

`attnlens.rollout`, `sinks`, `profile`, `head_types` and `ablate` are the methods; here are their
files, results and settings. Each is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlens.analyses import ablation, head_types, profile, rollout, sinks, uncertainty
    from attnlens.analyses.ablation import Ablation, Mode, SetAblation, ablate, ablate_together
    from attnlens.analyses.head_types import HeadTypes
    from attnlens.analyses.profile import Profile
    from attnlens.analyses.rollout import (
        Rollout,
        RolloutRow,
        RolloutSettings,
        rollout_from,
        rollout_matrix,
    )
    from attnlens.analyses.sinks import Sinks, SinkSettings
    from attnlens.analyses.uncertainty import Interval, bootstrap_mean

# Where each public name lives. A method of the same name as its file (rollout.rollout) is not
# lifted here: the name stands for the file.
_HOMES = {
    "Ablation": "attnlens.analyses.ablation",
    "HeadTypes": "attnlens.analyses.head_types",
    "Interval": "attnlens.analyses.uncertainty",
    "Mode": "attnlens.analyses.ablation",
    "Profile": "attnlens.analyses.profile",
    "Rollout": "attnlens.analyses.rollout",
    "RolloutRow": "attnlens.analyses.rollout",
    "RolloutSettings": "attnlens.analyses.rollout",
    "SetAblation": "attnlens.analyses.ablation",
    "SinkSettings": "attnlens.analyses.sinks",
    "Sinks": "attnlens.analyses.sinks",
    "ablate": "attnlens.analyses.ablation",
    "ablate_together": "attnlens.analyses.ablation",
    "bootstrap_mean": "attnlens.analyses.uncertainty",
    "rollout_from": "attnlens.analyses.rollout",
    "rollout_matrix": "attnlens.analyses.rollout",
}
_FILES = frozenset({"ablation", "head_types", "profile", "rollout", "sinks", "uncertainty"})

__all__ = [
    "Ablation",
    "HeadTypes",
    "Interval",
    "Mode",
    "Profile",
    "Rollout",
    "RolloutRow",
    "RolloutSettings",
    "SetAblation",
    "SinkSettings",
    "Sinks",
    "ablate",
    "ablate_together",
    "ablation",
    "bootstrap_mean",
    "head_types",
    "profile",
    "rollout",
    "rollout_from",
    "rollout_matrix",
    "sinks",
    "uncertainty",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _FILES:
        return import_module(f"attnlens.analyses.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'attnlens.analyses' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted(set(globals()) | set(__all__))
