"""Attention as a graph that information flows through: nodes are positions between layers.

Every edge points the way information flows, from the position that is read (below) to the position
that reads (above): an attention edge from `(l, s)` to `(l + 1, t)`, and beside it a residual edge
from `(l, t)` to `(l + 1, t)`. Node layer l is the residual stream that enters layer l, and the one
after the last layer is what leaves it; layers that are left out pass their input on unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, cast

import networkx as nx
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.errors import InputError
from attnlens.graphs.prune import prune_graph

ATTENTION, RESIDUAL, MLP = "attention", "residual", "mlp"
"""Kinds of edges."""


def node_name(layer: int, position: int) -> str:
    """Name of a node: `L3P5` is position 5 of the residual stream that enters layer 3."""
    return f"L{layer}P{position}"


class _Settings(Protocol):
    @property
    def residual(self) -> float:
        """Share of the residual stream."""
        ...


class HasMaps(Protocol):
    """What `rollout_graph` needs of a rollout: the maps that it went through, layer by layer."""

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """Token texts of each prompt, without padding."""
        ...

    @property
    def maps(self) -> Float[Tensor, "batch layer query key"]:
        """Heads fused to one map a layer, before the residual share; positions at the left."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Name of each map's site: `L3`, `enc.L3`."""
        ...

    @property
    def settings(self) -> _Settings:
        """A dataclass of the settings, kept with the graph."""
        ...


