"""The command `circuit`: found or read from a file, run on other prompts, and written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import typer

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_curve import faithfulness_curve
from attnlens.analyses.circuit_evaluation import CircuitEvaluation, check_network, evaluate_circuit
from attnlens.analyses.edge_runs import encoded
from attnlens.analyses.edge_scores import EdgeScores, edges
from attnlens.analyses.greedy_edges import Order, remove_edges
from attnlens.analyses.node_scores import NodeScores, nodes
from attnlens.analyses.scoring import Method
from attnlens.cli.asked import CircuitAsked, ModelAsked
from attnlens.cli.circuit_state import removal_state
from attnlens.cli.grading import no_grading
from attnlens.cli.main_job import build_task
from attnlens.cli.opening import open_checked
from attnlens.cli.options import TASK_FILES
from attnlens.cli.output import staged
from attnlens.cli.progress import Steps, progress
from attnlens.errors import InputError
from attnlens.graphs.export import SUFFIXES, export_graph
from attnlens.lens import Lens
from attnlens.tasks import Task
from attnlens.views.circuit_lines import CircuitFindings
from attnlens.views.circuit_report import circuit_parts
from attnlens.views.circuit_results import spaced
from attnlens.views.narrative import model_line
from attnlens.views.panels import count_text
from attnlens.views.report_parts import write_page

TOP, SMALL, SHARE = 200, 2000, 10
"""Edges that are taken where nothing is said: so many, or of a small model one in ten."""
MOST_NODES, NODE_SHARE = 30, 3
LITTLE = 0.5
"""A circuit that does less of the task is warned of."""
COST = 0.01
"""The share of the task that an edge must cost to survive a removal, where nothing is said."""


@dataclass(frozen=True)
class _Found:
    """A circuit and the scores that it is made of, where there are any."""

    circuit: Circuit
    scores: EdgeScores | NodeScores | None = None
    taken: str = ""
    notes: tuple[str, ...] = ()


def find_circuit(model: ModelAsked, asked: CircuitAsked, out: Path, words: Sequence[str]) -> None:
    """Find a circuit, or read one; run it on other prompts, write and print what was found.

    What can be refused without the model is refused first; `words` are those of the command, to
    say how to go on after a stop. Raises what the analyses raise.
    """
    suffixes = _suffixes(asked.graphs)
    saved = None if asked.evaluate is None else Circuit.load(asked.evaluate)
    with removal_state(out, asked, words) as state, staged(out) as folder, progress() as steps:
        lens = open_checked(model, steps)
        chosen_on, judged, on = _tasks(lens, asked, steps)
        if saved is None:
            found = _find(lens, chosen_on, asked, state, steps)
        else:
            check_network(lens, saved)
            origin = saved.about.get("task")
            found = _Found(saved, taken=f"found on {spaced(origin)}" if origin else "")
        findings = _judge(lens, judged, on, found, asked, steps)
        with steps("Writing the report"):
            title = f"Circuit of {spaced(judged.name)} in {model.title}"
            _write(findings, suffixes, folder, title, model_line(lens.anatomy))
    typer.echo()
    for line in findings.lines:
        typer.echo(line)
    if saved is None:
        own = shlex.quote(str(out / "circuit.json"))
        typer.echo(f"On another task: attnlens circuit MODEL --task TASK --evaluate {own}")
    typer.echo(f"Written to {out}: open {out / 'index.html'}")


def _suffixes(given: str) -> tuple[str, ...]:
    """Suffixes of the graph's files; raises InputError for one that there is not."""
    names = [name.strip().lower().removeprefix(".") for name in given.split(",") if name.strip()]
    for name in names:
        if f".{name}" not in SUFFIXES:
            known = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
            raise InputError(f"--graph {name!r} is no format of graphs; choose of {known}.")
    return tuple(dict.fromkeys(f".{name}" for name in names))


def _tasks(lens: Lens, asked: CircuitAsked, steps: Steps) -> tuple[Task, Task, str]:
    """The prompts that choose the circuit, those that it is run on, and what to call these."""
    why = no_grading(lens)
    if why is not None:
        raise InputError(f"This model cannot be graded: {why}.")
    with steps("Finding nodes and edges"):
        count = len(lens.wiring.network)
    with steps(f"Building prompts of the task {asked.task}; the model has {count:,} edges"):
        task = build_task(lens, asked.task, asked.prompts, asked.seed)
        assert task is not None  # no_grading has said so
        own = asked.task.lower().endswith(TASK_FILES)
        judged = task if own else build_task(lens, asked.task, asked.prompts, asked.seed + 1)
        assert judged is not None
    of = count_text(len(judged), "prompt")
    if asked.evaluate is not None:
        return task, judged, of
    known = {_ids(task, number) for number in range(len(task))}
    shared = sum(_ids(judged, number) in known for number in range(len(judged)))
    if shared == len(judged):
        return task, judged, f"the {of} that chose it"
    some = f"{of}, of which {shared} chose it too" if shared else ""
    return task, judged, some or f"{of} that had no part in choosing it"


def _ids(task: Task, number: int) -> tuple[int, ...]:
    return tuple(task.clean[number][task.mask[number]].tolist())


