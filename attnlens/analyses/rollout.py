"""Attention rollout: how attention, layer upon layer, carries input tokens to every position.

Abnar and Zuidema 2020, Quantifying attention flow in transformers. Heads of a layer are fused into
one map, the residual stream is added, and the layers are multiplied:

    R_0 = I,   R_l = ((1 - share) A_l + share I) R_(l-1)

With a share of one half this is the paper's `rownorm(A_l + I)`. Rows sum to 1, unless learned sinks
take a share of the attention: what they take is not handed back to the other keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.fusing import RolloutSettings, fuse_heads, rolled, rollout_matrix
from attnlens.anatomy import Anatomy, Site
from attnlens.errors import InputError
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer
from attnlens.hooks.tokens import Sides, Tokens
from attnlens.lens import Inputs, Lens, Trace

__all__ = ["Rollout", "RolloutRow", "RolloutSettings", "rollout", "rollout_from", "rollout_matrix"]

MANY_LAYERS = 12
"""Causal layers from which on the first token gathers most of a rollout, whatever the heads do."""


@dataclass(frozen=True)
class Rollout:
    """Cumulative attention after each layer; positions stand at the left, padding is zero."""

    tokens: tuple[tuple[str, ...], ...]
    matrix: Float[Tensor, "batch layer query key"]
    maps: Float[Tensor, "batch layer query key"]
    """The fused map of each layer, before the residual share: what a flow graph is made of."""
    layers: tuple[str, ...]
    """Names of the sites, in the order of the layer axis."""
    settings: RolloutSettings
    notes: tuple[str, ...]

    @property
    def last(self) -> Float[Tensor, "batch query key"]:
        """The rollout through all layers."""
        return self.matrix[:, -1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each prompt."""
        return tuple(len(tokens) for tokens in self.tokens)

    def of(self, prompt: int) -> Float[Tensor, "layer query key"]:
        """The matrices of one prompt, without padding."""
        length = self.lengths[prompt]
        return self.matrix[prompt, :, :length, :length]

    def to_frame(self, prompt: int = 0, layer: int = -1) -> pd.DataFrame:
        """One row a pair: query, query_token, key, key_token, weight; `layer` is an axis index."""
        own, words = self.of(prompt)[layer].double().cpu(), self.tokens[prompt]
        positions = range(len(words))
        index = pd.MultiIndex.from_product([positions, positions], names=["query", "key"])
        table = pd.DataFrame({"weight": own.flatten().numpy()}, index=index).reset_index()
        table.insert(1, "query_token", [words[i] for i in table["query"]])
        table.insert(3, "key_token", [words[i] for i in table["key"]])
        return table


