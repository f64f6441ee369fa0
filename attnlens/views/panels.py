"""Grids of heads, layer by head: one panel a quantity and stack, one cell a head."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from attnlens.errors import InputError
from attnlens.views.theme import colour_axis, styled

WIDEST = 16
MASSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
PLACE = ("head", "site", "layer", "index")
"""The columns of a table of heads that say which head a row is."""
RED = "red is worse"
"""What figures of effects say of their colours."""
Span = tuple[float, float]
Grid = Float[np.ndarray, "layer head"]


@dataclass(frozen=True)
class Quantity:
    """One number a head, and how it is drawn."""

    column: str
    """Its column in the table of heads."""
    title: str
    unit: str = ""
    signed: bool = False
    """Signed numbers diverge from 0; others run from 0 upwards."""
    mass: bool = False
    """Masses lie between 0 and 1: the colour scale ends at a round number."""
    worse: int = 0
    """Of signed numbers, the sign that is bad, which is painted red; 0 where neither is."""

    def heading(self, stack: str) -> str:
        """The title over a panel."""
        unit = f" ({self.unit})" if self.unit else ""
        red = f"; {RED}" if self.worse else ""
        return f"{self.title}{unit}{red}{f' · {stack}' if stack else ''}"


def head_grids(
    frame: pd.DataFrame, quantities: Sequence[Quantity], title: str, across: int = 3
) -> go.Figure:
    """A figure of grids: for each quantity one panel a stack, layers down and heads across.

    `frame` has one row a head with the columns head, site, layer, index and the quantities'; where
    it has `_low` and `_high` of a quantity, the hover text gives them as its interval. A stack for
    which a quantity means nothing has no panel.
    """
    stacks = list(dict.fromkeys(stack_of(site) for site in frame["site"]))
    cells = [(q, stack) for q in quantities for stack in stacks if _known(frame, q, stack)]
    if not cells:
        names = ", ".join(quantity.title for quantity in quantities)
        raise InputError(
            f"There is nothing to draw: no head of this model has a number for {names}."
        )
    across = min(across if len(stacks) == 1 else len(stacks), len(cells))
    down = -(-len(cells) // across)
    named = [html.escape(quantity.heading(stack)) for quantity, stack in cells]
    layers = max(_of_stack(frame, stack)["layer"].nunique() for stack in stacks)
    height = int(np.clip(26 * layers + 60, 150, 460))
    figure = make_subplots(
        down,
        across,
        subplot_titles=named,
        horizontal_spacing=0.42 / across / max(across - 1, 1) if across > 1 else 0,
        vertical_spacing=min(70 / (height * down), 0.9 / max(down - 1, 1)),
    )
    styled(figure, title, height * down + 110)
    for number, (quantity, stack) in enumerate(cells):
        place = number // across + 1, number % across + 1
        add_grid(figure, _of_stack(frame, stack), quantity, *place, numbers=across == 1)
    figure.update_annotations(font_size=13, xanchor="left")
    layout: Any = figure.layout
    for number, note in enumerate(layout.annotations):
        note.x = domains(figure, number // across + 1, number % across + 1)[0][0]
    figure.update_layout(margin={"l": 44, "r": 60, "b": 36})
    return figure


def add_grid(
    figure: go.Figure,
    frame: pd.DataFrame,
    quantity: Quantity,
    row: int,
    column: int,
    numbers: bool = False,
) -> None:
    """Draw one stack's grid of one quantity into a subplot, with its own colour bar.

    With `numbers` each cell shows its own, where they have room.
    """
    values, texts = _grid(frame, quantity)
    layers = sorted(frame["layer"].unique())
    used = len(list(figure.select_traces({"type": "heatmap"})))  # one a panel
    axis = f"coloraxis{used + 1 if used else ''}"
    figure.add_trace(
        go.Heatmap(
            z=values.astype(np.float32),
            x=[f"H{head}" for head in range(values.shape[1])],
            y=[f"L{layer}" for layer in layers],
            customdata=texts,
            coloraxis=axis,
            texttemplate="%{z:.2f}" if numbers and values.shape[1] <= WIDEST else None,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="%{customdata}<extra></extra>",
        ),
        row=row,
        col=column,
    )
    low, high = _range(values, quantity)
    scale = "diverging" if quantity.signed else "sequential"
    settings = colour_axis(scale, low, high, "", turned=quantity.worse < 0)
    x, y = domains(figure, row, column)
    settings["colorbar"] |= {
        "x": x[1] + 0.005,
        "y": (y[0] + y[1]) / 2,
        "len": y[1] - y[0],
        "thickness": 8,
        "nticks": 4,
        "tickfont": {"size": 10},
    }
    figure.update_layout({axis: settings})
    figure.update_xaxes(showgrid=False, ticks="", tickfont_size=10, row=row, col=column)
    figure.update_yaxes(
        showgrid=False, ticks="", tickfont_size=10, autorange="reversed", row=row, col=column
    )


def domains(figure: go.Figure, row: int, column: int) -> tuple[Span, Span]:
    """Where a subplot lies in the figure, across and up, from 0 to 1."""
    place: Any = figure.get_subplot(row, column)
    return place.xaxis.domain, place.yaxis.domain


def stack_of(site: str) -> str:
    """`cross` of `cross.L3`, "" of `L3`."""
    return site.rpartition(".")[0]


def number_text(value: float) -> str:
    """A number as a person writes it: two decimals, three where it is small, a true minus sign."""
    if np.isnan(value):
        return "n/a"
    digits = 3 if abs(value) < 0.1 else 2 if abs(value) < 100 else 0
    shown = f"{value:.{digits}f}"
    return shown.replace("-", "\u2212" if float(shown) else "")


def count_text(number: int, what: str) -> str:
    """`1 head`, `1,024 heads`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def interval_text(record: Mapping[str, Any], column: str) -> str:
    """The bounds of a number, out of the columns that end in `_low` and `_high`."""
    low, high = (number_text(record[f"{column}_{end}"]) for end in ("low", "high"))
    return f"{low} to {high}"


def _of_stack(frame: pd.DataFrame, stack: str) -> pd.DataFrame:
    return frame.loc[[stack_of(site) == stack for site in frame["site"]]]


def _known(frame: pd.DataFrame, quantity: Quantity, stack: str) -> bool:
    return bool(_of_stack(frame, stack)[quantity.column].notna().any())


def _grid(frame: pd.DataFrame, quantity: Quantity) -> tuple[Grid, list[list[str]]]:
    """Values and hover texts; cells of heads that a layer does not have are NaN."""
    layers = sorted(frame["layer"].unique())
    records: list[dict[str, Any]] = frame.to_dict("records")
    values = np.full((len(layers), max(record["index"] for record in records) + 1), np.nan)
    texts = [[""] * values.shape[1] for _ in layers]
    for record in records:
        row, index = layers.index(record["layer"]), int(record["index"])
        values[row, index] = record[quantity.column]
        shown = number_text(values[row, index])
        text = f"<b>{record['head']}</b> {html.escape(quantity.title)} {shown}"
        if f"{quantity.column}_low" in record:
            text += f"<br>interval {interval_text(record, quantity.column)}"
        texts[row][index] = text
    return values, texts


def _range(values: Grid, quantity: Quantity) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    top = float(np.abs(finite).max()) if finite.size else 1.0
    if quantity.mass:
        top = min((end for end in MASSES if end >= top - 1e-6), default=top)
    top = max(top, 1e-6)
    return (-top, top) if quantity.signed else (0.0, top)
