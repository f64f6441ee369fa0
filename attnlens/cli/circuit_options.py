"""The options of the commands about circuits."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class CircuitMethod(StrEnum):
    """How edges are judged; the names of `scoring.Method`, and removal."""

    EAP_IG = "eap-ig"
    EAP = "eap"
    EXACT = "exact"
    REMOVAL = "removal"


class Cut(StrEnum):
    """What is read along an edge that is cut; the names of `edge_runs.EdgeAblation`."""

    RESAMPLE = "resample"
    MEAN = "mean"
    ZERO = "zero"


class Granularity(StrEnum):
    """What is scored and chosen."""

    EDGES = "edges"
    NODES = "nodes"


class Visits(StrEnum):
    """How a removal visits edges; the names of `greedy_edges.Order`, in one word each."""

    FROM_LOGITS = "from-logits"
    FROM_EMBEDDINGS = "from-embeddings"
    RANDOM = "random"
    SCORES = "scores"


CHOICE = "Which edges make the circuit"
REMOVAL = "Removal"

Model = Annotated[str, typer.Argument(help="A model folder with safetensors, or a hub name.")]
Out = Annotated[
    Path, typer.Option(help="Folder for the page, tables, figures, graphs and circuit.json.")
]
Prompts = Annotated[
    int,
    typer.Option(
        min=2,
        help="Prompts that choose the circuit; as many others judge it. Of a file all are taken, "
        "for both.",
        metavar="N",
    ),
]
Method = Annotated[
    CircuitMethod,
    typer.Option(
        help="How edges are judged: from gradients at several inputs (eap-ig) or at one (eap, "
        "faster, and blind where a softmax is sure), by cutting each by itself (exact, slow), or "
        "by removing one after another what costs little (removal, slowest)."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Inputs of eap-ig.", metavar="N")]
Ablation = Annotated[
    Cut,
    typer.Option(
        help="What is read along an edge that is cut: what its sender writes on the prompt's "
        "corrupt twin (resample), or on the corrupt prompts on average (mean); nothing (zero)."
    ),
]
Seed = Annotated[int, typer.Option(help="Of prompts, random circuits and intervals.")]
PromptBatch = Annotated[int, typer.Option(min=1, help="Prompts that run together.", metavar="N")]
Graphs = Annotated[
    str,
    typer.Option(
        "--graph",
        help="Formats of the graph: graphml, gexf (Gephi), json (networkx, D3), cyjs (Cytoscape), "
        "dot or gv (Graphviz), csv; circuit.FORMAT each, circuit.graph.json for json.",
        metavar="FORMATS",
    ),
]
Evaluate = Annotated[
    Path | None,
    typer.Option(
        help="A circuit.json that is run on the task, in place of finding a circuit: does one "
        "task's circuit do another?",
        metavar="FILE",
    ),
]

Top = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="So many edges, those of the largest scores. Not given, nor --threshold: 200, or a "
        "tenth of the edges of a model with under 2,000. Of --granularity nodes, nodes: a third, "
        "30 at most. Of a removal, the edges it begins with: all.",
        metavar="N",
        rich_help_panel=CHOICE,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="All edges whose score is of this size or more. Of a removal, the share of the task "
        "that an edge must cost to stay: 0.01 where not given.",
        metavar="X",
        rich_help_panel=CHOICE,
    ),
]
Greedy = Annotated[
    bool,
    typer.Option(
        "--greedy",
        help="From the logits down: always the largest edge into what is there already.",
        rich_help_panel=CHOICE,
    ),
]
By = Annotated[
    Granularity,
    typer.Option(
        help="Score and choose edges; or nodes, with all edges between them.",
        rich_help_panel=CHOICE,
    ),
]
Order = Annotated[
    Visits | None,
    typer.Option(
        help="Which edges are tried first: those next to the logits (from-logits; where not "
        "given), next to the embeddings, random ones, or those of the smallest scores by eap-ig.",
        rich_help_panel=REMOVAL,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the removal in --out, whose decisions are kept there.",
        rich_help_panel=REMOVAL,
    ),
]

First = Annotated[Path, typer.Argument(help="A circuit.json.", metavar="A.json")]
Second = Annotated[Path, typer.Argument(help="Another, of the same model.", metavar="B.json")]
CompareOut = Annotated[
    Path | None, typer.Option(help="Folder for a page with figures and tables, if wanted.")
]
