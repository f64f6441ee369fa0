"""Look at the residual stream block by block while the model runs; nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.seam import Call

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
    leaving: dict[str, Stream] = {}
    for site in anatomy.sites:
        if site.block is None:
            continue
        stream = entering.setdefault((site.block, site.call), Stream(site))
        leaving[site.block.rpartition(".")[0]] = Stream(stream.site, final=True)
    asked = [stream for stream in entering.values() if stream.site.name in wanted]
    ends = [stream for stream in leaving.values() if stream.site.name in wanted]
    if not asked:
        raise UnsupportedModelError(
            f"{anatomy.model} holds these attention sites in no list of blocks, so there is no "
            "residual stream to look at."
        )
    places = {site.name: place for place, site in enumerate(anatomy.sites)}
    return tuple(sorted((*asked, *ends), key=lambda s: (places[s.site.name], s.final)))


class Residual:
    """Observer that shows each stream to `look(stream, tensor)` as it passes, detached."""

    sites: frozenset[str] = frozenset()

    def __init__(
        self,
        anatomy: Anatomy,
        streams: Sequence[Stream],
        look: Callable[[Stream, Tensor], None],
    ) -> None:
        self.seen: set[str] = set()
        self._anatomy = anatomy
        self._streams = tuple(streams)
        self._look = look

    def attach(self, model: nn.Module) -> Sequence[RemovableHandle]:
        """Hooks on the blocks of the streams."""
        handles: list[RemovableHandle] = []
        for name in dict.fromkeys(stream.site.block for stream in self._streams):
            assert name is not None
            block, calls = model.get_submodule(name), _calls(self._anatomy, name)
            own = [stream for stream in self._streams if stream.site.block == name]
            entering = {s.site.call: s for s in own if not s.final}
            leaving = {s.site.call: s for s in own if s.final}
            enter, leave = self._enter(calls, entering), self._leave(calls, leaving)
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        return handles

    def see(self, site: Site, call: Call) -> Call:
        """Nothing at the seam."""
        return call

    def _enter(self, calls: Sequence[int], streams: Mapping[int, Stream]) -> Callable[..., None]:
        count = [0]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._show(calls, count, streams, args[0] if args else kwargs["hidden_states"])

        return hook

    def _leave(self, calls: Sequence[int], streams: Mapping[int, Stream]) -> Callable[..., None]:
        count = [0]

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._show(calls, count, streams, output if isinstance(output, Tensor) else output[0])

        return hook

    def _show(
        self,
        calls: Sequence[int],
        count: list[int],
        streams: Mapping[int, Stream],
        tensor: Tensor,
    ) -> None:
        """Count a call of the block, and show its stream if it is one of those asked for."""
        call = calls[count[0] % len(calls)]
        count[0] += 1
        if call in streams:
            self.seen.add(streams[call].name)
            with torch.no_grad():
                self._look(streams[call], tensor.detach())


def _calls(anatomy: Anatomy, block: str) -> list[int]:
    """The numbers of a block's calls in one forward pass: several where layers share the block."""
    return list(dict.fromkeys(site.call for site in anatomy.sites if site.block == block))
