"""Paths with all heads between frozen: the edits of each sender, made as their prompts are due.

Many senders run side by side, in the run that records the receivers' inputs too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from attnlens.analyses.path_ends import INPUTS, End
from attnlens.anatomy import Anatomy, Head
from attnlens.hooks.edits import Edit, Patch, PatchStream
from attnlens.hooks.edits.freeze import Freeze
from attnlens.hooks.frozen import ReachedError, Until
from attnlens.hooks.keep import Keep, Request
from attnlens.lens import Lens
from attnlens.sweeps.clean_run import CleanRun
from attnlens.sweeps.modes import Donor, compared
from attnlens.sweeps.sweep import SweepSettings
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task

_ALL = 1 << 60
"""Bytes that may be kept of a run: no more than the sweep itself keeps, and it sees memory out."""


def frozen_trials(
    lens: Lens,
    task: Task,
    senders: Sequence[End],
    receivers: Sequence[End],
    settings: SweepSettings,
) -> list[Trial]:
    """A trial a sender, each of which precedes a receiver."""
    sent = _Sent.of(task, senders)
    if receivers[0].kind == "logits":
        return [Trial(s.name, _ToLogits(sent, s), _about(s, receivers)) for s in senders]
    start = compared(task)[1]
    paths = _Paths(sent, tuple(senders), tuple(receivers), task, settings)
    order = [site.name for site in lens.anatomy.sites]
    trials: list[Trial] = []
    for sender in senders:
        reached = [own for own in receivers if sender.precedes(own)]
        first = min((own.site for own in reached), key=order.index)
        about = _about(sender, reached)
        trials.append(Trial(sender.name, _ToInputs(paths, sender), about, start, first))
    return trials


def _about(sender: End, receivers: Sequence[End]) -> dict[str, str]:
    return {"path": f"{sender.name} -> {', '.join(own.name for own in receivers)}"}


@dataclass(frozen=True)
class _Sent:
    """What senders write in the other run, with all heads as in the own one."""

    own: Donor
    other: Donor

    @classmethod
    def of(cls, task: Task, senders: Sequence[End]) -> _Sent:
        kinds = {"head": "z", "mlp": "mlp", "embed": "residual"}
        wanted = tuple(dict.fromkeys(kinds[sender.kind] for sender in senders))
        return cls(Donor(task, ("z",), corrupt=False), Donor(task, wanted, corrupt=True))

    def edits(self, lens: Lens, prompts: slice, sender: End) -> tuple[Edit, ...]:
        """All heads held, and the sender's own output that of the other run."""
        held = Freeze("all", self.own.of(lens, prompts)["z"])
        kept = self.other.of(lens, prompts)
        if sender.head is not None:
            return held, Patch(sender.head, "z", kept["z"])
        if sender.kind == "mlp":
            return held, PatchStream(sender.site, stream="mlp", values=kept["mlp"])
        return held, PatchStream(sender.site, values=kept["residual"])


@dataclass(frozen=True)
class _ToLogits:
    """The edits of a sender whose receiver is the logits: the first run is the answer."""

    sent: _Sent
    sender: End

    def __call__(self, lens: Lens, prompts: slice) -> tuple[Edit, ...]:
        return self.sent.edits(lens, prompts, self.sender)


@dataclass(frozen=True)
class _ToInputs:
    """The edits of a sender: its receivers' inputs as recorded in the first run."""

    paths: _Paths
    sender: End

    def __call__(self, lens: Lens, prompts: slice) -> tuple[Edit, ...]:
        return self.paths.received(lens, prompts, self.sender)


