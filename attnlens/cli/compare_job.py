"""The command `compare`: what two saved circuits share, without their model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from attnlens.analyses.circuit import Circuit
from attnlens.cli.output import staged
from attnlens.cli.progress import progress
from attnlens.views.circuit_lines import overlap_lines
from attnlens.views.circuit_report import overlap_part
from attnlens.views.circuit_results import circuit_title
from attnlens.views.report_parts import write_page


def compare_circuits(first: Path, second: Path, out: Path | None) -> None:
    """Print what two circuits share, and write a page where a folder is given."""
    own, other = Circuit.load(first), Circuit.load(second)
    found = own.compare(other)
    named = [
        f"{which}: {circuit_title(each.about)}"
        for which, each in (("First", own), ("Second", other))
    ]
    if out is not None:
        with staged(out) as folder, progress() as steps, steps("Writing the report"):
            both = replace(own, kept=own.kept & other.kept, evaluation=None, curve=None)
            part = overlap_part(found, both if len(both) else None)
            write_page(folder, "Two circuits", "; ".join(named), part.lines, [part])
    typer.echo()
    for name in named:
        typer.echo(f"{name}.")
    for line in overlap_lines(found):
        typer.echo(line)
    if out is not None:
        typer.echo(f"Written to {out}: open {out / 'index.html'}")
