"""What activation patching tries: where a run is given what another run had there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from attnlens.anatomy import Anatomy, Head, HeadSpec, Site
from attnlens.errors import AttnlensError, InputError
from attnlens.hooks.edits import Edit, Patch, PatchStream
from attnlens.hooks.edits.base import StreamEdit
from attnlens.lens import Lens
from attnlens.sweeps.clean_run import CleanRun
from attnlens.sweeps.modes import Donor, compared
from attnlens.sweeps.trials import EditsOf, Trial
from attnlens.tasks import Task

Kind = Literal["q", "k", "v", "z", "pattern", "residual", "mlp"]
OF_KEYS = ("k", "v")
"""Kinds of which groups have one, whose positions are keys."""
STREAMS = ("residual", "mlp")
"""Kinds of which layers have one."""
Direction = Literal["denoise", "noise"]
"""`noise`: the clean prompt runs, and what is patched is as in its corrupt twin; `denoise`: the
corrupt prompt runs, and what is patched is as in the clean one."""
WHOLE = "donor"
"""The trial that has all of the other run."""


@dataclass(frozen=True)
class Place:
    """Where activations are put: heads that move together, or a layer's stream or MLP."""

    name: str
    """`L3H5`; `L3H4-7` for heads that share keys and values; `L3` for a layer."""
    site: str
    heads: tuple[Head, ...] = ()
    """All heads that move; none for a layer."""


def places_of(lens: Lens, kind: str, spec: HeadSpec | int | None) -> tuple[Place, ...]:
    """The places of a kind that a specification names, all where it is None.

    Raises:
        HeadError: a head or layer that the model does not have.
        InputError: an unknown kind, or a layer without a stream or an MLP of its own.

    """
    if kind not in get_args(Kind):
        raise InputError(f"There is no kind {kind!r} to patch; choose {', '.join(get_args(Kind))}.")
    if kind in STREAMS:
        return _layers(lens, kind, spec)
    if isinstance(spec, int):
        raise InputError(
            f"places={spec} names a layer; heads are written 'L{spec}' or 'L{spec}H0'."
        )
    heads = lens.anatomy.find("all" if spec is None else spec)
    grouped = [_group(lens.anatomy[h.site], h) if kind in OF_KEYS else (h,) for h in heads]
    return tuple(Place(_name(own), own[0].site, own) for own in dict.fromkeys(grouped))


def patch_trials(
    lens: Lens, task: Task, kind: str, places: Sequence[Place], positions: Sequence[int] | None
) -> list[Trial]:
    """A trial a place (and position): the task's prompts with activations of its corrupt ones.

    The last trial, `donor`, has the whole corrupt run, where this model's last layer can be given
    it; else there is none.
    """
    last = _last_block(lens.anatomy)
    donor = Donor(task, tuple(dict.fromkeys((kind, *_given(last)))), corrupt=True)
    whole = whole_trial(lens, task, donor)
    if whole is None:
        donor = Donor(task, (kind,), corrupt=True)
    shortest, same = compared(task)
    trials: list[Trial] = []
    for place in places:
        for position in (None,) if positions is None else positions:
            own = position if position is None or position >= 0 else shortest + position
            about = {"patch": kind, "place": place.name, "position": position}
            name = place.name if position is None else f"{place.name} at {position}"
            edits = _Patched(donor, kind, place, position)
            trials.append(Trial(name, edits, about, max(same, own or 0)))
    return trials if whole is None else [*trials, whole]


def whole_trial(lens: Lens, task: Task, donor: Donor | None = None) -> Trial | None:
    """The trial `donor`, all of the corrupt run; None where the last layer cannot be given it.

    A donor that keeps more is taken where it is given.
    """
    last = _last_block(lens.anatomy)
    whole = _Whole(donor or Donor(task, _given(last), corrupt=True), last)
    if not _repeats(lens, task, whole):
        return None
    return Trial(WHOLE, whole, {"patch": "everything"}, compared(task)[1])


@dataclass(frozen=True)
class _Patched:
    """The edit of one trial, made when its prompts are due."""

    donor: Donor
    kind: str
    place: Place
    position: int | None

    def __call__(self, lens: Lens, prompts: slice) -> tuple[Edit, ...]:
        kept = self.donor.of(lens, prompts)[self.kind]
        place, at = self.place, self.position
        if self.kind in STREAMS:
            return (PatchStream(place.site, self.kind, values=kept, queries=at),)
        where = {"keys" if self.kind in OF_KEYS else "queries": at}
        return (Patch(place.heads, self.kind, kept, **where),)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Whole:
    """All that the last block is given: its stream, and keys and values of another stack."""

    donor: Donor
    last: tuple[Site, ...]

    def __call__(self, lens: Lens, prompts: slice) -> tuple[Edit, ...]:
        kept = self.donor.of(lens, prompts)
        cross = [site.name for site in self.last if site.kind == "cross"]
        stream = PatchStream(self.last[0].name, values=kept["residual"])
        return (stream, *(Patch(name, kind, kept[kind]) for name in cross for kind in OF_KEYS))


def swapped(task: Task) -> Task:
    """The same task with the corrupt prompts in the place of the clean ones; answers stay."""
    return replace(task, clean=task.corrupt, corrupt=task.clean)


def _repeats(lens: Lens, task: Task, whole: EditsOf) -> bool:
    """Whether the first prompt, given all of its corrupt twin's run, has the twin's logits."""
    part = task.subset(slice(1))
    width = int(part.mask.sum())
    try:
        twin = CleanRun.of(lens, swapped(part), part.metric, restart=False)
        with lens.edit(*whole(lens, slice(1))):
            found = lens.logits({"input_ids": part.clean[:, :width]}, part.reads)
    except (AttnlensError, RuntimeError):
        return False
    return not twin.apart(found)


def _last_block(anatomy: Anatomy) -> tuple[Site, ...]:
    """The sites of the last block; of a block that layers share, those of its first run."""
    last = anatomy.sites[-1]
    return tuple(s for s in anatomy.sites if s is last or (s.block == last.block and s.call == 0))


def _given(last: Sequence[Site]) -> tuple[str, ...]:
    """Kinds of all that a last block is given."""
    cross = any(site.kind == "cross" for site in last)
    return ("residual", *(OF_KEYS if cross else ()))


def _group(site: Site, head: Head) -> tuple[Head, ...]:
    """The heads that share a head's keys and values."""
    size = site.heads // site.groups
    first = head.head // size * size
    return tuple(site.head(number) for number in range(first, first + size))


def _name(heads: Sequence[Head]) -> str:
    """`L3H5`, or `L3H4-7` for heads side by side."""
    first, last = heads[0], heads[-1]
    return str(first) if first == last else f"{first}-{last.head}"


def _layers(lens: Lens, kind: str, spec: HeadSpec | int | None) -> tuple[Place, ...]:
    names = StreamEdit("all" if spec is None else spec, kind).sites(lens.anatomy)
    blocks = {name: lens.anatomy[name].block for name in names}
    having = lens.mlps if kind == "mlp" else [block for block in blocks.values() if block]
    without = [name for name in names if blocks[name] not in having]
    if without and (spec is not None or len(without) == len(names)):
        raise InputError(
            f"{', '.join(without)} of {lens.anatomy.model} has no {kind} of its own to patch; "
            "choose other layers, or another kind."
        )
    return tuple(Place(name, name) for name in names if name not in without)
