"""Figures of results that are a few numbers a head: statistics, profiles, sinks, head types."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from attnlens.analyses.head_types import HeadTypes
from attnlens.analyses.profile import Profile
from attnlens.analyses.sinks import Sinks
from attnlens.errors import InputError
from attnlens.lens.trace import Statistics
from attnlens.views.panels import PLACE, Quantity, head_grids
from attnlens.views.shown import show
from attnlens.views.theme import INK, position_labels, styled

TITLES = {
    "offset_2": "two tokens back",
    "offset_1": "previous token",
    "offset_0": "the token itself",
    "offset_-1": "next token",
    "first_token": "first token",
    "special": "special tokens",
    "previous_token": "previous token",
    "duplicate": "duplicate token",
    "sink_rate": "sink rate of the first token",
    "strongest_mass": "mass on the strongest sink",
}
UNITS = {"entropy": "nats", "distance": "tokens"}
POSITIONS = 48


@show.register
def show_statistics(statistics: Statistics, columns: str | None = None) -> go.Figure:
    """Streamed statistics, one grid a number and stack; `columns` names some, with commas."""
    frame = statistics.to_frame()
    chosen = _chosen([name for name in frame.columns if name not in PLACE], columns)
    quantities = [Quantity(name, name.replace("_", " ")) for name in chosen]
    return head_grids(frame, quantities, f"Statistics of {statistics.anatomy.model}")


@show.register
def show_profile(profile: Profile, columns: str | None = None) -> go.Figure:
    """A profile, one grid a number and stack: entropy, distance, weights by offset and kind."""
    quantities = [_quantity(name) for name in _chosen(profile.names, columns)]
    texts = f"{profile.prompts} text{'s' * (profile.prompts != 1)}"
    return head_grids(profile.to_frame(), quantities, f"Where heads look, over {texts}")


@show.register
def show_head_types(types: HeadTypes, columns: str | None = None) -> go.Figure:
    """Scores of known head types, one grid a type and stack; copying runs from -1 to 1."""
    quantities = [_quantity(name) for name in _chosen(types.names, columns)]
    return head_grids(types.to_frame(), quantities, "Known head types", across=2)


@show.register
def show_sinks(sinks: Sinks) -> go.Figure:
    """Sinks of every head: mass on the first token, its sink rate, mass on the strongest sink."""
    names = ("first_token", "sink_rate", "strongest_mass")
    return head_grids(sinks.to_frame(), [_quantity(name) for name in names], "Attention sinks")


def show_sink_positions(sinks: Sinks) -> go.Figure:
    """Mean weight that each of the first positions gets from the rows that see it."""
    frame = sinks.by_position().head(POSITIONS)
    labels = position_labels(list(frame["token"]), len(frame))
    if not any(frame["token"]):
        labels = position_labels(None, len(frame))
    shown = np.array(frame["column_mass"], dtype=float)
    rates = [f"sink rate {rate:.2f} over {n} texts"
             for rate, n in zip(frame["sink_rate"], frame["prompts"], strict=True)]  # fmt: skip
    figure = go.Figure(
        go.Bar(
            x=labels,
            y=shown,
            customdata=rates,
            marker={"color": INK},
            hovertemplate="%{x}<br>mean weight %{y:.3f}<br>%{customdata}<extra></extra>",
        )
    )
    styled(figure, "Mean weight by key position, over all heads", 320)
    figure.update_xaxes(tickangle=-60)
    figure.update_yaxes(title="mean weight", rangemode="tozero")
    return figure


def _quantity(name: str) -> Quantity:
    unit = UNITS.get(name, "")
    signed = name == "copying"
    title = TITLES.get(name, name.replace("_", " "))
    return Quantity(name, title, unit, signed, mass=not unit and not signed)


def _chosen(found: list[str] | tuple[str, ...], columns: str | None) -> list[str]:
    """The numbers that a comma-separated list names; all where it is None."""
    chosen = list(found) if columns is None else [name.strip() for name in columns.split(",")]
    missing = [name for name in chosen if name not in found]
    if missing:
        raise InputError(
            f"There is no number a head named {', '.join(missing)}; there is {', '.join(found)}."
        )
    if not chosen:
        raise InputError("There is no number a head to draw.")
    return chosen
