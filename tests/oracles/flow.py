"""Attention flow as the paper computes it: networkx, one pair at a time, on floats."""

import networkx as nx
from torch import Tensor


def edmonds_karp(maps: Tensor, target: int, source: int) -> float:
    """Maximum flow from (L, target) to (0, source); edge (l + 1, t) -> (l, s) has `maps[l, t, s]`.

    `maps` is `layer query key` with the residual share in it.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from([(len(maps), target), (0, source)])
    for layer, query, key in maps.nonzero().tolist():
        graph.add_edge((layer + 1, query), (layer, key), capacity=float(maps[layer, query, key]))
    flow = nx.algorithms.flow.edmonds_karp
    return nx.maximum_flow_value(graph, (len(maps), target), (0, source), flow_func=flow)
