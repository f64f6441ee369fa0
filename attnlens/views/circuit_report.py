"""What a page shows of a circuit: parts with figures and tables."""

from __future__ import annotations

import pandas as pd

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_curve import FaithfulnessCurve
from attnlens.analyses.circuit_evaluation import CircuitEvaluation
from attnlens.analyses.circuit_overlap import CircuitOverlap
from attnlens.analyses.edge_scores import EdgeScores
from attnlens.analyses.node_scores import NodeScores
from attnlens.views.circuit import MOST
from attnlens.views.circuit_lines import CircuitFindings, edges_frame, metric_words, overlap_lines
from attnlens.views.circuit_results import METHODS
from attnlens.views.panels import count_text
from attnlens.views.report_parts import Drawn, Part, Table
from attnlens.views.shown import show

BOUNDS = {"low": "from", "high": "to"}


def circuit_parts(found: CircuitFindings) -> tuple[Part, ...]:
    """The circuit, what it does, and where they are known its curve and all scores."""
    parts = [_circuit_part(found), _evaluation_part(found)]
    if found.curve is not None:
        parts.append(_curve_part(found.curve))
    if found.scores is not None:
        parts.append(_scores_part(found.scores))
    return tuple(parts)


def _nodes_frame(circuit: Circuit, evaluation: CircuitEvaluation) -> pd.DataFrame:
    """Nodes of the circuit, what is lost without each, and how many edges enter and leave."""
    graph = circuit.to_graph()
    bounds = (bound.tolist() for bound in evaluation.minimality)
    lost = {node: own for node, *own in zip(evaluation.nodes, *bounds, strict=True)}
    nothing = [float("nan")] * 3
    rows = [
        {
            "node": name,
            "layer": data["layer"],
            "kind": data["kind"],
            **dict(zip(("lost", "lost_low", "lost_high"), lost.get(name, nothing), strict=True)),
            "edges in": len({d["name"] for *_, d in graph.in_edges(name, data=True)}),
            "edges out": len({d["name"] for *_, d in graph.out_edges(name, data=True)}),
        }
        for name, data in graph.nodes(data=True)
    ]
    columns = ["node", "layer", "kind", "lost", "lost_low", "lost_high", "edges in", "edges out"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("lost", ascending=False, kind="stable", na_position="last")


def _circuit_part(found: CircuitFindings) -> Part:
    circuit = found.circuit
    metric = metric_words(circuit, found.evaluation.metric)[0]
    strongest = f" Of {len(circuit):,} edges the strongest {MOST} are drawn." * (
        len(circuit) > MOST
    )
    return Part(
        title="The circuit",
        lines=(),
        prose=(
            "An edge is what one node wrote, as one input of a later node reads it: a head "
            "reads by its query (q), key (k) and value (v), MLPs and logits by one input each."
            f"{_shared(circuit)} {_scored(circuit, metric)} An edge helps where cutting it makes "
            "the task go worse. Where it is cut the receiver reads "
            f"{_instead(str(circuit.about.get('ablation', found.evaluation.ablation)))}."
        ),
        figures={
            "circuit": Drawn(
                show(circuit),
                "Embeddings below, logits on top; edges enter a head from below at the input that "
                "reads them. Wider: larger score; fainter: chosen less often. "
                f"{_colours(circuit, metric)}{strongest}",
            )
        },
        tables={
            "edges": Table(
                edges_frame(circuit), "edges of the circuit, the strongest first",
                ("edge", "score", "effect", "chosen"),
                {"chosen": "chosen, share of resamples"},
            ),
            "nodes": Table(
                _nodes_frame(circuit, found.evaluation),
                "nodes of the circuit, and the share of the task that is lost without each", (),
                {"lost_low": "from", "lost_high": "to"},
            ),
        },
    )  # fmt: skip


def _scored(circuit: Circuit, metric: str) -> str:
    """What the score of an edge is."""
    about = circuit.about
    if bool(circuit.score.isnan().all()):
        return "Scores of its edges are not known."
    if about.get("granularity") == "nodes":
        return (
            f"Its score here is that of its sender: by how much the {metric} changes where all "
            "that this node writes is cut."
        )
    if about.get("method") == "removal":
        return (
            f"Its score is by how much the {metric} changed when it was cut out of what the "
            "removal had left by then."
        )
    does = "put back" if about.get("direction") == "denoise" else "cut"
    return f"Its score is by how much the {metric} changes where that edge alone is {does}."


def _shared(circuit: Circuit) -> str:
    """What a name like L0G1 means, where heads share keys and values."""
    many = (read for read in circuit.network.receivers if len(read.nodes) > 1)
    first = next(many, None)
    if first is None:
        return ""
    group, heads = first.name.partition("<")[0], first.nodes
    named = f"{', '.join(heads[:-1])} and {heads[-1]}"
    return f" {group} is {named}, which share keys and values and so read them together."


def _colours(circuit: Circuit, metric: str) -> str:
    """What the colours of edges mean: which of them help."""
    if bool(circuit.score.isnan().any()):
        return ""
    if circuit.about.get("direction") == "denoise":
        does, turned = "putting the edge back", metric != "loss"
    else:
        does, turned = "cutting the edge", metric == "loss"
    ends = ("so it hinders", "so it helps") if turned else ("so it helps", "so it hinders")
    return f"Cold colours: {does} lowers the {metric}, {ends[0]}; warm: it raises it, {ends[1]}."


def _instead(ablation: str) -> str:
    return {
        "resample": "what its sender writes on the corrupt twin of the prompt",
        "mean": "what its sender writes on the corrupt prompts on average",
        "zero": "nothing",
    }.get(ablation, ablation)


def _evaluation_part(found: CircuitFindings) -> Part:
    evaluation = found.evaluation
    drawn = len(evaluation.random)
    chance = f" Whiskers of the grey bar span {drawn} random circuits." if drawn else ""
    return Part(
        title="What it does",
        lines=(),
        prose=(
            f"The circuit was run on {found.judged}. Faithfulness is (M \u2212 M of nothing) / (M "
            "of the whole model \u2212 M of nothing), with M the mean metric: 1 where the circuit "
            "alone does what the model does, over 1 where what was cut worked against the task. "
            "Completeness is the same of the model without the circuit: 0 where nothing of the "
            "task is left outside. Minimality of a node is what faithfulness loses without it. "
            "Random circuits are easily beaten, since few of them lead from end to end."
        ),
        figures={
            "evaluation": Drawn(
                show(evaluation),
                "Left: the metric of each run, with its interval over prompts. Right: what the "
                f"circuit loses without a node, pale where the interval holds 0.{chance}",
            )
        },
        tables={
            "evaluation": Table(
                evaluation.to_frame(), "measures of the circuit, shares of the task",
                None, BOUNDS,
            )
        },
        notes=found.notes,
    )  # fmt: skip


def _curve_part(curve: FaithfulnessCurve) -> Part:
    return Part(
        title="Faithfulness by size",
        lines=(),
        prose=(
            f"Circuits of the largest edges by {METHODS[curve.method]}, from few edges to all. CPR "
            "is the area under the curve over the share of edges (more is better), CMD the area "
            "between it and 1 (less is better). Small models flatter: from a fifth of the edges on "
            "random ones do something, too, so look at the left of the curve."
        ),
        figures={
            "curve": Drawn(
                show(curve),
                "The band is the interval over prompts; grey: the range of random circuits of as "
                "many edges.",
            )
        },
        tables={
            "curve": Table(
                curve.to_frame(), "faithfulness by size", (),
                {"faithfulness_low": "from", "faithfulness_high": "to"},
            )
        },
    )  # fmt: skip


def _scores_part(scores: EdgeScores | NodeScores) -> Part:
    of = "edges" if isinstance(scores, EdgeScores) else "nodes"
    where = (
        "Senders down, receivers across, from the first layer to the last; blank where there is no "
        "edge. Blue: cutting the edge lowers the metric; rust: it raises it. "
        "Colours end at the 99th percentile of sizes."
        if of == "edges"
        else "Layers down; embeddings, heads and MLPs across."
    )
    gradients = (
        " From gradients: true of small changes, a guide for large ones; a softmax that is sure of "
        "itself hides from them."
        if scores.scoring.steps
        else ""
    )
    return Part(
        title=f"Scores of all {of}",
        lines=(),
        prose=(
            f"By how much the metric changes where one of the {of} is cut, a mean over "
            f"{count_text(len(scores.by_prompt), 'prompt')}.{gradients}"
        ),
        figures={"scores": Drawn(show(scores), where)},
        tables={"scores": Table(scores.to_frame(), f"the score of each of the {of}", None)},
    )


def overlap_part(found: CircuitOverlap, shared: Circuit | None) -> Part:
    """What a page says of two circuits; `shared` is what both have, where that is anything."""
    figures = {
        "overlap": Drawn(
            show(found), "Nodes are heads and MLPs; embeddings and logits are in every circuit."
        )
    }
    tables = {"overlap": Table(found.to_frame(), "what the circuits share")}
    if shared is not None:
        title = f"The {count_text(len(shared), 'edge')} in both"
        figures["shared"] = Drawn(
            show(shared, title),
            "What both circuits have, with the scores of the first. "
            + _colours(shared, metric_words(shared, "metric")[0]),
        )
        names = ("edge", "score", "effect")
        tables["shared"] = Table(edges_frame(shared), "edges in both circuits", names)
    return Part(
        title="What both have",
        lines=overlap_lines(found),
        prose=(
            "Chance draws edges one by one, which circuits are not, so its probability is the "
            "least that one should ask."
        ),
        figures=figures,
        tables=tables,
    )
