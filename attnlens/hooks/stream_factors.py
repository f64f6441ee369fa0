"""By what factor each writer is seen at each place where the residual stream is read.

Every writer is held at what it wrote, so that nothing passes on but the stream itself, and each has
a copy of the prompt in which noise is added to it. What arrives of the noise at a place is the
writer's factor there; where something else arrives, the stream is no sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.module_runs import Seen, embeddings
from attnlens.hooks.probe import evaluating
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.returned import put, tensors_of
from attnlens.hooks.session import Handle, Observer, Session
from attnlens.hooks.wiring import Reader, Writer

_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2, torch.float64: 1e-6}
"""What rounding may leave of a stream, as a share of its size; 1e-4 in float32."""
_ONE = {torch.float16: 5e-3, torch.bfloat16: 5e-3, torch.float64: 1e-9}
"""How near to 1 a factor is 1: it is a mean over all numbers of a prompt; 1e-5 in float32."""
_COPIES = 64
"""Copies of the prompt in one forward."""


def stream_factors(
    model: nn.Module,
    anatomy: Anatomy,
    writers: Sequence[Writer],
    readers: Sequence[Reader],
    seen: Seen,
    example: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """By place, the factor of every writer that is seen there."""
    places = dict.fromkeys(reader.place for reader in readers)
    found: dict[str, dict[str, float]] = {place: {} for place in places}
    batch = len(next(value for value in example.values() if isinstance(value, Tensor)))
    for start in range(0, len(writers), _COPIES):
        part = writers[start : start + _COPIES]
        held = _Held(anatomy, writers, part, seen, batch, tuple(places))
        with evaluating(model), Session(model, anatomy, [held]):
            model(**_copies(example, batch, len(part) + 1))
        for place, arrived in held.arrived.items():
            for writer, noise, change in zip(part, held.noise, _changes(arrived), strict=True):
                factor = _factor(anatomy, writer, place, noise, change, arrived)
                if factor:
                    found[place][writer.name] = factor
    return found


def _copies(example: Mapping[str, Any], batch: int, times: int) -> dict[str, Any]:
    """The first prompt, so many times."""
    return {
        name: value[:1].repeat(times, *[1] * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim and len(value) == batch
        else value
        for name, value in example.items()
    }


def _changes(arrived: Float[Tensor, "copy position d"]) -> Float[Tensor, "copy position d"]:
    """What is different from the first copy, to which no noise was added."""
    wide = arrived.double()
    return wide[1:] - wide[:1]


def _factor(
    anatomy: Anatomy, writer: Writer, place: str, noise: Tensor, change: Tensor, arrived: Tensor
) -> float:
    """By what factor noise arrived; 0 where nothing did."""
    tolerance = _TOLERANCE.get(arrived.dtype, 1e-4)
    if change.shape != noise.shape:  # a place of the other stack
        return 0.0 if not bool(change.any()) else _no_sum(anatomy, writer, place)
    size = float(noise.norm())
    # Rounding goes with the stream, of which the noise may be a small part.
    rough = tolerance * max(size, float(arrived[0].double().norm()))
    if float(change.norm()) <= rough:
        return 0.0
    factor = float((change * noise).sum() / size**2)
    if float((change - factor * noise).norm()) > rough:
        return _no_sum(anatomy, writer, place)
    return 1.0 if abs(factor - 1) < _ONE.get(arrived.dtype, 1e-5) else factor


def _no_sum(anatomy: Anatomy, writer: Writer, place: str) -> float:
    raise UnsupportedModelError(
        f"What {writer.name} of {anatomy.model} writes is not simply added to the stream that "
        f"{place} reads: a norm or another step stands between (post-norm blocks, norms of what is "
        "written). So the stream is no sum of what nodes wrote, and its edges are not defined. "
        "Patch whole heads instead: al.patch(lens, task), or al.path_patch(lens, task)."
    )


class _Held(Observer):
    """Observer that holds writers at what they wrote, each of `part` with noise in its own copy."""

    def __init__(
        self,
        anatomy: Anatomy,
        writers: Sequence[Writer],
        part: Sequence[Writer],
        seen: Seen,
        batch: int,
        places: Sequence[str],
    ) -> None:
        self.arrived: dict[str, Tensor] = {}
        self._anatomy = anatomy
        self._writers = writers
        self._places = places
        generator = torch.Generator().manual_seed(0)
        own = {w.name: first_prompt(seen.written[w.name].made, batch) for w in writers}
        sizes = {name: float(tensor.double().pow(2).mean().sqrt()) for name, tensor in own.items()}
        # Beside the stream even what a silent part adds has to be seen.
        self.noise = [
            _noise(own[w.name], max(sizes[w.name], sizes[w.stream]) or 1.0, generator) for w in part
        ]
        self._held: dict[str, Tensor] = {}
        for writer in writers:
            copies = own[writer.name].repeat(len(part) + 1, 1, 1)
            for number, (other, noise) in enumerate(zip(part, self.noise, strict=True)):
                if other.name == writer.name:
                    copies[number + 1] += noise.to(copies)
            self._held[writer.name] = copies

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on writers and places."""
        return list(self._hooks(model))

    def _hooks(self, model: nn.Module) -> Iterator[Handle]:
        for writer in self._writers:
            held = self._held[writer.name]
            if writer.kind == "embed":
                look: Callable[[Tensor], Tensor] = lambda stream, held=held: held.to(stream)  # noqa: E731
                yield embeddings(model, self._anatomy, writer, look)
            else:
                module = model.get_submodule(writer.module)
                yield module.register_forward_hook(of_this_thread(_returns(held)))
        for place in self._places:
            module = model.get_submodule(place)
            yield module.register_forward_pre_hook(of_this_thread(self._arrive(place)))

    def _arrive(self, place: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.arrived[place] = (
                args[0].detach().reshape(len(self.noise) + 1, -1, args[0].shape[-1])
            )

        return hook


def _returns(held: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], made: Any) -> Any:
        first, *others = tensors_of(made)
        return put(made, [held.reshape(first.shape).to(first), *others])

    return hook


def first_prompt(made: Tensor, batch: int) -> Float[Tensor, "1 position d"]:
    """What was written for the first prompt; some modules fold prompts into one axis."""
    return made.reshape(batch, -1, made.shape[-1])[:1].clone()


def _noise(
    like: Float[Tensor, "1 position d"], size: float, generator: torch.Generator
) -> Float[Tensor, "position d"]:
    noise = torch.randn(like.shape[1:], generator=generator, dtype=torch.float64)
    return size * noise.to(like.device)


def check_sums(
    anatomy: Anatomy,
    readers: Sequence[Reader],
    factors: Mapping[str, Mapping[str, float]],
    seen: Seen,
) -> None:
    """Raise where two prompts' streams differ by more than what the writers wrote."""
    for place in dict.fromkeys(reader.place for reader in readers):
        given = seen.run(place).given
        stream = given.double()
        if stream.ndim != 3 or len(stream) < 2:
            continue
        wanted = stream[1] - stream[0]
        total = torch.zeros_like(wanted)
        size = stream.norm()
        for name, factor in factors[place].items():
            written = seen.written[name].made.double().reshape(len(stream), -1, stream.shape[-1])
            total += factor * (written[1] - written[0])
            size = torch.maximum(size, written.norm())
        if float((wanted - total).norm()) > _TOLERANCE.get(given.dtype, 1e-4) * float(size):
            raise UnsupportedModelError(
                f"The stream that {place} of {anatomy.model} reads holds more than embeddings, "
                "heads and MLPs wrote: some other module writes to it (a layer without attention, "
                "a router), so its edges are not all known."
            )
