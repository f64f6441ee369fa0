"""Relevance by attention gradients: Chefer et al. 2021, in the forms of its two papers.

Generic attention-model explainability (ICCV 2021): each layer adds what its map
`Ā = E_h[(A * dM/dA)^+]` brings to matrices R of relevance, of every side's positions for every
side's. Self-attention adds `Ā R`; cross-attention mixes two sides. Beyond attention visualization
(CVPR 2021): `prod (I + E_h[(dM/dA * R_A)^+])`, with R_A from relevance propagation. What is
arithmetic is apart from the model, on maps alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
from attnlens.analyses.gradient_rollout import by_side, carried_down
from attnlens.analyses.target import TargetSpec, settle
from attnlens.analyses.weight_gradients import (
    Edges,
    check_dense,
    chosen_heads,
    key_side,
    positive,
    query_side,
    start_rows,
    weight_gradients,
)
from attnlens.anatomy import Anatomy, HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.residual import FINAL
from attnlens.lens import Batch, Inputs, Lens
from attnlens.lens.asked import Maps

OWN_ROW = (
    "The explained row starts with a relevance of 1 for its own token: compare the others with one "
    "another."
)

Relevance = Mapping[tuple[str, str], Float[Tensor, "*batch row column"]]
"""R of pairs of sides: `R[s, q][i, j]` is how relevant position j of q is for position i of s. A
pair that is not there is 0, or I for a side with itself."""


def chefer(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
    row: int | None = None,
    maps: Maps = None,
    budget: str | float = "2GB",
) -> Attribution:
    """Chefer et al. 2021, generic: a row of R, with `Ā = E_h[(A * dM/dA)^+]` at each layer.

    Without cross-attention `R = prod (I + Ā)` from the top layer down, of which one row is carried,
    so no map is held; `layers` then has what enters each site. In an encoder-decoder `R_ss += Ā
    R_ss` in both stacks, `R_sq += Ā R_sq` in the decoder's, and cross-attention adds `R̄_ss^T Ā
    R̄_qq` to R_sq, where `R̄ = rownorm(R - I) + I` (0/0, in public code NaN, is 0); the scores are
    R_sq over the text and R_ss over the decoder's own tokens. The row is that of the target's
    logits, else `row` among the prompt's tokens (by default the last under causal attention, else
    the first, where a class token stands). Scores are never negative; the row itself keeps 1 or
    more. `heads` has the sums of `(A * dM/dA)^+`; with `maps` each of these.

    Raises:
        InputError: a target, heads, layers or row that is not there, a metric without a gradient,
            or an edit of z in `lens.edit`.
        BudgetError: R of an encoder-decoder, or maps, over the budget.
        UnsupportedModelError: a part of the model runs without gradients.

    """
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    chosen = chosen_heads(anatomy, layers, heads)
    mixed = any(anatomy[name].kind == "cross" for name in chosen)
    if mixed:
        _check_relevance(lens, batch, chosen, budget)
    kept = kept_maps(lens, batch, chosen, maps, budget)
    explained = settle(lens, batch, target)
    value, sites = weight_gradients(lens, batch, explained, layers, heads)
    start = start_rows(anatomy, batch, explained, sites[-1], row)
    names: tuple[str, ...] = ()
    if mixed:
        spread = _rows_of(_relevance(anatomy, sites), query_side(anatomy, sites[-1].site), start)
    else:
        spread = by_side(carried_down(anatomy, sites, start, normalised=False))
        names = (*(edges.site.name for edges in sites), FINAL)
    words, scores, notes = over_sides(lens, batch, spread)
    sums = summed(sites, positive, kept)
    return Attribution(
        method="chefer",
        tokens=words,
        scores=scores[:, 0],
        target=explained.names,
        value=value,
        settings=chosen_settings(layers, heads, row=row),
        layers=scores if names else None,
        layer_names=names,
        heads=sums.heads,
        head_names=sums.head_names,
        maps=sums.maps,
        places=places_of(batch),
        notes=(*notes, OWN_ROW),
    )


def self_attended(
    relevance: Relevance, side: str, attention: Float[Tensor, "*batch row row"]
) -> Relevance:
    """Self-attention of a side: `R_ss += Ā R_ss`, and `R_sq += Ā R_sq` for every other q."""
    found = dict(relevance)
    own = relevance.get((side, side))
    found[side, side] = attention + _eye(attention) if own is None else own + attention @ own
    for (first, other), known in relevance.items():
        if first == side and other != side:
            found[side, other] = known + attention @ known
    return found


def cross_attended(
    relevance: Relevance, side: str, other: str, attention: Float[Tensor, "*batch row column"]
) -> Relevance:
    """A decoder's side that attends to another: `R_sq += R̄_ss^T Ā R̄_qq`."""
    return {**relevance, (side, other): _brought(relevance, side, other, attention)}


def co_attended(
    relevance: Relevance,
    side: str,
    other: str,
    attention: Float[Tensor, "*batch row column"],
    back: Float[Tensor, "*batch column row"],
) -> Relevance:
    """Two sides that attend to each other at once, each by the relevance of before.

    `R_sq += R̄_ss^T Ā_sq R̄_qq` and `R_ss += Ā_sq R_qs`; the same for the other side with `back`.
    """
    found = dict(relevance)
    for first, second, own in ((side, other, attention), (other, side, back)):
        found[first, second] = _brought(relevance, first, second, own)
        crossed = relevance.get((second, first))
        if crossed is not None:
            before = relevance.get((first, first))
            square = own @ crossed
            found[first, first] = square + (_eye(square) if before is None else before)
    return found


def normalised(relevance: Float[Tensor, "*batch row row"]) -> Float[Tensor, "*batch row row"]:
    """`R̄ = (R - I) / rowsum(R - I) + I`; a row of I stays one, where public code divides 0 by 0."""
    eye = _eye(relevance)
    gained = relevance - eye
    total = gained.sum(-1, keepdim=True)
    return gained / torch.where(total > 0, total, 1) + eye


def relevance_rollout(
    gradients: Sequence[Float[Tensor, "batch head query key"]],
    relevances: Sequence[Float[Tensor, "batch head query key"]],
    start: int = 0,
) -> Float[Tensor, "batch query key"]:
    """Chefer et al. 2021, beyond attention: `prod_l (I + E_h[(dM/dA_l * R_A_l)^+])`, top first.

    `gradients` are dM/dA and `relevances` R_A of each layer, the lowest first; layers below `start`
    are left out. A class token's row, without its own column, is the paper's map.

    Raises:
        InputError: no layers, as many gradients as relevances there are not, shapes that differ, or
            a start that is no layer.

    """
    if not 0 <= start < len(gradients) or len(gradients) != len(relevances):
        raise InputError(
            f"There are gradients of {len(gradients)} layers and relevances of {len(relevances)}, "
            f"to start at layer {start}: give both of every layer, and a start among them."
        )
    found: Tensor | None = None
    for gradient, relevance in list(zip(gradients, relevances, strict=True))[start:]:
        if gradient.shape != relevance.shape or gradient.shape[-1] != gradient.shape[-2]:
            raise InputError(
                f"A layer's gradient is {list(gradient.shape)} and its relevance "
                f"{list(relevance.shape)}; both are [batch, head, query, key], as many queries as "
                "keys."
            )
        fused = positive(gradient * relevance).mean(1)
        step = fused + _eye(fused)
        found = step if found is None else step @ found
    assert found is not None
    return found


def _eye(like: Float[Tensor, "*batch row row"]) -> Float[Tensor, "row row"]:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _brought(
    relevance: Relevance, side: str, other: str, attention: Float[Tensor, "*batch row column"]
) -> Float[Tensor, "*batch row column"]:
    """R_sq after cross-attention: what was there and `R̄_ss^T Ā R̄_qq`."""
    own, theirs = relevance.get((side, side)), relevance.get((other, other))
    brought = attention if own is None else normalised(own).mT @ attention
    brought = brought if theirs is None else brought @ normalised(theirs)
    before = relevance.get((side, other))
    return brought if before is None else before + brought


def _relevance(anatomy: Anatomy, sites: Sequence[Edges]) -> Relevance:
    """R after all sites, in the order in which they run."""
    relevance: Relevance = {}
    for edges, fused in _fused(sites):
        side = query_side(anatomy, edges.site)
        if edges.site.kind == "cross":
            other = key_side(anatomy, edges.site)
            relevance = cross_attended(relevance, side, other, fused)
        else:
            relevance = self_attended(relevance, side, fused)
    return relevance


def _fused(sites: Sequence[Edges]) -> Iterator[tuple[Edges, Float[Tensor, "batch query key"]]]:
    """`Ā = E_h[(A * dM/dA)^+]` of each site, one at a time."""
    for edges in sites:
        batch, _, queries, keys = edges.rows.shape
        fused = edges.zeros(batch, queries, keys)
        for block in edges.blocks():
            fused[:, block.rows, block.keys] = positive(block.products).mean(1)
        yield edges, fused


def _rows_of(
    relevance: Relevance, side: str, start: Float[Tensor, "batch row"]
) -> dict[str, Float[Tensor, "batch one position"]]:
    """The explained row of R over each side that has one."""
    return {
        other: start[:, None] @ known
        for (first, other), known in relevance.items()
        if first == side
    }


def _check_relevance(
    lens: Lens, batch: Batch, chosen: Mapping[str, tuple[int, ...]], budget: str | float
) -> None:
    """Refuse R of more than the budget: of each stack, and three matrices for a step on the way."""
    first = {name.rpartition(".")[0]: name for name in reversed(list(chosen))}
    counts = dict.fromkeys(first.values(), 4)
    way = 'Explain the decoder alone (layers="dec.L0:"), whose row needs no matrix'
    check_dense("The relevance of every pair of positions", lens, batch, counts, budget, way)
