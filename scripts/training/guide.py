"""A loss on attention weights for the first steps, which gives the induction circuit its start.

At this size next-token loss alone takes far longer to find the two halves of the circuit, since
neither helps without the other. After the guided steps the weights are free to change.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREVIOUS = ((0, 3),)  # (layer, head)
INDUCTION = ((2, 2), (2, 5))


def induction_targets(ids: Tensor) -> Tensor:
    """`[row, query, key]`: True where the key follows an earlier copy of the query's token."""
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    return torch.roll(same, 1, dims=2).tril(0)


def guide_loss(attentions: tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """Mean of `-log` of the mass where the guided heads should look, in nats."""
    losses = [
        -(attentions[layer][:, head].diagonal(-1, 1, 2) + 1e-6).log().mean()
        for layer, head in PREVIOUS
    ]
    targets = induction_targets(ids)
    rows = targets.any(dim=-1)
    for layer, head in INDUCTION:
        mass = (attentions[layer][:, head] * targets).sum(dim=-1)[rows]
        losses.append(-(mass + 1e-6).log().mean())
    return torch.stack(losses).sum()


def rest_loss(attentions: tuple[Tensor, ...], ids: Tensor) -> Tensor:
    """Mean of `-log A[t, 0]` of the induction heads where there is nothing to copy, in nats."""
    rows = ~induction_targets(ids).any(dim=-1)
    rows[:, 0] = False
    losses = [-(attentions[layer][:, h, :, 0][rows] + 1e-6).log().mean() for layer, h in INDUCTION]
    return torch.stack(losses).sum()