def attention_graph(
    maps: Float[Tensor, "layer query key"],
    tokens: Sequence[str],
    residual: float = 0.5,
    threshold: float = 0.0,
    top: int | None = None,
    layers: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nx.MultiDiGraph[str]:
    """The flow graph of one prompt's fused maps.

    weight(l, s -> l + 1, t) = (1 - r) A_l[t, s] and weight(l, t -> l + 1, t) = r, so that the sum
    over paths of the product of their weights is attention rollout (Abnar and Zuidema 2020).

    Args:
        maps: one map a layer from the bottom up, heads already fused.
        tokens: the prompt's token texts, as many as positions.
        residual: share r of the residual stream, from 0 to 1; 0.5 is the paper's.
        threshold: edges below it are left out.
        top: so many of the edges that enter a node are kept, the strongest.
        layers: the maps' layer numbers, upwards; from 0 where not given.
        attributes: what the graph is to say of itself: model, method, settings.

    The strongest edge into every node stays in any case, so every node can be traced down to the
    lowest layer; no edge has weight 0. Nodes carry layer, position and token, edges weight
    and kind (`attention` or `residual`), which is also their key:
    `graph.edges["L0P2", "L1P5", "attention"]["weight"]`.

    Raises:
        InputError: maps that are not square, finite, at least 0, or not as long as the tokens; a
            position that nothing enters; a setting out of its range.

    """
    numbers = _layer_numbers(maps, layers)
    _check_maps(maps, tokens, numbers)
    _check_settings(residual, threshold, top)
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.graph.update(attributes or {})
    graph.graph.update(residual=residual, threshold=threshold, top=top, layers=list(numbers))
    streams = (*numbers, numbers[-1] + 1)
    for layer in streams:
        for position, token in enumerate(tokens):
            graph.add_node(node_name(layer, position), layer=layer, position=position, token=token)
    for attention, below, above in zip(maps, streams, streams[1:], strict=False):
        weights = _entering(attention, residual, below)
        _add_edges(graph, below, above, weights, _strong(weights, threshold, top))
    return graph


def rollout_graph(
    rollout: HasMaps,
    prompt: int = 0,
    threshold: float = 0.01,
    top: int | None = None,
    layers: Sequence[int] | None = None,
) -> nx.MultiDiGraph[str]:
    """The flow graph of one prompt's rollout: `attention_graph` of the maps that it multiplied.

    `layers` chooses some of the rollout's layers. At threshold 0 the sum over all paths from
    `L0P<s>` to the top's `P<t>` is the rollout `matrix[prompt, -1, t, s]`.

    Raises:
        InputError: a prompt or a layer that the rollout does not have.

    """
    if not -len(rollout.tokens) <= prompt < len(rollout.tokens):
        raise InputError(f"prompt={prompt}; the rollout has {len(rollout.tokens)} prompts.")
    numbers = [int(name.rpartition("L")[2]) for name in rollout.layers]
    chosen = numbers if layers is None else list(layers)
    if not chosen or not set(chosen) <= set(numbers):
        raise InputError(f"layers={chosen}; the rollout went through {numbers}.")
    rows = [numbers.index(layer) for layer in chosen]
    tokens = rollout.tokens[prompt]
    maps = rollout.maps[prompt, rows, : len(tokens), : len(tokens)]
    attributes = {
        "method": "rollout",
        "prompt": prompt,
        "sites": [rollout.layers[row] for row in rows],
        "settings": asdict(cast(Any, rollout.settings)),
    }
    residual = rollout.settings.residual
    return attention_graph(maps, tokens, residual, threshold, top, chosen, attributes)


def flow_graph(
    maps: Float[Tensor, "layer query key"],
    carried: Float[Tensor, "layer query key"],
    tokens: Sequence[str],
    pair: tuple[int, int],
    residual: float = 0.5,
    threshold: float = 0.0,
    layers: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nx.MultiDiGraph[str]:
    """One maximum flow through a prompt's fused maps: the edges that carry some of it.

    Edges are those of `attention_graph`: `weight` is the capacity, `flow` what is carried. Where a
    position's own attention and its residual edge run side by side, the residual edge fills first.

    Args:
        maps: one map a layer from the bottom up, heads already fused.
        carried: what flows from position t of layer l + 1 to s of layer l: `carried[l, t, s]`.
        tokens: the prompt's token texts, as many as positions.
        pair: target (a position above the last map) and source (below the first).
        residual: share r of the residual stream; 0.5 is the paper's.
        threshold: edges that carry less are left out, but for the strongest into each node, so
            that a path from the source to the target stays: a flow may be spread over many edges
            of which none carries much.
        layers: the maps' layer numbers, upwards; from 0 where not given.
        attributes: what the graph is to say of itself.

    Raises:
        InputError: as for `attention_graph`.

    """
    numbers = _layer_numbers(maps, layers)
    _check_maps(maps, tokens, numbers)
    _check_settings(residual, threshold, None)
    streams = (*numbers, numbers[-1] + 1)
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.graph.update(attributes or {})
    graph.graph.update(method="attention_flow", residual=residual, threshold=threshold)
    graph.graph.update(layers=list(numbers), flow=carried[-1].sum().item())
    for role, layer, position in zip(
        ("target", "source"), streams[:: -len(maps)], pair, strict=True
    ):
        graph.graph[role] = _add_node(graph, layer, position, tokens)
    for step, query, key in (carried > 0).nonzero().tolist():
        lower = _add_node(graph, streams[step], key, tokens)
        upper = _add_node(graph, streams[step + 1], query, tokens)
        flow, weight = carried[step, query, key].item(), maps[step, query, key].item()
        straight = min(flow, residual) if query == key else 0.0
        for kind, capacity, part in (
            (RESIDUAL, residual, straight),
            (ATTENTION, (1 - residual) * weight, flow - straight),
        ):
            if part > 0:
                graph.add_edge(lower, upper, kind, weight=capacity, flow=part, kind=kind)
    if not threshold or not graph.number_of_edges():
        return graph
    return prune_graph(graph, graph.graph["target"], graph.graph["source"], threshold, by="flow")


def _add_node(graph: nx.MultiDiGraph[str], layer: int, position: int, tokens: Sequence[str]) -> str:
    name = node_name(layer, position)
    graph.add_node(name, layer=layer, position=position, token=tokens[position])
    return name


def _layer_numbers(maps: Tensor, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers' numbers, checked to go upwards."""
    if maps.ndim != 3 or not len(maps):
        raise InputError(f"maps have shape {tuple(maps.shape)}; needed is layer query key.")
    numbers = tuple(range(len(maps))) if layers is None else tuple(layers)
    if len(numbers) != len(maps):
        raise InputError(f"{len(maps)} maps and {len(numbers)} layers; give one a map.")
    if list(numbers) != sorted(set(numbers)):
        raise InputError(f"layers={numbers}; a flow goes upwards, through each layer once.")
    return numbers


def _check_maps(maps: Tensor, tokens: Sequence[str], numbers: tuple[int, ...]) -> None:
    """Raise InputError unless the maps are square, of the tokens' length, finite and at least 0."""
    if maps.shape[1:] != (len(tokens), len(tokens)) or not len(tokens):
        raise InputError(
            f"maps are {maps.shape[1]} x {maps.shape[2]} and there are {len(tokens)} tokens; "
            "needed is a square map as long as the tokens (without padding)."
        )
    wrong = (~maps.isfinite() | (maps < 0)).nonzero()
    if len(wrong):
        layer, query, key = wrong[0].tolist()
        raise InputError(
            f"the weight of layer {numbers[layer]}, query {query}, key {key} is "
            f"{maps[layer, query, key].item()}; a flow needs finite weights of at least 0."
        )


def _check_settings(residual: float, threshold: float, top: int | None) -> None:
    if not 0 <= residual <= 1:
        raise InputError(f"residual={residual}; a share lies between 0 and 1.")
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold={threshold}; weights lie between 0 and 1.")
    if top is not None and top < 1:
        raise InputError(f"top={top}; at least one edge enters each node.")


def _entering(
    attention: Float[Tensor, "query key"], residual: float, layer: int
) -> Float[Tensor, "query key_and_residual"]:
    """What enters each position: its attention edges, then its residual edge."""
    attention = attention.detach().double().cpu()
    own = attention.new_full((len(attention), 1), residual)
    weights = torch.cat([(1 - residual) * attention, own], dim=-1)
    empty = (weights.amax(-1) == 0).nonzero()
    if len(empty):
        raise InputError(
            f"nothing enters position {empty[0].item()} above layer {layer}: its row is all 0 and "
            "so is the residual share; give a residual share, or leave the position out."
        )
    return weights


def _strong(
    weights: Float[Tensor, "query edge"], threshold: float, top: int | None
) -> Bool[Tensor, "query edge"]:
    """Edges to keep: at least the threshold and among the top; the strongest in any case."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    kept = (weights >= threshold) & (weights > 0)
    if top is not None:
        kept &= rank < top
    return kept | (rank == 0)


def _add_edges(
    graph: nx.MultiDiGraph[str], below: int, above: int, weights: Tensor, kept: Tensor
) -> None:
    """Add the kept edges of one layer."""
    length = len(weights)
    for query, edge in kept.nonzero().tolist():
        kind = RESIDUAL if edge == length else ATTENTION
        source = node_name(below, query if kind == RESIDUAL else edge)
        weight = weights[query, edge].item()
        graph.add_edge(source, node_name(above, query), kind, weight=weight, kind=kind)
