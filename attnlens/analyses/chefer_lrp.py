"""Chefer et al. 2021, Transformer interpretability beyond attention visualization.

    C = prod_l (I + E_h[(dM/dA_l * R_A_l)^+])

R_A is the relevance of the attention weights by propagation with alpha = 1, dM/dA their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attribution import Attribution, over_tokens
from attnlens.analyses.relevance import check_conserved
from attnlens.analyses.target import TargetSpec, settle
from attnlens.analyses.weight_gradients import (
    Edges,
    check_dense,
    chosen_heads,
    positive,
    start_rows,
    weight_gradients,
)
from attnlens.anatomy import HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.backward import ALPHA_ONE, relevances
from attnlens.hooks.residual import FINAL
from attnlens.lens import Inputs, Lens


def chefer_lrp(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    layers: HeadSpec | int | None = None,
    row: int | None = None,
    strict: bool = True,
    budget: str | float = "2GB",
) -> Attribution:
    """A row of `prod_l (I + E_h[(dM/dA_l * R_A_l)^+])`, the top layer first.

    R_A follows the alpha = 1 rule at linear maps (positive products alone) and the rules of
    `attnlrp` elsewhere: norms have frozen statistics, where the paper lets relevance through
    unchanged. Leave the lowest layers out by `layers="L2:"`, as the paper does for vision. The
    row is that of the target's logits, else `row` (by default the last under causal attention, else
    the first, a class token). Scores are never negative; the row itself keeps 1 or more. `layers`
    has what enters each site; `heads` the sums of `(dM/dA * R_A)^+`.

    Raises:
        BudgetError: the relevance of all weights over the budget.
        InputError: a target, layers or row that is not there, or a model with cross-attention.
        UnsupportedModelError: relevance is not conserved in this model.

    """
    note = check_conserved(lens, strict)
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    chosen = chosen_heads(anatomy, layers, None)
    if any(anatomy[name].kind == "cross" for name in chosen):
        raise InputError(
            f"{anatomy.model} has cross-attention, of which this form says nothing. Take "
            'method="chefer", the generic form.'
        )
    counts = {name: len(heads) for name, heads in chosen.items()}
    check_dense("The relevance of every weight", lens, batch, counts, budget, "Name fewer layers")
    explained = settle(lens, batch, target)
    value, sites = weight_gradients(lens, batch, explained, layers, None)
    found = relevances(
        lens.model, anatomy, batch.inputs, explained.metric, ALPHA_ONE,
        explained.observers(lens, batch), list(chosen),
    ).maps  # fmt: skip
    spread = start_rows(anatomy, batch, explained, sites[-1], row)
    reached, heads = [spread], []
    for edges in reversed(sites):
        products = positive_products(edges, found)
        spread = spread + torch.einsum("bt,bts->bs", spread, products.mean(1))
        reached.append(spread)
        heads.append(products.sum((2, 3)))
    words, scores = over_tokens(lens, batch, torch.stack(reached[::-1], dim=1))
    return Attribution(
        method="chefer_lrp",
        tokens=words,
        scores=scores[:, 0],
        target=explained.names,
        value=value,
        settings={"layers": layers, "row": row, "strict": strict},
        layers=scores,
        layer_names=(*(edges.site.name for edges in sites), FINAL),
        heads=torch.cat(heads[::-1], dim=1),
        head_names=tuple(head for edges in sites for head in edges.names),
        notes=note,
    )


def positive_products(
    edges: Edges, relevance: Mapping[str, Tensor]
) -> Float[Tensor, "batch head query key"]:
    """`(dM/dA * R_A)^+` of one site."""
    whole = relevance[edges.site.name]
    found = torch.zeros_like(whole)
    for block in edges.blocks():
        own = whole[:, :, block.rows, block.keys]
        found[:, :, block.rows, block.keys] = positive(block.gradient * own)
    return found
