"""What takes the place of an ablated head's output, and the trials that put it there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit, Identity, Mean, Patch, Uniform, Zero
from attnlens.hooks.edits.base import spec_text
from attnlens.hooks.where import Positions
from attnlens.lens import Inputs, Lens
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task


class Mode(StrEnum):
    """What takes the place of a head's output z; papers call different things "masking"."""

    ZERO = "zero"
    """Nothing."""
    MEAN = "mean"
    """Its mean over all positions of the reference prompts."""
    POSITION_MEAN = "position_mean"
    """Its mean over the reference prompts at the same position."""
    RESAMPLE = "resample"
    """What it writes on the corrupt twin of the prompt."""
    UNIFORM = "uniform"
    """The mean of the values that each row sees: A = 1 / visible keys."""
    IDENTITY = "identity"
    """The value of the row's own token: A = I."""
    FROZEN = "frozen"
    """Nothing, while all later heads attend as they did before."""


_ALL = 1 << 60
"""Bytes that a donor may keep; a sweep keeps as much of each clean run, and sees memory run out."""


@dataclass
class Donor:
    """Tensors of a run of a task's prompts, kept for the prompts whose turn it is."""

    task: Task
    kinds: tuple[str, ...]
    corrupt: bool
    _prompts: slice | None = field(default=None, repr=False)
    _kept: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Any], repr=False)

    def of(self, lens: Lens, prompts: slice) -> Mapping[str, Mapping[str, Tensor]]:
        """`kept[kind][site]` of these prompts, padding that none of them needs cut off."""
        if self._prompts != prompts:
            part = self.task.subset(prompts)
            width = int(part.mask.sum(1).max())
            inputs = part.corrupt_inputs() if self.corrupt else part.clean_inputs()
            cut = {name: tensor[:, :width] for name, tensor in inputs.items()}
            self._kept = lens.run(cut, keep=self.kinds, budget=_ALL).kept
            self._prompts = prompts
        return self._kept

    def __getstate__(self) -> dict[str, Any]:
        # What was kept is made anew where a copy goes.
        return {"task": self.task, "kinds": self.kinds, "corrupt": self.corrupt,
                "_prompts": None, "_kept": {}}  # fmt: skip


@dataclass(frozen=True)
class Ablator:
    """Makes the trials of one mode on one task; built by `Ablator.of`.

    `shortest` is the length of the task's shortest prompt; before position `same` no prompt differs
    from its corrupt twin; `reference` is the digest of the prompts that means were given of.
    """

    mode: Mode
    shortest: int
    same: int
    means: Mapping[str, Tensor] | None = None
    donor: Donor | None = None
    reference: str | None = None

    @classmethod
    def of(
        cls, lens: Lens, task: Task, mode: Mode | str, reference: Inputs | None = None
    ) -> Ablator:
        """The maker for a mode; means are those of `reference`, else of the corrupt prompts.

        Raises:
            InputError: there is no such mode, or a reference that it does not use.

        """
        if mode not in list(Mode):
            raise InputError(f"There is no ablation {mode!r}; choose {', '.join(Mode)}.")
        mode = Mode(mode)
        about = compared(task)
        if mode in (Mode.MEAN, Mode.POSITION_MEAN):
            given = task.corrupt_inputs() if reference is None else reference
            means = lens.mean_z(given, by_position=mode is Mode.POSITION_MEAN)
            return cls(mode, *about, means, None, _digest(lens, reference))
        if reference is not None:
            raise InputError(f"Mode {mode} takes no reference; the two means do.")
        if mode is Mode.RESAMPLE:
            return cls(mode, *about, donor=Donor(task, ("z",), corrupt=True))
        if mode is Mode.FROZEN:
            return cls(mode, *about, donor=Donor(task, ("q", "k"), corrupt=False))
        return cls(mode, *about)

    def trial(
        self, heads: Sequence[Head], name: str | None = None, position: int | None = None
    ) -> Trial:
        """The trial that ablates some heads at once, at one position or at all."""
        text = spec_text(heads)
        about = {"mode": str(self.mode), "heads": text}
        if position is not None:
            about["position"] = str(position)
        if self.reference is not None:
            about["reference"] = self.reference
        edits = _Made(self, tuple(heads), position)
        return Trial(name or text, edits, about, self._start(position))

    def _start(self, position: int | None) -> int:
        """The first position that the ablation may change, in any prompt."""
        start = 0 if self.mode is not Mode.RESAMPLE else self.same
        if position is None:
            return start
        return max(start, position if position >= 0 else self.shortest + position)

    def edits(
        self, lens: Lens, prompts: slice, heads: Sequence[Head], queries: Positions = None
    ) -> tuple[Edit, ...]:
        """The edits that ablate some heads on some prompts."""
        match self.mode:
            case Mode.ZERO:
                return (Zero(heads, queries=queries),)
            case Mode.UNIFORM:
                return (Uniform(heads, queries=queries),)
            case Mode.IDENTITY:
                return (Identity(heads, queries=queries),)
            case Mode.MEAN | Mode.POSITION_MEAN:
                assert self.means is not None
                return (Mean(heads, self.means, queries=queries),)
            case Mode.RESAMPLE:
                assert self.donor is not None
                z = self.donor.of(lens, prompts)["z"]
                return (Patch(heads, "z", z, queries=queries),)
            case Mode.FROZEN:
                return (Zero(heads, queries=queries), *self._held_maps(lens, prompts, heads))

    def _held_maps(self, lens: Lens, prompts: slice, heads: Sequence[Head]) -> tuple[Edit, ...]:
        """Later sites with the queries and keys of the clean run, so with its maps."""
        assert self.donor is not None
        kept = self.donor.of(lens, prompts)
        named = {head.site for head in heads}
        order = [site.name for site in lens.anatomy.sites]
        first = min(order.index(name) for name in named)
        later = ",".join(order[first + 1 :])
        if not later:
            return ()
        return (Patch(later, "q", kept["q"]), Patch(later, "k", kept["k"]))


@dataclass(frozen=True)
class _Made:
    """The edits of one trial, made when its prompts are due."""

    ablator: Ablator
    heads: tuple[Head, ...]
    position: int | None

    def __call__(self, lens: Lens, prompts: slice) -> tuple[Edit, ...]:
        return self.ablator.edits(lens, prompts, self.heads, self.position)


def compared(task: Task) -> tuple[int, int]:
    """Length of the shortest prompt, and before which position no prompt differs from its twin."""
    differs = ((task.clean != task.corrupt) & task.mask).any(0).nonzero()
    shortest = int(task.mask.sum(1).min())
    return shortest, int(differs[0]) if len(differs) else shortest


def _digest(lens: Lens, reference: Inputs | None) -> str | None:
    """What tells one reference from another; the task's own prompts are told with the task."""
    if reference is None:
        return None
    whole = hashlib.sha256()
    for name, value in sorted(lens.encode(reference).inputs.items()):
        if isinstance(value, Tensor):
            numbers = value.detach().double().cpu().contiguous().numpy()
            whole.update(f"{name} {numbers.shape}".encode() + numbers.tobytes())
    return whole.hexdigest()[:16]
