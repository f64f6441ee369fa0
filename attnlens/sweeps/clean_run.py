"""The clean run of some prompts, kept so that a trial goes on from the layer that it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import InputError, SeamError, UnsupportedModelError
from attnlens.hooks.edits import Edit
from attnlens.hooks.edits.base import StreamEdit
from attnlens.hooks.edits.freeze import Freeze
from attnlens.hooks.frozen import Entering, Frozen
from attnlens.hooks.mlp import OnlyRows
from attnlens.hooks.restart import Record, Recording, Restart, block_names
from attnlens.hooks.session import Observer
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch, repeated
from attnlens.sweeps.at_reads import at_reads
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
        rows: the only rows of the text that are run; None for all from `first` on.
        stream: what enters the first block at these rows.

    """

    lens: Lens
    task: Task
    metric: str
    text: Batch
    batch: Batch
    first: int
    logits: Float[Tensor, "prompt read vocab"]
    recording: Recording | None
    rows: Int[Tensor, "prompt read"] | None = None
    stream: Float[Tensor, "prompt read d_model"] | None = None

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

    @cached_property
    def at_reads(self) -> CleanRun | None:
        """The same run at the rows that are read alone, for trials that need no attention."""
        return at_reads(self)

    def first_site(self, edits: Sequence[Edit]) -> str:
        """Name of the site that runs first of those that the edits change."""
        # What is held as it was changes nothing below the others.
        changing = [edit for edit in edits if not isinstance(edit, Freeze)] or edits
        named = {name for edit in changing for name in edit.sites(self.anatomy)}
        return next(site.name for site in self.anatomy.sites if site.name in named)

    def run(
        self, trials: Sequence[Sequence[Edit]], site: str | None = None
    ) -> Float[Tensor, "trial prompt"]:
        """The metric under each trial's edits, all in one forward.

        `site` is the first that any of them changes: what lies below is not run again, nor is its
        attention where edits of heads alone are asked of it, nor any that all trials hold.
        """
        return self.grade(self.forward(trials, site))

    @torch.no_grad()
    def forward(
        self, trials: Sequence[Sequence[Edit]], site: str | None, *more: Observer
    ) -> Float[Tensor, "row read vocab"]:
        """Logits of the copies of the prompts, one a trial; sites that `more` ask for do run."""
        batch, reads = repeated(self.batch, len(trials)), self.reads.repeat(len(trials), 1)
        if self.recording is None or site is None:
            observers: list[Observer] = [self._stack(trials)]
        else:
            asked = frozenset[str]().union(*(observer.sites for observer in more))
            frozen = self._modules(self.frozen(trials, site) - asked)
            known = {own.name for own in frozen}
            stack = self._stack([self._left(edits, site, known) for edits in trials])
            skips = site not in asked and self.knows_z(trials, site)
            restart = self._restart(stack, len(trials), site, skips)
            held = Frozen(self.recording, frozen, len(trials))
            enters = self._entering(len(trials))
            observers = [restart, held, *enters, *(() if more else self._cut(trials)), stack]
        return self.lens.logits_at(batch, reads, *observers, *more)

    def _stack(self, trials: Sequence[Sequence[Edit]]) -> Stack:
        inputs, size = self.text.inputs, len(self.task)
        return Stack(self.anatomy, trials, inputs, size, self.lens.mlp_names, self.first)

    def frozen(self, trials: Sequence[Sequence[Edit]], site: str) -> frozenset[str]:
        """Sites above one that all trials hold, and whose modules return no more than their z."""
        assert self.recording is not None
        names = [own.name for own in self.anatomy.sites]
        later = names[names.index(site) + 1 :]
        held = (self._held(edits) for edits in trials)
        able = frozenset(name for name in later if self.recording.of(name).takes_z)
        return able.intersection(*held)

    def _held(self, edits: Sequence[Edit]) -> frozenset[str]:
        """Sites of which the edits hold every head, and change none."""
        held = [edit.whole(self.anatomy) for edit in edits if isinstance(edit, Freeze)]
        heads = [edit for edit in edits if not isinstance(edit, Freeze | StreamEdit)]
        changed = {name for edit in heads for name in edit.sites(self.anatomy)}
        return frozenset[str]().union(*held) - changed

    def _modules(self, names: frozenset[str]) -> list[Site]:
        """Those of some sites whose module attends for no other one."""
        others = {site.module for site in self.anatomy.sites if site.name not in names}
        chosen = [site for site in self.anatomy.sites if site.name in names]
        return [site for site in chosen if site.module not in others]

    def _left(self, edits: Sequence[Edit], site: str, known: set[str]) -> list[Edit]:
        """Edits of a trial, without holding what is not run, or is known."""
        names = [own.name for own in self.anatomy.sites]
        runs = {name for name in names[names.index(site) :] if name not in known}
        found: list[Edit] = []
        for edit in edits:
            if isinstance(edit, Freeze) and (whole := edit.whole(self.anatomy)) - runs:
                left = [name for name in names if name in whole & runs]
                found += [replace(edit, heads=",".join(left))] if left else []
            else:
                found.append(edit)
        return found

    def knows_z(self, trials: Sequence[Sequence[Edit]], name: str) -> bool:
        """Whether z of the first site that trials change follows from the clean run's call."""
        assert self.recording is not None
        return self.recording.of(name).takes_z and not any(
            isinstance(edit, StreamEdit)
            and edit.stream == "residual"
            and name in edit.sites(self.anatomy)
            and name not in self._held(edits)
            for edits in trials
            for edit in edits
        )

    def _restart(self, stack: Stack, times: int, name: str, skips: bool) -> Restart:
        assert self.recording is not None
        site = self.anatomy[name]
        z = stack.z_at(site, self.recording.of(name).call) if skips else None
        return Restart(self.recording, site, times, z)

    def unchanged(self) -> Float[Tensor, "prompt read vocab"]:
        """Logits with all attention taken from the recording, and the rest computed."""
        assert self.recording is not None
        first, *later = self.anatomy.sites
        restart = Restart(self.recording, first, 1, self.recording.of(first.name).call.output)
        return self.lens.logits_at(
            self.batch, self.reads, restart, Frozen(self.recording, later), *self._entering(1)
        )

    def _entering(self, times: int) -> tuple[Observer, ...]:
        return () if self.stream is None else (Entering(self.anatomy, self.stream, times),)

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
