"""`show(result)`: a plotly figure of any result, by its type."""

from __future__ import annotations

from functools import singledispatch
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnlens.errors import InputError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# The family of figures that draws each type. A family is imported when its first result is shown,
# so that importing views needs neither plotly nor torch.
_FAMILIES = {
    "attnlens.lens.trace.Trace": "attnlens.views.heatmaps",
    "attnlens.lens.trace.Statistics": "attnlens.views.grids",
    "attnlens.anatomy.sites.Anatomy": "attnlens.views.tables",
    "attnlens.hooks.check.Check": "attnlens.views.tables",
    "attnlens.analyses.rollout.Rollout": "attnlens.views.heatmaps",
    "attnlens.analyses.attention_flow.AttentionFlow": "attnlens.views.flow",
    "attnlens.analyses.routes.Routes": "attnlens.views.routes",
    "attnlens.analyses.profile.Profile": "attnlens.views.grids",
    "attnlens.analyses.sinks.Sinks": "attnlens.views.grids",
    "attnlens.analyses.head_types.HeadTypes": "attnlens.views.grids",
    "attnlens.analyses.ablation.Ablation": "attnlens.views.ranking",
    "attnlens.analyses.ablation_groups.GroupAblation": "attnlens.views.ablation",
    "attnlens.analyses.ablation_groups.SetAblation": "attnlens.views.ablation",
    "attnlens.analyses.ablation_pairs.PairAblation": "attnlens.views.ablation",
    "attnlens.analyses.ablation_positions.PositionAblation": "attnlens.views.ablation",
    "attnlens.analyses.edit_effects.EditEffects": "attnlens.views.ablation",
    "attnlens.analyses.patching.Patching": "attnlens.views.patching",
    "attnlens.analyses.path_patching.PathEffects": "attnlens.views.path_patching",
    "attnlens.analyses.edge_scores.EdgeScores": "attnlens.views.circuit_results",
    "attnlens.analyses.node_scores.NodeScores": "attnlens.views.circuit_results",
    "attnlens.analyses.circuit.Circuit": "attnlens.views.circuit_results",
    "attnlens.analyses.circuit_evaluation.CircuitEvaluation": "attnlens.views.circuit_results",
    "attnlens.analyses.circuit_curve.FaithfulnessCurve": "attnlens.views.circuit_results",
    "attnlens.analyses.circuit_overlap.CircuitOverlap": "attnlens.views.circuit_results",
    "attnlens.analyses.screening.ScreenedAblation": "attnlens.views.ablation",
    "attnlens.analyses.importance.GradientImportance": "attnlens.views.importance",
    "attnlens.analyses.logit_flow.LogitFlow": "attnlens.views.logit_flow",
    "attnlens.analyses.pruning.Pruning": "attnlens.views.importance",
    "attnlens.analyses.retrieval.RetrievalHeads": "attnlens.views.retrieval",
    "attnlens.analyses.query_focused.QueryFocusedHeads": "attnlens.views.retrieval",
    "attnlens.analyses.head_similarity.HeadSimilarity": "attnlens.views.similarity",
    "attnlens.analyses.layer_similarity.LayerSimilarity": "attnlens.views.similarity",
    "attnlens.analyses.ranks.HeadRanks": "attnlens.views.similarity",
    "attnlens.analyses.composition.Composition": "attnlens.views.composition",
    "attnlens.analyses.rhythm.Rhythm": "attnlens.views.context",
    "attnlens.analyses.long_context.LongContextHeads": "attnlens.views.context",
    "attnlens.analyses.basin.AttentionBasin": "attnlens.views.context",
    "attnlens.analyses.massive_activations.MassiveActivations": "attnlens.views.massive",
    "attnlens.analyses.massive_qk.MassiveQK": "attnlens.views.massive",
    "attnlens.analyses.vision.VisualSinks": "attnlens.views.massive",
    "attnlens.analyses.vision_heads.VisionAwareHeads": "attnlens.views.massive",
    "attnlens.analyses.syntax.SyntaxHeads": "attnlens.views.syntax",
    "attnlens.analyses.attention_probe.AttentionProbe": "attnlens.views.syntax",
    "attnlens.analyses.alignment.PropertyAlignment": "attnlens.views.syntax",
    "attnlens.analyses.attention_influence.AttentionInfluence": "attnlens.views.influence",
    "attnlens.analyses.contrast_decoding.Contrast": "attnlens.views.influence",
    "attnlens.analyses.saliency_flows.SaliencyFlows": "attnlens.views.attention_gradient",
    "attnlens.analyses.attribution.Attribution": "attnlens.views.attribution",
    "networkx.classes.multidigraph.MultiDiGraph": "attnlens.views.graph_figure",
    "attnlens.analyses.faithfulness.Faithfulness": "attnlens.views.faithfulness",
}


@singledispatch
def show(result: Any, *options: Any, **named: Any) -> Figure:
    """A plotly figure of a result: `show(trace, "L1H2")`, `show(profile)`, `show(ablation)`.

    Traces take `heads` and `prompt`, rollouts `prompt` and `layer`, statistics and other results a
    head `columns`. Raises InputError for what has no figure.
    """
    kind = type(result)
    family = _FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
    if family is None:
        drawn = ", ".join(name.rpartition(".")[2] for name in _FAMILIES)
        raise InputError(f"There is no figure of a {kind.__name__}; there are figures of {drawn}.")
    import_module(family)
    return show.dispatch(kind)(result, *options, **named)
