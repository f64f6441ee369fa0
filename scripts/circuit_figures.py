"""Make the figures and tables of docs/circuits.md.

    python -m scripts.circuit_figures [--prompts 16] [NAME ...]

All is measured on models that ship with the package. Figures go to docs/figures/circuit-NAME.png,
tables to the screen as Markdown. With names only those are made. It takes five to six minutes on
one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import cache
from itertools import combinations
from typing import Any, get_args

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from transformers.utils import logging

import attnlens as al
from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_curve import FaithfulnessCurve
from attnlens.analyses.circuit_evaluation import CircuitEvaluation
from attnlens.analyses.edge_runs import EdgeAblation
from attnlens.analyses.edge_scores import EdgeScores
from attnlens.analyses.greedy_edges import Order
from attnlens.analyses.scoring import Method
from attnlens.errors import AttnlensError
from attnlens.lens import Lens
from attnlens.tasks import Task
from attnlens.views.theme import styled
from attnlens.zoo import induction_model, name_circuit, name_model, small_path
from scripts.ablation_figures import CONTROL, FIGURES, GRID, print_table, write
from tests.architectures import ARCHITECTURES

TOP = 100
"""Edges of a circuit in most tables."""
METHODS: Mapping[Method, str] = {"exact": "#3b4246", "eap-ig": "#34808b", "eap": "#9a3412"}
TASKS: Mapping[str, Callable[..., Task]] = {
    "repeated tokens": al.tasks.repeated_tokens,
    "indirect object": al.tasks.indirect_object,
    "key-value": al.tasks.key_value,
    "copy": al.tasks.copy_task,
}
JUDGED = ("repeated tokens", "indirect object", "key-value")
"""The tasks whose edges are scored exactly, too."""


class Study:
    """The shipped model, its tasks, and what several figures and tables share."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self.lens = al.load(small_path())
        self.task = cache(self._task)
        self.scores = cache(self._scores)
        self.curve = cache(self._curve)
        self.evaluated = cache(self._evaluated)

    def _task(self, name: str, seed: int = 0) -> Task:
        return TASKS[name](self.lens, prompts=self.prompts, seed=seed)

    def _scores(self, name: str, method: Method, ablation: str = "resample") -> EdgeScores:
        return al.edges(self.lens, self.task(name), method, ablation=ablation)

    def _curve(self, name: str, method: Method) -> FaithfulnessCurve:
        return al.faithfulness_curve(self.lens, self.task(name), self.scores(name, method))

    def circuit(self, name: str, method: Method = "eap-ig", top: int = TOP) -> Circuit:
        """The circuit of the largest edges."""
        return self.scores(name, method).circuit(top=top)

    def _evaluated(self, name: str, method: Method = "eap-ig", top: int = TOP) -> CircuitEvaluation:
        return self.circuit(name, method, top).evaluate(self.lens, self.task(name))


def known(_: Study) -> go.Figure:
    """The hand-wired circuit of name copying; how many of its 25 edges each method finds."""
    lens = al.load(name_model())
    task = al.tasks.other_name(lens, prompts=32)
    names = [
        f"{edge.sender}->{edge.receiver}" + (f"<{edge.kind}>" if edge.kind else "")
        for edge in name_circuit()
    ]
    rows: list[dict[str, object]] = []
    exact = al.edges(lens, task, "exact", batch_size=16)
    for method in METHODS:
        found = exact if method == "exact" else al.edges(lens, task, method)
        circuit = found.circuit(top=len(names))
        evaluation = circuit.evaluate(lens, task, draws=20)
        rows.append(
            {
                "method": method,
                "of the 25 known": len(set(circuit.edges) & set(names)),
                "edges kept": len(circuit),
                "f": float(evaluation.faithfulness.mean),
                "random": float(evaluation.random.mean()),
                "embed->L3H0<k>": float(found.score[lens.wiring.network.find("embed->L3H0<k>")]),
            }
        )
    print_table("Hand-wired name copying, 25 edges known", pd.DataFrame(rows))
    title = "Hand-wired name copying: the circuit, edge by edge"
    return al.show(exact.circuit(top=len(names)), title=title)


