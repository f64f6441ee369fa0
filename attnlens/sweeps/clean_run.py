"""The clean run of some prompts, kept so that a trial goes on from the layer that it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.anatomy import Anatomy
from attnlens.errors import InputError, SeamError, UnsupportedModelError
from attnlens.hooks.edits import Edit
from attnlens.hooks.edits.base import StreamEdit
from attnlens.hooks.mlp import OnlyRows
from attnlens.hooks.restart import Record, Recording, Restart, block_names
from attnlens.hooks.session import Observer
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch, repeated
from attnlens.sweeps.stack import Stack
from attnlens.tasks import Task

# A restarted run repeats the operations of the full one on the same numbers; products of another
# height may round otherwise, and each layer carries that on. Models of float64 do some of it (the
# routers of experts) in float32.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class CleanRun:
    """Some prompts of a task as they run with nothing edited, recorded layer by layer.

    Attributes:
        text: the prompts; `batch` is what the model is given of them.
        first: position of the first row; keys and values of those before are known.
        logits: logits at the reads.
        recording: what each block returned; None where the model cannot be restarted.

    """

    lens: Lens
    task: Task
    metric: str
    text: Batch
    batch: Batch
    first: int
    logits: Float[Tensor, "prompt read vocab"]
    recording: Recording | None

    @classmethod
    def of(cls, lens: Lens, task: Task, metric: str, restart: bool = True) -> CleanRun:
        """Run the prompts of a (part of a) task."""
        width = int(task.mask.sum(1).max())
        ids, mask = task.clean[:, :width], task.mask[:, :width]
        batch = lens.encode({"input_ids": ids, "attention_mask": mask.long()})
        return cls.from_row(lens, task, metric, batch, batch, 0, restart)

    @classmethod
    def from_row(
        cls,
        lens: Lens,
        task: Task,
        metric: str,
        text: Batch,
        batch: Batch,
        first: int,
        restart: bool = True,
    ) -> CleanRun:
        """Run `batch`, the positions of `text` from `first` on."""
        record = Record(lens.anatomy_for(batch)) if restart else None
        observers = () if record is None else (record,)
        logits = lens.logits_at(batch, task.reads - first, *observers)
        recording = None if record is None else record.recording
        return cls(lens, task, metric, text, batch, first, logits, recording)

    @property
    def anatomy(self) -> Anatomy:
        """The model's sites."""
        return self.lens.anatomy_for(self.batch)

    @cached_property
    def values(self) -> Float[Tensor, " prompt"]:
        """The metric of each prompt, in float64 on the CPU."""
        return self.grade(self.logits)[0]

    @property
    def width(self) -> int:
        """Positions of the longest prompt."""
        assert self.text.ids is not None
        return self.text.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Positions that a trial runs, padding counted."""
        return len(self.task) * (self.width - self.first)

    @property
    def reads(self) -> Int[Tensor, "prompt read"]:
        """Rows of the batch that the metric reads."""
        return self.task.reads - self.first

    def grade(self, logits: Float[Tensor, "row read vocab"]) -> Float[Tensor, "copy prompt"]:
        """The metric of each copy of the prompts; NaN where a logit is."""
        copies = logits.unflatten(0, (-1, len(self.task)))
        values = torch.stack([self.task.score(own, self.metric).double() for own in copies])
        # The largest of logits of which some are NaN is a token all the same.
        return values.masked_fill(copies.isnan().flatten(2).any(2), torch.nan).cpu()

    def first_site(self, edits: Sequence[Edit]) -> str:
        """Name of the site that runs first of those that the edits change."""
        named = {name for edit in edits for name in edit.sites(self.anatomy)}
        return next(site.name for site in self.anatomy.sites if site.name in named)

    @torch.no_grad()
    def run(
        self, trials: Sequence[Sequence[Edit]], site: str | None = None
    ) -> Float[Tensor, "trial prompt"]:
        """The metric under each trial's edits, all in one forward.

        `site` is the first that any of them changes: what lies below is not run again, nor is its
        attention where edits of heads alone are asked of it.
        """
        size, mlps = len(self.task), self.lens.mlp_names
        stack = Stack(self.anatomy, trials, self.text.inputs, size, mlps, self.first)
        observers: list[Observer] = [stack]
        if self.recording is not None and site is not None:
            observers = [self._restart(stack, trials, site), *self._cut(trials), stack]
        batch = repeated(self.batch, len(trials))
        reads = self.reads.repeat(len(trials), 1)
        return self.grade(self.lens.logits_at(batch, reads, *observers))

    def _restart(self, stack: Stack, trials: Sequence[Sequence[Edit]], name: str) -> Restart:
        assert self.recording is not None
        site, z = self.anatomy[name], None
        streams = [e for edits in trials for e in edits if isinstance(e, StreamEdit)]
        entering = [edit for edit in streams if edit.stream == "residual"]
        here = any(name in edit.sites(self.anatomy) for edit in entering)
        if not here and self.recording.of(name).takes_z:
            z = stack.z_at(site, self.recording.of(name).call)
        return Restart(self.recording, site, len(trials), z)

    def check(self) -> str | None:
        """Why restarted runs of this model differ from full ones; None where they agree.

        One run goes on from the middle with nothing changed and has to give the clean logits.
        """
        assert self.recording is not None
        # Of two layers the lower, so that whole blocks run above it.
        site = self.anatomy.sites[(len(self.anatomy.sites) - 1) // 2]
        try:
            own = self.recording.of(site.name)
            restart = Restart(self.recording, site, 1, own.call.output if own.takes_z else None)
            again = self.lens.logits_at(self.batch, self.reads, restart, *self._cut([]))
        except UnsupportedModelError as error:
            return str(error)
        except (RuntimeError, ValueError, TypeError, SeamError) as error:
            return f"going on from {site.name} fails ({error})"
        apart = self.apart(again)
        text = f"going on from {site.name} gives logits that differ by {apart:.2g}"
        return text if apart else None

    def apart(self, logits: Float[Tensor, "prompt read vocab"]) -> float:
        """By how much other logits differ from the clean ones; 0 for what rounding explains."""
        apart = float((logits - self.logits).abs().max())
        scale = max(float(self.logits.abs().max()), 1.0)
        return apart if not apart <= TOLERANCES.get(self.logits.dtype, 1e-2) * scale else 0.0

    def check_finite(self) -> None:
        """Raise InputError where the model gives no numbers on a prompt."""
        bad = (~self.values.isfinite()).nonzero()
        if len(bad):
            padded = self.text.real is not None
            ways = " Some models' own attention makes NaN of padding: try batch_size=1."
            raise InputError(
                f"{self.anatomy.model} gives {float(self.values[bad[0, 0]])} for the {self.metric} "
                "of a prompt with nothing edited. Check its weights (lens.check()) and its dtype."
                + ways
                * padded
            )

    def _cut(self, trials: Sequence[Sequence[Edit]]) -> tuple[Observer, ...]:
        """The last MLP at the rows that the metric reads alone, where nobody else reads them."""
        last = block_names(self.lens.model, self.anatomy)[-1]
        mlp = self.lens.mlps.get(last)
        edited = any(isinstance(edit, StreamEdit) for edits in trials for edit in edits)
        if mlp is None or not mlp.whole or edited:
            return ()
        return (OnlyRows(mlp, self.reads),)
