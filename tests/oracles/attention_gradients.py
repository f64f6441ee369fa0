"""A and dM/dA of every site from the model's own eager attention and plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnlens.lens import Batch, Lens


def eager_gradients(
    lens: Lens, batch: Batch, metric: Callable[[Any], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and their gradients, `batch head query key`; only rows of padding mean nothing."""
    model = copy.deepcopy(lens.model)
    model.set_attn_implementation("eager")
    output = model(**batch.inputs, output_attentions=True)
    stacks = {
        "": output.get("attentions"),
        "enc": output.get("encoder_attentions"),
        "dec": output.get("decoder_attentions"),
        "cross": output.get("cross_attentions"),
    }
    weights: dict[str, Tensor] = {}
    for site in lens.anatomy_for(batch).sites:
        weights[site.name] = stacks[site.stack][site.layer]
    found = torch.autograd.grad(metric(output).sum(), list(weights.values()))
    return {
        name: (own.detach(), gradient)
        for (name, own), gradient in zip(weights.items(), found, strict=True)
    }


def logit(token: int, at: Tensor) -> Callable[[Any], Tensor]:
    """A token's logit at one padded position of each prompt."""
    return lambda output: output.logits[torch.arange(len(at)), at, token]