@dataclass(frozen=True)
class RolloutRow:
    """One target row of a rollout for each prompt, carried down from the top layer."""

    tokens: tuple[tuple[str, ...], ...]
    target: tuple[int, ...]
    """The target position of each prompt."""
    reached: Float[Tensor, "batch layer key"]
    """How the target's attention is spread over the positions that enter each layer."""
    layers: tuple[str, ...]
    settings: RolloutSettings
    notes: tuple[str, ...]

    @property
    def row(self) -> Float[Tensor, "batch key"]:
        """The target's row of the full rollout: its spread over the input tokens."""
        return self.reached[:, 0]

    def to_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a token: key, token, weight."""
        words = self.tokens[prompt]
        weights = self.row[prompt, : len(words)].tolist()
        return pd.DataFrame({"key": range(len(words)), "token": words, "weight": weights})


def rollout(
    trace: Trace, settings: RolloutSettings | None = None, stack: str | None = None
) -> Rollout:
    """Attention rollout of a trace that kept the patterns of a self-attention stack.

    `R_l = ((1 - share) A_l + share I) R_(l-1)` (Abnar and Zuidema 2020), in float32 at least;
    `stack` is needed where a model has several ("enc", "dec").

    Raises:
        InputError: a pattern, or some of its rows or heads, was not kept; no such stack.

    """
    settings = settings or RolloutSettings()
    sites, chosen = chosen_sites(trace.anatomy, settings, stack)
    for site in sites:
        _check_kept(trace, site, chosen[site.name])
    tokens = trace.sides.queries(sites[0])
    patterns = (_kept(trace, site, chosen[site.name]) for site in sites)
    layers = list(rolled(patterns, settings))
    tokens = tokens.cut(layers[0][0].shape[-1])
    maps, matrix = (
        _to_the_left(_to_the_left(torch.stack(parts, dim=1), tokens.real, 3), tokens.real, 2)
        for parts in zip(*layers, strict=True)
    )
    words = _words(trace.tokens, tokens, trace.sides, matrix)
    last = torch.stack([matrix[b, -1, len(own) - 1] for b, own in enumerate(words)])
    sums = [float(matrix[b, -1, : len(own)].sum(-1).min()) for b, own in enumerate(words)]
    notes = _notes(trace.anatomy, sites, settings, last, min(sums))
    return Rollout(words, matrix, maps, tuple(site.name for site in sites), settings, notes)


@torch.no_grad()
def rollout_from(
    lens: Lens,
    inputs: Inputs,
    target: int | Sequence[int] = -1,
    settings: RolloutSettings | None = None,
    stack: str | None = None,
) -> RolloutRow:
    """One target row of the rollout, `e_t Ã_L ... Ã_1`, without a map of queries x keys.

    The model runs once and its queries and keys are kept; a vector is then carried from the target
    down through the layers, attention rows recomputed block by block. `target` counts over each
    prompt's tokens, -1 is the last; one for all prompts, or one each. Raises InputError for a stack
    or target that is not there.
    """
    settings = settings or RolloutSettings()
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    sites, chosen = chosen_sites(anatomy, settings, stack)
    kept = _KeepRows(sites)
    lens.observe(batch, kept)
    tokens = batch.sides.queries(sites[0])
    shape = kept.rows[sites[0].name].shape
    tokens = tokens.cut(shape[2])
    places = _targets(tokens, shape[0], shape[2], target)
    spread = _one_hot(places, kept.rows[sites[0].name].query)
    reached: list[Tensor] = []
    for site in reversed(sites):
        heads = torch.tensor(chosen[site.name], device=spread.device)
        spread = _one_layer_down(kept.rows[site.name].select(heads), spread, settings)
        reached.append(spread)
    stacked = _to_the_left(torch.stack(reached[::-1], dim=1), tokens.real, 2)
    words = _words(batch.tokens, tokens, batch.sides, stacked)
    moved = tuple(
        place if tokens.real is None else int(tokens.real[b, :place].sum())
        for b, place in enumerate(places)
    )
    low = float(stacked[:, 0].sum(-1).min())
    notes = _notes(anatomy, sites, settings, stacked[:, 0], low)
    return RolloutRow(words, moved, stacked, tuple(s.name for s in sites), settings, notes)


def _one_layer_down(
    rows: Rows, spread: Float[Tensor, "batch query"], settings: RolloutSettings
) -> Float[Tensor, "batch key"]:
    """`spread Ã` for one layer, a block of rows at a time; rows without weight are not computed."""
    below = settings.residual * spread
    for block in rows.blocks():
        weights = spread[:, block]
        if not bool(weights.any()):
            continue
        keys = rows.keys_seen(block)
        pattern = rows.pattern(rows.scores(block, keys), block, keys).to(spread.dtype)
        own = torch.arange(block.start, block.stop, device=spread.device) - keys.start
        fused = fuse_heads(pattern, own, settings)
        below[:, keys] += (1 - settings.residual) * (weights[:, None] @ fused)[:, 0]
    return below


class _KeepRows(Observer):
    """Observer that keeps the rule of each site's rows: q, k and what else makes them."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.rows: dict[str, Rows] = {}

    def see(self, site: Site, call: Call) -> Call:
        """Keep the rule of one call."""
        self.rows[site.name] = Rows.at(site, call)
        return call


def _one_hot(places: Sequence[int], query: Tensor) -> Float[Tensor, "batch query"]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    spread = torch.zeros(len(places), query.shape[2], dtype=dtype, device=query.device)
    spread[range(len(places)), list(places)] = 1
    return spread


def _targets(tokens: Tokens, batch: int, length: int, target: int | Sequence[int]) -> list[int]:
    """The position of each prompt's target token in the padded batch."""
    each = [target] * batch if isinstance(target, int) else list(target)
    if len(each) != batch:
        raise InputError(f"{len(each)} targets for {batch} prompts; give one, or one each.")
    found: list[int] = []
    for prompt, target in enumerate(each):
        real = range(length)
        if tokens.real is not None:
            real = tokens.real[prompt].nonzero()[:, 0].tolist()
        if not -len(real) <= target < len(real):
            raise InputError(
                f"target={target} is not in prompt {prompt}, which has {len(real)} tokens."
            )
        found.append(real[target])
    return found


def chosen_sites(
    anatomy: Anatomy, settings: RolloutSettings, stack: str | None
) -> tuple[tuple[Site, ...], dict[str, tuple[int, ...]]]:
    """The sites to roll through and the heads to fuse at each."""
    stacks = tuple(dict.fromkeys(s.stack for s in anatomy.sites if s.kind != "cross"))
    if stack is None and len(stacks) > 1 and "" not in stacks:
        raise InputError(
            f"{anatomy.model} has several stacks; say which to roll out: "
            + " or ".join(f'stack="{name}"' for name in stacks)
            + "."
        )
    stack = stack if stack is not None else "" if "" in stacks else next(iter(stacks), "")
    if stack not in stacks:
        there = ", ".join(map(repr, stacks)) if any(stacks) else "one, without a name: give none"
        raise InputError(
            f"There is no self-attention stack {stack!r} to roll out; there is {there}."
        )
    heads = anatomy.heads if settings.heads is None else anatomy.find(settings.heads)
    numbers = {
        site.name: tuple(head.head for head in heads if head.site == site.name)
        for site in anatomy.layers(settings.layers)
        if site.stack == stack
    }
    sites = tuple(site for site in anatomy.sites if numbers.get(site.name))
    if not sites:
        raise InputError(
            f"layers={settings.layers!r} and heads={settings.heads!r} leave nothing to roll out in "
            f"the stack {stack!r}."
        )
    return sites, numbers


