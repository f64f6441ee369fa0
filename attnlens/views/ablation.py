"""Ablation of several heads at once, of pairs, of positions; screening; effects of any edits."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from attnlens.analyses.ablation_groups import GroupAblation, SetAblation
from attnlens.analyses.ablation_pairs import PairAblation
from attnlens.analyses.ablation_positions import PositionAblation
from attnlens.analyses.edit_effects import EditEffects
from attnlens.analyses.screening import ScreenedAblation
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.views.panels import (
    RED,
    Quantity,
    add_grid,
    count_text,
    domains,
    interval_text,
    number_text,
    stack_of,
)
from attnlens.views.ranking import (
    CONTROL,
    METRICS,
    change_of,
    effect_bars,
    error_bars,
    missing_text,
    mode_name,
    prompts_text,
    task_name,
)
from attnlens.views.shown import show
from attnlens.views.theme import INK, colour_axis, styled, token_label

LISTED = 12
"""Heads that a hover text names; of more it says how many."""
LABELLED = 64
"""Rows and columns of a heat map that have room for a name."""
NUMBERED = 12
"""Columns of a heat map whose cells have room for a number."""
TOLD = 20_000
"""Cells of a heat map whose hover texts a page can hold; of more the hover says the value."""
PLAIN = "<b>%{y}</b>, %{x}: %{z:.3f}"

Grid = Float[np.ndarray, "row column"]


@show.register
def show_groups(result: GroupAblation) -> go.Figure:
    """Effect of each group with its interval, in the order in which they were given."""
    listed = [heads_text(heads) for heads in result.groups]
    title = f"{mode_name(result.mode)} ablation of {count_text(len(listed), group_word(result))}"
    return _bars(result, result.ablated, result.names, listed, title)


@show.register
def show_edits(result: EditEffects) -> go.Figure:
    """Effect of each list of edits with its interval, in the order in which they were given."""
    texts = [html.escape(text) for text in result.edits]
    return _bars(result, result.edited, result.names, texts, "Edits")


@show.register
def show_set(result: SetAblation) -> go.Figure:
    """Effect of a set of heads with its interval, beside each random set of as many heads."""
    record = {"effect": result.effect, "effect_low": result.low, "effect_high": result.high}
    own, others = f"the set ({count_text(len(result.heads), 'head')})", "random sets of as many"
    unit = METRICS[result.metric][1]
    figure = go.Figure(effect_bars([record], [own], result.metric, own, [heads_text(result.heads)]))
    figure.add_trace(
        go.Scatter(
            x=result.control.tolist(),
            y=[others] * len(result.control),
            mode="markers",
            marker={"color": CONTROL, "symbol": "diamond", "size": 10, "opacity": 0.7},
            customdata=[heads_text(heads) for heads in result.control_sets],
            hovertemplate=f"<b>random set</b> %{{x:.3f}} {unit}<br>%{{customdata}}<extra></extra>",
        )
    )
    figure.update_yaxes(categoryarray=[others, own], categoryorder="array")
    title = f"{mode_name(result.mode)} ablation of a set"
    return _finished(figure, result, result.ablated, title, 2)


@show.register
def show_pairs(result: PairAblation) -> go.Figure:
    """Interaction of each pair of heads; on the diagonal the effect of the one head."""
    names = [str(head) for head in result.heads]
    values = result.interaction.clone()
    values.fill_diagonal_(0)
    values += result.single.diag()
    title = f"{mode_name(result.mode)} ablation of pairs"
    beside = effect_colours(result.metric, "effect, interaction")
    figure = heat_map(values.numpy(), names, names, partial(_pair_text, result), *beside)
    styled(figure, _title(result, title, result.joint), map_height(len(names), 48))
    figure.update_yaxes(scaleanchor="x", constrain="domain", ticksuffix=" ")
    figure.update_xaxes(constrain="domain")
    return figure


@show.register
def show_positions(result: PositionAblation) -> go.Figure:
    """Effect of each head at each position; heads down, the first prompt's tokens across."""
    names = [str(head) for head in result.heads]
    labels = place_labels(result.tokens, result.positions)

    def text(i: int, j: int) -> str:
        return _place_text(result, i, j, labels[j])

    title = f"{mode_name(result.mode)} ablation by position"
    beside = effect_colours(result.metric, "effect")
    figure = heat_map(result.effect.numpy(), names, labels, text, *beside)
    styled(figure, _title(result, title, result.ablated), map_height(len(names), 24))
    return across_tokens(figure, labels)


