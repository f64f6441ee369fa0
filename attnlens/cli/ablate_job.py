"""A sweep from the command line: what is checked first, what is run, and what a stop leaves."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attnlens.analyses.ablation import ablate
from attnlens.analyses.ablation_groups import ablate_layers
from attnlens.analyses.ablation_pairs import ablate_pairs
from attnlens.analyses.ablation_positions import ablate_positions
from attnlens.analyses.patching import patch
from attnlens.analyses.stored import Swept
from attnlens.cli.asked import PatchAsked, SweepAsked
from attnlens.cli.grading import no_grading
from attnlens.cli.main_job import build_task
from attnlens.cli.progress import Steps
from attnlens.errors import AttnlensError, FileError, InputError
from attnlens.lens import Lens
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task
from attnlens.views.panels import count_text


def run_sweep(
    opened: Callable[[], Lens], asked: SweepAsked, out: Path, steps: Steps, words: Sequence[str]
) -> Swept:
    """Ablate or patch what was asked for, keeping every value in `out`; what is there is not run.

    What can be refused without the model is refused first. Raises what the analyses raise, with a
    note of what is kept where the sweep had begun; `words` are those of the command.
    """
    settings = _settings(asked, out)
    check_place(out, asked.resume)
    lens = opened()
    work, doing = _patching(asked) if isinstance(asked, PatchAsked) else _ablating(lens, asked)
    with steps(f"Building prompts of the task {asked.task}"):
        task = build_task(lens, asked.task, asked.prompts, asked.seed)
    if task is None:
        raise InputError(f"This model cannot be graded: {no_grading(lens)}.")
    begun = False
    with steps(doing) as advance:

        def report(done: int, total: int) -> None:
            nonlocal begun
            begun = True
            advance(done, total)

        try:
            return work(
                lens, task, metric=asked.metric, seed=asked.seed, sweep=settings, progress=report
            )
        except AttnlensError as error:
            kept = kept_text(out, words) if begun else None
            if kept is not None:
                error.add_note(kept)
            raise


def _ablating(lens: Lens, asked: SweepAsked) -> tuple[Callable[..., Swept], str]:
    """The ablation that was asked for, and what it does."""
    heads = lens.anatomy.find(asked.heads)
    pairs = count_text(len(heads) * (len(heads) - 1) // 2, "pair")
    made = {
        "heads": (ablate, count_text(len(heads), "head")),
        "layers": (ablate_layers, count_text(len({head.site for head in heads}), "layer")),
        "pairs": (ablate_pairs, f"{pairs} of heads"),
        "positions": (ablate_positions, f"{count_text(len(heads), 'head')} position by position"),
    }
    run, what = made[asked.by]

    def work(lens: Lens, task: Task, **settings: Any) -> Swept:
        return run(lens, task, asked.heads, mode=asked.mode, **settings)

    return work, f"Ablating {what}"


def _patching(asked: PatchAsked) -> tuple[Callable[..., Swept], str]:
    """The patching that was asked for, and what it does."""
    each = " position by position" if asked.positions else ""
    work = partial(
        patch,
        kind=asked.kind,
        places=asked.heads or None,
        positions=asked.positions,
        direction=asked.direction,
    )
    return work, f"Patching {asked.kind} ({asked.direction}){each}"


def _settings(asked: SweepAsked, out: Path) -> SweepSettings:
    if asked.ray is None and (asked.workers is not None or asked.gpus):
        option = "--gpus" if asked.workers is None else "--workers"
        raise InputError(f"{option} is about the machines of --ray. Give that too.")
    return SweepSettings(
        batch_size=asked.batch_size,
        tokens=asked.tokens,
        store=out,
        resume=asked.resume,
        ray=asked.ray,
        workers=asked.workers,
        gpus=asked.gpus,
    )


def check_place(out: Path, resume: bool) -> None:
    """Refuse a folder that cannot hold the sweep, before the model is opened.

    Raises:
        FileError: it is a file, cannot be written, or holds a sweep that is not to be gone on with.

    """
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file. Give a folder for the sweep, with --out.")
    if not resume and values_kept(out) is not None:
        raise FileError(
            f"{out} holds a sweep already: add --resume to go on with it, or choose another "
            f"folder. attnlens ablate --show {shlex.quote(str(out))} draws what is there."
        )
    beside = next(place for place in (out, *out.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".attnlens-", dir=beside).cleanup()
    except OSError as error:
        raise FileError(
            f"Nothing can be written in {beside}: {error.strerror}. Choose another --out."
        ) from error


def values_kept(out: Path) -> tuple[int, int] | None:
    """How many values of the sweep in a folder are done, and of how many; None without a sweep."""
    try:
        done = Store.open(out).done()
    except FileError:
        return None
    return int(done.sum()), done.size


def kept_text(out: Path, words: Sequence[str]) -> str | None:
    """What a stop left in the store, and the command that goes on; None where nothing is there."""
    kept = values_kept(out)
    if kept is None:
        return None
    done, total = kept
    again = list(words) if "--resume" in words else [*words, "--resume"]
    return (
        f"{done:,} of {total:,} values are kept in {out}. This goes on:\n"
        f"  {shlex.join(['attnlens', *again])}"
    )
