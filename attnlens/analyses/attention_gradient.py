"""Attention x gradient: what each weight is worth to a target, to first order.

`A * dM/dA` of an edge is how the metric would change if the weight went, were it linear in it. One
forward and one backward serve all heads and layers. Signed products and their absolute values are
two methods here, since `sum |A dA| >= |sum A dA|` and papers mean either by "saliency".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attribution import Attribution, over_tokens, places_of
from attnlens.analyses.target import TargetSpec, settle
from attnlens.analyses.weight_gradients import (
    DECODER,
    OUTSIDE,
    TEXT,
    Edges,
    check_dense,
    chosen_heads,
    gather,
    key_side,
    weight_gradients,
)
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.tokens import Sides, Tokens
from attnlens.lens import Batch, Inputs, Lens, SiteTensors
from attnlens.lens.asked import Maps, choose_maps


def attention_gradient(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
    maps: Maps = None,
    budget: str | float = "2GB",
) -> Attribution:
    """Attention x gradient, signed: a token's score is `sum over layers, heads, rows of A * dM/dA`.

    The score of token s sums column s of every chosen map: what is read from s, in all layers
    together; `layers` has the sums of each layer, `heads` those of each head over all edges, which
    are `sum_t z_t . dM/dz_t`, the drop of a linear metric when the head is zeroed. Layers read one
    another, so the scores of all do not sum to the value. In an encoder-decoder cross-attention
    counts for the text. `maps` keeps `A * dM/dA` of the layers named (True: of all chosen), priced
    against `budget` first.

    Raises:
        InputError: a target, heads or layers that are not there, a metric without a gradient, or an
            edit of z in `lens.edit`.
        BudgetError: maps over the budget.
        UnsupportedModelError: a part of the model runs without gradients.

    """
    return _products(
        "attention_gradient", lens, inputs, target, layers, heads, maps, budget, _signed
    )


def attention_saliency(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
    maps: Maps = None,
    budget: str | float = "2GB",
) -> Attribution:
    """Saliency of attention: a token's score is `sum over layers, heads, rows of |A * dM/dA|`.

    Wang et al. 2023, Label words are anchors, take `I_l = sum_h |A_hl * dM/dA_hl|` as the traffic
    of layer l; here its columns are summed over rows. Never negative, and never less than the size
    of `attention_gradient`, edge by edge and in each sum. `saliency_flows` sums the same edges
    between groups of positions. Keywords and errors are those of `attention_gradient`.
    """
    return _products(
        "attention_saliency", lens, inputs, target, layers, heads, maps, budget, torch.abs
    )


def _signed(products: Tensor) -> Tensor:
    return products


def _products(
    method: str,
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec,
    layers: HeadSpec | int | None,
    heads: HeadSpec | None,
    maps: Maps,
    budget: str | float,
    part: Callable[[Tensor], Tensor],
) -> Attribution:
    """Sums of `part(A * dM/dA)` over the columns and heads of the chosen sites."""
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    kept = kept_maps(lens, batch, chosen_heads(anatomy, layers, heads), maps, budget)
    explained = settle(lens, batch, target)
    value, sites = weight_gradients(lens, batch, explained, layers, heads)
    sums = summed(sites, part, kept)
    words, by_layer, notes = columns_over_tokens(lens, batch, sums.columns)
    return Attribution(
        method=method,
        tokens=words,
        scores=by_layer.sum(1),
        target=explained.names,
        value=value,
        settings=chosen_settings(layers, heads),
        layers=by_layer,
        layer_names=tuple(sums.columns),
        heads=sums.heads,
        head_names=sums.head_names,
        maps=sums.maps,
        places=places_of(batch),
        notes=notes,
    )


def chosen_settings(
    layers: HeadSpec | int | None, heads: HeadSpec | None, **others: object
) -> dict[str, object]:
    """The settings of a method, without those that were left alone."""
    given = {"layers": layers, "heads": heads, **others}
    return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Summed:
    """Sums of all sites' products, each taken signed, absolute or positive."""

    columns: Mapping[str, Float[Tensor, "batch key"]]
    heads: Float[Tensor, "batch head"]
    head_names: tuple[Head, ...]
    maps: SiteTensors | None


def summed(
    sites: Sequence[Edges], part: Callable[[Tensor], Tensor], kept: Collection[str]
) -> Summed:
    """Sums of `part(A * dM/dA)` at each site, and the maps of the sites that are kept."""
    found = {edges.site.name: gather(edges, part, edges.site.name in kept) for edges in sites}
    maps = {name: own.maps for name, own in found.items() if own.maps is not None}
    return Summed(
        {name: own.columns for name, own in found.items()},
        torch.cat([own.heads for own in found.values()], dim=1).cpu(),
        tuple(head for edges in sites for head in edges.names),
        SiteTensors(maps) if maps else None,
    )


def kept_maps(
    lens: Lens, batch: Batch, chosen: Mapping[str, tuple[int, ...]], maps: Maps, budget: str | float
) -> frozenset[str]:
    """The sites whose maps are kept; BudgetError where they take more than the budget."""
    kept = choose_maps(lens.anatomy_for(batch), chosen, maps)
    counts = {name: len(heads) for name, heads in kept.items()}
    way = f"Keep those of some of the {len(kept)} layers (maps='{next(iter(kept), '')}')"
    check_dense("Keeping the map of every head", lens, batch, counts, budget, way)
    return frozenset(kept)


def columns_over_tokens(
    lens: Lens, batch: Batch, columns: Mapping[str, Float[Tensor, "batch key"]]
) -> tuple[tuple[tuple[str, ...], ...], Float[Tensor, "batch layer scored"], tuple[str, ...]]:
    """Columns of each site as scores of tokens, a row a site, and what could not be placed."""
    anatomy = lens.anatomy_for(batch)
    sides = {name: key_side(anatomy, anatomy[name]) for name in columns}
    stacked: dict[str, Tensor] = {}
    for side in dict.fromkeys(sides.values()):
        sizes = sorted({columns[name].shape[1] for name in columns if sides[name] == side})
        if len(sizes) > 1:
            raise InputError(
                f"The layers of {side} attend to {sizes[0]} to {sizes[-1]} positions, so their "
                "scores cannot be added. Name layers of one size: layers=..."
            )
        rows = [
            column if sides[name] == side else column.new_zeros(len(column), *sizes)
            for name, column in columns.items()
        ]
        stacked[side] = torch.stack(rows, dim=1)
    return over_sides(lens, batch, stacked)


def over_sides(
    lens: Lens, batch: Batch, scores: Mapping[str, Float[Tensor, "batch layer position"]]
) -> tuple[tuple[tuple[str, ...], ...], Float[Tensor, "batch layer scored"], tuple[str, ...]]:
    """Scores by side as those of tokens, and a note on what lies outside of all tokens."""
    sides = [side for side in scores if side != OUTSIDE] or list(scores)
    if TEXT not in sides and DECODER not in sides:  # positions of a tower are no tokens
        batch = replace(batch, sides=Sides(Tokens()))
        words, placed = over_tokens(lens, batch, scores[sides[0]])
        return words, placed.cpu(), ()
    decoder = scores.get(DECODER)
    text = scores[TEXT] if TEXT in scores else scores[DECODER][:, :, :0]
    words, placed = over_tokens(lens, batch, text, decoder)
    if OUTSIDE not in scores:
        return words, placed.cpu(), ()
    note = "Cross-attention reads what lies outside the text (an image): that has no score here."
    return words, placed.cpu(), (note,)
