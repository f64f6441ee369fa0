"""Figures of circuits by `show`: scores, the circuit itself, what it does, what two share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_curve import FaithfulnessCurve
from attnlens.analyses.circuit_evaluation import CircuitEvaluation
from attnlens.analyses.circuit_overlap import CircuitOverlap
from attnlens.analyses.edge_scores import EdgeScores
from attnlens.analyses.node_scores import NodeScores
from attnlens.analyses.uncertainty import bootstrap_mean
from attnlens.views.ablation import effect_colours
from attnlens.views.circuit import MOST, circuit_figure
from attnlens.views.circuit_curves import curve_figure, evaluation_figure
from attnlens.views.edge_scores import MOST as MOST_SENDERS
from attnlens.views.edge_scores import edge_scores_figure
from attnlens.views.panels import count_text, interval_text, number_text
from attnlens.views.path_patching import sender_map
from attnlens.views.ranking import CONTROL, METRICS, change_of
from attnlens.views.shown import show
from attnlens.views.theme import INK, escaped, styled

METHODS = {
    "eap-ig": "EAP-IG", "eap": "EAP", "exact": "exact cuts", "removal": "removal of edges",
}  # fmt: skip


@show.register
def show_edge_scores(found: EdgeScores, most: int = MOST_SENDERS) -> go.Figure:
    """Scores of all edges, senders down and receivers across; of many the strongest `most`."""
    scoring = found.scoring
    title = f"Scores of edges by {METHODS[scoring.method]} on {spaced(scoring.task)}"
    return edge_scores_figure(found.network, found.matrix, title, most)


@show.register
def show_node_scores(found: NodeScores) -> go.Figure:
    """Scores of heads by layer, embeddings and MLPs beside them."""
    scoring = found.scoring
    records: list[dict[str, Any]] = found.to_frame().to_dict("records")
    by_name = {record["node"]: record for record in records}
    names = [sender.name for sender in found.network.senders]
    texts = [
        f"<b>{name}</b>: {change_of(scoring.metric)} {number_text(by_name[name]['score'])}"
        f"<br>interval {interval_text(by_name[name], 'score')}"
        for name in names
    ]
    title = (
        f"Scores of nodes by {METHODS[scoring.method]} on {spaced(scoring.task)}, "
        f"{count_text(len(found.by_prompt), 'prompt')}"
    )
    colours = effect_colours(scoring.metric, "score")
    return sender_map(names, found.score.tolist(), texts, colours, title)


@show.register
def show_circuit(circuit: Circuit, title: str | None = None, most: int = MOST) -> go.Figure:
    """The graph of a circuit in layers from below; of more than `most` edges the strongest."""
    return circuit_figure(circuit.to_graph(), title or circuit_title(circuit.about), most)


@show.register
def show_evaluation(found: CircuitEvaluation) -> go.Figure:
    """The metric of the model, the circuit and the rest, and what is lost without each node."""
    runs: dict[str, tuple[float, float, float]] = {
        "whole model": _over_prompts(found, found.full),
        "circuit alone": _over_prompts(found, found.inside),
    }
    if len(found.random):
        gap = float((found.full - found.empty).mean())
        values = float(found.empty.mean()) + gap * found.random
        runs["random circuits"] = (float(values.mean()), float(values.min()), float(values.max()))
    runs["model without"] = _over_prompts(found, found.outside)
    runs["every edge cut"] = _over_prompts(found, found.empty)
    name, unit, _ = METRICS[found.metric]
    return evaluation_figure(
        list(runs),
        *([own[which] for own in runs.values()] for which in range(3)),
        nodes=found.nodes,
        minimality=found.minimality.mean.numpy(),
        node_lows=found.minimality.low.numpy(),
        node_highs=found.minimality.high.numpy(),
        title=f"What a circuit of {count_text(found.edges, 'edge')} does on {spaced(found.task)}",
        metric=f"{name} ({unit})" if unit else name,
        lost="share of the task",
    )


@show.register
def show_curve(found: FaithfulnessCurve) -> go.Figure:
    """Faithfulness against the share of edges kept, beside random circuits of the same sizes."""
    drawn = len(found.random) > 0
    return curve_figure(
        found.fractions,
        found.faithfulness.mean.numpy(),
        found.faithfulness.low.numpy(),
        found.faithfulness.high.numpy(),
        random_mean=found.random.mean(0).numpy() if drawn else None,
        random_low=found.random.amin(0).numpy() if drawn else None,
        random_high=found.random.amax(0).numpy() if drawn else None,
        cpr=float(found.cpr.mean),
        cmd=float(found.cmd.mean),
        title=f"The largest edges by {METHODS[found.method]} on {spaced(found.task)}",
    )


@show.register
def show_overlap(found: CircuitOverlap) -> go.Figure:
    """How many nodes and edges two circuits share, beside how many they would by chance."""
    kinds = {"nodes": found.nodes, "edges": found.edges}
    figure = go.Figure()
    for name, colour in (("shared", INK), ("expected by chance", CONTROL)):
        numbers = [len(own.names) if name == "shared" else own.expected for own in kinds.values()]
        texts = [
            f"<b>{kind}</b>: {len(own.names)} shared of {own.first} and {own.second}, "
            f"{own.total:,} in the model<br>by chance {number_text(own.expected)}, as many or more "
            f"with probability {chance_text(own.p)}<br>Jaccard index {number_text(own.jaccard)}"
            for kind, own in kinds.items()
        ]
        figure.add_trace(
            go.Bar(
                x=numbers, y=list(kinds), orientation="h", name=name, marker={"color": colour},
                text=[f"{number:.3g}" for number in numbers], textposition="outside",
                cliponaxis=False, customdata=texts, hovertemplate="%{customdata}<extra></extra>",
            )
        )  # fmt: skip
    styled(figure, "What two circuits share", 300)
    figure.update_xaxes(title="how many", gridcolor="#e4e6e2", zeroline=False)
    figure.update_yaxes(autorange="reversed", ticksuffix="  ")
    figure.update_layout(
        bargap=0.35, legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        margin={"t": 88, "r": 60},
    )  # fmt: skip
    layout: Any = figure.layout
    layout.title.text += f"<br><sup>{escaped(found.first)} / {escaped(found.second)}</sup>"
    return figure


def circuit_title(about: Mapping[str, Any]) -> str:
    """`Indirect object: top 100 edges by EAP-IG`, of what is known."""
    task, method = about.get("task"), str(about.get("method", ""))
    named = spaced(str(task)).capitalize() if task else "A circuit"
    rule = str(about.get("selection", ""))
    if method == "removal":
        return f"{named}: found by removal{f', {rule}' if rule else ''}"
    if rule.startswith("top ") and about.get("granularity"):
        rule = rule.replace("top ", "the largest ", 1)
        size, comma, rest = rule.partition(",")
        rule = f"{size} {about['granularity']}{comma}{rest}"
    by = f"by {METHODS.get(method, method)}" if method else ""
    told = " ".join(filter(None, [rule, by]))
    return f"{named}: {told}" if told else named


def spaced(task: str) -> str:
    """`repeated tokens` of `repeated_tokens`."""
    return task.replace("_", " ")


def chance_text(p: float) -> str:
    """A probability as a person reads it."""
    return f"{p:.2g}" if p >= 0.001 else "under .001"


def _over_prompts(found: CircuitEvaluation, values: Tensor) -> tuple[float, float, float]:
    """Mean with bounds over prompts."""
    mean, low, high = bootstrap_mean(values, found.resamples, found.confidence, found.seed)
    return float(mean), float(low), float(high)