def _check_kept(trace: Trace, site: Site, heads: tuple[int, ...]) -> None:
    """Raise InputError unless the trace has all rows of these heads."""
    kept = trace.heads.get(site.name, ()) if site.name in trace.pattern else ()
    if missing := sorted(set(heads) - set(kept)):
        raise InputError(
            f"The pattern of {site.head(missing[0])} was not kept. Run again with all layers and "
            'heads, or choose kept ones: RolloutSettings(layers="L0:2", heads="L0H1,L1H2").'
        )
    if trace.rows is not None:
        raise InputError(
            "The trace kept some rows only and a rollout needs all. Run without rows=, or use "
            "rollout_from for one target row."
        )


def _kept(
    trace: Trace, site: Site, heads: tuple[int, ...]
) -> Float[Tensor, "batch head query key"]:
    pattern, kept = trace.pattern[site.name], trace.heads[site.name]
    return pattern if heads == kept else pattern[:, [kept.index(head) for head in heads]]


def _to_the_left(values: Tensor, real: Tensor | None, axis: int) -> Tensor:
    """Move the real positions of each prompt along an axis to the left; the rest becomes 0."""
    if real is None:
        return values
    shape = [1] * values.ndim
    shape[0], shape[axis] = real.shape
    order = (~real).int().argsort(dim=-1, stable=True)
    moved = values.gather(axis, order.view(shape).expand(values.shape))
    return moved.masked_fill(~real.gather(-1, order).view(shape), 0)


def _words(
    texts: tuple[tuple[str, ...], ...], tokens: Tokens, sides: Sides, values: Tensor
) -> tuple[tuple[str, ...], ...]:
    """What stands at each position: token texts, else ids (a decoder's), else numbers."""
    if texts and tokens.ids is sides.text.ids:
        return texts
    if tokens.ids is None:
        return (tuple(map(str, range(values.shape[-1]))),) * values.shape[0]
    rows = [ids if tokens.real is None else ids[tokens.real[b]] for b, ids in enumerate(tokens.ids)]
    return tuple(tuple(map(str, row.tolist())) for row in rows)


def _notes(
    anatomy: Anatomy,
    sites: Sequence[Site],
    settings: RolloutSettings,
    last: Float[Tensor, "batch key"],
    lowest_sum: float,
) -> tuple[str, ...]:
    """What a reader of this rollout should know; `last` is one late row of each prompt."""
    notes: list[str] = []
    first = float((last[:, 0] / last.sum(-1)).mean())
    if all(site.causal for site in sites) and (len(sites) >= MANY_LAYERS or first > 0.5):
        notes.append(
            f"Through {len(sites)} causal layers {first:.0%} of the last row lies on the first "
            "token. Repeated causal averaging gathers there whatever the heads do: compare with "
            "the rollout of even attention before reading it as importance."
        )
    if any(site.sinks for site in sites):
        notes.append(
            "Learned sinks take a share of each row, which is not handed back: rows of the rollout "
            f"sum to {lowest_sum:.3f} at least."
        )
    return (*notes, *maps_notes(anatomy, sites, settings))


def maps_notes(
    anatomy: Anatomy, sites: Sequence[Site], settings: RolloutSettings
) -> tuple[str, ...]:
    """What fused maps leave out, whatever is made of them."""
    notes: list[str] = []
    between = {s.name for s in anatomy.sites if s.stack == sites[0].stack and s.kind != "cross"}
    inside = range(sites[0].layer, sites[-1].layer + 1)
    left_out = sorted(set(inside) - {site.layer for site in sites})
    if left_out:
        names = [f"{sites[0].name.rpartition('L')[0]}L{layer}" for layer in left_out]
        why = "left out" if set(names) <= between else "left out, or mixed by other means"
        notes.append(f"Taken to pass their input on unchanged ({why}): {', '.join(names)}.")
    if anatomy.unseen:
        notes.append(
            f"{len(anatomy.unseen)} attention modules lie outside the attention interface and are "
            "taken to pass their input on unchanged."
        )
    if settings.discard:
        notes.append(
            f"The lowest {settings.discard:.0%} of each head's row was dropped, never the weight "
            "on the row's own token; rows keep their sums."
        )
    return tuple(notes)
