"""Massive activations: a few coordinates of the residual stream, thousands of times the others.

Sun et al. 2024, Massive activations in large language models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import HeadSpec
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.residual import Residual, Stream, streams_of
from attnlens.hooks.tokens import Sides, Tokens
from attnlens.lens import Batch, Inputs, Lens
from attnlens.lens.inputs import split

TOP = 3
MOST = 1000
"""Coordinates listed of one prompt and stream; more than these are counted, not listed."""


@dataclass(frozen=True)
class MassiveActivation:
    """One massive coordinate of one prompt."""

    prompt: int
    position: int
    """From the prompt's first real token."""
    token: str
    stream: str
    channel: int
    value: float


@dataclass(frozen=True)
class MassiveActivations:
    """Massive coordinates of the residual stream, and how large each stream is.

    Attributes:
        streams: `L3` is the stream that enters the block of layer 3, `final` leaves the last one.
        top: the three largest `|x|` of a prompt, each `stream rank`.
        median: median `|x|` of a prompt over its real positions and all channels, a stream.
        counts: number of massive coordinates, `prompt stream`.
        found: the massive coordinates, the largest first.
        prompts: number of prompts.
        threshold, ratio: a coordinate is massive where `|x| > threshold` and `|x| >= ratio *
            median`.
        notes: what a reader should know.

    """

    streams: tuple[str, ...]
    top: Interval
    median: Interval
    counts: Int[Tensor, "prompt stream"]
    found: tuple[MassiveActivation, ...]
    prompts: int
    threshold: float
    ratio: float
    notes: tuple[str, ...]

    def channels(self, stack: str = "") -> tuple[int, ...]:
        """The channels that are massive in any stream of a stack."""
        return tuple(sorted({one.channel for one in self.found if _stack(one.stream) == stack}))

    def to_frame(self) -> pd.DataFrame:
        """One row a stream: magnitudes, massive coordinates a prompt, where they are."""
        rows: list[dict[str, Any]] = []
        for number, stream in enumerate(self.streams):
            row: dict[str, Any] = {"stream": stream}
            for rank in range(self.top.mean.shape[1]):
                row |= _with_bounds(f"top_{rank + 1}", self.top, (number, rank))
            row |= _with_bounds("median", self.median, (number,))
            own = [one for one in self.found if one.stream == stream]
            row["massive"] = float(self.counts[:, number].double().mean())
            row["prompts"] = int((self.counts[:, number] > 0).sum())
            row["channels"] = _list(sorted({one.channel for one in own}))
            row["positions"] = _list(_places(own))
            rows.append(row)
        return pd.DataFrame(rows)

    def by_channel(self) -> pd.DataFrame:
        """One row a massive channel: its streams, prompts, positions, mean and largest value."""
        groups: dict[tuple[str, int], list[MassiveActivation]] = {}
        for one in self.found:
            groups.setdefault((_stack(one.stream), one.channel), []).append(one)
        rows: list[dict[str, Any]] = []
        for (stack, channel), own in groups.items():
            there = [stream for stream in self.streams if any(o.stream == stream for o in own)]
            rows.append(
                {
                    "channel": channel,
                    "stack": stack,
                    "first": there[0],
                    "last": there[-1],
                    "streams": len(there),
                    "prompts": len({one.prompt for one in own}),
                    "positions": _list(_places(own)),
                    "mean": math.fsum(one.value for one in own) / len(own),
                    "largest": own[0].value,
                }
            )
        return pd.DataFrame(rows, columns=_BY_CHANNEL)

    def by_position(self) -> pd.DataFrame:
        """One row a position and token that holds a massive coordinate: prompts, channels."""
        groups: dict[tuple[str, int, str], list[MassiveActivation]] = {}
        for one in self.found:
            groups.setdefault((_stack(one.stream), one.position, one.token), []).append(one)
        rows: list[dict[str, Any]] = [
            {
                "position": position,
                "token": token,
                "stack": stack,
                "prompts": len({one.prompt for one in own}),
                "channels": _list(sorted({one.channel for one in own})),
                "largest": own[0].value,
            }
            for (stack, position, token), own in groups.items()
        ]
        frame = pd.DataFrame(rows, columns=_BY_POSITION)
        return frame.sort_values("prompts", ascending=False, kind="stable", ignore_index=True)


_BY_CHANNEL = ["channel", "stack", "first", "last", "streams", "prompts", "positions", "mean",
               "largest"]  # fmt: skip
_BY_POSITION = ["position", "token", "stack", "prompts", "channels", "largest"]