@show.register
def show_screened(result: ScreenedAblation) -> go.Figure:
    """Estimated effect of every head, one grid a stack, and exact effects beside the estimates."""
    frame = result.to_frame()
    stacks = list(dict.fromkeys(stack_of(site) for site in frame["site"]))
    count, metric = len(stacks), result.exact.metric
    name, unit, worse = METRICS[result.estimated]
    quantity = Quantity("estimate", f"estimated change of {name}", unit, signed=True, worse=worse)
    agreement = number_text(result.agreement)
    beside = f"the {len(result.exact.heads)} largest, exactly (rank agreement {agreement})"
    headings = [quantity.heading(stack) for stack in stacks]
    figure = make_subplots(
        count,
        2,
        horizontal_spacing=0.16,
        vertical_spacing=0.3 / count,
        specs=[[{}, {"rowspan": count} if row == 0 else None] for row in range(count)],
        subplot_titles=[headings[0], beside, *headings[1:]],
    )
    for row, stack in enumerate(stacks, 1):
        own = frame.loc[[stack_of(site) == stack for site in frame["site"]]]
        add_grid(figure, own, quantity, row, 1)
    for trace in _exact_beside(result):
        figure.add_trace(trace, row=1, col=2)
    figure.update_xaxes(title=f"estimated {change_of(result.estimated)}", row=1, col=2)
    figure.update_yaxes(title=f"exact {change_of(metric)}", row=1, col=2)
    named = f"Screened {result.exact.mode.value.replace('_', ' ')} ablation"
    title = f"{named} on {task_name(result.exact)}, {prompts_text(result.exact)}"
    styled(figure, title, 420 + 180 * (count - 1))
    layout: Any = figure.layout
    for number, note in enumerate(layout.annotations):
        start = domains(figure, 1, 2 if number == 1 else 1)[0][0]
        note.update(font_size=13, xanchor="left", x=start)
    figure.update_layout(showlegend=False, margin={"l": 44, "t": 84, "b": 56})
    return figure


def group_word(result: GroupAblation) -> str:
    """What a group is: a layer where each is named after the one that its heads are in."""
    layers = all(
        {head.site for head in heads} == {name}
        for name, heads in zip(result.names, result.groups, strict=True)
    )
    return "layer" if layers else "group"


def heads_text(heads: Sequence[Head]) -> str:
    """The heads by name, or the first of them and how many more."""
    named = ", ".join(map(str, heads[:LISTED]))
    return named + (f" and {len(heads) - LISTED} more" if len(heads) > LISTED else "")


def _exact_beside(result: ScreenedAblation) -> list[go.Scatter]:
    """Exact effects against estimates, over the line on which both agree where they can."""
    exact = result.exact
    records: list[dict[str, Any]] = exact.to_frame().to_dict("records")
    known = dict(zip(result.heads, result.estimate.tolist(), strict=True))
    estimates = [known[head] for head in exact.heads]
    ends = [min(estimates), max(estimates)]
    line = go.Scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": CONTROL, "dash": "dot", "width": 1},
        hoverinfo="skip",
    )
    points = go.Scatter(
        x=estimates,
        y=[record["effect"] for record in records],
        error_y=error_bars(records, "effect"),
        mode="markers+text",
        text=[str(head) for head in exact.heads],
        textposition="middle right",
        cliponaxis=False,
        textfont={"size": 10},
        marker={"color": INK, "size": 8},
        customdata=[interval_text(record, "effect") for record in records],
        hovertemplate="<b>%{text}</b> exact %{y:.3f} (%{customdata})<br>estimate %{x:.3f}"
        "<extra></extra>",
    )
    return [line, points] if result.estimated == exact.metric else [points]


def _bars(
    result: GroupAblation | EditEffects,
    values: Tensor,
    names: Sequence[str],
    hover: Sequence[str],
    title: str,
) -> go.Figure:
    """A bar a row, the first on top; those that are not known yet have none."""
    records: list[dict[str, Any]] = result.to_frame().to_dict("records")
    order = range(len(records))[::-1]
    labels = [html.escape(names[i]) for i in order]
    figure = go.Figure(
        effect_bars(
            [records[i] for i in order], labels, result.metric, title, [hover[i] for i in order]
        )
    )
    return _finished(figure, result, values, title, len(records))