def induction(study: Study) -> go.Figure:
    """A small circuit of repeated tokens, by EAP-IG."""
    circuit = study.circuit("repeated tokens", top=60)
    f = study.evaluated("repeated tokens", "eap-ig", 60).faithfulness.mean
    title = f"Repeated tokens: top 60 edges by EAP-IG, faithfulness {float(f):.2f}"
    return al.show(circuit, title=title)


def names(study: Study) -> go.Figure:
    """A small circuit of indirect object, by EAP-IG."""
    circuit = study.circuit("indirect object", top=30)
    f = study.evaluated("indirect object", "eap-ig", 30).faithfulness.mean
    title = f"Indirect object: top 30 edges by EAP-IG, faithfulness {float(f):.2f}"
    return al.show(circuit, title=title)


def scores(study: Study) -> go.Figure:
    return al.show(study.scores("indirect object", "exact"))


def curves(study: Study) -> go.Figure:
    """Faithfulness by each method on three tasks, beside random circuits; a table of areas."""
    figure = make_subplots(1, 3, subplot_titles=JUDGED, shared_yaxes=True, horizontal_spacing=0.03)
    rows: list[dict[str, object]] = []
    for column, name in enumerate(JUDGED, start=1):
        for method, colour in METHODS.items():
            found = study.curve(name, method)
            f = found.faithfulness.mean
            figure.add_trace(line(found.fractions, f, method, colour, column == 1), 1, column)
            rows.append(
                {
                    "task": name,
                    "method": method,
                    "CPR": with_bounds(*found.cpr, digits=3),
                    "CMD": with_bounds(*found.cmd, digits=3),
                    "random CPR": round(float(found.random_cpr.mean()), 3),
                }
            )
        chance = study.curve(name, "exact").random.mean(0)
        figure.add_trace(
            line(found.fractions, chance, "random", CONTROL, column == 1, dash="dot"), 1, column
        )
    print_table("Areas under the curves", pd.DataFrame(rows))
    by_size = [
        {"task": name, "method": method}
        | {
            str(edges): round(float(f), 2)
            for edges, f in zip(found.edges, found.faithfulness.mean, strict=True)
        }
        for name in JUDGED
        for method in METHODS
        for found in [study.curve(name, method)]
    ]
    print_table("Faithfulness by number of edges", pd.DataFrame(by_size))
    styled(figure, "Faithfulness of the largest edges, by how they were scored", 430, 1240)
    figure.update_xaxes(
        type="log",
        title="share of the edges",
        gridcolor=GRID,
        tickvals=[0.001, 0.01, 0.1, 1],
        ticktext=["0.1%", "1%", "10%", "100%"],
    )
    figure.update_yaxes(gridcolor=GRID, zerolinecolor="#b9bfba", range=[-0.05, 1.05])
    figure.update_yaxes(title="faithfulness", col=1)
    figure.update_layout(legend={"x": 0.01, "y": 0.98}, margin={"t": 84})
    return figure.update_annotations(font_size=13)


def line(x: Any, y: Any, name: str, colour: str, legend: bool, dash: str = "solid") -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=[float(value) for value in y],
        mode="lines+markers",
        name=name,
        line={"color": colour, "dash": dash},
        marker={"size": 5},
        showlegend=legend,
    )


def evaluation(study: Study) -> go.Figure:
    """What a circuit of indirect object does, and what each of its nodes adds."""
    found = study.evaluated("indirect object", "eap-ig", 30)
    print_table("Indirect object, 30 edges", found.to_frame())
    return al.show(found)


