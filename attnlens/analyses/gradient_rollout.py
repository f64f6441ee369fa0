"""Gradient rollout: rollout over the weights that speak for a target.

Each layer's map is `Ā = mean_h (A * dM/dA)^+`: what a weight is worth to the target, not only how
large it is. A vector is carried from the row that is explained down through the layers, rows of A
made anew block by block, so no map of queries x keys is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attention_gradient import (
    chosen_settings,
    kept_maps,
    over_sides,
    summed,
)
from attnlens.analyses.attribution import Attribution, places_of
from attnlens.analyses.target import TargetSpec, settle
from attnlens.analyses.weight_gradients import (
    Edges,
    chosen_heads,
    key_side,
    positive,
    query_side,
    start_rows,
    weight_gradients,
)
from attnlens.anatomy import Anatomy, HeadSpec
from attnlens.hooks.residual import FINAL
from attnlens.lens import Inputs, Lens
from attnlens.lens.asked import Maps

Spread = dict[str, Float[Tensor, "batch position"]]
"""How a row's relevance is spread over the positions of each side."""


def gradient_rollout(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
    row: int | None = None,
    maps: Maps = None,
    budget: str | float = "2GB",
) -> Attribution:
    """A row of `prod_l rownorm(Ā_l + I)`, top layer first, with `Ā = mean_h (A * dM/dA)^+`.

    `rownorm` divides each row by its sum, so that scores sum to 1 (Abnar and Zuidema 2020 for the
    rollout, Chefer et al. 2021 for the map; their own product, which is not normalised, is
    `chefer`). Ā is in units of the metric: the residual stream keeps `1 / (1 + sum_s Ā[t, s])` of a
    row, so a target with small gradients leaves most to the row itself. The row is that of the
    target's logits, else `row` among the prompt's tokens (by default the last under causal
    attention, else the first). In an encoder-decoder the row is the decoder's, and cross-attention
    hands its part on to the text. `layers` has the spread that enters each site and the start;
    `heads` the sums of `(A * dM/dA)^+`; a layer left out passes its input on. With `maps` every
    `(A * dM/dA)^+`, priced against `budget` first.

    Raises:
        InputError: a target, heads, layers or row that is not there, a metric without a gradient,
            or an edit of z in `lens.edit`.
        BudgetError: maps over the budget.
        UnsupportedModelError: a part of the model runs without gradients.

    """
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    kept = kept_maps(lens, batch, chosen_heads(anatomy, layers, heads), maps, budget)
    explained = settle(lens, batch, target)
    value, sites = weight_gradients(lens, batch, explained, layers, heads)
    start = start_rows(anatomy, batch, explained, sites[-1], row)
    reached = carried_down(anatomy, sites, start, normalised=True)
    words, spread, notes = over_sides(lens, batch, by_side(reached))
    sums = summed(sites, positive, kept)
    return Attribution(
        method="gradient_rollout",
        tokens=words,
        scores=spread[:, 0],
        target=explained.names,
        value=value,
        settings=chosen_settings(layers, heads, row=row),
        layers=spread,
        layer_names=(*(edges.site.name for edges in sites), FINAL),
        heads=sums.heads,
        head_names=sums.head_names,
        maps=sums.maps,
        places=places_of(batch),
        notes=notes,
    )


def carried_down(
    anatomy: Anatomy,
    sites: Sequence[Edges],
    start: Float[Tensor, "batch position"],
    normalised: bool,
) -> list[Spread]:
    """`start prod (Ā + I)` from the last site down: the spread that enters each site, and `start`.

    The rows of `Ā + I` are divided by their sums where `normalised`.
    """
    spread: Spread = {}
    for edges in sites:
        batch, _, queries, keys = edges.rows.shape
        spread[key_side(anatomy, edges.site)] = edges.zeros(batch, keys)
        spread[query_side(anatomy, edges.site)] = edges.zeros(batch, queries)
    spread[query_side(anatomy, sites[-1].site)] = start.to(sites[-1].dtype)
    reached = [dict(spread)]
    for edges in reversed(sites):
        rows, keys = query_side(anatomy, edges.site), key_side(anatomy, edges.site)
        stays, goes = one_layer_down(edges, spread[rows], normalised)
        spread[rows] = stays
        spread[keys] = spread[keys] + goes
        reached.append(dict(spread))
    return reached[::-1]


def one_layer_down(
    edges: Edges, spread: Float[Tensor, "batch query"], normalised: bool
) -> tuple[Float[Tensor, "batch query"], Float[Tensor, "batch key"]]:
    """What of a spread stays at its rows and what goes to keys; rows without any are not made."""
    stays, goes = spread.clone(), edges.zeros(edges.rows.shape[0], edges.rows.shape[3])
    for block in edges.blocks(spread != 0):
        fused = positive(block.products).mean(1)
        if normalised:
            stays[:, block.rows] /= 1 + fused.sum(-1)
        goes[:, block.keys] += torch.einsum("bt,bts->bs", stays[:, block.rows], fused)
    return stays, goes


def by_side(reached: Sequence[Spread]) -> Mapping[str, Float[Tensor, "batch layer position"]]:
    """Spreads of all layers, stacked, by side."""
    return {side: torch.stack([each[side] for each in reached], dim=1) for side in reached[0]}
