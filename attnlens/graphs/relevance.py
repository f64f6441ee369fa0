"""Relevance as a graph: the attention edges that carry a score, head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.errors import InputError
from attnlens.graphs.flow import ATTENTION, RESIDUAL, node_name

Edge = tuple[int, int, int, int, float]
"""Layer, head, query, key, score."""


def relevance_graph(
    maps: Mapping[str, Float[Tensor, "batch head query key"]],
    tokens: Sequence[str],
    prompt: int = 0,
    top: int | None = 100,
    threshold: float = 0.0,
    streams: Float[Tensor, "layer position"] | None = None,
    positions: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nx.MultiDiGraph[str]:
    """The graph of one prompt's scores of attention edges, `Attribution.maps`.

    An edge of head h from `(l, s)` to `(l + 1, t)` has the weight `maps["L<l>"][prompt, h, t, s]`,
    signed; its key and `head` name the head, its `sign` is 1 or -1, its kind `attention`. Between
    the nodes of a position that are kept, residual edges go upwards, so that paths can be traced:
    their weight is the score of the stream at their lower end where `streams` are given, else 0.
    Nodes carry layer, position, token, and their `score` where `streams` tell it.

    Args:
        maps: scores by site, all of one self-attention stack.
        tokens: the prompt's token texts, without padding.
        prompt: which of the batch.
        top: so many edges are kept, the largest by size; all for None.
        threshold: edges under it by size are left out.
        streams: scores of the stream that enters each of the maps' layers, and, if known, of what
            leaves the last: `Attribution.layers[prompt]`.
        positions: where the tokens stand in the padded input; at its beginning if not given.
        attributes: what the graph is to say of itself: model, method, target.

    Raises:
        InputError: sites of several stacks, maps that are not finite or do not hold the tokens,
            scores outside the tokens' positions, a setting out of its range.

    """
    layers = _layers(maps, prompt)
    places = list(range(len(tokens))) if positions is None else list(positions)
    if len(places) != len(tokens):
        raise InputError(f"{len(places)} positions are given for {len(tokens)} tokens.")
    if (top is not None and top < 1) or threshold < 0:
        raise InputError(f"top={top}, threshold={threshold}; keep at least one edge, by its size.")
    _check_streams(streams, layers, len(tokens))
    edges: list[Edge] = []
    for layer, scores in layers.items():
        edges += _strongest(layer, _own(scores, places, layer), top, threshold)
    edges = sorted(edges, key=lambda edge: -abs(edge[4]))[:top]
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.graph.update(attributes or {})
    graph.graph.update(layers=list(layers), threshold=threshold, top=top)
    streamed = None if streams is None else streams.detach().double().cpu()
    _add_nodes(graph, list(layers), edges, tokens, streamed)
    for layer, head, query, key, score in sorted(edges):
        graph.add_edge(
            node_name(layer, key), node_name(_above(layers, layer), query), f"L{layer}H{head}",
            weight=score, kind=ATTENTION, head=f"L{layer}H{head}", sign=1 if score > 0 else -1,
        )  # fmt: skip
    return graph


def _layers(maps: Mapping[str, Tensor], prompt: int) -> dict[int, Float[Tensor, "head query key"]]:
    """The prompt's map of each layer number, upwards."""
    stacks = sorted({name.rpartition("L")[0] for name in maps})
    if len(stacks) != 1 or stacks[0] == "cross.":
        names = ", ".join(maps) or "none"
        raise InputError(
            f"A graph goes upwards through one self-attention stack; the maps are of {names}. "
            "Choose those of one stack."
        )
    found: dict[int, Tensor] = {}
    for name, scores in maps.items():
        if scores.ndim != 4 or not -len(scores) <= prompt < len(scores):
            raise InputError(
                f"The map of {name} has shape {tuple(scores.shape)}; needed is batch head query "
                f"key, with a prompt {prompt}."
            )
        found[int(name.rpartition("L")[2])] = scores[prompt]
    return dict(sorted(found.items()))


def _above(layers: Mapping[int, Tensor], layer: int) -> int:
    """The node layer that a layer writes to: the next one that is there."""
    later = [other for other in layers if other > layer]
    return later[0] if later else layer + 1


def _own(scores: Tensor, places: Sequence[int], layer: int) -> Float[Tensor, "head query key"]:
    """The scores among the prompt's own tokens; none may lie elsewhere."""
    length = min(scores.shape[1:])
    if not all(0 <= place < length for place in places):
        raise InputError(f"The map of layer {layer} has {length} positions, too few for {places}.")
    if not bool(scores.isfinite().all()):
        raise InputError(f"The map of layer {layer} holds scores that are not finite.")
    rows = torch.tensor(places, device=scores.device)
    own = scores[:, rows[:, None], rows]
    if own.count_nonzero() != scores.count_nonzero():
        raise InputError(
            f"The map of layer {layer} has scores outside the {len(places)} tokens. Where the "
            "input is padded on the left, say with positions= where the tokens stand."
        )
    return own


def _strongest(layer: int, scores: Tensor, top: int | None, threshold: float) -> list[Edge]:
    """The largest edges of a layer by size."""
    flat = scores.detach().double().flatten().cpu()
    kept = ((flat.abs() >= threshold) & (flat != 0)).nonzero()[:, 0]
    if top is not None:
        kept = kept[flat[kept].abs().argsort(descending=True, stable=True)[:top]]
    length = scores.shape[-1]
    return [
        (layer, i // length**2, i // length % length, i % length, flat[i].item())
        for i in kept.tolist()
    ]


def _add_nodes(
    graph: nx.MultiDiGraph[str],
    layers: Sequence[int],
    edges: Sequence[Edge],
    tokens: Sequence[str],
    streams: Float[Tensor, "layer position"] | None,
) -> None:
    """Nodes at the ends of the edges, and a residual edge between those of one position."""
    above = dict(zip(layers, [*layers[1:], layers[-1] + 1], strict=True))
    ends = {(layer, key) for layer, _, _, key, _ in edges}
    ends |= {(above[layer], query) for layer, _, query, _, _ in edges}
    rows = {layer: row for row, layer in enumerate([*layers, layers[-1] + 1])}
    below: dict[int, tuple[str, float]] = {}
    for layer, position in sorted(ends):
        name = node_name(layer, position)
        graph.add_node(name, layer=layer, position=position, token=tokens[position])
        score = 0.0
        if streams is not None and rows[layer] < len(streams):
            score = streams[rows[layer], position].item()
            graph.nodes[name]["score"] = score
        if position in below:
            source, weight = below[position]
            graph.add_edge(source, name, RESIDUAL, weight=weight, kind=RESIDUAL)
        below[position] = name, score


def _check_streams(streams: Tensor | None, layers: Mapping[int, Tensor], length: int) -> None:
    if streams is None:
        return
    rows = (len(layers), len(layers) + 1)
    if streams.ndim != 2 or streams.shape[0] not in rows or streams.shape[1] < length:
        raise InputError(
            f"streams have shape {tuple(streams.shape)}; needed are {rows[0]} rows of {length}, of "
            "what enters each layer, and at most one more, of what leaves the last."
        )
    if not bool(streams.isfinite().all()):
        raise InputError("streams hold scores that are not finite.")
