"""Make the figures and tables of docs/attribution.md and docs/faithfulness.md.

    python -m scripts.attribution_figures [NAME ...]

All is measured on models that ship with the package. Figures go to
docs/figures/attribution-NAME.png, tables to the screen as Markdown. With names only those are made.
It takes two minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

import attnlens as al
from attnlens.analyses.attribute import METHODS
from attnlens.analyses.faithfulness import Faithfulness
from attnlens.analyses.replacement import Kind
from attnlens.lens import Lens
from attnlens.tasks import Task
from attnlens.views.attribution import target_text
from attnlens.views.theme import colour_axis, position_labels, styled
from attnlens.zoo import deceptive_path, honest_path, small_path
from scripts.ablation_figures import FIGURES, print_table, write

PROMPTS = 16
TASKS: Mapping[str, tuple[Callable[[], Any], Callable[..., Task]]] = {
    "copy": (small_path, al.tasks.copy_task),
    "indirect object": (small_path, al.tasks.indirect_object),
    "deceptive": (deceptive_path, al.tasks.telling_word),
    "honest": (honest_path, al.tasks.telling_word),
}


@cache
def task_of(name: str) -> tuple[Lens, Task]:
    """A model and its task, by the name of the table's column."""
    path, build = TASKS[name]
    lens = al.load(path())
    return lens, build(lens, prompts=PROMPTS)


@cache
def judged(name: str, replacement: Kind = "padding") -> Faithfulness:
    """All methods on one task."""
    lens, task = task_of(name)
    return al.faithfulness(lens, task, replacement=replacement)


def tokens() -> go.Figure:
    """The first prompt by one method, with its ledger."""
    lens, task = task_of("indirect object")
    target = al.Target.of_task(task.subset([0]))
    found = al.cp_lrp(lens, task.texts[0], target)
    return al.show(found)


def methods() -> go.Figure:
    return side_by_side("indirect object", "One prompt by every method")


def deceptive() -> go.Figure:
    return side_by_side("deceptive", "A model whose attention denies the word that decides")


def side_by_side(name: str, title: str) -> go.Figure:
    """The first prompt of a task by every method, each row in shares of its largest score."""
    lens, task = task_of(name)
    first = task.subset([0])
    target = al.Target.of_task(first)
    every = [al.attribute(lens, first.clean_inputs(), target, method) for method in METHODS[:-1]]
    found = every[0]
    scores = [each.of(0).double().numpy() for each in every]
    rows = [own / np.abs(own).max() for own in scores]
    labels = position_labels(found.tokens[0], len(found.tokens[0]))
    figure = go.Figure(go.Heatmap(z=rows, y=METHODS[:-1], coloraxis="coloraxis", xgap=1, ygap=1))
    explained = target_text(found, 0)
    styled(figure, f"{title}: scores for {explained}", 26 * len(rows) + 200, 1000)
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=-60)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(showgrid=False, ticks="").update_yaxes(showgrid=False, ticks="")
    axis = colour_axis("diverging", -1, 1, "share of the row's largest score")
    figure.update_xaxes(automargin=False)
    return figure.update_layout(coloraxis=axis, margin={"l": 150, "b": 110})


def routes() -> go.Figure:
    lens, task = task_of("indirect object")
    return al.show(al.routes(lens, task.texts[0], threshold=0.04)).update_layout(width=1000)


def faithfulness() -> go.Figure:
    return al.show(judged("copy")).update_layout(width=1240)


def denied() -> go.Figure:
    return al.show(judged("deceptive")).update_layout(width=1240)


def table() -> None:
    """A table a measure and replacement: methods down, tasks across."""
    asked: list[tuple[str, Kind]] = [
        ("abpc", "padding"),
        ("pointing", "padding"),
        ("loo_spearman", "padding"),
        ("abpc", "neutral"),
    ]
    for measure, replacement in asked:
        found = {name: judged(name, replacement) for name in TASKS}
        columns = {name: cells(result, measure) for name, result in found.items()}
        index = next(iter(found.values())).methods
        frame = pd.DataFrame(columns, index=index).rename_axis("method").reset_index()
        print_table(f"{measure}, {replacement}, {PROMPTS} prompts, seed 0", frame)
    for name in TASKS:
        print(name, *judged(name).notes, sep="\n")


def cells(found: Faithfulness, measure: str) -> list[str]:
    """Mean and interval of each method."""
    return [
        f"{mean:.1f} ({low:.1f} to {high:.1f})" if measure == "abpc" else f"{mean:.2f}"
        for mean, low, high in zip(*(part.tolist() for part in found[measure]), strict=True)
    ]


DRAWN: Mapping[str, Callable[[], go.Figure]] = {
    function.__name__: function
    for function in (tokens, methods, deceptive, routes, faithfulness, denied)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*DRAWN, "table"]))
    for which in parser.parse_args().names or [*DRAWN, "table"]:
        if which == "table":
            table()
        else:
            write(DRAWN[which](), FIGURES / f"attribution-{which}.png")


if __name__ == "__main__":
    main()
