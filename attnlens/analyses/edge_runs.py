"""A task graded with edges cut: any choices of edges, side by side, on the same references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.anatomy.network import Network
from attnlens.errors import InputError
from attnlens.hooks.edge_run import Activations, EdgeRun, Listen, as_reference
from attnlens.hooks.find_wiring import text_sites
from attnlens.hooks.restart import Record, Recording, Restart
from attnlens.hooks.session import Observer
from attnlens.hooks.wiring import Wiring
from attnlens.lens import Inputs, Lens
from attnlens.lens.inputs import Batch, repeated, split
from attnlens.sweeps.patches import Direction, swapped
from attnlens.tasks import Task

Progress = Callable[[int, int], None]
"""Called with (done, all)."""

SPACE, CPU_SPACE = 2**31, 2**25
"""Bytes that what senders wrote may take, all choices that run side by side together; on a CPU so
much as stays near its cache."""


class EdgeAblation(StrEnum):
    """What a receiver reads along an edge that is cut."""

    RESAMPLE = "resample"
    """What its sender writes on the corrupt twin of the prompt."""
    MEAN = "mean"
    """What it writes on the reference prompts, averaged over all their positions."""
    ZERO = "zero"
    """Nothing."""


def known_ablation(ablation: EdgeAblation | str) -> EdgeAblation:
    """The ablation of a name; InputError for another."""
    if ablation not in list(EdgeAblation):
        raise InputError(
            f"There is no ablation {ablation!r} of edges; choose {', '.join(EdgeAblation)}."
        )
    return EdgeAblation(ablation)


def directed(task: Task, direction: Direction, ablation: EdgeAblation) -> Task:
    """The task whose clean prompts are run: with clean and corrupt swapped to denoise.

    Raises:
        InputError: an unknown direction, or one that the ablation does not have.

    """
    if direction not in get_args(Direction):
        raise InputError(f"There is no direction {direction!r}; choose noise or denoise.")
    if direction == "noise":
        return task
    if ablation is not EdgeAblation.RESAMPLE:
        raise InputError(f"Denoising puts clean activations back; {ablation} has none to put.")
    return swapped(task)


@dataclass(frozen=True)
class References:
    """What senders write where their edges are cut, for the prompts whose turn it is."""

    lens: Lens
    ablation: EdgeAblation
    means: Mapping[str, Tensor] | None

    @classmethod
    def of(
        cls, lens: Lens, task: Task, ablation: EdgeAblation | str, reference: Inputs | None = None
    ) -> References:
        """For a task; means are those of `reference`, else of the corrupt prompts.

        Raises:
            InputError: no such ablation, a reference that it does not use, or edits that are on.
            UnsupportedModelError: a model whose edges are not defined.

        """
        kind = known_ablation(ablation)
        if lens.edited:
            raise InputError(
                "Edges are those of the model as it is; leave the block of lens.edit first."
            )
        if reference is not None and kind is not EdgeAblation.MEAN:
            raise InputError(f"Ablation {kind} takes no reference; the mean does.")
        if kind is not EdgeAblation.MEAN:
            return cls(lens, kind, None)
        given = task.corrupt_inputs() if reference is None else reference
        return cls(lens, kind, mean_written(lens, given))

    def written(self, task: Task, clean: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What writers write instead of `clean`, on a part of the task."""
        if self.ablation is EdgeAblation.ZERO:
            return {name: torch.zeros_like(tensor) for name, tensor in clean.items()}
        if self.means is not None:
            means = self.means
            return {name: means[name].to(t).expand_as(t) for name, t in clean.items()}
        return listened(self.lens, encoded(self.lens, task, corrupt=True), task)[0].written


def encoded(lens: Lens, task: Task, corrupt: bool = False) -> Batch:
    """The clean or corrupt prompts of a part of a task, padding that none needs cut off."""
    width = int(task.mask.sum(1).max())
    inputs = task.corrupt_inputs() if corrupt else task.clean_inputs()
    return lens.encode({name: tensor[:, :width] for name, tensor in inputs.items()})


def listened(
    lens: Lens, batch: Batch, task: Task, *observers: Observer
) -> tuple[Activations, Tensor]:
    """What a run wrote and read, and its logits at the reads."""
    listen = Listen(lens.wiring)
    logits = lens.logits_at(batch, task.reads, listen, *observers)
    return listen.activations, logits


@torch.no_grad()
def mean_written(lens: Lens, inputs: Inputs, batch_size: int = 8) -> dict[str, Tensor]:
    """What each writer writes on average over the real positions of some prompts."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for part in split(lens.encode(inputs), batch_size)[0]:
        listen = Listen(lens.wiring)
        lens.observe(part, listen)
        for writer in lens.wiring.writers:
            written = listen.written[writer.name].double()
            real = real_positions(part)[writer.stream]
            weight = written.new_ones(written.shape[:2]) if real is None else real.to(written)
            own = torch.einsum("bt...,bt->...", written, weight)
            sums[writer.name] = sums.get(writer.name, 0) + own
            counts[writer.name] = counts.get(writer.name, 0.0) + float(weight.sum())
    return {name: total / counts[name] for name, total in sums.items()}


def real_positions(batch: Batch) -> dict[str, Bool[Tensor, "batch position"] | None]:
    """By the name of a stream's embeddings, which positions are no padding; None where all are."""
    decoder = None if batch.sides.decoder is None else batch.sides.decoder.real
    text = batch.sides.text.real
    return {"embed": text, "enc.embed": text, "dec.embed": decoder}


