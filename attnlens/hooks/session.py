"""Attach to a model and let go of it again, always restoring.

A session switches the model's attention to the seam, listens at its attention modules, and hands
each call of a site to its observers in turn. Sessions nest: the one opened first sees a call first,
so what an outer session changes, an inner one sees. Only calls made by the thread that opened the
session are seen. Closing puts everything back as it was, after an error too; a session that saw no
call at a site it was asked for raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

from torch import nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import SeamError
from attnlens.hooks import seam
from attnlens.hooks.seam import Asked, Call
from attnlens.hooks.thread import this_thread


class Handle(Protocol):
    """Something put on a model that can be taken off again."""

    def remove(self) -> None:
        """Take it off."""
        ...


class Observer:
    """What a session hands its calls to: keeps, reducers and edits. By itself it does nothing."""

    sites: frozenset[str] = frozenset()
    """Names of the sites it wants to see."""

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks of its own that the session removes again, for what the seam does not show."""
        return ()

    def enter(self, site: Site, asked: Asked) -> Asked:
        """See one call at a site before the kernel runs; return it, changed or not."""
        return asked

    def see(self, site: Site, call: Call) -> Call:
        """See one call at a site; return it, changed or not."""
        return call


class Session:
    """The instrument attached to one model: `with Session(model, anatomy, observers): ...`."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        observers: Sequence[Observer],
    ) -> None:
        self.model = model
        self.observers = tuple(observers)
        self.fired: Counter[str] = Counter()
        self._modules = _by_module(anatomy.sites)
        self._names: dict[int, str] = {}
        self._calls: Counter[str] = Counter()
        self._inside = False
        self._site: Site | None = None
        self._thread: int | None = None
        self._undo = ExitStack()

    def __enter__(self) -> Session:
        if self._thread is not None:
            raise SeamError("This session is open already; make a new one to nest.")
        self._thread = this_thread()
        try:
            self._undo.callback(seam.restore, seam.switch(self.model))
            for name in self._modules:
                module = self.model.get_submodule(name)
                self._names[id(module)] = name
                seam.listen(module, self)
                self._undo.callback(seam.unlisten, module, self)
            for observer in self.observers:
                for hook in observer.attach(self.model):
                    self._undo.callback(hook.remove)
            for handle in (
                self.model.register_forward_pre_hook(self._enter_forward),
                self.model.register_forward_hook(self._leave_forward, always_call=True),
            ):
                self._undo.callback(handle.remove)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if kind is None:
            self.check_fired()

    def close(self) -> None:
        """Let go of the model, of all of it even where a step fails; again does nothing more."""
        try:
            self._undo.close()
        finally:
            self._names.clear()
            self._thread = None

    def attending(self, asked: Asked) -> Asked:
        """Hand one call to the observers that want its site, before the kernel runs."""
        if this_thread() != self._thread:
            return asked
        name = self._names[id(asked.module)]
        self._site = site = self._next_site(name, self._modules[name])
        for observer in self.observers:
            if site.name in observer.sites:
                asked = observer.enter(site, asked)
        return asked

    def attended(self, call: Call) -> Call:
        """Hand the same call to the same observers with what the kernel returned."""
        if this_thread() != self._thread:
            return call
        site = self._site
        assert site is not None
        self.fired[site.name] += 1
        for observer in self.observers:
            if site.name in observer.sites:
                call = observer.see(site, call)
        return call

    def _next_site(self, name: str, sites: Sequence[Site]) -> Site:
        """Which of a module's sites this call is, by its number in the forward pass."""
        call = self._calls[name]
        if call >= len(sites) and self._inside:
            raise SeamError(
                f"{name} attended more often in this forward pass than the {len(sites)} times seen "
                "when the model was examined (another number of images or chunks, perhaps). Open "
                "the model with an input of this shape: al.load(model, example=...)."
            )
        self._calls[name] += 1
        return sites[call % len(sites)]

    def _enter_forward(self, *_: object) -> None:
        self._count_anew(inside=True)

    def _leave_forward(self, *_: object) -> None:
        self._count_anew(inside=False)

    def _count_anew(self, inside: bool) -> None:
        if this_thread() == self._thread:
            self._calls.clear()
            self._inside = inside

    def check_fired(self) -> None:
        """Raise if a site that an observer asked for was never called."""
        asked = frozenset[str]().union(*(observer.sites for observer in self.observers))
        silent = sorted(asked - set(self.fired))
        if silent:
            raise SeamError(
                f"No attention call was seen at {', '.join(silent)}. The model did not run these "
                "sites on this input (an encoder without its decoder, or text without images); "
                "name only sites that run."
            )


def _by_module(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites by module name, in the order of their calls."""
    found: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda site: site.call):
        found.setdefault(site.module, []).append(site)
    return found
