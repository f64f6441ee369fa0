"""Read, measure and edit the attention of pretrained transformers while they run.

Importing this loads neither torch nor transformers: each public name is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlens import analyses, errors, graphs, tasks, views, zoo
    from attnlens.analyses.ablation import ablate
    from attnlens.analyses.ablation_groups import ablate_groups, ablate_layers, ablate_together
    from attnlens.analyses.ablation_pairs import ablate_pairs
    from attnlens.analyses.ablation_positions import ablate_positions
    from attnlens.analyses.alignment import property_alignment
    from attnlens.analyses.attention_flow import attention_flow
    from attnlens.analyses.attention_gradient import attention_gradient, attention_saliency
    from attnlens.analyses.attention_influence import attention_influence
    from attnlens.analyses.attention_probe import ProbeSettings, attention_probe
    from attnlens.analyses.attribute import attribute
    from attnlens.analyses.basin import DocumentPrompt, attention_basin, pack_documents
    from attnlens.analyses.chefer import chefer, relevance_rollout
    from attnlens.analyses.chefer_lrp import chefer_lrp
    from attnlens.analyses.circuit import Circuit
    from attnlens.analyses.circuit_curve import faithfulness_curve
    from attnlens.analyses.composition import composition
    from attnlens.analyses.contrast_decoding import contrast_decode
    from attnlens.analyses.contrastive_heads import ContrastiveHeads
    from attnlens.analyses.edge_scores import edges
    from attnlens.analyses.edit_effects import try_edits
    from attnlens.analyses.erasure import leave_one_out, random_attribution
    from attnlens.analyses.faithfulness import faithfulness
    from attnlens.analyses.flow_attribution import flow_attribution
    from attnlens.analyses.gradient_rollout import gradient_rollout
    from attnlens.analyses.greedy_edges import remove_edges
    from attnlens.analyses.head_similarity import head_similarity
    from attnlens.analyses.head_types import head_types
    from attnlens.analyses.importance import first_order_effects, gradient_importance
    from attnlens.analyses.input_gradient import input_gradient, integrated_gradients
    from attnlens.analyses.layer_similarity import layer_similarity
    from attnlens.analyses.logit_flow import logit_flow
    from attnlens.analyses.long_context import long_context_heads
    from attnlens.analyses.massive_activations import massive_activations
    from attnlens.analyses.massive_qk import massive_qk
    from attnlens.analyses.node_scores import nodes
    from attnlens.analyses.patching import patch
    from attnlens.analyses.path_patching import path_patch
    from attnlens.analyses.profile import profile
    from attnlens.analyses.pruning import heads_needed, prune_heads
    from attnlens.analyses.query_focused import QueryExample, query_focused_heads
    from attnlens.analyses.ranks import head_ranks
    from attnlens.analyses.relevance import attnlrp, cp_lrp
    from attnlens.analyses.replacement import Replacement
    from attnlens.analyses.retrieval import RetrievalSettings, retrieval_heads
    from attnlens.analyses.rhythm import rhythm
    from attnlens.analyses.rollout import RolloutSettings, rollout, rollout_from
    from attnlens.analyses.rollout_attribution import rollout_attribution
    from attnlens.analyses.routes import route_scores, routes
    from attnlens.analyses.saliency_flows import saliency_flows
    from attnlens.analyses.screening import ablate_screened
    from attnlens.analyses.sinks import SinkSettings, sinks
    from attnlens.analyses.stored import stored_ablation
    from attnlens.analyses.syntax import SyntaxSettings, syntax_heads
    from attnlens.analyses.target import Target
    from attnlens.analyses.value_norms import value_norms
    from attnlens.analyses.vision import visual_sinks
    from attnlens.analyses.vision_heads import vision_aware_heads
    from attnlens.graphs.circuit import circuit_graph
    from attnlens.graphs.export import export_graph, load_graph
    from attnlens.graphs.flow import rollout_graph
    from attnlens.graphs.prune import prune_graph
    from attnlens.graphs.relevance import relevance_graph
    from attnlens.hooks.edits import (
        Bias,
        Drop,
        Hide,
        Identity,
        Mean,
        Patch,
        PatchStream,
        Scale,
        Steer,
        SteerStream,
        Uniform,
        Zero,
        edits_from_json,
        edits_to_json,
    )
    from attnlens.hooks.reducers import (
        ArgMax,
        ColumnMass,
        DuplicateMass,
        Entropy,
        FirstTokenMass,
        InductionMass,
        MeanDistance,
        OffsetMass,
        TokenMass,
    )
    from attnlens.lens import Lens, load
    from attnlens.lens.frozen import frozen
    from attnlens.lens.sources import open_texts
    from attnlens.sweeps.sweep import SweepSettings
    from attnlens.views import show

__version__ = "0.1.0"

# Where each public name lives; a room is its own module.
_HOMES = {
    "ArgMax": "attnlens.hooks.reducers",
    "Bias": "attnlens.hooks.edits",
    "Circuit": "attnlens.analyses.circuit",
    "ColumnMass": "attnlens.hooks.reducers",
    "ContrastiveHeads": "attnlens.analyses.contrastive_heads",
    "DocumentPrompt": "attnlens.analyses.basin",
    "Drop": "attnlens.hooks.edits",
    "DuplicateMass": "attnlens.hooks.reducers",
    "Entropy": "attnlens.hooks.reducers",
    "FirstTokenMass": "attnlens.hooks.reducers",
    "Hide": "attnlens.hooks.edits",
    "Identity": "attnlens.hooks.edits",
    "InductionMass": "attnlens.hooks.reducers",
    "Lens": "attnlens.lens",
    "Mean": "attnlens.hooks.edits",
    "MeanDistance": "attnlens.hooks.reducers",
    "OffsetMass": "attnlens.hooks.reducers",
    "Patch": "attnlens.hooks.edits",
    "PatchStream": "attnlens.hooks.edits",
    "ProbeSettings": "attnlens.analyses.attention_probe",
    "QueryExample": "attnlens.analyses.query_focused",
    "Replacement": "attnlens.analyses.replacement",
    "RetrievalSettings": "attnlens.analyses.retrieval",
    "RolloutSettings": "attnlens.analyses.rollout",
    "Scale": "attnlens.hooks.edits",
    "SinkSettings": "attnlens.analyses.sinks",
    "Steer": "attnlens.hooks.edits",
    "SteerStream": "attnlens.hooks.edits",
    "SweepSettings": "attnlens.sweeps.sweep",
    "SyntaxSettings": "attnlens.analyses.syntax",
    "Target": "attnlens.analyses.target",
    "TokenMass": "attnlens.hooks.reducers",
    "Uniform": "attnlens.hooks.edits",
    "Zero": "attnlens.hooks.edits",
    "ablate": "attnlens.analyses.ablation",
    "ablate_groups": "attnlens.analyses.ablation_groups",
    "ablate_layers": "attnlens.analyses.ablation_groups",
    "ablate_pairs": "attnlens.analyses.ablation_pairs",
    "ablate_positions": "attnlens.analyses.ablation_positions",
    "ablate_screened": "attnlens.analyses.screening",
    "ablate_together": "attnlens.analyses.ablation_groups",
    "attention_basin": "attnlens.analyses.basin",
    "attention_flow": "attnlens.analyses.attention_flow",
    "attention_gradient": "attnlens.analyses.attention_gradient",
    "attention_influence": "attnlens.analyses.attention_influence",
    "attention_probe": "attnlens.analyses.attention_probe",
    "attention_saliency": "attnlens.analyses.attention_gradient",
    "attnlrp": "attnlens.analyses.relevance",
    "attribute": "attnlens.analyses.attribute",
    "chefer": "attnlens.analyses.chefer",
    "chefer_lrp": "attnlens.analyses.chefer_lrp",
    "circuit_graph": "attnlens.graphs.circuit",
    "composition": "attnlens.analyses.composition",
    "contrast_decode": "attnlens.analyses.contrast_decoding",
    "cp_lrp": "attnlens.analyses.relevance",
    "edges": "attnlens.analyses.edge_scores",
    "edits_from_json": "attnlens.hooks.edits",
    "edits_to_json": "attnlens.hooks.edits",
    "export_graph": "attnlens.graphs.export",
    "faithfulness": "attnlens.analyses.faithfulness",
    "faithfulness_curve": "attnlens.analyses.circuit_curve",
    "first_order_effects": "attnlens.analyses.importance",
    "flow_attribution": "attnlens.analyses.flow_attribution",
    "frozen": "attnlens.lens.frozen",
    "gradient_importance": "attnlens.analyses.importance",
    "gradient_rollout": "attnlens.analyses.gradient_rollout",
    "head_ranks": "attnlens.analyses.ranks",
    "head_similarity": "attnlens.analyses.head_similarity",
    "head_types": "attnlens.analyses.head_types",
    "heads_needed": "attnlens.analyses.pruning",
    "input_gradient": "attnlens.analyses.input_gradient",
    "integrated_gradients": "attnlens.analyses.input_gradient",
    "layer_similarity": "attnlens.analyses.layer_similarity",
    "leave_one_out": "attnlens.analyses.erasure",
    "load": "attnlens.lens",
    "load_graph": "attnlens.graphs.export",
    "logit_flow": "attnlens.analyses.logit_flow",
    "long_context_heads": "attnlens.analyses.long_context",
    "massive_activations": "attnlens.analyses.massive_activations",
    "massive_qk": "attnlens.analyses.massive_qk",
    "nodes": "attnlens.analyses.node_scores",
    "open_texts": "attnlens.lens.sources",
    "pack_documents": "attnlens.analyses.basin",
    "patch": "attnlens.analyses.patching",
    "path_patch": "attnlens.analyses.path_patching",
    "profile": "attnlens.analyses.profile",
    "property_alignment": "attnlens.analyses.alignment",
    "prune_graph": "attnlens.graphs.prune",
    "prune_heads": "attnlens.analyses.pruning",
    "query_focused_heads": "attnlens.analyses.query_focused",
    "random_attribution": "attnlens.analyses.erasure",
    "relevance_graph": "attnlens.graphs.relevance",
    "relevance_rollout": "attnlens.analyses.chefer",
    "remove_edges": "attnlens.analyses.greedy_edges",
    "retrieval_heads": "attnlens.analyses.retrieval",
    "rhythm": "attnlens.analyses.rhythm",
    "rollout": "attnlens.analyses.rollout",
    "rollout_attribution": "attnlens.analyses.rollout_attribution",
    "rollout_from": "attnlens.analyses.rollout",
    "rollout_graph": "attnlens.graphs.flow",
    "route_scores": "attnlens.analyses.routes",
    "routes": "attnlens.analyses.routes",
    "saliency_flows": "attnlens.analyses.saliency_flows",
    "show": "attnlens.views",
    "sinks": "attnlens.analyses.sinks",
    "stored_ablation": "attnlens.analyses.stored",
    "syntax_heads": "attnlens.analyses.syntax",
    "try_edits": "attnlens.analyses.edit_effects",
    "value_norms": "attnlens.analyses.value_norms",
    "vision_aware_heads": "attnlens.analyses.vision_heads",
    "visual_sinks": "attnlens.analyses.vision",
}
_ROOMS = frozenset({"analyses", "errors", "graphs", "tasks", "views", "zoo"})

__all__ = [
    "ArgMax",
    "Bias",
    "Circuit",
    "ColumnMass",
    "ContrastiveHeads",
    "DocumentPrompt",
    "Drop",
    "DuplicateMass",
    "Entropy",
    "FirstTokenMass",
    "Hide",
    "Identity",
    "InductionMass",
    "Lens",
    "Mean",
    "MeanDistance",
    "OffsetMass",
    "Patch",
    "PatchStream",
    "ProbeSettings",
    "QueryExample",
    "Replacement",
    "RetrievalSettings",
    "RolloutSettings",
    "Scale",
    "SinkSettings",
    "Steer",
    "SteerStream",
    "SweepSettings",
    "SyntaxSettings",
    "Target",
    "TokenMass",
    "Uniform",
    "Zero",
    "__version__",
    "ablate",
    "ablate_groups",
    "ablate_layers",
    "ablate_pairs",
    "ablate_positions",
    "ablate_screened",
    "ablate_together",
    "analyses",
    "attention_basin",
    "attention_flow",
    "attention_gradient",
    "attention_influence",
    "attention_probe",
    "attention_saliency",
    "attnlrp",
    "attribute",
    "chefer",
    "chefer_lrp",
    "circuit_graph",
    "composition",
    "contrast_decode",
    "cp_lrp",
    "edges",
    "edits_from_json",
    "edits_to_json",
    "errors",
    "export_graph",
    "faithfulness",
    "faithfulness_curve",
    "first_order_effects",
    "flow_attribution",
    "frozen",
    "gradient_importance",
    "gradient_rollout",
    "graphs",
    "head_ranks",
    "head_similarity",
    "head_types",
    "heads_needed",
    "input_gradient",
    "integrated_gradients",
    "layer_similarity",
    "leave_one_out",
    "load",
    "load_graph",
    "logit_flow",
    "long_context_heads",
    "massive_activations",
    "massive_qk",
    "nodes",
    "open_texts",
    "pack_documents",
    "patch",
    "path_patch",
    "profile",
    "property_alignment",
    "prune_graph",
    "prune_heads",
    "query_focused_heads",
    "random_attribution",
    "relevance_graph",
    "relevance_rollout",
    "remove_edges",
    "retrieval_heads",
    "rhythm",
    "rollout",
    "rollout_attribution",
    "rollout_from",
    "rollout_graph",
    "route_scores",
    "routes",
    "saliency_flows",
    "show",
    "sinks",
    "stored_ablation",
    "syntax_heads",
    "tasks",
    "try_edits",
    "value_norms",
    "views",
    "vision_aware_heads",
    "visual_sinks",
    "zoo",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"attnlens.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'attnlens' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted(set(globals()) | set(__all__))
