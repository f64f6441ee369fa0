"""Figures of results that are a few numbers a head."""

from __future__ import annotations

import plotly.graph_objects as go

from attnlens.errors import InputError
from attnlens.lens.trace import Statistics
from attnlens.views.panels import Quantity, head_grids
from attnlens.views.shown import show

PLACE = ("head", "site", "layer", "index")


@show.register
def show_statistics(statistics: Statistics, columns: str | None = None) -> go.Figure:
    """Streamed statistics, one grid a number and stack; `columns` names some, with commas."""
    frame = statistics.to_frame()
    found = [name for name in frame.columns if name not in PLACE]
    chosen = found if columns is None else [name.strip() for name in columns.split(",")]
    missing = [name for name in chosen if name not in found]
    if missing or not chosen:
        raise InputError(
            f"There is no number a head named {', '.join(missing)}; there is {', '.join(found)}."
            if missing
            else "These statistics have no number a head to draw."
        )
    quantities = [Quantity(name, name.replace("_", " ")) for name in chosen]
    return head_grids(frame, quantities, f"Statistics of {statistics.anatomy.model}")
