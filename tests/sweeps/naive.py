"""Sweeps done the slow way: one trial at a time, in a full forward of the model that users edit."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

import attnlens as al
from attnlens.anatomy import Head
from attnlens.lens import Lens
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task
from tests.architectures import ARCHITECTURES
from tests.architectures.base import PAD, VOCAB


@cache
def lens_of(name: str, double: bool = True) -> Lens:
    """A model of the catalogue."""
    model = ARCHITECTURES[name].build()
    return al.load(model.double() if double else model)


def task_of(lens: Lens, lengths: Sequence[int] = (14, 9, 12), same: int = 0, seed: int = 0) -> Task:
    """Random prompts, whose corrupt twins begin with `same` of their tokens.

    Each is read at its end and two positions before; a decoder beside an encoder reads its start.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(4, VOCAB - 2, (length,), generator=draw).tolist()

    clean = [ids(length) for length in lengths]
    corrupt = [[*own[:same], *ids(len(own) - same)] for own in clean]
    two = getattr(lens.model.config, "is_encoder_decoder", False)
    return Task.from_prompts(
        "random",
        clean,
        corrupt,
        [[0] if two else [length - 3, length - 1] for length in lengths],
        [ids(1 if two else 2) for _ in lengths],
        [ids(1 if two else 2) for _ in lengths],
        metric="loss",
        pad_id=PAD,
    )


def some_heads(lens: Lens) -> list[tuple[Head, ...]]:
    """A head of the first, a middle and the last site, and a group across layers."""
    sites = lens.anatomy.sites
    first, middle, last = sites[0], sites[len(sites) // 2], sites[-1]
    group = (first.head(1), middle.head(0), last.head(last.heads - 1))
    return [(first.head(0),), (middle.head(1),), (last.head(1),), group]


def one_by_one(lens: Lens, task: Task, trials: Sequence[Trial]) -> Tensor:
    """The metric of each prompt under each trial."""
    rows: list[Tensor] = []
    for trial in trials:
        with lens.edit(*trial.of_prompts(lens, slice(0, len(task)))):
            logits = lens.logits(task.clean_inputs(), task.reads, len(task))
        rows.append(task.score(logits).double())
    return torch.stack(rows)


def assert_close(found: Tensor, wanted: Tensor, rounding: float) -> None:
    """Equal to a share of the largest value."""
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    apart = (found - wanted).abs().max() / wanted.abs().max()
    assert apart <= rounding, float(apart)
