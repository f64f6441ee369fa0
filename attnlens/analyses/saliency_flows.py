"""Saliency flows: how much of a target passes between groups of positions, layer by layer.

Wang et al. 2023, Label words are anchors. `I_l = sum_h |A_hl * dM/dA_hl|` is the traffic of layer
l; its mean over the edges from one group of positions to another says where information goes: in
their few-shot prompts first from the text to the label words, later from these to the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.analyses.attention_gradient import chosen_settings
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.analyses.uncertainty import bootstrap_mean, check_bootstrap
from attnlens.analyses.weight_gradients import (
    Edges,
    WeightBlock,
    chosen_heads,
    query_side,
    start_rows,
    weight_gradients,
)
from attnlens.anatomy import Anatomy, HeadSpec
from attnlens.errors import InputError
from attnlens.lens import Batch, Inputs, Lens
from attnlens.lens.inputs import split

ALL, TARGET = "text", "target"
"""Groups that need not be given: every token, and the row that the target is read at."""
REST = "everything else"

Positions = int | Sequence[int] | Sequence[Sequence[int]]
"""Positions among a prompt's tokens: the same in all prompts, or a list of each prompt's."""


@dataclass(frozen=True)
class SaliencyFlows:
    """Mean saliency of the edges between groups of positions, by layer, over prompts."""

    flows: tuple[str, ...]
    """`text to labels`, ..., and last what belongs to none of them."""
    layers: tuple[str, ...]
    by_prompt: Float[Tensor, "prompt flow layer"]
    """NaN where a layer lets no edge of a flow be seen."""
    mean: Float[Tensor, "flow layer"]
    low: Float[Tensor, "flow layer"]
    high: Float[Tensor, "flow layer"]
    target: tuple[str, ...]
    """What was explained of each prompt."""
    tokens: tuple[tuple[str, ...], ...]
    groups: Mapping[str, tuple[tuple[int, ...], ...]]
    """Positions of each group in each prompt, among its tokens."""
    settings: Mapping[str, Any]
    seed: int
    resamples: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a flow and layer: flow, layer, saliency, saliency_low, saliency_high."""
        index = pd.MultiIndex.from_product([self.flows, self.layers], names=["flow", "layer"])
        columns = {"saliency": self.mean, "saliency_low": self.low, "saliency_high": self.high}
        numbers = {name: values.flatten().numpy() for name, values in columns.items()}
        return pd.DataFrame(numbers, index=index).reset_index()


