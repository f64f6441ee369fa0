"""What every edit is: which heads, positions and phases it changes, and its openings.

An edit of heads may change what the kernel gets (`enter`), or scores, weights and z after the
kernel has run (`see`); `changes.py` helps with the latter. An edit of a stream has `change`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.anatomy import Anatomy, Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.edits.given import held_heads, held_layers
from attnlens.hooks.edits.text import describe, spec_text, where_text
from attnlens.hooks.positions import Positions, held_positions
from attnlens.hooks.seam import Asked, Call
from attnlens.hooks.where import Phase, Where, check_phase


@dataclass(frozen=True)
class Edit:
    """A change to a running model at some query positions, in some phases."""

    queries: Positions = field(default=None, kw_only=True)
    """Rows that are changed; see `Positions`. Padding never is."""
    phase: Phase = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        check_phase(self.phase)
        for name in ("queries", "keys"):
            if hasattr(self, name):
                object.__setattr__(self, name, held_positions(getattr(self, name)))

    def of_prompts(self, prompts: slice) -> Self:
        """The same edit for some prompts of the batch that it was made for."""
        changed: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name in ("queries", "keys"):
                is_mask = isinstance(value, Tensor) and value.dtype == torch.bool
                if is_mask and value.ndim == 2 and value.shape[0] > 1:
                    changed[part.name] = value[prompts]
            elif part.metadata.get("by_prompt"):
                changed[part.name] = {
                    name: tensor[prompts] if tensor.shape[0] > 1 else tensor
                    for name, tensor in value.items()
                }
        return replace(self, **changed) if changed else self

    def sites(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Names of the sites, or of the blocks' first sites, where it acts."""
        raise NotImplementedError


@dataclass(frozen=True)
class HeadEdit(Edit):
    """A change to some heads."""

    heads: HeadSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", held_heads(self.heads))

    def sites(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Sites of the heads."""
        return tuple(dict.fromkeys(head.site for head in anatomy.find(self.heads)))

    def moved(self, anatomy: Anatomy) -> tuple[Head, ...]:
        """The heads whose output it changes; more than named where heads share keys or values."""
        return anatomy.find(self.heads)

    @property
    def key_positions(self) -> Positions:
        """Keys that it changes."""
        return getattr(self, "keys", None)

    def enter(self, site: Site, asked: Asked, where: Where) -> Asked:
        """Change what the kernel gets."""
        return asked

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Change what the kernel gave."""
        return call

    def __str__(self) -> str:
        return f"{describe(self)} of {spec_text(self.heads)}{where_text(self)}"


@dataclass(frozen=True)
class StreamEdit(Edit):
    """A change to the residual stream or to what an MLP writes, at some layers.

    A block has one stream that enters it and one MLP; they are named by the block's first site.
    """

    layers: HeadSpec | int
    stream: str = "residual"
    """`residual`: what enters the layer's block; `mlp`: what its MLP adds to the stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", held_layers(self.layers))
        if self.stream not in ("residual", "mlp"):
            raise InputError(f"There is no stream {self.stream!r}; choose residual or mlp.")

    def sites(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The first site of each block of the layers."""
        first: dict[tuple[str, int], str] = {}
        for site in anatomy.sites:
            first.setdefault((site.block or site.name, site.call), site.name)
        layers = anatomy.layers(self.layers)
        return tuple(dict.fromkeys(first[site.block or site.name, site.call] for site in layers))

    def change(
        self,
        site: Site,
        stream: Float[Tensor, "batch row d_model"],
        rows: Tensor | None,
        start: int,
    ) -> Float[Tensor, "batch row d_model"]:
        """The stream as edited; `rows` are the chosen ones, `start` the place of the first."""
        raise NotImplementedError

    def __str__(self) -> str:
        text = f"{describe(self)} of {self.stream} {spec_text(self.layers)}"
        return text + where_text(self)
