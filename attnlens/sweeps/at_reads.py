"""Trials under which all attention is known are run at the rows that the metric reads alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.errors import AttnlensError
from attnlens.hooks.edits import Edit, Patch, PatchStream
from attnlens.hooks.edits.freeze import Freeze
from attnlens.hooks.frozen import Entering, ReachedError, at_rows, rows_of
from attnlens.hooks.tokens import Sides
from attnlens.lens.inputs import Batch

if TYPE_CHECKING:
    from attnlens.sweeps.clean_run import CleanRun


def reads_suffice(clean: CleanRun, edits: Sequence[Edit], site: str) -> bool:
    """Whether no attention from a site on, the first that the edits change, has to be computed."""
    holds = any(isinstance(edit, Freeze) for edit in edits)
    if clean.recording is None or not holds or not all(map(_fits, edits)):
        return False
    names = [own.name for own in clean.anatomy.sites]
    later = set(names[names.index(site) + 1 :])
    return clean.knows_z([edits], site) and later <= clean.frozen([edits], site)


def at_reads(clean: CleanRun) -> CleanRun | None:
    """The clean run at the rows that are read; None where its logits are not the clean ones.

    So it is with models in which more than attention mixes positions.
    """
    ids, rows = clean.batch.ids, clean.reads
    plain = {"input_ids", "attention_mask", "past_key_values"}
    if clean.recording is None or ids is None or not set(clean.batch.inputs) <= plain:
        return None
    try:
        inputs = {"input_ids": rows_of(ids, rows, 1)}
        batch = Batch(inputs, Sides.of(inputs), ())
        # Only its answers count: the rows' tokens and their number are those of both prompts.
        task = replace(
            clean.task,
            clean=inputs["input_ids"].cpu(),
            corrupt=inputs["input_ids"].cpu(),
            mask=torch.ones(rows.shape, dtype=torch.bool),
            reads=torch.arange(rows.shape[1]).expand(rows.shape),
            spans=None,
        )
        # Embeddings of the rows' own positions, which the rows alone do not tell.
        stream = rows_of(_entering(clean), rows, 1)
        short = replace(
            clean,
            task=task,
            text=batch,
            batch=batch,
            first=0,
            recording=at_rows(clean.recording, rows),
            rows=rows,
            stream=stream,
        )
        again = short.unchanged()
    except (AttnlensError, RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return None
    return None if clean.apart(again) else short


def _entering(clean: CleanRun) -> Float[Tensor, "prompt position d_model"]:
    """The stream that enters the first block."""
    seen = Entering(clean.anatomy)
    with suppress(ReachedError):
        clean.lens.logits_at(clean.batch, clean.reads, seen)
    assert seen.stream is not None
    return seen.stream


def edits_at(edits: Sequence[Edit], clean: CleanRun) -> tuple[Edit, ...]:
    """Edits for the rows of a run: of the tensors that they hold, those at the rows and sites."""
    return tuple(_cut(edit, clean) for edit in edits)


def _cut(edit: Edit, clean: CleanRun) -> Edit:
    assert clean.rows is not None
    assert isinstance(edit, Patch | PatchStream)
    values: dict[str, Tensor] = {
        name: rows_of(edit.values[name], clean.rows, edit.values[name].ndim - 2)
        for name in edit.sites(clean.anatomy)
    }
    return replace(edit, values=values)


def _fits(edit: Edit) -> bool:
    """Whether an edit at some rows is known by what it does there."""
    z = isinstance(edit, Patch) and edit.kind == "z"
    return edit.queries is None and (z or isinstance(edit, PatchStream))