@dataclass(frozen=True)
class _Part:
    """Some prompts of the task, ready to be run with edges cut, from any layer on."""

    prompts: slice
    task: Task
    batch: Batch
    reference: Activations
    clean: Activations
    recording: Recording


class EdgeRuns:
    """A task made ready to be graded with edges cut; references of all prompts are held.

    Attributes:
        network: nodes and edges.
        full: the metric of each prompt with no edge cut, by an ordinary run.

    """

    def __init__(
        self,
        lens: Lens,
        task: Task,
        metric: str | None = None,
        ablation: EdgeAblation | str = EdgeAblation.RESAMPLE,
        reference: Inputs | None = None,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}; give 1 or more.")
        self.lens = lens
        self.task = task
        self.metric = metric or task.metric
        references = References.of(lens, task, ablation, reference)
        self.ablation = references.ablation
        self.full = torch.zeros(len(task), dtype=torch.float64)
        self._parts = [
            self._prepared(references, slice(start, start + batch_size))
            for start in range(0, len(task), batch_size)
        ]

    @property
    def wiring(self) -> Wiring:
        """How the model is wired."""
        return self.lens.wiring

    @property
    def network(self) -> Network:
        """Nodes and edges."""
        return self.wiring.network

    @torch.no_grad()
    def run(
        self,
        kept: Bool[Tensor, "choice sender receiver"] | Sequence[Tensor],
        progress: Progress | None = None,
    ) -> Float[Tensor, "choice prompt"]:
        """The metric of each prompt with the edges of each choice kept and all others cut."""
        found = torch.zeros(len(kept), len(self.task), dtype=torch.float64)
        for number, part in enumerate(self._parts):
            step = self.side_by_side(part.batch)
            for start in range(0, len(kept), step):
                own = slice(start, start + step)
                chosen = kept[own] if isinstance(kept, Tensor) else torch.stack([*kept[own]])
                found[own, part.prompts] = self._graded(part, chosen)
                if progress is not None:
                    done = number * len(kept) + min(start + step, len(kept))
                    progress(done, len(kept) * len(self._parts))
        return found

    def side_by_side(self, batch: Batch | None = None) -> int:
        """How many choices run in one forward."""
        batch = self._parts[0].batch if batch is None else batch
        width = self.lens.anatomy.d_model or 1
        each = batch.sides.text.ids
        tokens = each.numel() if each is not None else batch.size
        space = CPU_SPACE if self.lens.device.type == "cpu" else SPACE
        return max(1, space // (len(self.network.senders) * tokens * width * 4))

    def _first_cut(self, kept: Tensor) -> Site | None:
        """The site to go on from: below it no choice cuts an edge, so all is as it was."""
        anatomy = self.lens.anatomy
        cut = (self.network.exists & ~kept).any(0).any(0)
        for reader, columns in self.wiring.columns():
            if bool(cut[columns].any()) and reader.kind != "logits":
                return anatomy[reader.part.removesuffix(".mlp")]
        return text_sites(anatomy)[-1]

    def _prepared(self, references: References, prompts: slice) -> _Part:
        part = self.task.subset(prompts)
        batch = encoded(self.lens, part)
        record = Record(self.lens.anatomy_for(batch), text_sites(self.lens.anatomy))
        clean, logits = listened(self.lens, batch, part, record)
        self.full[prompts] = part.score(logits, self.metric).double().cpu()
        written = references.written(part, clean.written)
        reference = as_reference(self.wiring, clean, written)
        return _Part(prompts, part, batch, reference, clean, record.recording)

    def _graded(self, part: _Part, kept: Tensor) -> Float[Tensor, "choice prompt"]:
        batch, reads = repeated(part.batch, len(kept)), part.task.reads.repeat(len(kept), 1)
        observers: list[Observer] = []
        known: dict[str, Tensor] = {}
        site = self._first_cut(kept)
        if site is not None and part.recording.reason is None:
            observers.append(Restart(part.recording, site, len(kept)))
            known = {
                writer.name: part.clean.written[writer.name]
                for writer in self.wiring.writers
                if writer.kind != "embed" and part.recording.skips(site.name, writer.module)
            }
        observers.append(EdgeRun(self.wiring, part.reference, kept, known))
        logits = self.lens.logits_at(batch, reads, *observers)
        copies = logits.unflatten(0, (len(kept), -1))
        values = torch.stack([part.task.score(own, self.metric).double() for own in copies])
        # The largest of logits of which some are NaN is a token all the same.
        return values.masked_fill(copies.isnan().flatten(2).any(2), torch.nan).cpu()