def _find(lens: Lens, task: Task, asked: CircuitAsked, state: Path | None, steps: Steps) -> _Found:
    if asked.method == "removal":
        return _remove(lens, task, asked, state, steps)
    by_nodes = asked.granularity == "nodes"
    count = len(lens.wiring.network.senders if by_nodes else lens.wiring.network)
    top, taken = asked.top, ""
    if top is None and asked.threshold is None:
        top, taken = _size(count, by_nodes)
    with steps(f"Scoring {count:,} {asked.granularity} by {asked.method}") as advance:
        scores = (nodes if by_nodes else edges)(
            lens, task, cast("Method", asked.method), asked.steps, asked.ablation,
            metric=asked.metric, batch_size=asked.batch_size, seed=asked.seed, progress=advance,
        )  # fmt: skip
    if isinstance(scores, NodeScores):
        assert top is not None
        circuit = scores.circuit(top)
    else:
        circuit = scores.circuit(top, asked.threshold, asked.greedy)
    if not len(circuit):
        raise _leads_nowhere("--threshold" if top is None else "--top")
    return _Found(circuit, scores, taken, scores.notes)


def _leads_nowhere(option: str) -> InputError:
    mend = "raise" if option == "--top" else "lower"
    return InputError(
        f"No edge that {option} keeps lies on a way from embeddings to logits: {mend} it."
    )


def _size(count: int, by_nodes: bool) -> tuple[int, str]:
    """How many are taken where nothing is said, and why."""
    unless = "as --top does not say" if by_nodes else "as neither --top nor --threshold says"
    if by_nodes:
        third = max(1, count // NODE_SHARE)
        few = third <= MOST_NODES
        return (third, f"a third of all nodes, {unless}") if few else (MOST_NODES, unless)
    if count < SMALL:
        return max(1, count // SHARE), f"a tenth of all edges, {unless}"
    return TOP, unless


def _remove(
    lens: Lens, task: Task, asked: CircuitAsked, state: Path | None, steps: Steps
) -> _Found:
    scores: EdgeScores | None = None
    order = cast("Order", (asked.order or "from-logits").replace("-", " "))
    if asked.top is not None or order == "scores":
        with steps(f"Scoring {len(lens.wiring.network):,} edges by eap-ig") as advance:
            scores = edges(
                lens, task, "eap-ig", asked.steps, asked.ablation, metric=asked.metric,
                batch_size=asked.batch_size, seed=asked.seed, progress=advance,
            )  # fmt: skip
    start = None if scores is None or asked.top is None else scores.circuit(asked.top)
    if start is not None and not len(start):
        raise _leads_nowhere("--top")
    count = len(lens.wiring.network if start is None else start)
    with steps(f"Trying {count:,} edges one after another") as advance:
        circuit = remove_edges(
            lens, task, COST if asked.threshold is None else asked.threshold, order,
            scores.score if scores is not None and order == "scores" else None, start,
            asked.ablation, asked.metric, batch_size=asked.batch_size, seed=asked.seed,
            state=state, progress=advance,
        )  # fmt: skip
    if not len(circuit):
        if state is not None:  # there is nothing to go on with
            state.unlink(missing_ok=True)
        raise InputError("No edge costs so much of the task: lower --threshold.")
    taken = "as --threshold does not say" if asked.threshold is None else ""
    return _Found(circuit, scores, taken, () if scores is None else scores.notes)


def _judge(
    lens: Lens, task: Task, on: str, found: _Found, asked: CircuitAsked, steps: Steps
) -> CircuitFindings:
    circuit = found.circuit
    metric = asked.metric if asked.evaluate is not None else None
    with steps(f"Running the circuit, {len(circuit):,} edges, beside random ones") as advance:
        evaluation = evaluate_circuit(
            lens, task, circuit, metric=metric, batch_size=asked.batch_size, seed=asked.seed,
            progress=advance,
        )  # fmt: skip
    curve = None
    if isinstance(found.scores, EdgeScores):
        with steps("Running circuits of other sizes") as advance:
            curve = faithfulness_curve(
                lens, task, found.scores, greedy=asked.greedy, batch_size=asked.batch_size,
                seed=asked.seed, progress=advance,
            )  # fmt: skip
    notes = dict.fromkeys((*found.notes, *evaluation.notes, *_guessing(evaluation)))
    if asked.evaluate is None and float(evaluation.faithfulness.mean) < LITTLE:
        more = "a larger --top" if asked.threshold is None else "a smaller --threshold"
        notes["The circuit does little of the task: too small, or edges that its scores miss are "
              f"needed. Try {more}, --method exact or another --ablation."] = None  # fmt: skip
    return CircuitFindings(
        circuit, evaluation, _accuracy(lens, task, asked.batch_size), on, found.taken,
        found.scores, curve, tuple(notes),
    )  # fmt: skip


@torch.no_grad()
def _accuracy(lens: Lens, task: Task, batch_size: int) -> float:
    """Share of prompts whose right answer is the likeliest token."""
    right = 0.0
    for start in range(0, len(task), batch_size):
        part = task.subset(slice(start, start + batch_size))
        logits = lens.logits_at(encoded(lens, part), part.reads)
        right += float(part.score(logits, "accuracy").sum())
    return right / len(task)


def _guessing(evaluation: CircuitEvaluation) -> tuple[str, ...]:
    if evaluation.metric != "logit_difference" or float(evaluation.full.mean()) > 0:
        return ()
    note = (
        "The whole model prefers the wrong answer: a circuit of a task that a model cannot do "
        "explains nothing."
    )
    return (note,)


def _write(
    found: CircuitFindings, suffixes: Sequence[str], folder: Path, title: str, subtitle: str
) -> None:
    found.circuit.save(folder / "circuit.json", found.evaluation, found.curve)
    others = {"circuit.json": "the circuit, for al.Circuit.load, attnlens compare and --evaluate"}
    graph: Any = found.circuit.to_graph()
    for suffix in suffixes:
        name = f"circuit{'.graph' * (suffix == '.json')}{suffix}"  # circuit.json is the circuit
        export_graph(graph, folder / name)
        others[name] = "its graph"
    write_page(folder, title, subtitle, found.lines, circuit_parts(found), others)
