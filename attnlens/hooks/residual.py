"""Look at the residual stream block by block while the model runs; nothing of it is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.session import Handle, Observer

FINAL = "final"


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


class Residual(Observer):
    """Observer that shows each stream to `look(stream, tensor)` as it passes, detached.

    What leaves a last block is shown when the model is done, since layers may share the block.
    """

    sites: frozenset[str] = frozenset()

    def __init__(
        self,
        anatomy: Anatomy,
        streams: Sequence[Stream],
        look: Callable[[Stream, Tensor], None],
    ) -> None:
        self._anatomy = anatomy
        self._streams = tuple(streams)
        self._look = look
        self._calls: Counter[str] = Counter()
        self._left: dict[str, tuple[Stream, Tensor]] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on the blocks of the streams, and on the model's end."""
        handles = [model.register_forward_hook(self._end)]
        for stream in self._streams:
            name = stream.site.block
            assert name is not None
            block = model.get_submodule(name)
            if stream.final:
                handles.append(block.register_forward_hook(self._leave(stream)))
        for name in dict.fromkeys(s.site.block for s in self._streams if not s.final):
            assert name is not None
            enter = self._enter(name)
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        return handles

    def _enter(self, block: str) -> Callable[..., None]:
        calls = list(dict.fromkeys(s.call for s in self._anatomy.sites if s.block == block))
        own = {s.site.call: s for s in self._streams if s.site.block == block and not s.final}

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            number = self._calls[block]
            self._calls[block] += 1
            if number < len(calls) and calls[number] in own:
                self._show(own[calls[number]], args[0] if args else kwargs["hidden_states"])

        return hook

    def _leave(self, stream: Stream) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._left[stream.name] = stream, output if isinstance(output, Tensor) else output[0]

        return hook

    def _end(self, *_: object) -> None:
        self._calls.clear()
        while self._left:
            self._show(*self._left.popitem()[1])

    def _show(self, stream: Stream, tensor: Tensor) -> None:
        with torch.no_grad():
            self._look(stream, tensor.detach())