def paths(study: Study) -> go.Figure:
    """Frozen and direct paths to the logits and to what the answering heads read."""
    lens, task = study.lens, study.task("indirect object")
    ends = [str(head) for head in lens.anatomy.heads] + [f"L{n}.mlp" for n in range(4)] + ["embed"]
    rows: dict[str, dict[str, float]] = {}
    for receivers in ("logits", "L3H7<q>", "L3H7<k>", "L3H7<v>"):
        for form in ("frozen", "direct"):
            found = al.path_patch(lens, task, receivers, ends, form)
            for sender, effect in zip(found.senders, found.effect.tolist(), strict=True):
                rows.setdefault(sender, {})[f"{receivers}, {form}"] = effect
    frame = pd.DataFrame(rows).T
    largest = frame.loc[frame.abs().max(axis=1) > 0.3].rename_axis("sender").reset_index()
    print_table("Paths of indirect object (effects in logits)", largest.round(2))
    return al.show(al.path_patch(lens, task, "logits", ends))


def saturated(study: Study) -> None:
    """The hand-wired induction model: what gradients see of a softmax that has decided."""
    lens = al.load(induction_model())
    task = al.tasks.repeated_tokens(lens, prompts=study.prompts)
    edges = ("L1H2->logits", "L0H1->L1H2<k>", "embed->L0H1<v>", "embed->L1H2<v>", "L0H1->L1H2<v>")
    for metric in ("logit_difference", "loss"):
        columns: dict[str, list[float]] = {}
        asked: tuple[tuple[Method, int], ...] = (
            ("exact", 1), ("eap", 1), ("eap-ig", 5), ("eap-ig", 10), ("eap-ig", 20), ("eap-ig", 50),
        )  # fmt: skip
        for method, steps in asked:
            found = al.edges(lens, task, method, steps=steps, metric=metric)
            name = f"{method}, {steps} steps" if method == "eap-ig" else method
            columns[name] = found.score[lens.wiring.network.find(edges)].tolist()
            others = found.score.abs()
            others[lens.wiring.network.find(edges)] = 0
            columns[name].append(float(others.max()))
        frame = pd.DataFrame(columns, index=[*edges, "largest other, by size"])
        print_table(f"Hand-wired induction, {metric}", frame.rename_axis("edge").reset_index())


def rules(study: Study) -> None:
    """One set of scores under several rules, and circuits under each ablation."""
    lens, name = study.lens, "indirect object"
    task, found = study.task(name), study.scores(name, "eap-ig")
    rules: Mapping[str, dict[str, Any]] = {
        "top=100": {"top": 100},
        "top=100, greedy=True": {"top": 100, "greedy": True},
        "threshold=0.1": {"threshold": 0.1},
        "threshold=0.1, greedy=True": {"threshold": 0.1, "greedy": True},
    }
    rows = [{"rule": rule} | facts(lens, task, found.circuit(**own)) for rule, own in rules.items()]
    by_node = al.nodes(lens, task).circuit(top=12)
    rows.append({"rule": "12 nodes, all edges between"} | facts(lens, task, by_node))
    print_table("Rules, indirect object, EAP-IG", pd.DataFrame(rows))
    print_table("Ablations, indirect object, EAP-IG", pd.DataFrame(ablations(study, name)))
    print_table("Ablations, repeated tokens", pd.DataFrame(ablations(study, "repeated tokens")))
    shares = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    rows = []
    for ablation in EdgeAblation:
        own = al.faithfulness_curve(
            lens, task, study.scores(name, "eap-ig", str(ablation)), shares, draws=0
        )
        values = own.faithfulness.mean.tolist()
        rows.append({"ablation": str(ablation)} | dict(zip(shares, values, strict=True)))
    print_table("Faithfulness by share of edges, indirect object", pd.DataFrame(rows))


