"""Real transformers architectures, built small from configs with seeded random weights.

Every architecture of ``ARCHITECTURES`` runs all its attention through transformers' attention
interface. Those of ``UNSUPPORTED`` run none of it there, those of ``PARTIAL`` only a part.
"""

from __future__ import annotations

from .audio import AUDIO
from .base import KINDS, Architecture, Inputs, randomise
from .decoders import DECODERS
from .encoder_decoders import ENCODER_DECODERS
from .encoders import ENCODERS
from .experts import EXPERTS
from .hybrids import HYBRIDS
from .multimodal import MULTIMODAL
from .unsupported import PARTIAL, UNSUPPORTED
from .vision import VISION

_ALL = [
    *DECODERS,
    *EXPERTS,
    *HYBRIDS,
    *ENCODERS,
    *ENCODER_DECODERS,
    *VISION,
    *MULTIMODAL,
    *AUDIO,
]
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}
if len(ARCHITECTURES) != len(_ALL):
    raise ValueError("two architectures have one name")


def names(kind: str | None = None) -> list[str]:
    """Names of the architectures, all or those of one kind."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"no kind {kind!r}: there are {', '.join(KINDS)}")
    return [name for name, each in ARCHITECTURES.items() if kind in (None, each.kind)]


__all__ = [
    "ARCHITECTURES",
    "KINDS",
    "PARTIAL",
    "UNSUPPORTED",
    "Architecture",
    "Inputs",
    "names",
    "randomise",
]
