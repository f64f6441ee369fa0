"""Figures of where in a long text attention goes: rhythm, long-context heads, attention basin."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from attnlens.analyses.basin import AttentionBasin, SlotMass
from attnlens.analyses.long_context import LongContextHeads
from attnlens.analyses.rhythm import Rhythm
from attnlens.analyses.uncertainty import Interval
from attnlens.errors import InputError
from attnlens.views.panels import Quantity, head_grids, number_text
from attnlens.views.shown import show
from attnlens.views.theme import INK, colour_axis, position_labels, styled, token_label

PEAKS = 10
LABELLED = 64  # tokens that have a tick each; longer texts have theirs at the peaks and on hover
RUST = "#9a3412"
Curve = Float[np.ndarray, " position"]


@show.register
def show_rhythm(rhythm: Rhythm, prompt: int = 0) -> go.Figure:
    """Both curves over the tokens of one prompt, the highest peaks with their token."""
    if not 0 <= prompt < rhythm.prompts:
        raise InputError(f"There is no prompt {prompt}; there are 0 to {rhythm.prompts - 1}.")
    length = rhythm.lengths[prompt]
    words = rhythm.tokens[prompt] if rhythm.tokens else None
    low, high = rhythm.horizon
    titles = (
        f"How far local heads look back, {rhythm.window} tokens at most (WAAD, tokens)",
        f"Weight from the rows {low} to {high} tokens later, global heads (FAI)",
    )
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.14, subplot_titles=titles)
    styled(figure, f"Reasoning rhythm of text {prompt}", 560)
    labels = position_labels(words, length)
    for row, (curve, colour) in enumerate(((rhythm.waad, INK), (rhythm.fai, RUST)), start=1):
        values = curve[prompt, :length].double().numpy()
        _add_curve(figure, row, values, labels, colour)
    figure.update_annotations(font_size=13, xanchor="left", x=0)
    _mark_peaks(figure, 1, rhythm.waad[prompt, :length].double().numpy(), words)
    _mark_peaks(figure, 2, rhythm.fai[prompt, :length].double().numpy(), words)
    ticks: dict[str, Any] = {}
    if length <= LABELLED and words is not None:
        shown = [token_label(word) for word in words]
        ticks = {"tickvals": list(range(length)), "ticktext": shown, "tickangle": -60}
    figure.update_xaxes(range=[-0.5, length - 0.5], showgrid=False, **ticks)
    figure.update_xaxes(title="token" if ticks else "position", row=2)
    figure.update_layout(showlegend=False, margin={"l": 50, "b": 90 if ticks else 50})
    return figure


@show.register
def show_long_context_heads(heads: LongContextHeads) -> go.Figure:
    """How often each head is local, its weight on far keys, and whether the estimate agrees."""
    quantities = [
        Quantity("local", "local queries (share)", mass=True),
        Quantity("far_mass", "weight on far keys", mass=True),
        Quantity("accuracy", "estimate agrees (share)", mass=True),
    ]
    texts = f"{heads.prompts} text{'s' * (heads.prompts != 1)}"
    title = (
        f"Queries that {heads.first} first and {heads.window:,} latest keys serve with "
        f"{heads.tau:.0%} of their weight, over {texts}"
    )
    return head_grids(heads.to_frame(), quantities, title)


@show.register
def show_basin(basin: AttentionBasin, head: str | None = None) -> go.Figure:
    """Mass by slot over all heads, or of one `head`, in total and per token; below, by layer."""
    mass, whose = basin.mean, "all heads"
    if head is not None:
        names = [str(each) for each in basin.heads]
        if head not in names:
            raise InputError(
                f"There is no head {head!r} here; there are {names[0]} to {names[-1]}."
            )
        mass, whose = _of_head(basin.per_head, names.index(head)), head
    figure = make_subplots(
        2,
        2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        subplot_titles=(
            "In total",
            "Per token of the document",
            "In total, mean of each layer's heads",
        ),
        horizontal_spacing=0.1,
        vertical_spacing=0.16,
    )
    texts = f"{basin.prompts} example{'s' * (basin.prompts != 1)}"
    turned = ", documents rotated" if basin.rotated else ""
    title = f"Weight of the query on each document slot, {whose}, {texts}{turned}"
    styled(figure, title, 420 + int(np.clip(20 * len(basin.sites), 80, 400)))
    slots = [str(slot) for slot in range(basin.slots)]
    for column, interval in enumerate((mass.total, mass.per_token), start=1):
        _add_bars(figure, column, slots, interval)
    _add_layers(figure, basin, slots)
    figure.update_annotations(font_size=13, xanchor="left")
    layout: Any = figure.layout
    for note, start in zip(layout.annotations, (0, 0.55, 0), strict=True):
        note.x = start
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_xaxes(title="document slot", row=2, col=1)
    figure.update_layout(showlegend=False, bargap=0.35)
    return figure


def peaks(values: Curve) -> list[int]:
    """The highest local maxima, in their order, none within a fortieth of the text of another."""
    most = min(PEAKS, 1 + len(values) // 8)
    filled = np.nan_to_num(values, nan=-np.inf)
    around = np.pad(filled, 1, constant_values=-np.inf)
    before, after = around[:-2], around[2:]
    top = (filled >= before) & (filled > after) & ~(np.isinf(after) & (filled == before))
    apart = max(2, len(values) // 40)
    found: list[int] = []
    for place in sorted(np.flatnonzero(top).tolist(), key=lambda place: -values[place]):
        if len(found) < most and all(abs(place - other) >= apart for other in found):
            found.append(place)
    return sorted(found)


def _add_curve(figure: go.Figure, row: int, values: Curve, labels: list[str], colour: str) -> None:
    texts = [f"{label} <b>{number_text(v)}</b>" for label, v in zip(labels, values, strict=True)]
    figure.add_trace(
        go.Scatter(
            x=np.arange(len(values)),
            y=values.astype(np.float32),
            customdata=texts,
            mode="lines",
            line={"color": colour, "width": 1.5},
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=row,
        col=1,
    )


def _mark_peaks(figure: go.Figure, row: int, values: Curve, words: tuple[str, ...] | None) -> None:
    """Name the peaks, and end the axis above them; a first token far above the rest is cut off."""
    rest = values[1:][np.isfinite(values[1:])]
    if not rest.size:
        return
    highest = float(np.nanmax(values))
    top = 1.35 * (highest if highest < 2 * rest.max() else float(rest.max()))
    top = max(top, 1e-6)
    for place in peaks(values):
        name = token_label(words[place], 10) if words is not None else f"#{place}"
        cut = values[place] > top
        figure.add_annotation(
            x=place,
            y=0.84 * top if cut else values[place],
            text=f"{name} {number_text(values[place])} \u2191" if cut else name,
            textangle=0 if cut else -45,
            xanchor="left",
            yanchor="bottom",
            xshift=4 if cut else -2,
            showarrow=False,
            font={"size": 11},
            row=row,
            col=1,
        )
    figure.update_yaxes(range=[0, top], row=row)


def _of_head(mass: SlotMass, number: int) -> SlotMass:
    total, per_token = (
        Interval(*(bound[number] for bound in each)) for each in (mass.total, mass.per_token)
    )
    return SlotMass(total, per_token)


def _add_bars(figure: go.Figure, column: int, slots: list[str], interval: Interval) -> None:
    mean, low, high = (bound.numpy() for bound in interval)
    texts = [
        f"slot {slot} <b>{m:.3g}</b><br>interval {a:.3g} to {b:.3g}"
        for slot, m, a, b in zip(slots, mean, low, high, strict=True)
    ]
    figure.add_trace(
        go.Bar(
            x=slots,
            y=mean,
            error_y={
                "type": "data",
                "array": np.nan_to_num(high - mean),
                "arrayminus": np.nan_to_num(mean - low),
                "color": "#22262a",
                "thickness": 1.2,
            },
            marker={"color": INK},
            customdata=texts,
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=1,
        col=column,
    )
    figure.update_yaxes(rangemode="tozero", row=1, col=column)


def _add_layers(figure: go.Figure, basin: AttentionBasin, slots: list[str]) -> None:
    values = basin.per_layer.total.mean.numpy()
    figure.add_trace(
        go.Heatmap(
            z=values.astype(np.float32),
            x=slots,
            y=[html.escape(site) for site in basin.sites],
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="%{y}, slot %{x}: %{z:.3g}<extra></extra>",
        ),
        row=2,
        col=1,
    )
    settings = colour_axis("sequential", 0.0, max(float(values.max()), 1e-6), "")
    settings["colorbar"] |= {"len": 0.42, "y": 0.2, "thickness": 8, "nticks": 4}
    figure.update_layout(coloraxis=settings)
    figure.update_yaxes(autorange="reversed", showgrid=False, row=2, col=1)
