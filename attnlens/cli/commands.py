"""What the commands do once their modules are loaded: open, run, print."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from attnlens.analyses.saved import read_state
from attnlens.analyses.streaming import SAVE_SECONDS
from attnlens.cli.ablate_job import kept_text, run_sweep
from attnlens.cli.ablate_show import RESULTS, say_results, write_results
from attnlens.cli.asked import (
    ModelAsked,
    NeedleAsked,
    StoppedError,
    SweepAsked,
    TextsAsked,
    TreesAsked,
)
from attnlens.cli.doctor import verdict
from attnlens.cli.main_job import Plan, build_task, run_report
from attnlens.cli.method_jobs import run_retrieval, run_sinks, run_syntax
from attnlens.cli.opening import open_checked, open_lens
from attnlens.cli.passages import PLAIN
from attnlens.cli.progress import progress
from attnlens.cli.texts import open_source, settle
from attnlens.errors import FileError
from attnlens.sweeps.store import Store


def report(
    model: ModelAsked,
    asked: TextsAsked,
    out: Path,
    *,
    built_in: Sequence[str] = PLAIN,
    task: str = "repeat",
    prompts: int = 16,
    mode: str = "zero",
    heads: str = "all",
    budget: str = "2GB",
) -> None:
    """Run the main job on a model and print what was found and where it lies."""
    source = open_source(asked)
    with _going_on(asked), progress() as steps:
        lens = open_lens(model, steps)
        lens.check().raise_problems()
        texts = settle(lens, source, asked, built_in, steps)
        built = build_task(lens, task, prompts)
        plan = Plan(model.title, mode, heads, budget, asked)
        findings = run_report(lens, texts, built, out, plan, steps)
    _say(findings.lines(), out)


def find_ablation(model: ModelAsked, asked: SweepAsked, out: Path, words: Sequence[str]) -> None:
    """Ablate heads on a task, keeping every value; write and print what was found.

    `words` are those of the command, to say how to go on after a stop.
    """
    try:
        with progress() as steps:
            result = run_sweep(lambda: open_checked(model, steps), asked, out, steps, words)
            manifest, place = Store.open(out).manifest, out / RESULTS
            lines = write_results(result, manifest, place, steps, model.title)
    except KeyboardInterrupt:
        kept = kept_text(out, words)
        if kept is None:
            raise
        raise StoppedError(kept) from None
    say_results(lines, out, place)


def find_sinks(model: ModelAsked, asked: TextsAsked, out: Path, epsilon: float, rule: str) -> None:
    """Find sinks over a corpus, write and print them."""
    source = open_source(asked)
    with _going_on(asked), progress() as steps:
        lens = open_checked(model, steps)
        texts = settle(lens, source, asked, (), steps)
        lines = run_sinks(lens, model.title, texts, asked, epsilon, rule, out, steps)
    _say(lines, out)


def find_retrieval(model: ModelAsked, asked: NeedleAsked, out: Path) -> None:
    """Find retrieval heads, write and print them."""
    with progress() as steps:
        lines = run_retrieval(lambda: open_checked(model, steps), model.title, asked, out, steps)
    _say(lines, out)


def find_syntax(model: ModelAsked, asked: TreesAsked, out: Path) -> None:
    """Find heads that follow syntax, write and print them."""
    with progress() as steps:
        lines = run_syntax(lambda: open_checked(model, steps), model.title, asked, out, steps)
    _say(lines, out)


def diagnose(model: ModelAsked, asked: TextsAsked) -> bool:
    """Print a model's anatomy, self-check and clearest heads; whether the check passed."""
    source = open_source(asked)
    with progress() as steps:
        lens = open_lens(model, steps)
        texts = settle(lens, source, asked, PLAIN, steps)
        lines, sound = verdict(lens, texts.sample, model.title, steps)
    for line in lines:
        typer.echo(line)
    return sound


def _say(lines: Sequence[str], out: Path) -> None:
    typer.echo()
    for line in lines:
        typer.echo(line)
    typer.echo(f"Written to {out}: open {out / 'index.html'}")


@contextmanager
def _going_on(asked: TextsAsked) -> Generator[None]:
    """Say after an interrupt what is saved, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        paths = [path for method in ("profile", "sinks") if (path := asked.state_of(method))]
        saved = {path: count for path in paths if (count := _counted(path))}
        for path, count in saved.items():
            typer.echo(f"{path} holds what {count:,} texts gave.", err=True)
        if saved:
            typer.echo("The same command goes on from there.", err=True)
        elif asked.state is not None:
            typer.echo(f"Nothing was saved yet: that is done every {SAVE_SECONDS:g} s.", err=True)
        elif asked.streamed:
            typer.echo("Nothing is saved to go on from: give --state FILE for that.", err=True)
        raise


def _counted(state: Path) -> int:
    """How many texts a state holds."""
    try:
        return int(read_state(state)[1]["texts"]["count"])
    except (FileError, KeyError):
        return 0