def massive_activations(
    lens: Lens,
    texts: Inputs,
    threshold: float = 100.0,
    ratio: float = 1000.0,
    layers: HeadSpec | int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> MassiveActivations:
    """Find residual coordinates with `|x| > threshold` and `|x| >= ratio * median |x|`.

    The median is that of one prompt's stream, over its real positions and all channels (of an even
    number of values the lower middle one). Streams are reduced as they pass, so that memory does
    not grow with the layers. Sun et al. 2024.

    Raises:
        InputError: a threshold that is not positive, or a ratio below 1.
        UnsupportedModelError: a model without blocks, so without a residual stream.

    """
    if not (0 < threshold < math.inf and 1 <= ratio < math.inf):
        raise InputError(
            f"threshold={threshold} and ratio={ratio} cannot be used: threshold is a magnitude "
            "above 0, ratio a multiple of the median, 1 or more."
        )
    check_bootstrap(resamples, confidence)
    whole = lens.encode(texts)
    anatomy = lens.anatomy_for(whole)
    streams = streams_of(anatomy, anatomy.layers(layers))
    tally = _Tally(lens, threshold, ratio, whole.size)
    parts, order = split(whole, batch_size)
    for part in parts:
        prompts, order = order[: part.size], order[part.size :]
        tally.part(part, prompts)
        lens.observe(part, Residual(anatomy, streams, tally.look))
    return tally.result(streams, (resamples, confidence, seed))


def magnitudes(
    x: Float[Tensor, "position channel"], threshold: float, ratio: float
) -> tuple[Float[Tensor, " rank"], Float[Tensor, ""], Int[Tensor, "found 2"], int]:
    """The largest `|x|`, the median, the massive coordinates (largest first), and their number."""
    size = x.abs()
    median = size.flatten().median()
    top = size.flatten().topk(min(TOP, size.numel())).values
    massive = (size > threshold) & (size >= ratio * median)
    places = massive.nonzero()
    largest = size[massive].argsort(descending=True)[:MOST]
    return top, median, places[largest], len(places)


@dataclass
class _Tally:
    """What is kept of the streams: a few numbers a prompt and stream."""

    lens: Lens
    threshold: float
    ratio: float
    size: int
    sides: Sides | None = None
    prompts: Sequence[int] = ()
    top: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    median: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    counts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    found: list[MassiveActivation] = field(default_factory=list[MassiveActivation])
    left_out: set[str] = field(default_factory=set[str])

    def part(self, part: Batch, prompts: Sequence[int]) -> None:
        """The batch that runs next, and which prompts it holds."""
        self.sides, self.prompts = part.sides, prompts

    def look(self, stream: Stream, tensor: Tensor) -> None:
        """Reduce one stream of the batch."""
        if tensor.ndim != 3 or tensor.shape[0] != len(self.prompts):
            self.left_out.add(stream.name)
            return
        assert self.sides is not None
        tokens = self.sides.queries(stream.site).cut(tensor.shape[1])
        for row, prompt in enumerate(self.prompts):
            x = tensor[row] if tokens.real is None else tensor[row][tokens.real[row]]
            x = x if x.dtype == torch.float64 else x.float()
            top, median, places, count = magnitudes(x, self.threshold, self.ratio)
            self._room(stream.name)
            self.top[stream.name][prompt, : len(top)] = top.cpu()
            self.median[stream.name][prompt] = median.cpu()
            self.counts[stream.name][prompt] = count
            values = x[places[:, 0], places[:, 1]].tolist()
            for (position, channel), value in zip(places.tolist(), values, strict=True):
                token = self._token(tokens, row, position)
                self.found.append(
                    MassiveActivation(prompt, position, token, stream.name, channel, value)
                )

    def _room(self, stream: str) -> None:
        if stream not in self.top:
            self.top[stream] = torch.full((self.size, TOP), torch.nan, dtype=torch.float64)
            self.median[stream] = torch.full((self.size,), torch.nan, dtype=torch.float64)
            self.counts[stream] = torch.zeros(self.size, dtype=torch.long)

    def _token(self, tokens: Tokens, row: int, position: int) -> str:
        """Text of the token at a real position; "" where positions are no tokens (an image)."""
        if tokens.ids is None:
            return ""
        ids = tokens.ids[row] if tokens.real is None else tokens.ids[row][tokens.real[row]]
        return self.lens.token_texts([int(ids[position])])[0]

    def result(
        self, streams: Sequence[Stream], bootstrap: tuple[int, float, int]
    ) -> MassiveActivations:
        """All batches together."""
        names = tuple(stream.name for stream in streams if stream.name in self.top)
        if not names:
            raise UnsupportedModelError(
                f"{self.lens.anatomy.model} has no stream of one vector a prompt and position, so "
                "its coordinates cannot be told apart by prompt."
            )
        top = torch.stack([self.top[name] for name in names], 1)
        median = torch.stack([self.median[name] for name in names], 1)
        return MassiveActivations(
            names,
            bootstrap_mean(top, *bootstrap),
            bootstrap_mean(median, *bootstrap),
            torch.stack([self.counts[name] for name in names], 1),
            tuple(sorted(self.found, key=lambda one: -abs(one.value))),
            self.size,
            self.threshold,
            self.ratio,
            self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        notes: list[str] = []
        if self.size < 2:
            notes.append("One prompt gives no interval over prompts; give several.")
        if self.left_out:
            names = _list(sorted(self.left_out))
            notes.append(f"Left out, because their first axis is not the prompt: {names}.")
        if any(bool((counts > MOST).any()) for counts in self.counts.values()):
            notes.append(
                f"A prompt has over {MOST} massive coordinates in one stream, of which the largest "
                f"{MOST} are listed; the threshold is low."
            )
        return tuple(notes)


def _with_bounds(name: str, interval: Interval, place: tuple[int, ...]) -> dict[str, float]:
    values = {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {column: float(tensor[place]) for column, tensor in values.items()}


def _places(found: Sequence[MassiveActivation]) -> list[int]:
    """Positions, the commonest first."""
    return [place for place, _ in Counter(one.position for one in found).most_common()]


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


def _stack(stream: str) -> str:
    return stream.rpartition(".")[0]
