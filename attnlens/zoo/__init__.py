"""Models that ship with the package: wired by hand, or trained. Imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlens.zoo.deceptive import (
        deceptive_model,
        deceptive_path,
        deceptive_prompts,
        honest_model,
        honest_path,
    )
    from attnlens.zoo.induction import induction_model
    from attnlens.zoo.naming import name_circuit, name_model, name_prompts
    from attnlens.zoo.retrieval import retrieval_model
    from attnlens.zoo.trained import small_path

_HOMES = {
    "deceptive_model": "attnlens.zoo.deceptive",
    "deceptive_path": "attnlens.zoo.deceptive",
    "deceptive_prompts": "attnlens.zoo.deceptive",
    "honest_model": "attnlens.zoo.deceptive",
    "honest_path": "attnlens.zoo.deceptive",
    "induction_model": "attnlens.zoo.induction",
    "name_circuit": "attnlens.zoo.naming",
    "name_model": "attnlens.zoo.naming",
    "name_prompts": "attnlens.zoo.naming",
    "retrieval_model": "attnlens.zoo.retrieval",
    "small_path": "attnlens.zoo.trained",
}

__all__ = [
    "deceptive_model",
    "deceptive_path",
    "deceptive_prompts",
    "honest_model",
    "honest_path",
    "induction_model",
    "name_circuit",
    "name_model",
    "name_prompts",
    "retrieval_model",
    "small_path",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'attnlens.zoo' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted(set(globals()) | set(__all__))