def removal(study: Study) -> None:
    """Removal in every order on two tasks; on one from all edges, too."""
    for name in ("indirect object", "repeated tokens"):
        lens, task, found = study.lens, study.task(name), study.scores(name, "eap-ig")
        start = found.circuit(top=300)
        asked: list[tuple[str, Order, Circuit | None]] = [
            (order, order, start) for order in get_args(Order)
        ]
        if name == "indirect object":
            asked.append(("from logits, all edges", "from logits", None))
        rows: list[dict[str, object]] = []
        kept: dict[str, Circuit] = {}
        for title, order, begin in asked:
            scored = found.score if order == "scores" else None
            circuit = al.remove_edges(lens, task, 0.005, order, scored, begin)
            kept[title] = circuit
            tried = circuit.about
            passes = {"tried": tried["began with"], "forward passes": tried["forward passes"]}
            rows.append({"order": title} | passes | facts(lens, task, circuit))
        print_table(f"Removal, {name}", pd.DataFrame(rows))
        for (a, first), (b, second) in combinations(list(kept.items())[:4], 2):
            print(f"{a} / {b}: Jaccard of edges {first.compare(second).edges.jaccard:.2f}")
        print()


def ablations(study: Study, name: str) -> list[dict[str, object]]:
    """Circuits found under one ablation, evaluated under each."""
    rows: list[dict[str, object]] = []
    for ablation in EdgeAblation:
        circuit = study.scores(name, "eap-ig", str(ablation)).circuit(top=TOP)
        row: dict[str, object] = {"found under": str(ablation)}
        for other in EdgeAblation:
            own = circuit.evaluate(study.lens, study.task(name), ablation=other, draws=0)
            row[str(other)] = with_bounds(*own.faithfulness)
        rows.append(row)
    return rows


def facts(lens: Lens, task: Task, circuit: Circuit) -> dict[str, object]:
    """Size, faithfulness, completeness, and how many nodes are needed."""
    found = circuit.evaluate(lens, task, draws=0)
    return {
        "edges": len(circuit),
        "nodes": len(found.nodes),
        "f": with_bounds(*found.faithfulness),
        "completeness": round(float(found.completeness.mean), 3),
        "nodes without which f falls": int((found.minimality.low > 0.001).sum()),
    }


def methods(study: Study) -> None:
    """Circuits by three methods: stability, overlap, other prompts, and the largest edges."""
    for name in JUDGED:
        rows = []
        for method in METHODS:
            circuit = study.circuit(name, method)
            chosen = circuit.to_frame()["chosen"]
            own = study.evaluated(name, method)
            fresh = circuit.evaluate(study.lens, study.task(name, seed=1), draws=0)
            rows.append(
                {
                    "method": method,
                    "edges": len(circuit),
                    "nodes": len(own.nodes),
                    "f": with_bounds(*own.faithfulness),
                    "f, other prompts": with_bounds(*fresh.faithfulness),
                    "completeness": with_bounds(*own.completeness, digits=3),
                    "random f": round(float(own.random.mean()), 3),
                    "random, largest": round(float(own.random.max()), 3),
                    "random completeness": round(float(own.random_outside.mean()), 2),
                    "random completeness, least": round(float(own.random_outside.min()), 2),
                    "chosen in 95 %": int((chosen >= 0.95).sum()),
                    "chosen under half": int((chosen < 0.5).sum()),
                    "mean chosen": round(float(chosen.mean()), 2),
                }
            )
        print_table(f"{name}: top {TOP} by each method", pd.DataFrame(rows))
        rows = []
        for a, b in combinations(METHODS, 2):
            both = study.circuit(name, a).compare(study.circuit(name, b))
            sa, sb = study.scores(name, a).score, study.scores(name, b).score
            rank = pd.DataFrame({"a": sa.abs().numpy(), "b": sb.abs().numpy()}).corr(
                method="spearman"
            )
            rows.append(shared(f"{a}, {b}", both) | {"Spearman of sizes": rank.iloc[0, 1]})
        print_table(f"{name}: overlap of methods", pd.DataFrame(rows))
        largest = study.scores(name, "exact").to_frame().head(12)
        for method in ("eap-ig", "eap"):
            own = study.scores(name, method).to_frame()
            rank = pd.Series(range(1, len(own) + 1), index=own["edge"])
            value = own.set_index("edge")["score"]
            largest[f"{method} (rank)"] = [
                f"{value[edge]:.2f} ({rank[edge]})" for edge in largest["edge"]
            ]
        print_table(f"{name}: largest edges", largest.drop(columns=["sender", "receiver"]))
    rows = [missed(study, name) for name in ("repeated tokens", "key-value")]
    print_table("EAP's circuit with edges that exact scores have before it", pd.DataFrame(rows))
    edges = [f"L2H{head}->logits" for head in range(8)]
    numbers = study.lens.wiring.network.find(edges)
    columns = {
        method: study.scores("repeated tokens", method).score[numbers].tolist()
        for method in METHODS
    }
    frame = pd.DataFrame(columns, index=pd.Index(edges, name="edge"))
    print_table("repeated tokens: layer 2 into the logits", frame.reset_index())


