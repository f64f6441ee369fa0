"""Image tokens of models that read images and text: which positions they are, which are sinks.

Kang et al. 2025, See what you are told: visual attention sink in large multimodal models (VAR).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.analyses.massive_activations import massive_activations
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import HeadSpec, Site
from attnlens.errors import HeadError, InputError
from attnlens.hooks.residual import Residual, Stream, streams_of
from attnlens.hooks.tokens import Sides
from attnlens.lens import Batch, Inputs, Lens
from attnlens.lens.inputs import split

IMAGE_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Where a config names the tokens that stand for pieces of an image or a video."""


@dataclass(frozen=True)
class VisualSink:
    """An image token that is a sink in one stream."""

    prompt: int
    position: int
    """From the prompt's first real token."""
    stream: str
    channel: int
    """The sink channel with the largest value."""
    value: float
    """`|RMSNorm(x)_c|` of that channel."""


@dataclass(frozen=True)
class VisualSinks:
    """Image tokens whose sink channels stand out, by stream.

    Attributes:
        streams: `L3` is the stream that enters the block of layer 3, `final` leaves the last one.
        rate: share of a prompt's image tokens that are sinks, a stream.
        text_rate: the same share of its other tokens.
        found: the image tokens that are sinks, the largest value first.
        channels: the sink channels.
        image_tokens: number of image tokens of each prompt.
        threshold: a token is a sink where `max_c |RMSNorm(x)_c|` over the sink channels exceeds it.
        notes: what a reader should know.

    """

    streams: tuple[str, ...]
    rate: Interval
    text_rate: Interval
    found: tuple[VisualSink, ...]
    channels: tuple[int, ...]
    image_tokens: tuple[int, ...]
    threshold: float
    notes: tuple[str, ...]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.image_tokens)

    def to_frame(self) -> pd.DataFrame:
        """One row a stream: share of image and of other tokens that are sinks, and how many."""
        rows: list[dict[str, Any]] = []
        for number, stream in enumerate(self.streams):
            row: dict[str, Any] = {"stream": stream}
            for name, interval in (("rate", self.rate), ("text_rate", self.text_rate)):
                row |= {name: float(interval.mean[number])}
                row |= {f"{name}_low": float(interval.low[number])}
                row |= {f"{name}_high": float(interval.high[number])}
            row["sinks"] = sum(one.stream == stream for one in self.found)
            rows.append(row)
        return pd.DataFrame(rows)

    def by_token(self) -> pd.DataFrame:
        """One row an image token that is a sink: prompt, position, streams, largest value."""
        groups: dict[tuple[int, int], list[VisualSink]] = {}
        for one in self.found:
            groups.setdefault((one.prompt, one.position), []).append(one)
        rows = [
            {
                "prompt": prompt,
                "position": position,
                "streams": len(own),
                "channel": own[0].channel,
                "value": own[0].value,
            }
            for (prompt, position), own in groups.items()
        ]
        return pd.DataFrame(rows, columns=["prompt", "position", "streams", "channel", "value"])


