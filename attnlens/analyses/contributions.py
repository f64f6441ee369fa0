"""What each part of a sum contributes to it: the pure part of information-flow routes.

Ferrando and Voita 2024, Information flow routes: automatically interpreting language models at
scale. For `y = sum_j z_j`, with norms over the vectors' numbers:

    proximity_j = max(0, |y|_1 - |y - z_j|_1),   importance_j = proximity_j / sum_i proximity_i
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_BYTES = 1 << 20
"""Parts held at a time: what stays near the cache is read fast."""


def proximity(
    total: Float[Tensor, "*row d_model"], part: Float[Tensor, "*row d_model"]
) -> Float[Tensor, "*row"]:
    """`max(0, |y|_1 - |y - z|_1)`: how much nearer to 0 the sum would be without the part."""
    return (total.abs().sum(-1) - (total - part).abs().sum(-1)).clamp_min(0)


def weighted_proximity(
    total: Float[Tensor, "row d_model"],
    weights: Float[Tensor, "head row key"],
    vectors: Iterable[Float[Tensor, "key d_model"]],
) -> Float[Tensor, "head row key"]:
    """Proximity of every part `weights[h, t, s] * vectors[h][s]` to row t of the sum.

    Never larger than `part . sign(y)`, which one product gives for all: a part for which that is
    not positive has none, and is not looked at again. The others are made a chunk at a time.
    """
    sign, size = total.sign(), total.abs().sum(-1)
    bytes_of_part = total.shape[-1] * total.element_size()
    budget = CHUNK_BYTES if total.device.type == "cpu" else CHUNK_BYTES << 8
    together = max(budget // bytes_of_part, 1)
    found = torch.empty_like(weights)
    for head, own in enumerate(vectors):
        bound = torch.mul(weights[head], sign @ own.T, out=found[head])
        pairs = (bound > 0).nonzero()
        bound.clamp_min_(0)
        for chunk in pairs.split(together):
            row, key = chunk.unbind(1)
            part = own.index_select(0, key).mul_(weights[head, row, key][:, None])
            rest = part.sub_(total.index_select(0, row)).abs_().sum(-1)
            # The bound has not the rounding that the difference of two norms has.
            bound[row, key] = (size[row] - rest).clamp_min_(0).minimum(bound[row, key])
    return found


@dataclass(frozen=True)
class Shares:
    """A number a part of the sum at each row; importances sum to 1 at a row."""

    residual: Float[Tensor, " row"]
    mlp: Float[Tensor, " row"]
    bias: Float[Tensor, " row"]
    """What is the same for every text: biases of the output projection and of norms."""
    attention: Float[Tensor, "head row key"]

    @property
    def total(self) -> Float[Tensor, " row"]:
        """The sum over all parts."""
        return self.residual + self.mlp + self.bias + self.attention.sum((0, 2))

    def over(self, total: Float[Tensor, " row"]) -> Shares:
        """All numbers divided by a row's."""
        return Shares(
            self.residual / total,
            self.mlp / total,
            self.bias / total,
            self.attention / total[:, None],
        )

    def importance(self) -> Shares:
        """Importances of proximities; all is the residual's where every proximity is 0 (0/0)."""
        total = self.total
        residual = torch.where(total == 0, 1.0, self.residual)
        total = torch.where(total == 0, 1.0, total)
        return Shares(residual, self.mlp, self.bias, self.attention).over(total)

    def kept(self, threshold: float) -> Shares:
        """Those of at least `threshold`, scaled to sum to 1, the others 0.

        The strongest but for biases is kept in any case, so that a route goes on from every row.
        """
        strongest = torch.stack([self.residual, self.mlp, *self._strongest_edges()]).amax(0)

        def strong(part: Tensor, best: Tensor) -> Tensor:
            return part * ((part >= threshold) | (part == best))

        kept = Shares(
            strong(self.residual, strongest),
            strong(self.mlp, strongest),
            self.bias * (self.bias >= threshold),
            strong(self.attention, strongest[:, None]),
        )
        return kept.over(kept.total)

    def _strongest_edges(self) -> list[Float[Tensor, " row"]]:
        return [self.attention.amax((0, 2))] if self.attention.numel() else []
