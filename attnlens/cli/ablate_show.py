"""The results of a stored sweep: a page with tables and figures, and the findings in short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from attnlens.analyses.stored import Swept, stored_ablation
from attnlens.cli.output import staged
from attnlens.cli.progress import Steps, progress
from attnlens.errors import FileError
from attnlens.sweeps.manifest import Manifest
from attnlens.sweeps.store import Store
from attnlens.views.ablation_parts import part_of
from attnlens.views.panels import count_text
from attnlens.views.report_parts import write_page

RESULTS = "results"
"""Folder beside the values in which results are written."""


def show_sweep(folder: Path, out: Path | None) -> None:
    """Draw the sweep in a folder, without its model, and print what was found.

    Raises FileError where there is no sweep, or nothing of it is done.
    """
    with progress() as steps:
        with steps(f"Reading {folder}"):
            store = Store.open(folder)
            done = store.done()
            result = stored_ablation(folder)
        if not (done[:-1] & done[-1]).any():
            raise FileError(
                f"{folder} holds a sweep of {done.size:,} values and none to show yet: the same "
                "command with --resume goes on with it."
            )
        place = folder / RESULTS if out is None else out
        lines = write_results(result, store.manifest, place, steps)
    say_results(lines, folder, place)


def write_results(
    result: Swept, manifest: Manifest, out: Path, steps: Steps, name: str | None = None
) -> list[str]:
    """A result as a page with its tables and figures; gives the findings in short.

    `name` is what the page calls the model.
    """
    with staged(out) as folder, steps("Writing the results"):
        part = part_of(result, vocabulary(manifest))
        title = f"{part.title}: {name or manifest.model['name']}"
        write_page(folder, title, _origin(manifest), part.lines, [part])
    return [*part.lines, *part.notes]


def vocabulary(manifest: Manifest) -> int | None:
    """The size of the model's vocabulary, of its text model where it has several."""
    config = manifest.model["config"]
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return None if size is None else int(size)


def say_results(lines: Sequence[str], folder: Path, results: Path) -> None:
    """Print what was found and where it lies."""
    typer.echo()
    for line in lines:
        typer.echo(line)
    typer.echo(f"Every value is in {folder / 'rows'}, as Parquet.")
    typer.echo(f"Written to {results}: open {results / 'index.html'}")


def _origin(manifest: Manifest) -> str:
    """What the numbers are of."""
    versions = ", ".join(
        f"{package} {manifest.versions[package]}"
        for package in ("attnlens", "torch", "transformers")
        if package in manifest.versions
    )
    weights = f"{manifest.model['name']}, weights {manifest.model['weights']}"
    prompts = count_text(manifest.prompts, "prompt")
    return f"{weights}; {prompts}, seed {manifest.seed}; {versions}"
