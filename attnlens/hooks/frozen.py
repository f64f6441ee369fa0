"""Attention that is known from a recorded run: returned again, uncomputed; at some rows alone.

Where all attention is known, no position depends on another, so a forward at the rows that somebody
reads gives what a forward at all rows gives there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.hooks.replaced import Replaced, of_this_thread
from attnlens.hooks.residual import Passing, Stream
from attnlens.hooks.restart import Attended, Ran, Recording
from attnlens.hooks.returned import put, tensors_of, widened
from attnlens.hooks.session import Handle, Observer


class Frozen(Observer):
    """Observer under which some sites' modules return what they returned in the recorded run.

    The run's inputs are `times` copies of the recorded batch. A module whose return value is more
    than z through its output projection cannot be told so: ask `Attended.takes_z` first.
    """

    def __init__(self, recording: Recording, sites: Sequence[Site], times: int = 1) -> None:
        self._ran = {site.module: recording.of(site.name).ran for site in sites}
        self._times = times

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Replace the modules' forwards, for this thread."""
        return [
            Replaced(model.get_submodule(module), self._returning(run))
            for module, run in self._ran.items()
        ]

    def _returning(self, run: Ran) -> Callable[..., Any]:
        return lambda *_, **__: put(run.value, widened(run.value, self._times))


class ReachedError(Exception):
    """The forward came as far as it was wanted."""


class Until(Observer):
    """Observer under which a forward ends, with `ReachedError`, when the block of a site is done.

    Where sites share a block, or have none, it runs to its end.
    """

    def __init__(self, anatomy: Anatomy, site: Site) -> None:
        alone = {other.call for other in anatomy.sites if other.block == site.block} == {0}
        self._block = site.block if alone else None

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hook the end of the block."""
        if self._block is None:
            return ()
        return [model.get_submodule(self._block).register_forward_hook(of_this_thread(self._end))]

    def _end(self, *_: object) -> None:
        raise ReachedError


class Entering(Observer):
    """Observer that puts a stream, as often as there are copies, where the first block is entered.

    Without one it keeps what comes there, as `stream`, and ends the forward with `ReachedError`.
    """

    def __init__(self, anatomy: Anatomy, stream: Tensor | None = None, times: int = 1) -> None:
        self.stream = stream
        self._anatomy = anatomy
        self._times = times

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hook the first block."""
        return [Passing(model, self._anatomy, [Stream(self._anatomy.sites[0])], self._enter)]

    def _enter(self, _: Stream, tensor: Tensor) -> Tensor:
        if self.stream is not None:
            return self.stream.repeat(self._times, *[1] * (tensor.ndim - 1))
        self.stream = tensor.detach()
        raise ReachedError


def at_rows(recording: Recording, rows: Int[Tensor, "batch row"]) -> Recording:
    """What was recorded at some rows of each prompt, as if there were no others."""
    sizes = next(iter(recording.attention.values())).call.query.shape
    shape = sizes[0], sizes[2]

    def cut_shape(own: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return (*rows.shape, *own[2:]) if own is not None and tuple(own[:2]) == shape else own

    def cut_run(run: Ran) -> Ran:
        held = [
            rows_of(tensor, rows, 1) if tuple(tensor.shape[:2]) == shape else tensor
            for tensor in tensors_of(run.value)
        ]
        return replace(run, value=put(run.value, held), entered=cut_shape(run.entered))

    def cut_site(own: Attended) -> Attended:
        call = own.call
        call = replace(
            call,
            query=rows_of(call.query, rows, 2),
            key=rows_of(call.key[:, :, -shape[1] :], rows, 2),
            value=rows_of(call.value[:, :, -shape[1] :], rows, 2),
            output=rows_of(call.output, rows, 1),
            mask=None,
        )
        return Attended(call, cut_run(own.ran), own.projection, cut_shape(own.projected))

    attention = {name: cut_site(own) for name, own in recording.attention.items()}
    return replace(recording, ran=tuple(map(cut_run, recording.ran)), attention=attention)


def rows_of(tensor: Tensor, rows: Int[Tensor, "batch row"], axis: int) -> Tensor:
    """Some positions of each prompt, `axis` being that of positions; one prompt may serve all."""
    if tensor.shape[0] == 1 != rows.shape[0]:
        tensor = tensor.expand(rows.shape[0], *tensor.shape[1:])
    shape = [rows.shape[0], *[1] * (tensor.ndim - 1)]
    shape[axis] = rows.shape[1]
    wanted = list(tensor.shape)
    wanted[axis] = rows.shape[1]
    return torch.gather(tensor, axis, rows.to(tensor.device).view(shape).expand(wanted))