def _finished(
    figure: go.Figure, result: GroupAblation | EditEffects | SetAblation, values: Tensor,
    title: str, rows: int,
) -> go.Figure:  # fmt: skip
    styled(figure, _title(result, title, values), 26 * rows + 130)
    figure.update_xaxes(title=f"{change_of(result.metric)}; {RED}", zeroline=True)
    figure.update_yaxes(type="category", automargin=True, ticksuffix="  ")
    figure.update_layout(bargap=0.35, showlegend=False)
    return figure


def _title(
    result: GroupAblation | EditEffects | SetAblation | PairAblation | PositionAblation,
    title: str,
    values: Tensor,
) -> str:
    """What a figure shows: what was done, task, prompts, and how much is missing."""
    return f"{title} on {task_name(result)}, {prompts_text(result)}{missing_text(values)}"


def heat_map(
    values: Grid,
    rows: Sequence[str],
    columns: Sequence[str],
    text: Callable[[int, int], str],
    what: str,
    turned: bool,
) -> go.Figure:
    """A heat map that diverges from 0, red above, or below where `turned`.

    `text` is what the hover says of a cell, in maps that are small enough for a page to hold it;
    `what` is markup beside the colours. Raises InputError where no value is known yet.
    """
    known = values[np.isfinite(values)]
    if not known.size:
        raise InputError("There is nothing to draw: no value of this sweep is known yet.")
    top = max(float(np.abs(known).max()), 1e-6)
    told = values.size <= TOLD
    texts = [[text(i, j) for j in range(len(columns))] for i in range(len(rows))] if told else None
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32),
            x=list(columns),
            y=list(rows),
            customdata=texts,
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}" if len(columns) <= NUMBERED else None,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate=f"{'%{customdata}' if told else PLAIN}<extra></extra>",
        )
    )
    axis = colour_axis("diverging", -top, top, "", turned=turned)
    axis["colorbar"]["title"]["text"] = what
    figure.update_layout(coloraxis=axis)
    figure.update_xaxes(type="category", showgrid=False, ticks="")
    figure.update_yaxes(type="category", showgrid=False, ticks="", autorange="reversed")
    figure.update_xaxes(showticklabels=len(columns) <= LABELLED or len(columns) != len(rows))
    if len(rows) <= LABELLED:
        figure.update_yaxes(tickvals=list(rows))
    return figure


def effect_colours(metric: str, what: str) -> tuple[str, bool]:
    """What stands beside the colours of effects on a metric, and whether they are turned."""
    _, measured, worse = METRICS[metric]
    unit = f"({measured}); " if measured else ""
    return f"{what} on {metric}<br>{unit}{RED}", worse < 0


def across_tokens(figure: go.Figure, labels: Sequence[str]) -> go.Figure:
    """The heat map with the tokens of the first prompt below it, as many as have room."""
    figure.update_xaxes(
        title="position (tokens of the first prompt)", tickangle=-60, side="bottom",
        tickvals=list(labels)[:: len(labels) // LABELLED + 1],
    )  # fmt: skip
    figure.update_yaxes(ticksuffix=" ")
    figure.update_layout(margin={"b": 100})
    return figure


def place_labels(tokens: Sequence[str], positions: Sequence[int]) -> list[str]:
    """One label a position, all different: the token and where it stands."""
    return [
        f"{token_label(token)}<sub> {position}</sub>"
        for token, position in zip(tokens, positions, strict=True)
    ]


def _pair_text(result: PairAblation, i: int, j: int) -> str:
    """What the hover says of a pair, or of one head by itself."""
    one, other = result.heads[i], result.heads[j]
    alone = [number_text(float(result.single[k])) for k in (i, j)]
    if i == j:
        return f"<b>{one}</b> by itself {alone[0]}"
    bounds = {"x_low": float(result.low[i, j]), "x_high": float(result.high[i, j])}
    return (
        f"<b>{one}, {other}</b> interaction {number_text(float(result.interaction[i, j]))}"
        f"<br>interval {interval_text(bounds, 'x')}"
        f"<br>both {number_text(float(result.joint[i, j]))}"
        f"<br>{one} by itself {alone[0]}<br>{other} by itself {alone[1]}"
    )


def _place_text(result: PositionAblation, i: int, j: int, label: str) -> str:
    bounds = {"x_low": float(result.low[i, j]), "x_high": float(result.high[i, j])}
    return (
        f"<b>{result.heads[i]}</b> at {label}: {number_text(float(result.effect[i, j]))}"
        f"<br>interval {interval_text(bounds, 'x')}"
    )


def map_height(rows: int, each: int) -> int:
    """Height of a figure of a heat map whose rows are `each` high."""
    return int(np.clip(each * rows + 170, 360, 1100))
