"""Norms of value-weighted attention: how much a head takes from a token, not how much it looks.

A large weight on a token whose value is near 0 moves nothing. Kobayashi et al. 2020, Attention is
not only a weight: analyzing transformers with vector norms, measure what is added to a row instead:

    |A_h[t, s] f_h(s)|,   f_h(s) = v_s W_O^h

and of a layer the norm of the sum over its heads, in which heads may cancel. No vector of every row
and key is made: the products of all heads' f(s) with each other are `head head` numbers a key, from
which both norms follow for any row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.analyses.attention_gradient import (
    chosen_settings,
    columns_over_tokens,
    kept_maps,
)
from attnlens.analyses.attribution import Attribution, places_of
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.analyses.weight_gradients import DECODER, TEXT, chosen_heads, query_side
from attnlens.anatomy import HeadSpec, Site
from attnlens.anatomy.weights import output_weight
from attnlens.errors import InputError
from attnlens.hooks.gradients import usable
from attnlens.hooks.probe import evaluating
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer, Session
from attnlens.hooks.tokens import Sides
from attnlens.lens import Batch, Inputs, Lens, SiteTensors
from attnlens.lens.asked import Maps

_CHUNK = 1 << 22
"""Numbers of `batch key head d_model` made at a time."""


@torch.no_grad()
def value_norms(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
    maps: Maps = None,
    budget: str | float = "2GB",
) -> Attribution:
    """Score tokens by `|sum_h A_h[t, s] v_s W_O^h|` in the row t whose logits the target reads.

    Each layer's row is divided by its sum and the layers are averaged, so the scores of a prompt
    sum to 1 and say nothing of sign, nor of the target but for its row. `layers` of the result are
    the norms themselves, `heads` each head's `sum_s |A_h[t, s] v_s W_O^h|`, and `maps` these norms
    in every row, priced against `budget` first. Where the target names no row (a model without
    logits, a function of the output), norms are means over all rows. Biases and norms after W_O are
    left out. In an encoder-decoder the rows are the decoder's. Kobayashi et al. 2020.

    Raises:
        InputError: a target, heads or layers that are not there, or an edit that is on.
        BudgetError: maps over the budget.
        UnsupportedModelError: a gate or a norm stands between heads and W_O, or rows that cannot be
            recomputed.

    """
    if lens.edited:
        raise InputError(
            "An edit is on, and norms are of what heads write by themselves, not of what an edit "
            "makes of it. Take them outside lens.edit."
        )
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    chosen = chosen_heads(anatomy, layers, heads)
    kept = kept_maps(lens, batch, chosen, maps, budget)
    explained = _settled(lens, batch, target)
    reads = explained.reads if explained is not None else None
    if reads is not None:
        own = DECODER if batch.sides.decoder is not None else TEXT
        chosen = {n: h for n, h in chosen.items() if query_side(anatomy, anatomy[n]) == own}
    norms = _Norms(chosen, batch.sides, reads, kept)
    observers = () if explained is None else explained.observers(lens, batch)
    with evaluating(lens.model), Session(lens.model, anatomy, [norms, *observers]):
        output = lens.model(**usable(lens.model, batch.inputs))
    words, by_layer, notes = columns_over_tokens(lens, batch, norms.layers)
    by_layer = by_layer.cpu()
    sums = by_layer.sum(-1, keepdim=True)
    scores = (by_layer / torch.where(sums > 0, sums, 1)).mean(1)
    nothing = torch.full((batch.size,), torch.nan, dtype=torch.float64)
    if reads is None:
        notes = (*notes, "The target names no row, so norms are means over all rows.")
    return Attribution(
        method="value_norms",
        tokens=words,
        scores=scores,
        target=("no target",) * batch.size if explained is None else explained.names,
        value=nothing if explained is None else explained.metric(output).double().cpu(),
        settings=chosen_settings(layers, heads),
        layers=by_layer,
        layer_names=tuple(norms.layers),
        heads=torch.cat([norms.heads[name] for name in norms.layers], dim=1).cpu(),
        head_names=tuple(anatomy[n].head(number) for n in norms.layers for number in chosen[n]),
        maps=SiteTensors(norms.maps) if norms.maps else None,
        places=places_of(batch),
        notes=notes,
    )


def _settled(lens: Lens, batch: Batch, target: TargetSpec) -> Explained | None:
    """The target settled; None for none of a model that has nothing to explain."""
    try:
        return settle(lens, batch, target)
    except InputError:
        if target is None and lens.anatomy_for(batch).unembedding is None:
            return None
        raise


@dataclass
class _Norms(Observer):
    """Observer that takes the norms of some heads as each site runs."""

    chosen: Mapping[str, tuple[int, ...]]
    sides: Sides
    reads: Tensor | None
    keep: Collection[str]
    layers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    heads: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    maps: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    _model: nn.Module | None = None

    def __post_init__(self) -> None:
        self.sites = frozenset(self.chosen)

    def attach(self, model: nn.Module) -> tuple[Handle, ...]:
        """Note the model, whose W_O is read at each site."""
        self._model = model
        return ()

    def see(self, site: Site, call: Call) -> Call:
        """Take the norms of one call."""
        assert self._model is not None
        numbers = torch.tensor(self.chosen[site.name], device=call.query.device)
        rows = Rows.summing(site, call).select(numbers)
        weight = output_weight(self._model, site)[numbers]
        value = call.value[:, numbers // (site.heads // site.groups)]
        products = head_products(value, weight.to(value))
        single = products.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().transpose(1, 2)
        if self.reads is not None:
            pattern = _at(rows, self.reads)
            self.layers[site.name] = summed_norms(pattern, products)[:, 0]
            self.heads[site.name] = (pattern[:, :, 0].double() * single).sum(-1)
        else:
            self._mean_rows(site, rows, products, single)
        if site.name in self.keep:
            self.maps[site.name] = (rows.dense() * single[:, :, None]).to(value.dtype)
        return call

    def _mean_rows(
        self,
        site: Site,
        rows: Rows,
        products: Float[Tensor, "batch key head head"],
        single: Float[Tensor, "batch head key"],
    ) -> None:
        """Means of the norms over the real rows, a block at a time."""
        batch, heads, queries, keys = rows.shape
        real = self.sides.queries(site).cut(queries).real
        weights = products.new_ones(batch, queries) if real is None else real.to(products)
        weights = weights / weights.sum(-1, keepdim=True)
        layer, each = products.new_zeros(batch, keys), products.new_zeros(batch, heads)
        for block in rows.blocks():
            seen = rows.keys_seen(block)
            pattern = rows.pattern(rows.scores(block, seen), block, seen).double()
            share = weights[:, block]
            norms = summed_norms(pattern, products[:, seen])
            layer[:, seen] += torch.einsum("bts,bt->bs", norms, share)
            each += torch.einsum("bhts,bhs,bt->bh", pattern, single[:, :, seen], share)
        self.layers[site.name], self.heads[site.name] = layer, each


def head_products(
    value: Float[Tensor, "batch head key d_v"], weight: Float[Tensor, "head d_v d_model"]
) -> Float[Tensor, "batch key head head"]:
    """`f_h(s) . f_g(s)` of all pairs of heads at every key, `f_h(s) = v_s W_O^h`; in float64."""
    batch, heads, keys, _ = value.shape
    found = value.new_empty(batch, keys, heads, heads, dtype=torch.float64)
    size = max(_CHUNK // (batch * heads * weight.shape[-1]), 1)
    for start in range(0, keys, size):
        own = slice(start, start + size)
        written = torch.einsum("bhsv,hvd->bshd", value[:, :, own].double(), weight.double())
        found[:, own] = written @ written.transpose(-1, -2)
    return found


def summed_norms(
    pattern: Float[Tensor, "batch head row key"],
    products: Float[Tensor, "batch key head head"],
) -> Float[Tensor, "batch row key"]:
    """`|sum_h A_h[t, s] f_h(s)|` of rows, from the products of what heads write of each key."""
    pattern = pattern.double()
    across = torch.einsum("bhts,bshg->bgts", pattern, products)
    return (across * pattern).sum(1).clamp_min(0).sqrt()


def _at(rows: Rows, reads: Tensor) -> Float[Tensor, "batch head 1 key"]:
    """One row of each prompt."""
    positions: list[int] = reads[:, 0].tolist()
    return torch.cat([rows.prompt(b).dense([place]) for b, place in enumerate(positions)])
