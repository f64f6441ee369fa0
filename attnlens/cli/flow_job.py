"""The commands `flow` and `routes`: paths to one position of a text, and their graph as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import plotly.graph_objects as go
import typer

from attnlens.analyses.attention_flow import attention_flow
from attnlens.analyses.rollout import rollout
from attnlens.analyses.routes import routes
from attnlens.cli.asked import ModelAsked, PathsAsked
from attnlens.cli.attribute_job import check_reads_text
from attnlens.cli.opening import open_checked
from attnlens.cli.progress import progress
from attnlens.cli.prompt import check_place
from attnlens.cli.terminal import print_scores, score_table
from attnlens.errors import FileError, InputError
from attnlens.files import write_atomically
from attnlens.graphs import export_graph, node_name, prune_graph, rollout_graph
from attnlens.graphs.export import SUFFIXES
from attnlens.lens import Lens
from attnlens.views import show
from attnlens.views.panels import count_text, number_text
from attnlens.views.theme import visible

FILES = (*SUFFIXES, ".html")


@dataclass(frozen=True)
class _Paths:
    """What was found, ready to be said and written."""

    heading: str
    words: tuple[str, ...]
    scores: Sequence[float]
    """How much comes from each token."""
    columns: tuple[str, ...]
    cells: Sequence[tuple[str, ...]]
    """Of each token, what the columns after its text hold."""
    lines: Sequence[str]
    graph: nx.MultiDiGraph[str]
    figure: go.Figure | None = None


def follow(model: ModelAsked, asked: PathsAsked) -> None:
    """Trace paths to a position of a text; print the sources, and write the graph if asked for.

    What can be refused without the model is refused first. Raises what the methods raise.
    """
    if asked.out is not None and not check_place(asked.out, FILES):
        raise FileError(
            f"{asked.out} has the suffix {asked.out.suffix!r}; graphs are files with "
            f"{', '.join(SUFFIXES)}, drawings with .html."
        )
    trace = {"attention_flow": _flow, "rollout": _rollout, "routes": _routes}[asked.method]
    with progress() as steps:
        lens = open_checked(model, steps)
        check_reads_text(lens)
        with steps(f"Tracing {asked.method.replace('_', ' ')}"):
            found = trace(lens, asked)
        if asked.out is not None:
            with steps(f"Writing {asked.out}"):
                _write(found, asked.out)
    _say(found, asked)


def _flow(lens: Lens, asked: PathsAsked) -> _Paths:
    trace = lens.run(asked.text, keep=("pattern",))
    found = attention_flow(trace, targets=asked.target, stack=asked.stack)
    frame, words = found.to_frame(), found.tokens[0]
    graph = found.graph(asked.target, asked.source, threshold=asked.threshold)
    target, source = found.targets[0][0], graph.nodes[graph.graph["source"]]["position"]
    _check_joined(words, source, target, bool(graph.number_of_edges()))
    cells = [
        (number_text(r["flow"]), number_text(r["share"]), number_text(r["rollout"]),
         "yes" if r["saturated"] else "no")
        for r in frame.to_dict("records")
    ]  # fmt: skip
    return _Paths(
        f"Attention flow to {_place(words, target)}",
        words,
        frame["flow"].tolist(),
        ("flow", "share", "rollout", "saturated"),
        cells,
        [*found.notes, f"The graph is one maximum flow from {_place(words, source)}."],
        graph,
    )


def _rollout(lens: Lens, asked: PathsAsked) -> _Paths:
    found = rollout(lens.run(asked.text, keep=("pattern",)), stack=asked.stack)
    words = found.tokens[0]
    place = _position(asked.target, len(words))
    shares = found.of(0)[-1, place].double().tolist()
    source = None
    if asked.source is not None:
        source = _position(asked.source, len(words), "--source")
        _check_joined(words, source, place, shares[source] > 0)
    # the strongest edges of all may lead past one source
    whole = rollout_graph(found, threshold=asked.threshold if source is None else 0)
    levels = [int(data["layer"]) for _, data in whole.nodes(data=True)]
    start = None if source is None else node_name(min(levels), source)
    return _Paths(
        f"Rollout to {_place(words, place)}",
        words,
        shares,
        ("share",),
        [(number_text(share),) for share in shares],
        found.notes,
        prune_graph(whole, node_name(max(levels), place), start, asked.threshold),
    )


def _routes(lens: Lens, asked: PathsAsked) -> _Paths:
    found = routes(lens, asked.text, asked.target, asked.threshold, asked.stack)
    words, shares = found.tokens[0], found.of(0).double().tolist()
    heads = found.heads_frame().nlargest(5, "passing").to_dict("records")
    named = ", ".join(f"{h['head']} {number_text(h['passing'])}" for h in heads if h["passing"] > 0)
    lines = [f"Heads through which most passes: {named}."] if named else []
    lost = float(found.lost[0])
    if lost:
        lines.append(f"{lost:.1%} of the importance ends in biases.")
    return _Paths(
        f"Routes to {_place(words, found.target[0])}",
        words,
        shares,
        ("arrives",),
        [(number_text(share),) for share in shares],
        [*lines, *found.notes],
        found.graph(),
        show(found),
    )


def _position(given: int, count: int, option: str = "--target") -> int:
    if not -count <= given < count:
        raise InputError(f"{option} {given} is not in the text, which has {count} tokens.")
    return given % count


def _check_joined(words: Sequence[str], source: int, target: int, joined: bool) -> None:
    if not joined:
        raise InputError(
            f"No attention leads from {_place(words, source)} to {_place(words, target)}: choose "
            "another --source."
        )


def _place(words: Sequence[str], position: int) -> str:
    return f"{visible(words[position])} at {position}"


def _write(found: _Paths, out: Path) -> None:
    if out.suffix.lower() == ".html":
        figure = found.figure or show(found.graph, found.heading)
        write_atomically(out, figure.to_html(include_plotlyjs=True))
    else:
        export_graph(found.graph, out)


def _say(found: _Paths, asked: PathsAsked) -> None:
    order = sorted(range(len(found.words)), key=lambda i: -found.scores[i])
    shown = [i for i in order if found.scores[i] > 0][: asked.top]
    rows = [(str(i), visible(found.words[i]), *found.cells[i]) for i in shown]
    typer.echo(f"\n{found.heading}: {count_text(len(found.words), 'token')}.\n")
    sizes = [found.scores[i] for i in shown]
    table = score_table(("position", "token", *found.columns), rows, sizes)
    print_scores(found.words, found.scores, table)
    more = sum(score > 0 for score in found.scores) - len(shown)
    if more > 0:
        typer.echo(f"and {more:,} tokens with less; --top {len(shown) + more} prints all.")
    for line in found.lines:
        typer.echo(line)
    if asked.out is not None:
        nodes, edges = found.graph.number_of_nodes(), found.graph.number_of_edges()
        size = f"{count_text(nodes, 'node')}, {count_text(edges, 'edge')}"
        typer.echo(f"Written to {asked.out}: {size}.")
