"""Read, measure and edit the attention of pretrained transformers while they run.

Importing this loads neither torch nor transformers: each public name is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlens import analyses, errors, graphs, tasks, views, zoo
    from attnlens.analyses.ablation import ablate
    from attnlens.analyses.head_types import head_types
    from attnlens.analyses.profile import profile
    from attnlens.analyses.rollout import rollout
    from attnlens.analyses.sinks import sinks
    from attnlens.graphs.flow import rollout_graph
    from attnlens.hooks.edits import Mean, Scale, Uniform, Zero
    from attnlens.hooks.reducers import (
        ArgMax,
        ColumnMass,
        DuplicateMass,
        Entropy,
        FirstTokenMass,
        InductionMass,
        MeanDistance,
        OffsetMass,
    )
    from attnlens.lens import Lens, load
    from attnlens.views import show

__version__ = "0.1.0"

# Where each public name lives; a room is its own module.
_HOMES = {
    "ArgMax": "attnlens.hooks.reducers",
    "ColumnMass": "attnlens.hooks.reducers",
    "DuplicateMass": "attnlens.hooks.reducers",
    "Entropy": "attnlens.hooks.reducers",
    "FirstTokenMass": "attnlens.hooks.reducers",
    "InductionMass": "attnlens.hooks.reducers",
    "Lens": "attnlens.lens",
    "Mean": "attnlens.hooks.edits",
    "MeanDistance": "attnlens.hooks.reducers",
    "OffsetMass": "attnlens.hooks.reducers",
    "Scale": "attnlens.hooks.edits",
    "Uniform": "attnlens.hooks.edits",
    "Zero": "attnlens.hooks.edits",
    "ablate": "attnlens.analyses.ablation",
    "head_types": "attnlens.analyses.head_types",
    "load": "attnlens.lens",
    "profile": "attnlens.analyses.profile",
    "rollout": "attnlens.analyses.rollout",
    "rollout_graph": "attnlens.graphs.flow",
    "show": "attnlens.views",
    "sinks": "attnlens.analyses.sinks",
}
_ROOMS = frozenset({"analyses", "errors", "graphs", "tasks", "views", "zoo"})

__all__ = [
    "ArgMax",
    "ColumnMass",
    "DuplicateMass",
    "Entropy",
    "FirstTokenMass",
    "InductionMass",
    "Lens",
    "Mean",
    "MeanDistance",
    "OffsetMass",
    "Scale",
    "Uniform",
    "Zero",
    "__version__",
    "ablate",
    "analyses",
    "errors",
    "graphs",
    "head_types",
    "load",
    "profile",
    "rollout",
    "rollout_graph",
    "show",
    "sinks",
    "tasks",
    "views",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"attnlens.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'attnlens' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted(set(globals()) | set(__all__))
