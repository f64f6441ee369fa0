"""The command `faithfulness`: methods judged on a task, a table for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnlens.analyses.attribute import METHODS, method_of
from attnlens.analyses.faithfulness import MEASURES, Faithfulness, faithfulness
from attnlens.analyses.judging import RANDOM
from attnlens.analyses.replacement import Kind, Replacement
from attnlens.cli.asked import JudgedAsked, ModelAsked
from attnlens.cli.grading import no_grading
from attnlens.cli.main_job import build_task
from attnlens.cli.opening import open_checked
from attnlens.cli.output import staged
from attnlens.cli.progress import progress
from attnlens.errors import InputError
from attnlens.views.faithfulness import faithfulness_lines, faithfulness_part, judged, ordered
from attnlens.views.narrative import model_line
from attnlens.views.panels import count_text, number_text
from attnlens.views.report_parts import write_page

HEADINGS = {
    "loo_spearman": "like LOO",
    "gradient_spearman": "like grad.",
    "deletion": "deletion",
    "insertion": "insertion",
    "abpc": "between",
    "comprehensiveness": "compreh.",
    "sufficiency": "suffic.",
    "pointing": "points",
}
WIDTH = 120
"""Columns of the table where there is no terminal to fit it to."""


def judge(model: ModelAsked, asked: JudgedAsked, out: Path) -> None:
    """Judge methods on a task; print the table and write a page with its tables and figure.

    What can be refused without the model is refused first. Raises what `faithfulness` raises.
    """
    methods = _methods(asked.methods)
    replacement = _replacement(asked)
    with staged(out) as folder, progress() as steps:
        lens = open_checked(model, steps)
        with steps(f"Building prompts of the task {asked.task}"):
            task = build_task(lens, asked.task, asked.prompts, asked.seed)
        if task is None:
            raise InputError(f"This model cannot be graded: {no_grading(lens)}.")
        what = count_text(len({*methods} - {RANDOM}), "method")
        with steps(f"Judging {what} on {count_text(len(task), 'prompt')}") as advance:
            found = faithfulness(
                lens, task, methods, replacement, batch_size=asked.batch_size, seed=asked.seed,
                progress=advance,
            )  # fmt: skip
        with steps("Writing the report"):
            part = faithfulness_part(found)
            title = f"Attributions of {model.title}"
            write_page(folder, title, model_line(lens.anatomy), part.lines, [part])
    _say(found, out)


def _methods(given: str | None) -> tuple[str, ...]:
    """The methods asked for; raises for a name that there is not."""
    if given is None:
        return METHODS
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise InputError("--methods is empty: name one at least, or leave it out to judge all.")
    for name in names:
        method_of(name)
    return names


def _replacement(asked: JudgedAsked) -> Replacement:
    token: str | int | None = asked.token
    if asked.token is not None:
        if asked.replacement != "neutral":
            raise InputError("--token is the token of --replacement neutral: give that too.")
        number = asked.token.removeprefix("id:")
        if asked.token.startswith("id:"):
            if not number.isdecimal():
                raise InputError(f"--token {asked.token!r} is no id; write a number: id:7.")
            token = int(number)
    return Replacement(cast("Kind", asked.replacement), token, asked.special)


def _say(found: Faithfulness, out: Path) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    typer.echo()
    console.print(measures_table(found))
    typer.echo(
        "* clearly better than random scores, ! clearly worse: the interval of the difference "
        "leaves 0 out."
    )
    typer.echo("\u2191 more is better, \u2193 less is better; areas and drops in logits.\n")
    for line in (*faithfulness_lines(found), *found.notes):
        typer.echo(line)
    typer.echo(f"Written to {out}: open {out / 'index.html'}")


def measures_table(found: Faithfulness) -> Table:
    """A row a method, best area between the curves first, random scores last."""
    known = [name for name in MEASURES if not bool(found[name].mean.isnan().all())]
    verdicts = {name: judged(found, name) for name in known}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in known:
        arrow = "\u2191" if MEASURES[name] else "\u2193"
        table.add_column(f"{HEADINGS[name]} {arrow}", justify="right", no_wrap=True)
    frame = found.to_frame().set_index("method")
    for method in (*ordered(found), RANDOM):
        record: dict[Any, Any] = frame.loc[method].to_dict()
        cells = [_cell(record[name], verdicts[name][method]) for name in known]
        table.add_row(*_row(method, cells))
    return table


def _row(method: str, cells: Sequence[Text]) -> tuple[Text, ...]:
    return Text(method, "dim" if method == RANDOM else "bold"), *cells


def _cell(value: float, verdict: int) -> Text:
    mark, style = {1: ("*", "green"), -1: ("!", "dark_orange3"), 0: (" ", "")}[verdict]
    return Text(f"{number_text(value)}{mark}", style)
