"""A circuit as a graph: the nodes of a model that it keeps, and which input reads which node."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import Any, Literal

import networkx as nx
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.anatomy.network import ARROW, LOGITS, Network, SenderKind
from attnlens.errors import InputError

NodeKind = SenderKind | Literal["logits"]
Values = Float[Tensor, "sender receiver"]


def circuit_graph(
    network: Network,
    kept: Bool[Tensor, "sender receiver"],
    scores: Values | None = None,
    chosen: Values | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nx.MultiDiGraph[str]:
    """The graph of the edges of a circuit, from the node that writes to the node that reads.

    Nodes carry `layer` and `kind` (embed, head, mlp, logits), and stand in the order in which they
    run. An edge's key and `input` say by what it is read (q, k, v, mlp, logits), `name` is that of
    `network.edge_names`, `weight` its score, 1 where there are none, `sign` 1 or -1, `chosen` the
    share of resamples in which it was selected.

    Heads that share keys and values read one edge together. It is drawn to each of them that
    writes to another node of the circuit, to all where none does; `shared` then says how many heads
    share the input, and `name` is the same on all its copies.

    Args:
        network: nodes and edges of the model.
        kept: which edges are in the circuit.
        scores: signed score of every edge; what is not kept may be NaN.
        chosen: in which share of resamples each edge was selected, likewise.
        attributes: what the graph is to say of itself: model, method, task.

    Raises:
        InputError: an array of another shape, a kept edge that the model does not have, or one
            whose score is not finite.

    """
    for what, given in (("kept", kept), ("scores", scores), ("chosen", chosen)):
        _check_shape(network, what, given)
    kept = kept.cpu()
    _check_edges(network, kept)
    edges = network.edges[network.numbers(kept)].tolist()
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    graph.graph.update(attributes or {})
    writing = {network.senders[sender].name for sender, _ in edges}
    targets = {receiver: _readers(network, receiver, writing) for _, receiver in edges}
    ends = writing.union(*targets.values())
    kinds: dict[str, NodeKind] = {node.name: node.kind for node in network.senders}
    kinds[LOGITS] = "logits"
    for name in network.nodes:
        if name in ends:
            graph.add_node(name, layer=network.layers[name], kind=kinds[name])
    for sender, receiver in edges:
        told = _edge(network, sender, receiver, scores, chosen)
        for target in targets[receiver]:
            graph.add_edge(network.senders[sender].name, target, told["input"], **told)
    return graph


def _check_shape(network: Network, what: str, given: Tensor | None) -> None:
    if given is not None and given.shape != network.exists.shape:
        raise InputError(
            f"{what} has shape {tuple(given.shape)}; needed is one value a pair of sender and "
            f"receiver, {tuple(network.exists.shape)}."
        )


def _check_edges(network: Network, kept: Tensor) -> None:
    unknown = (kept & ~network.exists).nonzero().tolist()
    if unknown:
        sender, receiver = unknown[0]
        raise InputError(
            f"The model has no edge {_name(network, sender, receiver)}: keep edges within "
            "network.exists."
        )


def _readers(network: Network, receiver: int, writing: Collection[str]) -> Sequence[str]:
    """Nodes to which an edge is drawn: of those that share the input, the ones that write on."""
    nodes = network.receivers[receiver].nodes
    return [node for node in nodes if node in writing] or nodes


def _edge(
    network: Network, sender: int, receiver: int, scores: Tensor | None, chosen: Tensor | None
) -> dict[str, Any]:
    """What an edge carries."""
    read = network.receivers[receiver]
    weight = 1.0 if scores is None else float(scores[sender, receiver])
    told: dict[str, Any] = {
        "weight": weight,
        "sign": -1 if weight < 0 else 1,
        "input": read.kind,
        "name": _name(network, sender, receiver),
    }
    if chosen is not None:
        told["chosen"] = float(chosen[sender, receiver])
    if len(read.nodes) > 1:
        told["shared"] = len(read.nodes)
    for what in ("weight", "chosen"):
        if what in told and not isfinite(told[what]):
            given = "scores" if what == "weight" else what
            raise InputError(
                f"{given} of the kept edge {told['name']} is {told[what]}; a graph needs a finite "
                "number of every edge that is kept."
            )
    return told


def _name(network: Network, sender: int, receiver: int) -> str:
    return f"{network.senders[sender].name}{ARROW}{network.receivers[receiver].name}"
