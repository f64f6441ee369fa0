"""Attention as flow graphs: build, prune, export, import."""

from attnlens.graphs.export import export_graph, load_graph
from attnlens.graphs.flow import (
    ATTENTION,
    MLP,
    RESIDUAL,
    attention_graph,
    flow_graph,
    node_name,
    rollout_graph,
)
from attnlens.graphs.prune import prune_graph
from attnlens.graphs.relevance import relevance_graph

__all__ = [
    "ATTENTION",
    "MLP",
    "RESIDUAL",
    "attention_graph",
    "export_graph",
    "flow_graph",
    "load_graph",
    "node_name",
    "prune_graph",
    "relevance_graph",
    "rollout_graph",
]