def saliency_flows(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec,
    groups: Mapping[str, Positions],
    flows: Sequence[tuple[str, str]] = ((ALL, "labels"), ("labels", TARGET)),
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> SaliencyFlows:
    """Mean of `I_l[t, s] = sum_h |A * dM/dA|` over edges from a group's positions s to another's t.

    `groups` names positions among each prompt's tokens; `"text"` is every token, and `"target"`,
    unless it is given, the row that the target is read at. `flows` are pairs (from, to). An edge
    counts where row t sees key s, s other than t; edges of no flow are `everything else`. Each
    prompt's mean is over its own edges, then over prompts, with a bootstrap interval. The paper
    takes a loss for M: give a function of the output as the target. No map outlives its block.

    Raises:
        InputError: a group without positions or outside a prompt, a flow of an unknown group,
            layers of several stacks, or what `attention_saliency` refuses.
        UnsupportedModelError: a part of the model runs without gradients.

    """
    check_bootstrap(resamples, confidence)
    whole = lens.encode(inputs)
    anatomy = lens.anatomy_for(whole)
    _check_one_stack(anatomy, layers, heads)
    _check_flows(groups, flows)
    positions = {name: _each(name, given, whole) for name, given in groups.items()}
    explained = settle(lens, whole, target)
    found: list[Tensor] = []
    if TARGET in {reader for flow in flows for reader in flow}:
        positions.setdefault(TARGET, ())
    rows: list[tuple[int, ...]] = []
    names: tuple[str, ...] = ()
    done = 0
    for part in split(whole, batch_size, by_length=False)[0]:
        own = slice(done, done + part.size)
        done = own.stop
        here = explained.part(own)
        _, sites = weight_gradients(lens, part, here, layers, heads)
        members, read = _members(anatomy, part, here, sites[-1], positions, own)
        rows += read
        found.append(torch.stack([_means(edges, members, flows) for edges in sites], dim=2))
        names = tuple(edges.site.name for edges in sites)
    by_prompt = torch.cat(found).double().cpu()
    interval = bootstrap_mean(by_prompt, resamples, confidence, seed)
    return SaliencyFlows(
        flows=(*(f"{source} to {reader}" for source, reader in flows), REST),
        layers=names,
        by_prompt=by_prompt,
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        target=explained.names,
        tokens=whole.tokens,
        groups={name: each or tuple(rows) for name, each in positions.items()},
        settings=chosen_settings(layers, heads),
        seed=seed,
        resamples=resamples,
        confidence=confidence,
        notes=() if len(by_prompt) > 1 else ("One prompt gives no interval; give several.",),
    )


def _means(
    edges: Edges,
    members: Mapping[str, Bool[Tensor, "batch position"]],
    flows: Sequence[tuple[str, str]],
) -> Float[Tensor, "batch flow"]:
    """Mean saliency of each flow's edges at one site, and of the edges of none."""
    batch = edges.rows.shape[0]
    sums, counts = edges.zeros(batch, len(flows) + 1), edges.zeros(batch, len(flows) + 1)
    for block in edges.blocks():
        saliency = block.products.abs().sum(1)
        seen = _seen(edges, block, members[ALL])
        chosen = [
            members[reader][:, block.rows, None] & members[source][:, None, block.keys] & seen
            for source, reader in flows
        ]
        rest = seen.clone()
        for own in chosen:
            rest &= ~own
        for number, own in enumerate([*chosen, rest]):
            sums[:, number] += (saliency * own).sum((1, 2))
            counts[:, number] += own.sum((1, 2))
    return sums / counts


def _seen(
    edges: Edges, block: WeightBlock, real: Bool[Tensor, "batch position"]
) -> Bool[Tensor, "batch row key"]:
    """The edges of a block between two different real tokens of which one sees the other."""
    rows = torch.arange(block.rows.start, block.rows.stop, device=real.device)
    keys = torch.arange(block.keys.start, block.keys.stop, device=real.device)
    seen = real[:, block.rows, None] & real[:, None, block.keys] & (rows[:, None] != keys)
    visible = edges.rows.visible(block.rows, block.keys)
    return seen if visible is None else seen & visible.any(1)


def _members(
    anatomy: Anatomy,
    part: Batch,
    explained: Explained,
    edges: Edges,
    positions: Mapping[str, tuple[tuple[int, ...], ...]],
    prompts: slice,
) -> tuple[dict[str, Bool[Tensor, "batch position"]], list[tuple[int, ...]]]:
    """Which padded positions are of each group, and the target's rows where they were not given."""
    batch, _, queries, _ = edges.rows.shape
    known = part.sides.queries(edges.site).cut(queries).real
    real = torch.ones(batch, queries, dtype=torch.bool, device=edges.value.device)
    real = real if known is None else known
    members, read = {ALL: real}, list[tuple[int, ...]]()
    for name, each in positions.items():
        if not each:  # the target's own row
            members[name] = start_rows(anatomy, part, explained, edges, None) > 0
            read = [
                (int(own[at].int().argmax()),) for own, at in zip(members[name], real, strict=True)
            ]
            continue
        members[name] = torch.zeros_like(real)
        for prompt, own in enumerate(each[prompts]):
            places = real[prompt].nonzero()[:, 0]
            if max(own) >= len(places) or min(own) < -len(places):
                raise InputError(
                    f"The group {name!r} has the positions {list(own)} in prompt "
                    f"{prompts.start + prompt}, which has {len(places)} tokens."
                )
            members[name][prompt, places[list(own)]] = True
    return members, read


def _each(name: str, given: Positions, batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Positions of each prompt; negative ones count from its end."""
    if isinstance(given, int):
        given = [given]
    nested = [own for own in given if not isinstance(own, int)]
    if not nested:
        each = (tuple(own for own in given if isinstance(own, int)),) * batch.size
    elif len(nested) == len(given) == batch.size:
        each = tuple(tuple(own) for own in nested)
    else:
        raise InputError(
            f"The group {name!r} has {len(given)} entries for {batch.size} prompts: give positions "
            "that all prompts have, or a list of positions of each prompt."
        )
    if not all(each):
        raise InputError(f"The group {name!r} has no positions in a prompt: give one at least.")
    return each


def _check_flows(groups: Mapping[str, Positions], flows: Sequence[tuple[str, str]]) -> None:
    known = {ALL, TARGET, *groups}
    if ALL in groups:
        raise InputError(f"{ALL!r} is the group of every token already; name yours otherwise.")
    for flow in flows:
        for name in flow:
            if name not in known:
                raise InputError(
                    f"The flow {flow[0]!r} to {flow[1]!r} names no group of yours; there is "
                    f"{', '.join(sorted(known))}. Give groups={{{name!r}: positions}}, or flows=..."
                )
    if not flows:
        raise InputError("There is no flow to measure: give pairs of groups, (from, to).")


def _check_one_stack(
    anatomy: Anatomy, layers: HeadSpec | int | None, heads: HeadSpec | None
) -> None:
    """Raise InputError where rows and columns are not the same positions at all sites."""
    sites = [anatomy[name] for name in chosen_heads(anatomy, layers, heads)]
    sides = {query_side(anatomy, site) for site in sites}
    if len(sides) > 1 or any(site.kind == "cross" for site in sites):
        raise InputError(
            f"{anatomy.model} has several stacks, and flows are within one. Name its layers: "
            'layers="dec.L0:" or layers="enc.L0:".'
        )
