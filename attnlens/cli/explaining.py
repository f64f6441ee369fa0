"""The arguments and options of the commands that explain one text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from attnlens.cli.options import MODEL


class FlowMethod(StrEnum):
    """How attention is followed through the layers."""

    ATTENTION_FLOW = "attention_flow"
    ROLLOUT = "rollout"


Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="TEXT",
        help='The text, in quotes; "-" reads it from the input.',
        show_default=False,
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option("--file", help="A UTF-8 file that holds the text, in its place.")
]
TargetToken = Annotated[
    str | None,
    typer.Option(
        help="The token whose logit is explained, spaces included: ' Ben', or an id: id:262. The "
        "likeliest next token where not given.",
        metavar="TOKEN",
    ),
]
AgainstToken = Annotated[
    str | None,
    typer.Option(
        help="A second token, whose logit is taken off: why the target and not this one?",
        metavar="TOKEN",
    ),
]
At = Annotated[
    int,
    typer.Option(help="The position whose next token is explained; -1 is the last.", metavar="N"),
]
Method = Annotated[
    str,
    typer.Option(
        help="attnlrp, input_gradient, chefer, routes, leave_one_out and more: an unknown name "
        "lists them all.",
        metavar="NAME",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of the method, as its Python function takes it: --set strict=false. May be "
        "given several times.",
        metavar="NAME=VALUE",
    ),
]
Top = Annotated[int, typer.Option(min=1, help="Tokens that are printed.", metavar="N")]
ScoresOut = Annotated[
    Path | None,
    typer.Option(
        help="A folder for a page with figures and tables, or a file: .csv for the scores, .html "
        "for the figure, .gexf, .graphml, .json, .cyjs or .dot for the graph of a method that has "
        "one.",
        metavar="DIR|FILE",
    ),
]
TargetPosition = Annotated[
    int, typer.Option(help="The position that is traced back; -1 is the last.", metavar="N")
]
SourcePosition = Annotated[
    int | None,
    typer.Option(
        help="The position whose paths to the target the graph holds. Not given: the source of the "
        "largest flow, or every source of a rollout.",
        metavar="N",
    ),
]
FlowBy = Annotated[
    FlowMethod,
    typer.Option(
        "--method",
        help="attention_flow: the most that can pass from each source to the target; rollout: the "
        "share that passes.",
    ),
]
GraphOut = Annotated[
    Path | None,
    typer.Option(
        help="A file for the graph: .graphml, .gexf (Gephi), .json (networkx, D3), .cyjs "
        "(Cytoscape), .dot (Graphviz), .csv; .html draws it.",
        metavar="FILE",
    ),
]
FlowThreshold = Annotated[
    float,
    typer.Option(min=0, max=1, help="Weaker edges are left out of the graph.", metavar="X"),
]
RouteThreshold = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Parts that are a smaller share of their sum are dropped.", metavar="X"
    ),
]
Stack = Annotated[
    str | None,
    typer.Option(
        help="The stack of a model that has several: enc, dec.",
        metavar="NAME",
        rich_help_panel=MODEL,
    ),
]
