"""Attention as flow graphs: build, prune, export, import."""

from attnlens.graphs.export import export_graph, load_graph
from attnlens.graphs.flow import attention_graph, node_name, rollout_graph
from attnlens.graphs.prune import prune

__all__ = [
    "attention_graph",
    "export_graph",
    "load_graph",
    "node_name",
    "prune",
    "rollout_graph",
]