def visual_sinks(
    lens: Lens,
    inputs: Inputs,
    channels: Sequence[int] | None = None,
    threshold: float = 20.0,
    image_mask: Bool[Tensor, "prompt position"] | None = None,
    layers: HeadSpec | int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> VisualSinks:
    """Image tokens with `max_c |RMSNorm(x)_c| > threshold`, `RMSNorm(x) = x / sqrt(mean_c x_c^2)`.

    c runs over the sink `channels`. Where none are given the inputs run twice: first the channels
    are found, those in which `massive_activations` finds any in the text stack, then the tokens are
    judged. Image tokens are those of the config's image token id, or of `image_mask`. Kang et al.
    2025.

    Raises:
        InputError: no image tokens, no channels or one that does not exist, or a threshold that no
            token can pass (RMSNorm is at most the square root of the width).

    """
    if channels is not None:
        _check_channels(channels)
    check_bootstrap(resamples, confidence)
    whole = lens.encode(inputs)
    image = image_positions(lens, whole, image_mask)
    anatomy = lens.anatomy_for(whole)
    sites = language_sites(anatomy.layers(layers), whole.sides)
    notes = ["One prompt gives no interval over prompts; give several."] if whole.size < 2 else []
    if channels is None:
        names = [site.head(0) for site in sites]
        massive = massive_activations(lens, whole.inputs, layers=names, batch_size=batch_size)
        channels = sorted({one.channel for one in massive.found})
        notes.append(
            "Two passes: the sink channels are those with massive activations (over "
            f"{massive.threshold:g} and {massive.ratio:g} times the median) on the same inputs."
        )
        if not channels:
            notes.append("No channel has massive activations, so no token is a sink.")
    tally = _Tally(tuple(channels), threshold, whole.size)
    streams = streams_of(anatomy, sites)
    parts, order = split(whole, batch_size)
    for part in parts:
        tally.prompts, order = order[: part.size], order[part.size :]
        tally.part, tally.image = part, image[tally.prompts, : _length(part)]
        lens.observe(part, Residual(anatomy, streams, tally.look))
    names = tuple(stream.name for stream in streams if stream.name in tally.rate)
    shares = (torch.stack([own[name] for name in names], 1) for own in (tally.rate, tally.others))
    rate, text_rate = (bootstrap_mean(own, resamples, confidence, seed) for own in shares)
    return VisualSinks(
        names,
        rate,
        text_rate,
        tuple(sorted(tally.found, key=lambda one: -one.value)),
        tuple(channels),
        tuple(image.sum(-1).tolist()),
        threshold,
        tuple(notes),
    )


def image_positions(
    lens: Lens, batch: Batch, image_mask: Bool[Tensor, "prompt position"] | None = None
) -> Bool[Tensor, "prompt position"]:
    """Which real positions of each prompt stand for a piece of an image (or a video).

    Raises:
        InputError: no such position, or a mask of another shape than the token ids.

    """
    if batch.ids is None:
        raise InputError("Image tokens are found among token ids, and this input has none.")
    if image_mask is not None:
        if not isinstance(image_mask, Tensor):
            kind = type(image_mask).__name__
            raise InputError(f"image_mask is a {kind}; it must be a tensor of torch.bool.")
        if image_mask.shape != batch.ids.shape:
            raise InputError(
                f"image_mask has shape {list(image_mask.shape)} and the token ids "
                f"{list(batch.ids.shape)}; they must agree."
            )
        found = image_mask.bool().to(batch.ids.device)
    else:
        named: list[int] = [
            value
            for name in IMAGE_IDS
            if isinstance(value := getattr(lens.model.config, name, None), int)
        ]
        if not named:
            raise InputError(
                f"The config of {lens.anatomy.model} names no image token "
                f"({', '.join(IMAGE_IDS)}). Say which positions are the image's: image_mask=..."
            )
        found = torch.isin(batch.ids, torch.tensor(named, device=batch.ids.device))
    if batch.real is not None:
        found = found & batch.real
    if not bool(found.any()):
        raise InputError(
            "There are no image tokens in the inputs. Give the dictionary that the model's "
            "processor makes of images and text together."
        )
    return found


def language_sites(sites: Sequence[Site], sides: Sides) -> tuple[Site, ...]:
    """The sites that work on the text's positions, among them those of images."""
    found = tuple(
        site
        for site in sites
        if not site.stack.startswith(("vision", "audio"))
        and (sides.decoder is None or sides.queries(site) is sides.text)
    )
    if not found:
        names = ", ".join(site.name for site in sites)
        raise HeadError(
            f"{names} do not read the text: they work on images alone, or write the answer in a "
            "decoder. Name layers of the text."
        )
    return found


def _check_channels(channels: Sequence[int]) -> None:
    if not isinstance(channels, Sequence) or not all(isinstance(c, int) for c in channels):
        raise InputError(f"channels={channels!r} is no list of whole numbers.")
    if not channels:
        raise InputError(
            "channels=[] leaves nothing to judge by; name one, or leave it out to have them found."
        )


@dataclass
class _Tally:
    """Shares of sinks a prompt and stream, and the image tokens that are sinks."""

    channels: tuple[int, ...]
    threshold: float
    size: int
    prompts: Sequence[int] = ()
    part: Batch | None = None
    image: Tensor | None = None
    rate: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    others: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    found: list[VisualSink] = field(default_factory=list[VisualSink])

    def look(self, stream: Stream, tensor: Tensor) -> None:
        """Judge the tokens of one stream."""
        assert self.part is not None
        assert self.image is not None
        self._check(tensor.shape[-1])
        for row, prompt in enumerate(self.prompts):
            real = slice(None) if self.part.real is None else self.part.real[row]
            x, image = tensor[row][real], self.image[row][real]
            values = normed(x)[:, list(self.channels)]
            for shares, own in ((self.rate, image), (self.others, ~image)):
                over = (values[own] > self.threshold).any(-1).double().mean()
                empty = torch.full((self.size,), math.nan, dtype=torch.float64)
                shares.setdefault(stream.name, empty)[prompt] = over.cpu()
            if self.channels:
                self._list(stream.name, prompt, values, image)

    def _list(self, stream: str, prompt: int, values: Tensor, image: Tensor) -> None:
        largest, place = values.max(-1)
        for position in ((largest > self.threshold) & image).nonzero()[:, 0].tolist():
            channel = self.channels[int(place[position])]
            value = float(largest[position])
            self.found.append(VisualSink(prompt, position, stream, channel, value))

    def _check(self, width: int) -> None:
        wrong = [channel for channel in self.channels if not 0 <= channel < width]
        if wrong:
            raise InputError(f"There is no channel {wrong[0]}; there are 0 to {width - 1}.")
        if not 0 < self.threshold < math.sqrt(width):
            raise InputError(
                f"threshold={self.threshold} can tell no token from another: |RMSNorm(x)| of "
                f"{width} channels is above 0 and at most {math.sqrt(width):.3g}."
            )


def normed(x: Float[Tensor, "position channel"]) -> Float[Tensor, "position channel"]:
    """`|RMSNorm(x)| = |x| / sqrt(mean_c x_c^2)`, without a gain, in float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.abs() / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)


def _length(part: Batch) -> int:
    assert part.ids is not None
    return part.ids.shape[1]
