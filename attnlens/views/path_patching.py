"""Path patching: senders by layer and head, the embeddings before them and MLPs after."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from attnlens.analyses.path_patching import PathEffects
from attnlens.views.ablation import Grid, effect_colours, heat_map, map_height
from attnlens.views.panels import interval_text, number_text
from attnlens.views.ranking import change_of, missing_text, prompts_text, task_name
from attnlens.views.shown import show
from attnlens.views.theme import styled

EMBED, MLP = "embed", "MLP"
"""The columns of what is no head."""
NAMED = 4
"""Receivers that a title names; of more it says how many."""

_SENDER = re.compile(r"^(?P<layer>.*L\d+)(?P<own>H\d+|\.mlp)$")


@show.register
def show_paths(result: PathEffects) -> go.Figure:
    """Effect of the path from each sender, layers down; raises InputError where none is known."""
    records: list[dict[str, Any]] = result.to_frame().to_dict("records")
    names = [record["sender"] for record in records]
    effects = [record["effect"] for record in records]
    texts = [_text(result, record) for record in records]
    colours = effect_colours(result.metric, "effect")
    return sender_map(names, effects, texts, colours, _title(result))


def sender_map(
    names: Sequence[str],
    numbers: Sequence[float],
    hovers: Sequence[str],
    colours: tuple[str, bool],
    title: str,
) -> go.Figure:
    """A number of each node that writes: layers down, embeddings, heads and MLPs across.

    `colours` are what stands beside the colours, and whether they are turned.
    """
    places = [_place(name) for name in names]
    layers = list(dict.fromkeys(layer for layer, _ in places if layer))
    columns = sorted({column for _, column in places}, key=_order)
    values: Grid = np.full((max(len(layers), 1), len(columns)), np.nan)
    texts = [[""] * len(columns) for _ in values]
    for sender, (layer, column), number, hover in zip(names, places, numbers, hovers, strict=True):
        # Embeddings enter the first layer of their stack that is drawn.
        stack = sender.removesuffix(EMBED)
        first = next((name for name in layers if name.startswith(f"{stack}L")), None)
        name = layer or first
        row = layers.index(name) if name else 0
        values[row, columns.index(column)] = number
        texts[row][columns.index(column)] = hover
    rows = layers or [EMBED]
    figure = heat_map(values, rows, columns, lambda i, j: texts[i][j], *colours)
    return styled(figure, title, map_height(len(rows), 26))


def _place(sender: str) -> tuple[str, str]:
    """Row and column of a sender; embeddings have no row of their own."""
    found = _SENDER.match(sender)
    if found is None:
        return "", EMBED
    return found["layer"], MLP if found["own"] == ".mlp" else found["own"]


def _order(column: str) -> int:
    """Embeddings, heads by number, MLPs."""
    if column in (EMBED, MLP):
        return -1 if column == EMBED else 1 << 30
    return int(column[1:])


def _title(result: PathEffects) -> str:
    named = ", ".join(result.receivers[:NAMED])
    more = f" and {len(result.receivers) - NAMED} more" * (len(result.receivers) > NAMED)
    return (
        f"Paths to {named}{more} ({result.form}, {result.direction}) on {task_name(result)}, "
        f"{prompts_text(result)}{missing_text(result.patched)}"
    )


def _text(result: PathEffects, record: dict[str, Any]) -> str:
    """What the hover says of a sender."""
    return (
        f"<b>{record['sender']}</b>: {change_of(result.metric)} {number_text(record['effect'])}"
        f"<br>interval {interval_text(record, 'effect')}"
        f"<br>share of the gap between the runs {number_text(record['share'])}"
    )
