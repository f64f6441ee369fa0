"""Chefer et al. 2021, Transformer interpretability beyond attention visualization.

    C = prod_l (I + E_h[(dM/dA_l * R_A_l)^+])

R_A is the relevance of the attention weights by propagation with alpha = 1, dM/dA their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attention_gradient import chosen_settings, over_sides
from attnlens.analyses.attribution import Attribution, places_of
from attnlens.analyses.chefer import OWN_ROW
from attnlens.analyses.relevance import check_conserved
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.analyses.weight_gradients import (
    Edges,
    check_dense,
    chosen_heads,
    positive,
    query_side,
    start_rows,
    weight_gradients,
)
from attnlens.anatomy import HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.backward import ALPHA_ONE, MixedPromptsError, relevances
from attnlens.hooks.residual import FINAL
from attnlens.lens import Batch, Inputs, Lens, SiteTensors
from attnlens.lens.asked import Maps, choose_maps


def chefer_lrp(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
    row: int | None = None,
    maps: Maps = None,
    strict: bool = True,
    budget: str | float = "2GB",
) -> Attribution:
    """A row of `prod_l (I + E_h[(dM/dA_l * R_A_l)^+])`, the top layer first.

    R_A follows the alpha = 1 rule at linear maps (positive products alone) and the rules of
    `attnlrp` elsewhere: norms have frozen statistics, where the paper lets relevance through
    unchanged. Leave the lowest layers out by `layers="L2:"`, as the paper does for vision. The
    row is that of the target's logits, else `row` (by default the last under causal attention, else
    the first, a class token). Scores are never negative; the row itself keeps 1 or more. `layers`
    has what enters each site; `heads` the sums of `(dM/dA * R_A)^+`, and `maps`
    these of the layers named (True: of all chosen).

    Raises:
        BudgetError: the relevance of all weights over the budget.
        InputError: a target, layers, heads or row that is not there, or cross-attention.
        UnsupportedModelError: relevance is not conserved in this model.

    """
    note = check_conserved(lens, strict)
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    chosen = chosen_heads(anatomy, layers, heads)
    if any(anatomy[name].kind == "cross" for name in chosen):
        raise InputError(
            f"{anatomy.model} has cross-attention, of which this form says nothing. Take "
            'method="chefer", the generic form.'
        )
    kept = choose_maps(anatomy, chosen, maps)
    counts = {name: anatomy[name].heads for name in chosen}
    check_dense("The relevance of every weight", lens, batch, counts, budget, "Name fewer layers")
    explained = settle(lens, batch, target)
    value, sites = weight_gradients(lens, batch, explained, layers, heads)
    found = _relevances(lens, batch, explained, list(chosen))
    spread = start_rows(anatomy, batch, explained, sites[-1], row)
    reached, found_maps = [spread], dict[str, Tensor]()
    for edges in reversed(sites):
        products = positive_products(edges, found)
        found_maps[edges.site.name] = products
        spread = spread + torch.einsum("bt,bts->bs", spread, products.mean(1))
        reached.append(spread)
    side = query_side(anatomy, sites[-1].site)
    words, scores, notes = over_sides(lens, batch, {side: torch.stack(reached[::-1], dim=1)})
    sums = [found_maps[name].sum((2, 3)) for name in chosen]
    own_maps = {name: found_maps[name] for name in kept}
    return Attribution(
        method="chefer_lrp",
        tokens=words,
        scores=scores[:, 0],
        target=explained.names,
        value=value,
        settings=chosen_settings(layers, heads, row=row, strict=strict),
        layers=scores,
        layer_names=(*(edges.site.name for edges in sites), FINAL),
        heads=torch.cat(sums, dim=1).cpu(),
        head_names=tuple(head for edges in sites for head in edges.names),
        maps=SiteTensors(own_maps) if own_maps else None,
        places=places_of(batch),
        notes=(*notes, *note, OWN_ROW),
    )


def _relevances(
    lens: Lens, batch: Batch, explained: Explained, names: Sequence[str]
) -> Mapping[str, Float[Tensor, "batch head query key"]]:
    """R_A of every head of some sites, by the alpha = 1 rule."""
    anatomy = lens.anatomy_for(batch)
    observers = explained.observers(lens, batch)
    try:
        return relevances(
            lens.model, anatomy, batch.inputs, explained.metric, ALPHA_ONE, observers, names
        ).maps
    except MixedPromptsError:
        raise InputError(
            f"{anatomy.model} mixes the rows of its prompts: give one at a time."
        ) from None


def positive_products(
    edges: Edges, relevance: Mapping[str, Tensor]
) -> Float[Tensor, "batch head query key"]:
    """`(dM/dA * R_A)^+` of one site."""
    whole = relevance[edges.site.name][:, list(edges.heads)]
    found = torch.zeros_like(whole)
    for block in edges.blocks():
        own = whole[:, :, block.rows, block.keys]
        found[:, :, block.rows, block.keys] = positive(block.gradient * own)
    return found
