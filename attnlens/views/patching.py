"""Activation patching: heads by layer, layers as bars, or places by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from attnlens.analyses.patching import Patching
from attnlens.errors import InputError
from attnlens.views.ablation import (
    Grid,
    across_tokens,
    effect_colours,
    heat_map,
    map_height,
    place_labels,
)
from attnlens.views.panels import RED, interval_text, number_text
from attnlens.views.ranking import (
    BETTER,
    WORSE,
    change_of,
    error_bars,
    missing_text,
    prompts_text,
    task_name,
)
from attnlens.views.shown import show
from attnlens.views.theme import styled

BLUE = "blue is towards clean"
"""What figures of shares say of their colours."""
SHARES = {"denoise": "recovery", "noise": "share lost"}
"""What a share is called, by direction."""


@show.register
def show_patching(result: Patching, column: str | None = None) -> go.Figure:
    """Recovery, or the share lost, of each place; places down and tokens across by position.

    `column` is "share" or "effect"; effects where not given and no share is known. Raises
    InputError for another, and where no value is known yet.
    """
    if column not in (None, "share", "effect"):
        raise InputError(f"There is no column {column!r} to draw; choose share or effect.")
    if column is None:
        column = "effect" if bool(result.share.isnan().all()) else "share"
    if result.positions is not None:
        return _by_position(result, column)
    return _by_head(result, column) if any(result.heads) else _by_layer(result, column)


def share_name(result: Patching) -> str:
    """`recovery` or `share lost`."""
    return SHARES[result.direction]


def patching_title(result: Patching) -> str:
    """`Patching z (denoise)`."""
    return f"Patching {result.kind} ({result.direction})"


def _by_position(result: Patching, column: str) -> go.Figure:
    assert result.positions is not None
    labels = place_labels(result.tokens, result.positions)
    records = _records(result)

    def text(i: int, j: int) -> str:
        return _text(result, records[i * len(labels) + j], f" at {labels[j]}")

    values = getattr(result, column).numpy()
    figure = heat_map(values, result.places, labels, text, *_colours(result, column))
    styled(figure, _title(result), map_height(len(result.places), 24))
    return across_tokens(figure, labels)


def _by_head(result: Patching, column: str) -> go.Figure:
    """Layers down, heads across; heads that share keys and values are one cell."""
    layers = list(dict.fromkeys(result.sites))
    own = [
        place.removeprefix(site) for place, site in zip(result.places, result.sites, strict=True)
    ]
    first = {name: heads[0].head for name, heads in zip(own, result.heads, strict=True)}
    names = sorted(first, key=lambda name: (first[name], name))
    values: Grid = np.full((len(layers), len(names)), np.nan)
    texts = [[""] * len(names) for _ in layers]
    for record, name in zip(_records(result), own, strict=True):
        i, j = layers.index(record["site"]), names.index(name)
        values[i, j] = record[column]
        texts[i][j] = _text(result, record)
    colours = _colours(result, column)
    figure = heat_map(values, layers, names, lambda i, j: texts[i][j], *colours)
    return styled(figure, _title(result), map_height(len(layers), 26))


def _by_layer(result: Patching, column: str) -> go.Figure:
    """A bar a layer with its interval, the first on top."""
    records = _records(result)[::-1]
    numbers = [record[column] for record in records]
    what, turned = _colours(result, column)
    above, below = (BETTER, WORSE) if turned else (WORSE, BETTER)
    figure = go.Figure(
        go.Bar(
            x=numbers,
            y=[record["place"] for record in records],
            orientation="h",
            marker={"color": [above if number > 0 else below for number in numbers]},
            error_x=error_bars(records, column),
            customdata=[_text(result, record) for record in records],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    styled(figure, _title(result), 26 * len(records) + 130)
    effect = f"{change_of(result.metric)}; {RED}"
    figure.update_xaxes(title=f"{what.replace('<br>', '; ')}" if column == "share" else effect)
    figure.update_yaxes(type="category", ticksuffix="  ")
    figure.update_layout(bargap=0.35, showlegend=False)
    return figure


def _colours(result: Patching, column: str) -> tuple[str, bool]:
    """What stands beside the colours, and whether what is above 0 is blue."""
    if column == "effect":
        return effect_colours(result.metric, "effect")
    return f"{share_name(result)}<br>{BLUE}", result.direction == "denoise"


def _title(result: Patching) -> str:
    missing = missing_text(result.patched)
    return f"{patching_title(result)} on {task_name(result)}, {prompts_text(result)}{missing}"


def _text(result: Patching, record: dict[str, Any], where: str = "") -> str:
    """What the hover says of a place."""
    return (
        f"<b>{record['place']}</b>{where}: {share_name(result)} {number_text(record['share'])}"
        f"<br>interval {interval_text(record, 'share')}"
        f"<br>{change_of(result.metric)} {number_text(record['effect'])}"
        f"<br>interval {interval_text(record, 'effect')}"
    )


def _records(result: Patching) -> list[dict[str, Any]]:
    return result.to_frame().to_dict("records")