@dataclass
class _Paths:
    """Receivers' inputs under the senders of one site, for the prompts whose turn it is."""

    sent: _Sent
    senders: tuple[End, ...]
    receivers: tuple[End, ...]
    task: Task
    settings: SweepSettings
    _prompts: slice | None = field(default=None, repr=False)
    _clean: CleanRun | None = field(default=None, repr=False)
    _site: str = field(default="", repr=False)
    _known: dict[str, tuple[Edit, ...]] = field(default_factory=dict[str, Any], repr=False)
    _restart: bool | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # What was recorded is made anew where a copy goes.
        empty = {"_prompts": None, "_clean": None, "_site": "", "_known": {}, "_restart": None}
        return vars(self) | empty

    def received(self, lens: Lens, prompts: slice, sender: End) -> tuple[Edit, ...]:
        """The edits that put what the receivers read under a sender in their places."""
        if self._prompts != prompts or self._clean is None:
            self._clean, self._site = self._run(lens, prompts), ""
            self._prompts = prompts
        if self._site != sender.site:
            own = [other for other in self.senders if other.site == sender.site]
            self._known = self._first_runs(lens, self._clean, prompts, own)
            self._site = sender.site
        return self._known[sender.name]

    def _run(self, lens: Lens, prompts: slice) -> CleanRun:
        """The prompts as they run unpatched, recorded where this model can be restarted."""
        if self._restart is None:
            self._restart = self.settings.restart
        part = self.task.subset(prompts)
        clean = CleanRun.of(lens, part, part.metric, self._restart)
        self._restart = self._restart and clean.check() is None
        return clean if self._restart else replace(clean, recording=None)

    def _first_runs(
        self, lens: Lens, clean: CleanRun, prompts: slice, senders: Sequence[End]
    ) -> dict[str, tuple[Edit, ...]]:
        """What the receivers read under each of some senders of one site."""
        size = max(self.settings.tokens // clean.tokens, 1)
        found: dict[str, tuple[Edit, ...]] = {}
        for start in range(0, len(senders), size):
            own = senders[start : start + size]
            trials = [self.sent.edits(lens, prompts, sender) for sender in own]
            kept = self._watched(lens, clean, trials)
            for number, sender in enumerate(own):
                found[sender.name] = self._edits(
                    lens.anatomy, kept, number, len(clean.task), sender
                )
        return found

    def _watched(
        self, lens: Lens, clean: CleanRun, trials: Sequence[Sequence[Edit]]
    ) -> dict[str, Mapping[str, Tensor]]:
        """`q`, `k`, `v` and `mlp` of the receivers by site, of all trials side by side."""
        keeps = [
            Keep(lens.anatomy, request, _ALL, lens.mlp_names)
            for request in self._requests(lens.anatomy)
        ]
        last = lens.anatomy.sites[max(end.place[0] for end in self.receivers)]
        site = None if clean.recording is None else clean.first_site(trials[0])
        with suppress(ReachedError):
            clean.forward(trials, site, *keeps, Until(lens.anatomy, last))
        return {kind: found for keep in keeps for kind, found in keep.kept.items()}

    def _requests(self, anatomy: Anatomy) -> list[Request]:
        def request(kind: str, kinds: tuple[str, ...]) -> list[Request]:
            named = {end.site for end in self.receivers if end.kind == kind}
            sites = tuple(site for site in anatomy.sites if site.name in named)
            heads = {site.name: tuple(range(site.heads)) for site in sites}
            return [Request(kinds, sites, heads)] if sites else []

        asked = {part for end in self.receivers if end.kind == "head" for part in end.inputs}
        kinds = tuple(part for part in INPUTS if part in asked)
        return [*request("head", kinds), *request("mlp", ("mlp",))]

    def _edits(
        self,
        anatomy: Anatomy,
        kept: Mapping[str, Mapping[str, Tensor]],
        copy: int,
        prompts: int,
        sender: End,
    ) -> tuple[Edit, ...]:
        """The edits of one sender, out of one copy of what was kept."""
        rows = slice(copy * prompts, (copy + 1) * prompts)
        reached = [end for end in self.receivers if sender.precedes(end)]
        found: list[Edit] = []
        for part in INPUTS:
            heads = [end.head for end in reached if end.head is not None and part in end.inputs]
            if heads:
                found.append(Patch(heads, part, _rows(kept[part], heads, rows)))
        mlps = [end.site for end in reached if end.kind == "mlp"]
        if mlps:
            values = {site: kept["mlp"][site][rows] for site in mlps}
            found.append(PatchStream(",".join(mlps), stream="mlp", values=values))
        return tuple(found)


def _rows(tensors: Mapping[str, Tensor], heads: Sequence[Head], rows: slice) -> dict[str, Tensor]:
    return {site: tensors[site][rows] for site in dict.fromkeys(head.site for head in heads)}
