"""Ablation of single heads: a grid of effects, and a ranking beside matched random heads."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from attnlens.analyses.ablation import Ablation
from attnlens.analyses.ablation_groups import SetAblation
from attnlens.views.panels import RED, Quantity, count_text, head_grids, interval_text, number_text
from attnlens.views.shown import show
from attnlens.views.theme import styled

MOST = 16
LEAST = 0.001
"""The smallest cost that is said: less would read as 0."""
NONE_CLEAR = f"no cost of {LEAST:g} or more has an interval clear of 0"
WORSE, BETTER, CONTROL = "#9a3412", "#3d76a8", "#7a8488"

# What a metric is called, its unit, and the sign of an effect that makes the task go worse.
METRICS = {
    "loss": ("loss", "nats", 1),
    "logit_difference": ("logit difference", "logits", -1),
    "accuracy": ("accuracy", "", -1),
}


class Graded(Protocol):
    """What results of sweeps share."""

    @property
    def task(self) -> str:
        """What was graded."""
        ...

    @property
    def metric(self) -> str:
        """By what."""
        ...

    @property
    def clean(self) -> Tensor:
        """The metric of each prompt, nothing edited; NaN where it is not known yet."""
        ...


@show.register
def show_ablation(ablation: Ablation) -> go.Figure:
    """Effect of ablating each head, one grid a stack; colours diverge from no effect."""
    metric, unit, worse = METRICS[ablation.metric]
    quantity = Quantity("effect", f"change of {metric}", unit, signed=True, worse=worse)
    return head_grids(ablation.to_frame(), [quantity], heading(ablation), across=2)


def show_ranking(ablation: Ablation) -> go.Figure:
    """The heads with the largest effects, with intervals, and their matched random heads."""
    known = [record for record in ranked(ablation) if not math.isnan(record["effect"])]
    records = known[:MOST][::-1]
    names = [record["head"] for record in records]
    figure = go.Figure(effect_bars(records, names, ablation.metric, "this head"))
    if with_controls(ablation):
        figure.add_trace(
            go.Scatter(
                x=[record["control"] for record in records],
                y=names,
                mode="markers",
                marker={"color": CONTROL, "symbol": "diamond", "size": 8},
                error_x=error_bars(records, "control"),
                hovertemplate="other heads of the layer %{x:.3f}<extra></extra>",
                name="random other heads of the layer",
            )
        )
    styled(figure, heading(ablation), 24 * len(records) + 150)
    figure.update_xaxes(title=f"{change_of(ablation.metric)}; {RED}", zeroline=True)
    figure.update_layout(
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        bargap=0.35,
        margin_t=84,
    )
    return _with_colours(figure)


def with_controls(ablation: Ablation) -> bool:
    """Whether any head stands beside random others."""
    return bool((~ablation.control.isnan()).any())


def _with_colours(figure: go.Figure) -> go.Figure:
    """The figure with a legend of the two colours of its bars, in place of that of the bars."""
    figure.update_traces(showlegend=False, selector={"type": "bar"})
    for colour, name in ((WORSE, "the task goes worse"), (BETTER, "better")):
        marker = {"color": colour, "symbol": "square", "size": 11}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, legendrank=1)
        )
    return figure


def title_of(ablation: Ablation) -> str:
    """What was done, in a few words."""
    return f"{mode_name(ablation.mode)} ablation on {task_name(ablation)}"


def mode_name(mode: str) -> str:
    """`Position mean` of `position_mean`."""
    return mode.replace("_", " ").capitalize()


def task_name(result: Graded) -> str:
    """`repeated tokens` of `repeated_tokens`."""
    return result.task.replace("_", " ")


def prompts_text(result: Graded) -> str:
    """`16 prompts`, or `9 of 16 prompts` where a sweep is not finished."""
    known, count = int((~result.clean.isnan()).sum()), len(result.clean)
    return f"{f'{known:,} of ' * (known < count)}{count_text(count, 'prompt')}"


def missing_text(values: Tensor) -> str:
    """`, 43 of 512 values missing` where a sweep is not finished."""
    missing = int(values.isnan().sum())
    return f", {missing:,} of {values.numel():,} values missing" if missing else ""


def heading(ablation: Ablation) -> str:
    """What a figure shows: mode, task, prompts, and how much is missing."""
    return f"{title_of(ablation)}, {prompts_text(ablation)}{missing_text(ablation.ablated)}"


def change_of(metric: str) -> str:
    """`change of loss (nats)`."""
    name, unit, _ = METRICS[metric]
    return f"change of {name}" + (f" ({unit})" if unit else "")


def effect_bars(
    records: Sequence[dict[str, Any]],
    names: Sequence[str],
    metric: str,
    legend: str,
    hover: Sequence[str] | None = None,
) -> go.Bar:
    """A bar with its interval for the effect of each record; `hover` is markup after the number."""
    _, unit, worse = METRICS[metric]
    effects = [record["effect"] for record in records]
    texts = [f"interval {interval_text(record, 'effect')}" for record in records]
    if hover is not None:
        texts = [f"{text}<br>{more}" for text, more in zip(texts, hover, strict=True)]
    return go.Bar(
        x=effects,
        y=list(names),
        orientation="h",
        marker={"color": [WORSE if effect * worse > 0 else BETTER for effect in effects]},
        error_x=error_bars(records, "effect"),
        customdata=texts,
        hovertemplate=f"<b>%{{y}}</b> %{{x:.3f}} {unit}<br>%{{customdata}}<extra></extra>",
        name=html.escape(legend),
    )


def ranked(ablation: Ablation) -> list[dict[str, Any]]:
    """The table of heads, the largest effect in either direction first; unknown ones last."""
    frame = ablation.to_frame()
    order = np.argsort(-np.abs(frame["effect"].to_numpy(dtype=float)), kind="stable")
    return frame.iloc[order].to_dict("records")


def ablation_lines(ablation: Ablation, vocab: int | None, most: int = 3) -> list[str]:
    """What ablating the heads that matter most costs, beside matched random heads.

    Where the model does not solve the task, effects say little, and a line says so.
    """
    lines = task_lines(ablation, vocab)
    found = costly(ranked(ablation), ablation.metric)[:most]
    if not found:
        task = task_name(ablation)
        none = f"No single head matters there: {NONE_CLEAR} ({task})."
        return [*lines, none]
    return [*lines, *(f"Ablating {r['head']} {cost_text(r, ablation.metric)}." for r in found)]


def task_lines(result: Graded, vocab: int | None) -> list[str]:
    """How well the model does with nothing edited, and a caution where that is not well."""
    metric, unit, _ = METRICS[result.metric]
    clean = number_text(float(result.clean.nanmean()))
    of = f"{metric} {clean}{f' {unit}' if unit else ''}"
    lines = [f"Task {task_name(result)}: {of} with every head in place."]
    if not _solved(result, vocab):
        lines.append(
            "That is no better than guessing, so what follows says little about how heads do it."
        )
    return lines


def costly(records: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Records whose interval lies on the bad side of no effect, the largest cost first.

    Costs under `LEAST` are left out.
    """
    worse = METRICS[metric][2]
    costs = [record for record in records if record["effect"] * worse >= LEAST]
    found = [record for record in costs if _least(record, worse) > 0]
    return sorted(found, key=lambda record: -record["effect"] * worse)


def cost_text(record: dict[str, Any], metric: str) -> str:
    """`costs 2.00 nats of loss (1.90 to 2.10; random heads of its layer 0.00)`."""
    name, unit, worse = METRICS[metric]
    beside: list[str] = []
    if not math.isnan(record["effect_low"]):
        beside.append(_bounds(record["effect_low"] * worse, record["effect_high"] * worse))
    if not math.isnan(record.get("control", math.nan)):
        beside.append(f"random heads of its layer {number_text(record['control'] * worse)}")
    text = f"costs {_amount(record['effect'], unit)} of {name}"
    return text + (f" ({'; '.join(beside)})" if beside else "")


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


def _solved(result: Graded, vocab: int | None) -> bool:
    """Whether the model, nothing edited, does better than guessing."""
    clean = float(result.clean.nanmean())
    if result.metric == "loss":
        return vocab is None or clean < math.log(vocab)
    return clean > 0


def _least(record: dict[str, Any], worse: int) -> float:
    """The end of the interval that is nearest to no effect, or the effect where there is none."""
    ends = [record["effect_low"] * worse, record["effect_high"] * worse]
    least = min(ends)
    return record["effect"] * worse if least != least else least


def error_bars(records: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
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
