"""A smaller graph that still says where the targets' information comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import networkx as nx

from attnlens.errors import InputError


def prune_graph(
    graph: nx.MultiDiGraph[str],
    targets: str | Iterable[str],
    sources: str | Iterable[str] | None = None,
    threshold: float | None = None,
    top: int | None = None,
    by: str = "weight",
) -> nx.MultiDiGraph[str]:
    """The strong edges on paths from the sources to the targets; every target keeps a path.

    What lies on no path from a source to a target goes. Of the edges that enter a node, those with
    a weight of at least `threshold` in size, whatever its sign, stay, and of them the `top`
    strongest; the strongest stays in any case. What the targets then no longer reach, traced back,
    goes too. Parallel edges count one by one; equal weights stay in the graph's order. Sources are
    the nodes that nothing enters where not given. `by` names another attribute than the weight to
    go by: "flow" of `flow_graph`.

    The graph given is left as it is; the new one says under `"pruned"` what was asked.

    Raises:
        InputError: an unknown node, a graph with cycles, an edge without a weight, top under 1, or
            a target that no source reaches.

    """
    ends = _nodes(graph, targets, "target")
    starts = (
        _nodes(graph, sources, "source")
        if sources is not None
        else [node for node, degree in graph.in_degree() if degree == 0]
    )
    if top is not None and top < 1:
        raise InputError(f"top={top}; at least one edge enters each node.")
    if not nx.is_directed_acyclic_graph(graph):
        raise InputError("The graph has cycles; paths are traced in graphs without.")
    reached_up = _from_starts(graph, starts, ends)
    kept = _trace(graph.subgraph(reached_up), starts, ends, threshold, top, by)
    pruned: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    pruned.graph.update(graph.graph)
    pruned.graph["pruned"] = {
        "targets": ends,
        "sources": None if sources is None else starts,
        "threshold": threshold,
        "top": top,
        "by": by,
    }
    reached = {node for source, target, _ in kept for node in (source, target)} | set(ends)
    pruned.add_nodes_from((n, dict(data)) for n, data in graph.nodes(data=True) if n in reached)
    for source, target, key, data in graph.edges(keys=True, data=True):
        if (source, target, key) in kept:
            pruned.add_edge(source, target, key)
            pruned.edges[source, target, key].update(data)
    return pruned


def _nodes(graph: nx.MultiDiGraph[str], given: str | Iterable[str], role: str) -> list[str]:
    """Nodes as given, without repeats, checked to be there."""
    names = list(dict.fromkeys([given] if isinstance(given, str) else given))
    unknown = [name for name in names if name not in graph]
    if unknown or not names:
        some = ", ".join(map(str, list(graph)[:3]))
        raise InputError(f"The graph has no {role} {unknown or names}; its nodes are {some}, ...")
    return names


def _from_starts(graph: nx.MultiDiGraph[str], starts: list[str], ends: list[str]) -> set[str]:
    """Nodes that a start reaches; paths are then traced back from the ends."""
    below = _reached(graph.succ, starts)
    unreached = [node for node in ends if node not in below]
    if unreached:
        raise InputError(f"No source reaches the targets {unreached}; give other sources.")
    return below


def _reached(neighbours: Mapping[str, Iterable[str]], starts: list[str]) -> set[str]:
    """Nodes that can be reached from any of some nodes, themselves included."""
    seen, waiting = set(starts), list(starts)
    while waiting:
        fresh = [node for node in neighbours[waiting.pop()] if node not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return seen


def _trace(
    graph: nx.MultiDiGraph[str],
    starts: list[str],
    ends: list[str],
    threshold: float | None,
    top: int | None,
    by: str,
) -> set[tuple[str, str, Any]]:
    """Edges kept when the strong ones are followed backwards from the ends."""
    kept: set[tuple[str, str, Any]] = set()
    seen, waiting = set(ends), list(ends)
    while waiting:
        node = waiting.pop()
        entering = sorted(
            graph.in_edges(node, keys=True, data=True), key=lambda edge: -_strength(edge, by)
        )
        for rank, edge in enumerate(entering):
            source, target, key, _ = edge
            strong = threshold is None or _strength(edge, by) >= threshold
            # the strongest may go only where the path may begin
            if rank > 0 and (not strong or (top is not None and rank >= top)):
                break
            if rank == 0 and not strong and node in starts:
                break
            kept.add((source, target, key))
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return kept


def _strength(edge: tuple[str, str, Any, dict[str, Any]], by: str) -> float:
    """The size of an edge's weight, checked."""
    source, target, key, data = edge
    weight = data.get(by)
    if isinstance(weight, bool) or not isinstance(weight, Real) or weight != weight:
        raise InputError(
            f"edge {source!r} -> {target!r} ({key!r}) has {by} {weight!r}; a number is needed."
        )
    return abs(float(weight))
