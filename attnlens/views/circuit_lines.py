"""What is said of a circuit in short, on the terminal and on the page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_curve import FaithfulnessCurve
from attnlens.analyses.circuit_evaluation import CircuitEvaluation
from attnlens.analyses.circuit_overlap import CircuitOverlap, Shared, helping
from attnlens.analyses.edge_scores import EdgeScores
from attnlens.analyses.node_scores import NodeScores
from attnlens.views.circuit_results import chance_text, circuit_title, spaced
from attnlens.views.panels import count_text, number_text
from attnlens.views.ranking import METRICS

NAMED = 5
"""Nodes, and edges, that a sentence names."""
SURE = 0.95
"""An edge that so many of the resamples choose is one of the task, not of the prompts."""
LEAST = 0.005
"""The smallest loss, as a share of the task, for which a node is named."""
MOST_DONE = 0.9
"""The share of the task for which the curve tells how many edges are enough."""


@dataclass(frozen=True)
class CircuitFindings:
    """A circuit and what was found of it.

    Attributes:
        accuracy: share of prompts whose right answer is the likeliest token of all.
        judged: on which prompts it was run: `16 prompts that had no part in choosing it`.
        taken: why the circuit has its size, where that was not asked for.
        scores, curve: None where there are none.
        notes: what to beware of.

    """

    circuit: Circuit
    evaluation: CircuitEvaluation
    accuracy: float
    judged: str
    taken: str = ""
    scores: EdgeScores | NodeScores | None = None
    curve: FaithfulnessCurve | None = None
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """The findings in short, a sentence a line."""
        found = (
            *_task_lines(self),
            *_size_lines(self.circuit, self.taken),
            *_does_lines(self),
            *_node_lines(self.evaluation),
            *_edge_lines(self.circuit, self.evaluation),
            *_curve_lines(self.curve),
        )
        return (*found, *(f"Beware: {note}" for note in self.notes))


def _task_lines(found: CircuitFindings) -> list[str]:
    evaluation = found.evaluation
    name, unit, _ = METRICS[evaluation.metric]
    unit = f" {unit}" if unit else ""
    full, empty = (
        number_text(float(values.mean())) for values in (evaluation.full, evaluation.empty)
    )
    prompts = count_text(len(evaluation.full), "prompt")
    right = f"; the right answer is its likeliest token in {found.accuracy:.0%} of {prompts}"
    line = (
        f"Task {spaced(evaluation.task)}: {name} of the whole model {full}{unit}, with every "
        f"edge cut {empty}{unit}{right}."
    )
    return [line]


def _size_lines(circuit: Circuit, taken: str) -> list[str]:
    nodes = [name for name in circuit.nodes if circuit.network.layers[name] >= 0][:-1]
    heads = [name for name in nodes if not name.endswith(".mlp")]
    counts = {"head": len(heads), "MLP": len(nodes) - len(heads)}
    parts = [count_text(count, kind) for kind, count in counts.items() if count]
    between = f" between {' and '.join(parts)}" if parts else ""
    about = circuit.about
    rule = circuit_title(about).partition(": ")[2]
    told = [taken] if taken else []
    whole = re.match(rf"top {len(circuit)}\b", str(about.get("selection", "")))
    if about.get("granularity") == "edges" and about.get("method") != "removal" and not whole:
        told.append("those on no way from embeddings to logits are left out")
    origin = f", {rule}" if rule else ""
    origin += f" ({'; '.join(told)})" if told else ""
    line = (
        f"The circuit: {count_text(len(circuit), 'edge')} of {len(circuit.network):,} "
        f"({circuit.share:.1%}){between}{origin}."
    )
    return [line]


def _does_lines(found: CircuitFindings) -> list[str]:
    evaluation = found.evaluation
    chance = evaluation.random
    beside = ""
    if len(chance):
        beside = (
            f"; of {len(chance)} random circuits of as many edges the best does "
            f"{number_text(float(chance.max()))}"
        )
    f, rest = evaluation.faithfulness, evaluation.completeness
    does = f"By itself it does {number_text(float(f.mean))} of the task{_interval(f)}"
    left = f"Without it the model keeps {number_text(float(rest.mean))} of the task"
    lines = [f"{does}, on {found.judged}{beside}.", f"{left}{_interval(rest)}."]
    if float(f.mean) < MOST_DONE and found.circuit.about.get("method") == "removal":
        lines.append(
            "What was removed cost under the threshold each time, which adds up: a smaller one "
            "keeps more."
        )
    return lines


def _interval(found: Any) -> str:
    """` (0.97 to 0.99)`, nothing where the interval is not known."""
    if bool(found.low.isnan()):
        return ""
    return f" ({number_text(float(found.low))} to {number_text(float(found.high))})"


def _node_lines(evaluation: CircuitEvaluation) -> list[str]:
    """The nodes of which the circuit misses most, and how many it hardly misses."""
    lost = dict(zip(evaluation.nodes, evaluation.minimality.mean.tolist(), strict=True))
    found = [name for name in sorted(lost, key=lambda n: -lost[n]) if lost[name] >= LEAST]
    if not found:
        return ["No node of it is missed by itself: others do its work."] if lost else []
    named = ", ".join(f"{name} {number_text(lost[name])}" for name in found[:NAMED])
    few = len(lost) - len(found)
    rest = f"; {few} of {len(lost)} nodes cost under {LEAST:g} each" if few else ""
    return [f"What it loses of the task without a node: {named}{rest}."]


def _edge_lines(circuit: Circuit, evaluation: CircuitEvaluation) -> list[str]:
    """The strongest edges, and how sure the choice is."""
    frame = edges_frame(circuit)
    lines: list[str] = []
    if circuit.about.get("granularity") == "edges" and bool(circuit.score.isfinite().all()):
        unit = metric_words(circuit, evaluation.metric)[1]
        named = ", ".join(
            f"{record['edge']} {record['effect']} by {number_text(abs(record['score']))}"
            for record in frame.head(NAMED).to_dict("records")
        )
        lines.append(f"Strongest edges{f', in {unit}' if unit else ''}: {named}.")
    chosen = circuit.chosen[circuit.network.numbers(circuit.kept)]
    if bool(chosen.isfinite().all()):
        sure = int((chosen >= SURE).sum())
        lines.append(
            f"Were the prompts drawn again, {sure:,} of its {len(chosen):,} edges would be chosen "
            f"in {SURE:.0%} of the draws or more; the mean is {float(chosen.mean()):.0%}."
        )
    return lines


def _curve_lines(curve: FaithfulnessCurve | None) -> list[str]:
    if curve is None:
        return []
    f = curve.faithfulness.mean.tolist()
    enough = [edges for edges, value in zip(curve.edges, f, strict=True) if value >= MOST_DONE]
    chance = ""
    if len(curve.random_cpr):
        chance = f" (random {number_text(float(curve.random_cpr.mean()))})"
    line = (
        f"Over all sizes: CPR {number_text(float(curve.cpr.mean))}{chance}, CMD "
        f"{number_text(float(curve.cmd.mean))}"
    )
    if enough and enough[0] < curve.edges[-1]:
        line += f"; of the sizes tried {enough[0]:,} edges are the first to do {MOST_DONE:g}"
    return [f"{line}."]


def edges_frame(circuit: Circuit) -> pd.DataFrame:
    """Kept edges, the strongest first, and whether each helps."""
    signs = dict(zip(circuit.network.edge_names, helping(circuit).tolist(), strict=True))
    frame = circuit.to_frame()
    words = {1.0: "helps", -1.0: "hinders"}
    frame["effect"] = [words.get(signs[name], "") for name in frame["edge"]]
    return frame


def metric_words(circuit: Circuit, otherwise: str) -> tuple[str, str]:
    """Name and unit of the metric of a circuit's scores, which a file may call as it likes."""
    metric = str(circuit.about.get("metric", otherwise))
    name, unit, _ = METRICS.get(metric, (spaced(metric), "", 1))
    return name, unit


def overlap_lines(found: CircuitOverlap) -> tuple[str, ...]:
    """What two circuits share, in short."""
    lines = [
        _shared_line(what, own) for what, own in (("edges", found.edges), ("nodes", found.nodes))
    ]
    if found.same_sign == found.same_sign:
        lines.append(f"Of the shared edges {found.same_sign:.0%} help in both or hinder in both.")
    lines.append(
        "Shared edges are no shared work: attnlens circuit MODEL --task B --evaluate A.json runs "
        "one task's circuit on another."
    )
    return tuple(lines)


def _shared_line(what: str, own: Shared) -> str:
    verb = "is" if own.expected == 1 else "are"
    return (
        f"{what.capitalize()}: {len(own.names):,} shared of {own.first:,} and {own.second:,} "
        f"(Jaccard index {number_text(own.jaccard)}); by chance {number_text(own.expected)} "
        f"{verb} expected, as many or more with probability {chance_text(own.p)}."
    )
