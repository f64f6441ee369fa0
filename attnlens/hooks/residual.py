"""The residual stream, block by block, shown while the model runs to those who look or change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import SeamError, UnsupportedModelError
from attnlens.hooks.session import Handle, Observer
from attnlens.hooks.thread import this_thread

FINAL = "final"
"""Name of the stream that leaves a last block."""


@dataclass(frozen=True)
class Stream:
    """The residual stream at one place: entering the block of a site, or leaving the last block."""

    site: Site
    """The site whose block it enters, or of the block that it leaves."""
    final: bool = False

    @property
    def name(self) -> str:
        """`L3` for what enters layer 3, `final` for what leaves the last; `enc.L3`, `enc.final`."""
        if not self.final:
            return self.site.name
        return f"{self.site.stack}.{FINAL}" if self.site.stack else FINAL


def streams_of(anatomy: Anatomy, sites: Sequence[Site]) -> tuple[Stream, ...]:
    """The streams that enter the blocks of some sites, and that leave a stack whose last is there.

    A block with self- and cross-attention has one stream, of the first of its sites. Layers without
    attention have none.

    Raises:
        UnsupportedModelError: none of the sites is in a list of blocks.

    """
    wanted = {site.name for site in sites}
    entering: dict[tuple[str, int], Stream] = {}
    last: dict[str, tuple[str, int]] = {}
    asked: set[tuple[str, int]] = set()
    for site in anatomy.sites:
        if site.block is None:
            continue
        place = site.block, site.call
        entering.setdefault(place, Stream(site))
        last[site.block.rpartition(".")[0]] = place
        if site.name in wanted:
            asked.add(place)
    if not asked:
        raise UnsupportedModelError(
            f"{anatomy.model} holds these attention sites in no list of blocks, so there is no "
            "residual stream to look at."
        )
    found: list[Stream] = []
    for place, stream in entering.items():
        if place in asked:
            found.append(stream)
            if place in last.values():
                found.append(Stream(stream.site, final=True))
    return tuple(found)


Look = Callable[[Stream, Tensor], Tensor | None]
"""(stream, its tensor) -> another to go on with, or None to leave it."""


class Passing:
    """Handle of hooks that show streams to `look` as they enter their blocks.

    With `mlps`, the module that each block's MLP ends with, what these return is shown instead.
    Runs of a block that layers share are counted anew in each forward pass of the model. Passes of
    other threads are left alone. With `strict`, a pass in which a stream does not come raises
    SeamError: a module may attend twice in one run of its block, and then its sites share a stream.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        streams: Sequence[Stream],
        look: Look,
        mlps: Mapping[str, str] | None = None,
        strict: bool = False,
    ) -> None:
        self._look = look
        self._thread = this_thread()
        self._runs: Counter[str] = Counter()
        self._handles: list[Handle] = [model.register_forward_pre_hook(self._count_anew)]
        wanted = {(s.site.block, s.site.call): s for s in streams if not s.final}
        for block in dict.fromkeys(block for block, _ in wanted if block is not None):
            calls = dict.fromkeys(site.call for site in anatomy.sites if site.block == block)
            own = [wanted.get((block, call)) for call in calls]
            module = model.get_submodule(block if mlps is None else mlps[block])
            if mlps is None:
                hook = self._entering(block, own)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles += self._leaving(model.get_submodule(block), module, block, own)
            if strict:
                self._handles.append(model.register_forward_hook(self._check(block, own)))

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()

    def _here(self) -> bool:
        return this_thread() == self._thread

    def _count_anew(self, *_: object) -> None:
        if self._here():
            self._runs.clear()

    def _shown(self, block: str, streams: Sequence[Stream | None], tensor: Tensor) -> Tensor | None:
        """What is to go on in the place of a tensor; None for the tensor itself."""
        if not self._here():
            return None
        stream = streams[self._runs[block] % len(streams)]
        self._runs[block] += 1
        return None if stream is None else self._look(stream, tensor)

    def _entering(self, block: str, streams: Sequence[Stream | None]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = self._shown(block, streams, args[0] if args else kwargs["hidden_states"])
            if changed is None:
                return None
            if args:
                return (changed, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": changed}

        return hook

    def _leaving(
        self, around: nn.Module, mlp: nn.Module, block: str, streams: Sequence[Stream | None]
    ) -> list[Handle]:
        shapes: list[torch.Size] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shapes[:] = [(args[0] if args else kwargs["hidden_states"]).shape]

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            alone = isinstance(output, Tensor)
            written: Tensor = output if alone else output[0]
            # Some blocks fold prompts and positions into one axis before their MLP.
            changed = self._shown(block, streams, written.reshape(*shapes[0][:-1], -1))
            if changed is None:
                return None
            changed = changed.reshape(written.shape)
            return changed if alone else (changed, *output[1:])

        return [
            around.register_forward_pre_hook(enter, with_kwargs=True),
            mlp.register_forward_hook(leave),
        ]

    def _check(self, block: str, streams: Sequence[Stream | None]) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs = self._runs[block]
            silent = [stream.name for stream in streams[runs:] if stream is not None]
            if self._here() and runs and silent:
                raise SeamError(
                    f"{silent[0]} has no stream of its own: its block {block} runs once and "
                    "attends more often. Name the block's first site."
                )

        return hook


class Residual(Observer):
    """Observer that shows each stream to `look(stream, tensor)` as it passes, detached.

    What leaves a last block is shown when the model is done, since layers may share the block.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        streams: Sequence[Stream],
        look: Callable[[Stream, Tensor], None],
    ) -> None:
        self._anatomy = anatomy
        self._streams = tuple(streams)
        self._look = look
        self._left: dict[str, tuple[Stream, Tensor]] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on the blocks of the streams, and on the model's end."""
        handles: list[Handle] = [
            model.register_forward_hook(self._end),
            Passing(model, self._anatomy, self._streams, self._show),
        ]
        for stream in self._streams:
            if stream.final and stream.site.block is not None:
                block = model.get_submodule(stream.site.block)
                handles.append(block.register_forward_hook(self._leave(stream)))
        return handles

    def _leave(self, stream: Stream) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._left[stream.name] = stream, output if isinstance(output, Tensor) else output[0]

        return hook

    def _end(self, *_: object) -> None:
        while self._left:
            self._show(*self._left.popitem()[1])

    def _show(self, stream: Stream, tensor: Tensor) -> None:
        with torch.no_grad():
            self._look(stream, tensor.detach())
