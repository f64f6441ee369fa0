"""The page that a person reads: what this model's heads do, and which matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from attnlens.anatomy import Head
from attnlens.views.findings import Findings
from attnlens.views.markup import element
from attnlens.views.narrative import THRESHOLD, TYPES, check_line, model_line, strongest
from attnlens.views.page import Cell, Page
from attnlens.views.panels import interval_text, number_text
from attnlens.views.ranking import METRICS, ablation_lines, title_of, together_line
from attnlens.views.report_parts import add_part, file_items
from attnlens.views.tables import ANATOMY_COLUMNS, CHECK_COLUMNS, anatomy_rows, check_rows

STRONGEST = 5
"""Rows of a type in the table of the strongest heads."""
HEADINGS = {
    "first_token": "first token",
    "previous_token": "previous token",
    "sink_rate": "sink rate",
    "effect": "effect of ablation",
}
COLUMNS = (
    "previous_token", "duplicate", "induction", "copying", "retrieval", "first_token",
    "sink_rate", "entropy", "distance", "effect",
)  # fmt: skip


def report_page(findings: Findings, figures: Mapping[str, go.Figure]) -> str:
    """The report as HTML, offline and in one file."""
    page = Page(findings.model, model_line(findings.anatomy))
    page.section("In short")
    page.points(findings.lines()[1:])
    _heads(page, findings, figures)
    if findings.sink_part is not None:
        add_part(page, findings.sink_part)
    _prompt(page, findings, figures)
    _ablation(page, findings, figures)
    for part in findings.further_parts:
        add_part(page, part)
    _all_heads(page, findings)
    _model(page, findings)
    _files(page, findings, figures)
    return page.html()


def best_induction(findings: Findings) -> Head | None:
    """The head with the highest induction score over the threshold."""
    found = findings.types.of_type("induction", THRESHOLD) if findings.types is not None else ()
    return found[0] if found else None


def first_head(findings: Findings) -> Head:
    """The head that is shown on the prompt: the best induction, else previous-token head."""
    stack = findings.anatomy.stacks[0]
    own = [head for head in findings.anatomy.heads if head.stack == stack]
    for name in ("induction", "previous_token"):
        found = findings.types.of_type(name, THRESHOLD) if findings.types is not None else ()
        own_found = [head for head in found if head.stack == stack]
        if own_found:
            return own_found[0]
    return own[0]


def _heads(page: Page, findings: Findings, figures: Mapping[str, go.Figure]) -> None:
    if findings.types is None:
        return
    page.section("What its heads do")
    types = findings.types
    source = "the texts" if findings.texts else "random tokens"
    read = findings.profile.prompts if findings.profile is not None else 0
    if findings.texts and read > len(findings.texts):
        source = f"the first {len(findings.texts)} texts"
    page.prose(
        f"Scores are mean weights. Previous-token scores are taken over {source}; duplicate-token "
        f"and induction scores over {types.prompts} sequences of {types.period} random tokens said "
        "four times, where only the repetition can be attended to. An induction head attends to "
        "the token that followed the last time. Copying compares what a head's weights read and "
        "write: near 1, the head raises the tokens that it attends to. Intervals are 95 % "
        "bootstrap intervals over prompts."
    )
    frame = types.to_frame()
    page.figure(
        figures["head-types"],
        "Each cell is a head: layers from top to bottom, heads from left to right.",
    )
    page.table(("type", "head", "score", "95 % interval"), _strongest(frame))
    if "repeated" in figures:
        page.figure(
            figures["repeated"],
            f"{best_induction(findings)} on random tokens said twice: in the second half it looks "
            "at the token that followed the first copy of its own.",
        )
    for note in types.notes:
        page.note(note)
    if findings.profile is not None:
        page.subsection("Where they look")
        texts = findings.profile.prompts
        page.figure(
            figures["profile"],
            f"Means over {texts:,} text{'s' * (texts != 1)}. Entropy says how widely a head "
            "spreads its attention, distance how far it looks; the others are the weight on one "
            "kind of token.",
        )
        for note in findings.profile.notes:
            page.note(note)


def _strongest(frame: pd.DataFrame) -> list[list[str | Cell]]:
    rows: list[list[str | Cell]] = []
    for name, title in TYPES.items():
        for record in strongest(frame, name)[:STRONGEST]:
            score = record[name]
            shown = Cell(number_text(score), score, score)
            rows.append([title, record["head"], shown, interval_text(record, name)])
    return rows


def _prompt(page: Page, findings: Findings, figures: Mapping[str, go.Figure]) -> None:
    if findings.trace is None:
        return
    page.section("One prompt")
    head = first_head(findings)
    page.prose(
        f"The beginning of the first text, seen by {head}. Rows are queries, the tokens that look; "
        "columns are keys, the tokens looked at."
    )
    page.figure(figures["pattern"], f"Attention weights of {head}.")
    page.figure(figures["patterns-of-its-layer"], f"All heads of {head.site} on the same prompt.")
    if findings.rollout is not None:
        rollout = findings.rollout
        page.subsection("Rollout")
        page.prose(
            "Attention rollout (Abnar and Zuidema 2020) follows attention through all layers, "
            f"heads averaged, with a share of {rollout.settings.residual} for the residual stream: "
            "how much of each position's last state could have come from each token."
        )
        page.figure(figures["rollout"], f"Rollout through {len(rollout.layers)} layers.")
        for note in rollout.notes:
            page.note(note)


def _ablation(page: Page, findings: Findings, figures: Mapping[str, go.Figure]) -> None:
    ablation = findings.ablation
    if ablation is None:
        return
    page.section("What matters")
    metric, _, worse = METRICS[ablation.metric]
    direction = "rises" if worse > 0 else "falls"
    page.prose(
        f"{title_of(ablation)}, {len(ablation.clean)} prompts: each head is taken out by itself "
        f"and the task is graded again. Where {metric} {direction}, the head was needed. Grey "
        "diamonds are the mean of other heads of the same layer: what taking out just any head "
        f"costs. Of {len(ablation.heads)} heads that do nothing, about "
        f"{_by_chance(len(ablation.heads))} would have an interval on that side of 0 by chance."
    )
    page.points(ablation_lines(ablation, findings.anatomy.vocab, most=6))
    if findings.together is not None:
        page.prose(
            together_line(findings.together),
            " Heads that do the same stand in for each other: taking out one may show little.",
        )
    page.figure(figures["ranking"], "The largest effects, with 95 % intervals over prompts.")
    page.figure(figures["ablation"], f"Change of {metric} when a head is ablated.")
    for note in ablation.notes:
        page.note(note)


def _by_chance(heads: int) -> str:
    """How many of so many 95 % intervals miss 0 on one side by chance."""
    return number_text(0.025 * heads)


def _all_heads(page: Page, findings: Findings) -> None:
    table = findings.heads
    columns = [name for name in COLUMNS if name in table]
    if not columns:
        return
    page.section("Every head")
    page.prose("Click a column to sort by it. heads.csv and heads.parquet hold every number.")
    records: list[dict[str, Any]] = table.to_dict("records")
    largest = {
        name: max((abs(r[name]) for r in records if r[name] == r[name]), default=0.0)
        for name in columns
    }
    rows = [_head_row(record, columns, largest) for record in records]
    headings = ["head", *(HEADINGS.get(name, name) for name in columns)]
    page.table([*headings, "interval"] if "effect" in columns else headings, rows)


def _head_row(
    record: dict[str, Any], columns: list[str], largest: Mapping[str, float]
) -> list[str | Cell]:
    row: list[str | Cell] = [record["head"]]
    for name in columns:
        value = float(record[name])
        share = None
        if value == value and largest[name] > 0:
            share = abs(value) / (largest[name] if largest[name] > 1 else 1)
        row.append(_cell(value, share))
    if "effect" in columns:
        row.append(interval_text(record, "effect"))
    return row


def _cell(value: float, share: float | None = None) -> Cell:
    return Cell(number_text(value), value, share)


def _model(page: Page, findings: Findings) -> None:
    page.section("The model and the instrument")
    page.prose(model_line(findings.anatomy))
    page.table(ANATOMY_COLUMNS, anatomy_rows(findings.anatomy))
    page.prose(
        check_line(findings.check),
        " Row error is the largest difference of a recomputed weight from the model's own; drift "
        "the largest difference between the model's kernel and its eager form; and changing a "
        "pattern has to change the output.",
    )
    page.table(CHECK_COLUMNS, check_rows(findings.check))
    if findings.left_out:
        page.subsection("Left out")
        page.points(findings.left_out)


def _files(page: Page, findings: Findings, figures: Mapping[str, go.Figure]) -> None:
    page.section("Files beside this page")
    files = [
        ("heads.csv", "one row a head, every number with its interval"),
        ("heads.parquet", "the same, typed"),
    ]
    if findings.rollout is not None:
        files.append(
            ("rollout.graphml", "the rollout as a graph, for Gephi, Cytoscape or networkx")
        )
    items = [element("li", element("a", name, href=name), f": {what}") for name, what in files]
    page.add(element("ul", *items, *file_items(findings.parts, figures)))
