"""Figures of massive values: in the residual stream, in q and k, and at the image's tokens."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from attnlens.analyses.massive_activations import MassiveActivation, MassiveActivations
from attnlens.analyses.massive_qk import ChannelNorms, MassiveQK
from attnlens.analyses.uncertainty import Interval
from attnlens.analyses.vision import VisualSinks
from attnlens.analyses.vision_heads import VisionAwareHeads
from attnlens.anatomy.rotary import Rotary
from attnlens.errors import HeadError
from attnlens.views.panels import Quantity, domains, head_grids, number_text
from attnlens.views.shown import show
from attnlens.views.theme import INK, colour_axis, styled, token_label

RUST = "#9a3412"
GREY = "#8a9094"
RANKS = ("#0b3a4a", INK, "#8fbfc0")
CHANNELS = 24
"""Massive channels drawn, those of the largest values."""
HIGHEST = 4.0
"""Colours of ratios end at two to this power; larger ones are told by hover."""
LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"}


@show.register
def show_massive_activations(massive: MassiveActivations) -> go.Figure:
    """Top magnitudes and median of every stream on a log axis, and the massive channels below."""
    names = list(massive.streams)
    channels = _channels(massive)
    heights = [320, 18 * len(channels) + 40] if channels else [320]
    titles = ("|x|: the three largest and the median of a text", "Massive channels")
    figure = make_subplots(
        len(heights),
        1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=70 / (sum(heights) + 70),
        subplot_titles=titles[: len(heights)],
    )
    texts = f"{massive.prompts} text{'s' * (massive.prompts != 1)}"
    styled(figure, f"Residual stream by layer, mean over {texts}", sum(heights) + 140)
    ranks = zip(("largest", "second", "third"), RANKS, strict=True)
    for rank, (name, colour) in enumerate(ranks):
        _add_line(figure, names, Interval(*(part[:, rank] for part in massive.top)), name, colour)
    _add_line(figure, names, massive.median, "median", RUST, dash="dot")
    span = float((massive.top.mean.max() / massive.median.mean.min()).log10())
    step = 1 if span > 1.5 else "D2"
    figure.update_yaxes(type="log", title="|x|", exponentformat="power", dtick=step, row=1, col=1)
    if channels:
        _add_channels(figure, massive, channels)
    figure.update_xaxes(type="category", showgrid=False, tickangle=0 if len(names) <= 16 else -60)
    figure.update_xaxes(title="stream entering the layer", row=len(heights), col=1)
    figure.update_annotations(font_size=13, xanchor="left", x=0)
    _add_threshold(figure, massive)
    figure.update_layout(legend=LEGEND, margin={"t": 76})
    return figure


@show.register
def show_massive_qk(massive: MassiveQK, layer: str | int | None = None) -> go.Figure:
    """Heads by channels of one layer's q and k, with the wavelength of each channel below.

    `layer` is a number or a site's name; that with the largest ratio where it is not given.
    """
    site = _site(massive, layer)
    rotary, query, key = massive.rotary[site], massive.query[site], massive.key[site]
    turns = bool((rotary.frequencies > 0).any())
    heights = [26 * norms.ratio.shape[0] + 30 for norms in (query, key)] + [130] * turns
    titles = [f"{name}: norm over the head's median channel" for name in ("Queries", "Keys")]
    titles += ["Wavelength of the channel's rotary pair (tokens)"] * turns
    figure = make_subplots(
        len(heights),
        1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=56 / (sum(heights) + 56 * (len(heights) - 1)),
        subplot_titles=titles,
    )
    texts = f"{massive.prompts} text{'s' * (massive.prompts != 1)}"
    height = sum(heights) + 56 * len(heights) + 80
    styled(figure, f"Channels of q and k at {site}, over {texts}", height)
    _add_ratios(figure, 1, "H", query, rotary)
    _add_ratios(figure, 2, "G", key, rotary)
    if turns:
        _add_wavelengths(figure, 3, rotary)
    bottom = domains(figure, 2, 1)[1][0]
    figure.update_layout(coloraxis=_ratio_axis(bottom), showlegend=False)
    figure.update_annotations(font_size=13, xanchor="left", x=0)
    figure.update_xaxes(showgrid=False, range=[-0.5, len(rotary.frequencies) - 0.5])
    figure.update_xaxes(title="channel", row=len(heights), col=1)
    return figure


@show.register
def show_visual_sinks(sinks: VisualSinks) -> go.Figure:
    """Share of the image tokens, and of the others, that are sinks in each stream."""
    names = list(sinks.streams)
    figure = make_subplots(1, 1)
    texts = f"{sinks.prompts} prompt{'s' * (sinks.prompts != 1)}"
    channels = "channels " if len(sinks.channels) > 1 else "channel "
    channels += ", ".join(map(str, sinks.channels[:8])) or "none"
    rule = f"|RMSNorm(x)| over {sinks.threshold:g} in {channels}"
    styled(figure, f"Visual sinks, {rule}; {texts}", 380)
    _add_line(figure, names, sinks.rate, "image tokens", INK)
    _add_line(figure, names, sinks.text_rate, "other tokens", RUST, dash="dot")
    figure.update_yaxes(title="share that are sinks", rangemode="tozero")
    figure.update_xaxes(type="category", showgrid=False, title="stream entering the layer")
    figure.update_layout(legend=LEGEND)
    return figure


@show.register
def show_vision_aware_heads(heads: VisionAwareHeads) -> go.Figure:
    """How far each head moves when the image is hidden, and its weight on the image."""
    quantities = [
        Quantity("divergence", "moves by |z \u2212 z\u2032|"),
        Quantity("relative", "moves by a share of |z|"),
        Quantity("image_mass", "weight on image tokens", mass=True),
    ]
    texts = f"{heads.prompts} prompt{'s' * (heads.prompts != 1)}"
    return head_grids(heads.to_frame(), quantities, f"Heads that read the image, over {texts}")


def _channels(massive: MassiveActivations) -> list[tuple[str, int]]:
    """Massive channels by stack, those of the largest values."""
    largest = list(dict.fromkeys((_stack(o.stream), o.channel) for o in massive.found))[:CHANNELS]
    stacks = [_stack(stream) for stream in massive.streams]
    return sorted(largest, key=lambda channel: stacks.index(channel[0]))


def _add_threshold(figure: go.Figure, massive: MassiveActivations) -> None:
    """The magnitude from which a coordinate may be massive, as a line with its rule."""
    figure.add_shape(
        type="line",
        xref="x domain",
        x0=0,
        x1=1,
        y0=massive.threshold,
        y1=massive.threshold,
        line={"color": GREY, "width": 1, "dash": "dash"},
    )
    rule = f"massive above {massive.threshold:g} and {massive.ratio:g} times the median"
    figure.add_annotation(
        text=rule if massive.found else f"nothing is {rule}",
        xref="paper",
        yref="y",
        x=1,
        y=math.log10(massive.threshold),
        yanchor="bottom",
        xanchor="right",
        showarrow=False,
        font={"size": 11, "color": GREY},
    )


def _ratio_axis(bottom: float) -> dict[str, Any]:
    """The colours of ratios, by powers of two, beside the panels above `bottom`."""
    powers = range(-int(HIGHEST), int(HIGHEST) + 1)
    axis = colour_axis("diverging", -HIGHEST, HIGHEST, "")
    axis["colorbar"] |= {
        "tickvals": list(powers),
        "ticktext": [f"{2**power}" if power >= 0 else f"1/{2**-power}" for power in powers],
        "len": 1 - bottom,
        "y": 1,
        "yanchor": "top",
    }
    return axis


def _add_line(
    figure: go.Figure,
    names: Sequence[str],
    interval: Interval,
    name: str,
    colour: str,
    dash: str = "solid",
) -> None:
    """A line over the streams, with its interval as error bars."""
    mean, low, high = (part.double().numpy() for part in interval)
    bounded = np.isfinite(low) & np.isfinite(high)
    texts = [
        f"<b>{html.escape(stream)}</b> {name} {number_text(m)}"
        + (f"<br>interval {number_text(a)} to {number_text(b)}" if known else "")
        for stream, m, a, b, known in zip(names, mean, low, high, bounded, strict=True)
    ]
    starts = [n for n in range(1, len(names)) if _stack(names[n]) != _stack(names[n - 1])]
    figure.add_trace(
        go.Scatter(
            # The line is broken where another stack begins.
            x=np.insert(np.array(names, dtype=object), starts, [names[n] for n in starts]),
            y=np.insert(mean, starts, np.nan),
            error_y={
                "type": "data",
                "array": np.insert(np.where(bounded, high - mean, 0), starts, 0),
                "arrayminus": np.insert(np.where(bounded, mean - low, 0), starts, 0),
                "thickness": 1,
                "width": 3,
            },
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"size": 5},
            customdata=np.insert(np.array(texts, dtype=object), starts, ""),
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=1,
        col=1,
    )


def _add_channels(
    figure: go.Figure, massive: MassiveActivations, channels: Sequence[tuple[str, int]]
) -> None:
    """One row a massive channel: log10 of its mean |x| where it is massive."""
    shape = (len(channels), len(massive.streams))
    values = np.full(shape, np.nan, dtype=np.float32)
    texts = [[""] * shape[1] for _ in channels]
    groups: dict[tuple[int, int], list[MassiveActivation]] = {}
    for one in massive.found:
        key = _stack(one.stream), one.channel
        if key in channels:
            place = channels.index(key), massive.streams.index(one.stream)
            groups.setdefault(place, []).append(one)
    for (row, column), own in groups.items():
        mean = sum(abs(one.value) for one in own) / len(own)
        values[row, column] = math.log10(mean)
        texts[row][column] = (
            f"<b>{own[0].stream}</b> channel {own[0].channel}<br>|x| {number_text(mean)} in "
            f"{len({one.prompt for one in own})} of {massive.prompts} texts<br>at {_where(own)}"
        )
    stacks = {stack for stack, _ in channels}
    figure.add_trace(
        go.Heatmap(
            z=values,
            x=list(massive.streams),
            y=[f"{stack}." * (len(stacks) > 1) + f"c{channel}" for stack, channel in channels],
            customdata=texts,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=2,
        col=1,
    )
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    axis = colour_axis("sequential", min(low, high - 1), high, "|x|")
    ticks = [
        m * 10.0**d for d in range(math.floor(low) - 1, math.ceil(high) + 1) for m in (1, 2, 5)
    ]
    (_, (bottom, top)) = domains(figure, 2, 1)
    axis["colorbar"] |= {
        "tickvals": [math.log10(tick) for tick in ticks],
        "ticktext": [f"{tick:g}" for tick in ticks],
        "y": (bottom + top) / 2,
        "len": max(top - bottom, 0.25),
        "thickness": 8,
    }
    figure.update_layout(coloraxis=axis)
    figure.update_yaxes(autorange="reversed", showgrid=False, row=2, col=1)


def _where(found: Sequence[MassiveActivation], most: int = 3) -> str:
    """The positions with their tokens, the largest values first."""
    places = dict.fromkeys((one.position, one.token) for one in found)
    named = [f"{p} {token_label(t)}" if t else str(p) for p, t in list(places)[:most]]
    more = f", {len(places) - most} more" if len(places) > most else ""
    return f"position {', '.join(named)}{more}"


def _site(massive: MassiveQK, layer: str | int | None) -> str:
    """The site asked for, or the one with the largest ratio."""
    if layer is None:
        peaks: dict[str, float] = {}
        for side in (massive.query, massive.key):
            for site, norms in side.items():
                largest = float(norms.ratio.nan_to_num(0.0).max())
                peaks[site] = max(peaks.get(site, 0.0), largest)
        return max(peaks, key=lambda site: peaks[site])
    name = f"L{layer}" if isinstance(layer, int) else layer
    if name not in massive.query:
        raise HeadError(f"There is no layer {name!r} here; there is {', '.join(massive.query)}.")
    return name


def _add_ratios(
    figure: go.Figure, row: int, letter: str, norms: ChannelNorms, rotary: Rotary
) -> None:
    ratio: Float[np.ndarray, "head channel"] = norms.ratio.double().numpy()
    with np.errstate(divide="ignore"):
        colours = np.clip(np.log2(ratio), -HIGHEST, HIGHEST)
    turning = [_turning(rotary, channel) for channel in range(ratio.shape[1])]
    texts = [
        [
            f"<b>{letter}{head}</b> channel {channel}<br>norm "
            f"{number_text(float(norms.norm[head, channel]))}, "
            f"{number_text(float(ratio[head, channel]))} times the median<br>"
            f"massive in {float(norms.massive[head, channel]):.0%} of the texts<br>"
            f"{turning[channel]}"
            for channel in range(ratio.shape[1])
        ]
        for head in range(ratio.shape[0])
    ]
    figure.add_trace(
        go.Heatmap(
            z=colours.astype(np.float32),
            x=list(range(ratio.shape[1])),
            y=[f"{letter}{head}" for head in range(ratio.shape[0])],
            customdata=texts,
            coloraxis="coloraxis",
            xgap=1 if ratio.shape[1] <= 64 else 0,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=row,
        col=1,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, row=row, col=1)


def _turning(rotary: Rotary, channel: int) -> str:
    """How a channel turns, in words."""
    frequency = float(rotary.frequencies[channel])
    if math.isnan(frequency):
        return "rotary frequency unknown"
    if frequency == 0:
        return "does not turn with the position"
    length = number_text(float(rotary.wavelengths[channel]))
    return (
        f"turns {frequency:.3g} radians a token with channel {int(rotary.partner[channel])}<br>"
        f"wavelength {length} tokens"
    )


def _add_wavelengths(figure: go.Figure, row: int, rotary: Rotary) -> None:
    waves = rotary.wavelengths.numpy()
    shown = np.where(np.isfinite(waves), waves, np.nan)
    texts = [f"channel {c}<br>{_turning(rotary, c)}" for c in range(len(waves))]
    figure.add_trace(
        go.Scatter(
            x=list(range(len(waves))),
            y=shown,
            mode="markers",
            marker={"color": INK, "size": 5},
            customdata=texts,
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=row,
        col=1,
    )
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, row=row, col=1)


def _stack(stream: str) -> str:
    return stream.rpartition(".")[0]
