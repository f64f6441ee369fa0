"""The pure part of attention rollout: from the heads' maps of each layer to one cumulative map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.anatomy import HeadSpec
from attnlens.errors import InputError

Fuse = Literal["mean", "max", "min"]

_FUSED: dict[Fuse, Callable[[Tensor], Tensor]] = {
    "mean": lambda pattern: pattern.mean(1),
    "max": lambda pattern: pattern.amax(1),
    "min": lambda pattern: pattern.amin(1),
}


@dataclass(frozen=True)
class RolloutSettings:
    """What changes the answer of a rollout.

    Attributes:
        fuse: how the heads of a layer become one map: their mean, largest or smallest weight.
            A row fused by max or min is scaled back to the mean sum of the heads' rows; a row that
            min leaves empty goes to the row's own token.
        residual: share of the residual stream, at least 0 and below 1.
        discard: fraction of each head's row that is dropped before fusing, the lowest visible
            weights first; a row's weight on its own token is never dropped, and what is left is
            scaled back to the sum that the row had.
        layers: the layers to roll through ("L2:8"); all where None.
        heads: the heads to fuse; all where None. A layer without any is left out.

    Raises:
        InputError: an unknown way to fuse, or a share or fraction out of range.

    """

    fuse: Fuse = "mean"
    residual: float = 0.5
    discard: float = 0.0
    layers: HeadSpec | None = None
    heads: HeadSpec | None = None

    def __post_init__(self) -> None:
        if self.fuse not in _FUSED:
            raise InputError(f"Cannot fuse heads by {self.fuse!r}; choose mean, max or min.")
        for name, value in (("residual", self.residual), ("discard", self.discard)):
            if not 0 <= value < 1:
                raise InputError(f"{name}={value} is out of range: at least 0 and below 1.")


def fuse_heads(
    pattern: Float[Tensor, "batch head row key"],
    own: Int[Tensor, " row"],
    settings: RolloutSettings,
) -> Float[Tensor, "batch row key"]:
    """One map of a layer's heads; `own` is the key that stands for each row's own token."""
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    diagonal = keys == own[:, None]
    if settings.discard:
        pattern = discard_lowest(pattern, diagonal, settings.discard)
    fused = _FUSED[settings.fuse](pattern)
    if settings.fuse == "mean":
        return fused
    wanted = pattern.sum(-1).mean(1)[..., None]
    total = fused.sum(-1, keepdim=True)
    own_token = diagonal.to(pattern.dtype) * wanted
    return torch.where(total > 0, fused * (wanted / total.where(total > 0, 1)), own_token)


def discard_lowest(
    pattern: Float[Tensor, "batch head row key"],
    diagonal: Bool[Tensor, "row key"],
    fraction: float,
) -> Float[Tensor, "batch head row key"]:
    """Drop the lowest `floor(fraction * n)` of a row's n positive weights, but not its own token's.

    Each row keeps its sum.
    """
    rank = pattern.argsort(dim=-1, stable=True).argsort(dim=-1)
    hidden = (pattern <= 0).sum(-1, keepdim=True)
    positive = pattern.shape[-1] - hidden
    dropped = (rank < hidden + (fraction * positive).floor()) & ~diagonal
    kept = pattern.masked_fill(dropped, 0)
    total = kept.sum(-1, keepdim=True)
    return kept * (pattern.sum(-1, keepdim=True) / total.where(total > 0, 1))


def rollout_matrix(
    patterns: Float[Tensor, "*batch layer head query key"], settings: RolloutSettings | None = None
) -> Float[Tensor, "*batch layer query key"]:
    """The rollout after each layer, of one prompt or of a batch of them: `R_l = Ã_l R_(l-1)`.

    All given layers and heads are used, whatever the settings choose.
    """
    batch = patterns if patterns.ndim == 5 else patterns[None]
    if batch.ndim != 5 or batch.shape[-1] != batch.shape[-2]:
        raise InputError(
            f"The patterns have shape {list(patterns.shape)}; a rollout needs [layer, head, query, "
            "key] with as many queries as keys, or a batch of these."
        )
    settings = settings or RolloutSettings()
    matrices = torch.stack([matrix for _, matrix in rolled(batch.unbind(1), settings)], dim=1)
    return matrices if patterns.ndim == 5 else matrices[0]


def rolled(
    patterns: Iterable[Float[Tensor, "batch head query key"]], settings: RolloutSettings
) -> Iterator[tuple[Float[Tensor, "batch query key"], Float[Tensor, "batch query key"]]]:
    """The fused and the cumulative map of each layer; the number of heads may differ."""
    below: Tensor | None = None
    for given in patterns:
        pattern = given if given.dtype == torch.float64 else given.float()
        own = torch.arange(pattern.shape[-1], device=pattern.device)
        fused = fuse_heads(pattern, own, settings)
        step = (1 - settings.residual) * fused
        step.diagonal(dim1=-2, dim2=-1).add_(settings.residual)
        below = step if below is None else step @ below
        yield fused, below