def missed(study: Study, name: str) -> dict[str, object]:
    """Faithfulness of EAP's circuit as edges of the exact one that it lacks are put in."""
    exact, eap = (study.scores(name, method).score.abs() for method in ("exact", "eap"))
    network = study.lens.wiring.network
    chosen = eap.argsort(descending=True)[:TOP].tolist()
    order = exact.argsort(descending=True)[:TOP].tolist()
    lacking = [edge for edge in order if edge not in chosen]
    row: dict[str, object] = {"task": name}
    row["first lacking"] = ", ".join(network.edge_names[edge] for edge in lacking[:3])
    for more in (0, 1, 2, 3, 5, 10):
        edges = [network.edge_names[edge] for edge in chosen + lacking[:more]]
        found = Circuit.of(network, edges).evaluate(study.lens, study.task(name), draws=0)
        row[f"with {more}"] = round(float(found.faithfulness.mean), 2)
    return row


def shared(title: str, found: Any) -> dict[str, object]:
    return {
        "pair": title,
        "edges shared": len(found.edges.names),
        "by chance": round(found.edges.expected, 1),
        "Jaccard": round(found.edges.jaccard, 2),
        "nodes shared": f"{len(found.nodes.names)} of {found.nodes.first} and {found.nodes.second}",
        "nodes by chance": round(found.nodes.expected, 1),
        "p, nodes": round(found.nodes.p, 2),
        "same sign": round(found.same_sign, 2),
    }


def reuse(study: Study) -> None:
    """Circuits of four tasks against each other, and each on every task."""
    lens = study.lens
    objects = al.tasks.coloured_objects(lens, prompts=200)
    scored = objects.score(lens.logits(objects.clean_inputs(), objects.reads), "accuracy")
    score = objects.score(lens.logits(objects.clean_inputs(), objects.reads), "logit_difference")
    won = float((score > 0).double().mean())
    print(f"coloured objects: right {float(scored.mean()):.2f}, answer before wrong {won:.2f}\n")
    rows = []
    for a, b in combinations(TASKS, 2):
        rows.append(shared(f"{a}, {b}", study.circuit(a).compare(study.circuit(b))))
    print_table(f"Overlap of tasks, top {TOP} by EAP-IG", pd.DataFrame(rows))
    rows = []
    for a in TASKS:
        row: dict[str, object] = {"circuit of": a}
        for b in TASKS:
            found = study.circuit(a).evaluate(lens, study.task(b), draws=0)
            row[b] = with_bounds(*found.faithfulness)
        rows.append(row)
    print_table("Faithfulness of a task's circuit on another task", pd.DataFrame(rows))


