"""What the commands do once their modules are loaded: open, run, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from attnlens.cli.doctor import verdict
from attnlens.cli.main_job import Plan, build_task, run_report
from attnlens.cli.passages import PLAIN
from attnlens.cli.progress import Steps, progress
from attnlens.cli.texts import check_lengths, cut_texts, read_texts
from attnlens.errors import InputError
from attnlens.lens import Lens, load


def report(
    model: str,
    out: Path,
    *,
    file: Path | None = None,
    name: str | None = None,
    texts: Sequence[str] = PLAIN,
    task: str = "repeat",
    prompts: int = 16,
    mode: str = "zero",
    heads: str = "all",
    budget: str = "2GB",
    cut: bool = False,
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Run the main job on a model and print what was found and where it lies."""
    given = read_texts(file) if file is not None else None
    with progress() as steps:
        lens = _open(model, tokenizer, device, dtype, steps)
        lens.check().raise_problems()
        chosen = _texts(lens, given, texts, cut)
        built = build_task(lens, task, prompts)
        plan = Plan(name or _name(model), mode, heads, budget)
        findings = run_report(lens, chosen, built, out, plan, steps)
    typer.echo()
    for line in findings.lines():
        typer.echo(line)
    typer.echo(f"Written to {out}: open {out / 'index.html'}")


def diagnose(
    model: str,
    *,
    file: Path | None = None,
    cut: bool = False,
    tokenizer: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> bool:
    """Print a model's anatomy, self-check and clearest heads; whether the check passed."""
    given = read_texts(file) if file is not None else None
    with progress() as steps:
        lens = _open(model, tokenizer, device, dtype, steps)
        chosen = _texts(lens, given, PLAIN, cut)
        lines, sound = verdict(lens, chosen, _name(model), steps)
    for line in lines:
        typer.echo(line)
    return sound


def _open(
    model: str, tokenizer: str | None, device: str | None, dtype: str | None, steps: Steps
) -> Lens:
    if device is not None:
        _check_device(device)
    with steps(f"Opening {_name(model)}"):
        return load(model, tokenizer, device, dtype, check=False)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"The device {device!r} is not there. Leave --device out, or write cpu or cuda."
        ) from None
    if kind == "meta":
        raise InputError("The device 'meta' holds no numbers. Write cpu or cuda.")


def _texts(
    lens: Lens, given: tuple[str, ...] | None, built_in: Sequence[str], cut: bool
) -> tuple[str, ...]:
    """The texts to read; none where the model has no tokenizer and no text was given."""
    if given is None:
        return cut_texts(lens, tuple(built_in)) if lens.tokenizer is not None else ()
    if cut:
        return cut_texts(lens, given)
    check_lengths(lens, given)
    return given


def _name(model: str) -> str:
    """A folder's own name, or the hub's."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
