"""Ablation: a grid of effects, and the heads that matter most beside matched random heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from attnlens.analyses.ablation import Ablation
from attnlens.analyses.ablation_groups import SetAblation
from attnlens.views.panels import Quantity, head_grids, interval_text, number_text
from attnlens.views.shown import show
from attnlens.views.theme import styled

MOST = 16
WORSE, BETTER, CONTROL = "#9a3412", "#1f4e79", "#7a8488"

# What a metric is called, its unit, and the sign of an effect that makes the task go worse.
METRICS = {
    "loss": ("loss", "nats", 1),
    "logit_difference": ("logit difference", "logits", -1),
    "accuracy": ("accuracy", "", -1),
}


@show.register
def show_ablation(ablation: Ablation) -> go.Figure:
    """Effect of ablating each head, one grid a stack; colours diverge from no effect."""
    metric, unit, _ = METRICS[ablation.metric]
    quantity = Quantity("effect", f"change of {metric}", unit, signed=True)
    return head_grids(ablation.to_frame(), [quantity], title_of(ablation), across=2)


def show_ranking(ablation: Ablation) -> go.Figure:
    """The heads with the largest effects, with intervals, and their matched random heads."""
    records = ranked(ablation)[:MOST][::-1]
    metric, unit, worse = METRICS[ablation.metric]
    names = [record["head"] for record in records]
    effects = [record["effect"] for record in records]
    colours = [WORSE if effect * worse > 0 else BETTER for effect in effects]
    figure = go.Figure()
    figure.add_trace(
        go.Bar(
            x=effects,
            y=names,
            orientation="h",
            marker={"color": colours},
            error_x=_bars(records, "effect"),
            customdata=[f"interval {interval_text(record, 'effect')}" for record in records],
            hovertemplate=f"<b>%{{y}}</b> %{{x:.3f}} {unit}<br>%{{customdata}}<extra></extra>",
            name="this head",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=[record["control"] for record in records],
            y=names,
            mode="markers",
            marker={"color": CONTROL, "symbol": "diamond", "size": 8},
            error_x=_bars(records, "control"),
            hovertemplate="other heads of the layer %{x:.3f}<extra></extra>",
            name="random other heads of the layer",
        )
    )
    styled(figure, title_of(ablation), 24 * len(records) + 150)
    figure.update_xaxes(title=f"change of {metric}" + (f" ({unit})" if unit else ""), zeroline=True)
    figure.update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, bargap=0.35
    )
    return figure


def title_of(ablation: Ablation) -> str:
    """What was done, in a few words."""
    return f"{ablation.mode.value.capitalize()} ablation on {ablation.task.replace('_', ' ')}"


def ranked(ablation: Ablation) -> list[dict[str, Any]]:
    """The table of heads, the largest effect in either direction first."""
    frame = ablation.to_frame()
    order = np.argsort(-np.abs(frame["effect"].to_numpy(dtype=float)), kind="stable")
    return frame.iloc[order].to_dict("records")


def ablation_lines(ablation: Ablation, vocab: int | None, most: int = 3) -> list[str]:
    """What ablating the heads that matter most costs, beside matched random heads.

    Where the model does not solve the task, effects say little, and a line says so.
    """
    metric, unit, worse = METRICS[ablation.metric]
    task = ablation.task.replace("_", " ")
    clean = number_text(float(ablation.clean.mean()))
    lines = [f"Task {task}: {metric} {clean}{f' {unit}' if unit else ''} with every head in place."]
    if not _solved(ablation, vocab):
        lines.append(
            "That is no better than guessing, so what follows says little about how heads do it."
        )
    costly = sorted(ranked(ablation), key=lambda record: -record["effect"] * worse)
    # A head matters where its interval lies on the bad side of no effect.
    found = [r for r in costly if _least(r, worse) > 0]
    if not found:
        return [*lines, f"No single head matters there: no interval lies clear of 0 ({task})."]
    for record in found[:most]:
        cost = f"{_amount(record['effect'], unit)} of {metric}"
        bounds = _bounds(record["effect_low"] * worse, record["effect_high"] * worse)
        line = f"Ablating {record['head']} costs {cost} ({bounds}"
        if record["control"] == record["control"]:
            line += f"; random heads of its layer {number_text(record['control'] * worse)}"
        lines.append(line + ").")
    return lines


def together_line(ablation: SetAblation) -> str:
    """What taking out all induction heads at once does, beside random sets of as many heads."""
    metric, unit, worse = METRICS[ablation.metric]
    costs = ablation.effect * worse > 0
    sign = worse if costs else -worse
    line = (
        f"Ablating the {len(ablation.heads)} induction heads together "
        f"{'costs' if costs else 'gains'} {_amount(ablation.effect, unit)} of {metric} "
        f"({_bounds(ablation.low * sign, ablation.high * sign)}"
    )
    if not len(ablation.control):
        return line + "; there are too few other heads in their layers for random sets)."
    control = number_text(float(ablation.control.mean()) * sign)
    return line + f"; random sets of as many heads in the same layers {control})."


def _amount(effect: float, unit: str) -> str:
    return number_text(abs(effect)) + (f" {unit}" if unit else "")


def _bounds(low: float, high: float) -> str:
    least, most = sorted((low, high))
    return f"{number_text(least)} to {number_text(most)}"


def _solved(ablation: Ablation, vocab: int | None) -> bool:
    """Whether the model, nothing ablated, does better than guessing."""
    clean = float(ablation.clean.mean())
    if ablation.metric == "loss":
        return vocab is None or clean < math.log(vocab)
    return clean > 0


def _least(record: dict[str, Any], worse: int) -> float:
    """The end of the interval that is nearest to no effect, or the effect where there is none."""
    ends = [record["effect_low"] * worse, record["effect_high"] * worse]
    least = min(ends)
    return record["effect"] * worse if least != least else least


def _bars(records: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Error bars from the bounds of an interval."""
    values, low, high = (
        np.array([record[f"{name}{end}"] for record in records], dtype=float)
        for end in ("", "_low", "_high")
    )
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - values).clip(0),
        "arrayminus": (values - low).clip(0),
        "thickness": 1.2,
        "width": 3,
        "color": CONTROL,
    }