def heads(study: Study) -> None:
    """Every head by eight measures, on two tasks, and how the measures rank them."""
    for name in ("indirect object", "repeated tokens"):
        frame = heads_of(study, name)
        named = frame.columns.drop("in the circuit")
        some = frame.loc[
            frame[named].div(frame[named].abs().max()).abs().max(axis=1).nlargest(14).index
        ]
        ends = study.evaluated(name)
        whole, nothing = float(ends.full.mean()), float(ends.empty.mean())
        print(f"{name}: {whole:.2f} with all edges, {nothing:.2f} with none\n")
        print_table(f"{name}: heads", some.sort_index().reset_index())
        ranks = frame[named].abs().corr(method="spearman").rename_axis("measure")
        print_table(f"{name}: rank correlation of sizes", ranks.reset_index())


def heads_of(study: Study, name: str) -> pd.DataFrame:
    """One row a head; shares as they are, the rest in the unit of the metric."""
    lens, task = study.lens, study.task(name)
    evaluated = study.evaluated(name)
    every = [str(head) for head in lens.anatomy.heads]

    def nodes(method: Method) -> list[float]:
        return al.nodes(lens, task, method).to_frame().set_index("node")["score"][every].tolist()

    needed = dict(zip(evaluated.nodes, evaluated.minimality.mean.tolist(), strict=True))
    ablated = {
        mode: al.ablate(lens, task, mode=mode, controls=0).effect.tolist()
        for mode in ("zero", "resample")
    }
    patched = al.patch(lens, task)
    columns = {
        "ablated, zero": ablated["zero"],
        "ablated, resample": ablated["resample"],
        "patched, share": patched.share.tolist(),
        "path to logits, frozen": al.path_patch(lens, task).effect.tolist(),
        "path to logits, direct": al.path_patch(lens, task, form="direct").effect.tolist(),
        "node, exact": nodes("exact"),
        "node, EAP-IG": nodes("eap-ig"),
        "node, EAP": nodes("eap"),
        "minimality": [needed.get(head, 0.0) for head in every],
    }
    frame = pd.DataFrame(columns, index=pd.Index(every, name="head"))
    frame["in the circuit"] = ["yes" if head in needed else "" for head in every]
    return frame


def architectures(_: Study) -> None:
    """Which of the tested architectures have edges; only made when it is named."""
    logging.set_verbosity(logging.CRITICAL)
    told: dict[str, str] = {}
    for name, architecture in ARCHITECTURES.items():
        model: Any = architecture.build()
        try:
            try:
                lens = al.Lens(model)
            except AttnlensError:
                lens = al.Lens(model, example=architecture.inputs(model))
            told[name] = f"{len(lens.wiring.network)} edges"
        except AttnlensError as error:
            told[name] = str(error).partition(", so ")[0]
    frame = pd.DataFrame({"architecture": list(told), "edges": list(told.values())})
    print_table("Which architectures have edges", frame)
    count = sum(text.endswith(" edges") for text in told.values())
    headless = sum("no logits" in text for text in told.values())
    print(f"{count} have edges, {len(told) - count - headless} with logits have none\n")


def with_bounds(value: Any, low: Any, high: Any, digits: int = 2) -> str:
    return f"{float(value):.{digits}f} ({float(low):.{digits}f} to {float(high):.{digits}f})"


DRAWN: Mapping[str, Callable[[Study], go.Figure]] = {
    function.__name__: function
    for function in (known, induction, names, scores, curves, evaluation, paths)
}
TABLES: dict[str, Callable[[Study], None]] = {
    function.__name__: function for function in (saturated, rules, removal, methods, reuse, heads)
}
ASKED = {"architectures": architectures}
"""Tables that are made only when they are named."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=", ".join([*DRAWN, *TABLES, *ASKED])
    )
    parser.add_argument("--prompts", type=int, default=16, help="of each task")
    asked = parser.parse_args()
    study = Study(asked.prompts)
    for which in asked.names or [*DRAWN, *TABLES]:
        if which in TABLES | ASKED:
            (TABLES | ASKED)[which](study)
        else:
            write(DRAWN[which](study), FIGURES / f"circuit-{which}.png")


if __name__ == "__main__":
    main()
