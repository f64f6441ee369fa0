"""The command `attribute`: one text, one method, a table of tokens, and files where asked for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from attnlens.analyses.attribute import method_of
from attnlens.analyses.attribution import Attribution
from attnlens.analyses.fusing import RolloutSettings
from attnlens.analyses.target import Target
from attnlens.cli.asked import ModelAsked, ScoresAsked
from attnlens.cli.opening import open_checked
from attnlens.cli.output import staged
from attnlens.cli.progress import progress
from attnlens.cli.prompt import check_place
from attnlens.cli.terminal import print_scores, score_table
from attnlens.errors import AttnlensError, InputError
from attnlens.files import write_atomically
from attnlens.graphs.export import SUFFIXES, export_graph
from attnlens.lens import Lens
from attnlens.views.attribution import show_attribution
from attnlens.views.attribution_part import attribution_lines, attribution_part, ranked
from attnlens.views.narrative import model_line
from attnlens.views.panels import number_text
from attnlens.views.report_parts import write_page
from attnlens.views.theme import visible

GRAPHS = tuple(suffix for suffix in SUFFIXES if suffix != ".csv")
FILES = (".csv", ".html", *GRAPHS)
OTHERS = (".parquet", ".png", ".pdf", ".svg", ".jpg", ".txt", ".md", ".tsv", ".xlsx", ".npz", ".pt")
"""Suffixes that nobody gives to a folder."""
ID = "id:"


def explain(model: ModelAsked, asked: ScoresAsked) -> None:
    """Score the tokens of a text; print the largest, and write what was asked for.

    What can be refused without the model is refused first. Raises what the method raises.
    """
    function = method_of(asked.method)
    settings = _settings(function, asked)
    target = Target(_token(asked.target), _token(asked.against), asked.at)
    is_file = asked.out is not None and check_place(asked.out, FILES, OTHERS)
    if asked.out is not None and is_file and asked.out.suffix.lower() in GRAPHS:
        settings = _with_maps(function, settings)
    with progress() as steps:
        lens = open_checked(model, steps)
        check_reads_text(lens)
        with steps(f"Scoring tokens by {asked.method}"):
            found = _scored(function, lens, asked, target, settings)
        if asked.out is not None:
            with steps("Writing the results"):
                _write(found, lens, model.title, asked.out, is_file)
    _say(found, asked)


def check_reads_text(lens: Lens) -> None:
    """Raise InputError where a model has nothing to read text with."""
    if lens.tokenizer is None:
        raise InputError(
            "The model has no tokenizer, so it cannot read the text. Give one with --tokenizer "
            "FOLDER."
        )


def _scored(
    function: Callable[..., Attribution],
    lens: Lens,
    asked: ScoresAsked,
    target: Target,
    settings: dict[str, Any],
) -> Attribution:
    try:
        return function(lens, asked.text, target, **settings)
    except (TypeError, ValueError, AttributeError) as error:
        if not settings or isinstance(error, AttnlensError):
            raise
        raise InputError(f"{asked.method} cannot be run with --set as given: {error}.") from error


def _settings(function: Callable[..., Attribution], asked: ScoresAsked) -> dict[str, Any]:
    """What `--set` gives the method: JSON where it is some, else text.

    The settings of a rollout are given by their own names.
    """
    known = list(inspect.signature(function).parameters)[3:]
    grouped = [field.name for field in fields(RolloutSettings)] if "settings" in known else []
    known = [*(name for name in known if name != "settings"), *grouped]
    found: dict[str, Any] = {}
    for pair in asked.settings:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set takes NAME=VALUE, not {pair!r}.")
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"{asked.method} has no setting {name!r}; {has}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    own = {name: found.pop(name) for name in grouped if name in found}
    try:
        return found | ({"settings": RolloutSettings(**own)} if own else {})
    except TypeError as error:
        raise InputError(f"{asked.method} cannot take --set as given: {error}.") from error


def _with_maps(function: Callable[..., Attribution], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with scores of edges, of which a graph is made, where the method has them."""
    has_maps = "maps" in inspect.signature(function).parameters
    return {"maps": "all"} | settings if has_maps else settings


def _token(given: str | None) -> str | int | None:
    """A token as text, or the number after `id:`."""
    if given is None or not given.startswith(ID):
        return given
    number = given.removeprefix(ID)
    if not number.isdecimal():
        raise InputError(f"{given!r} is no token id; write a whole number: id:262.")
    return int(number)


def _write(found: Attribution, lens: Lens, name: str, out: Path, is_file: bool) -> None:
    if not is_file:
        with staged(out) as folder:
            part = attribution_part(found)
            title = f"{found.method} on {name}"
            write_page(folder, title, model_line(lens.anatomy), part.lines, [part])
    elif out.suffix.lower() in GRAPHS:
        export_graph(found.graph(), out)
    elif out.suffix.lower() == ".csv":
        write_atomically(out, found.to_frame().to_csv(index=False, lineterminator="\n"))
    else:
        write_atomically(out, show_attribution(found).to_html(include_plotlyjs=True))


def _say(found: Attribution, asked: ScoresAsked) -> None:
    frame = ranked(found).head(asked.top)
    records = frame.to_dict("records")
    rows = [(str(r["position"]), visible(r["token"]), number_text(r["score"])) for r in records]
    explained, *lines = attribution_lines(found, tokens=False)
    typer.echo(f"\n{explained}\n")
    table = score_table(("position", "token", "score"), rows, frame["score"].tolist())
    print_scores(found.tokens[0], found.of(0).tolist(), table)
    more = len(found.tokens[0]) - len(frame)
    if more > 0:
        typer.echo(
            f"and {more:,} tokens with smaller scores; --top {len(frame) + more} prints all."
        )
    for line in (*lines, *found.notes):
        typer.echo(line)
    if asked.out is not None:
        page = asked.out / "index.html"
        opened = f": open {page}" if page.exists() else ""
        typer.echo(f"Written to {asked.out}{opened}")
