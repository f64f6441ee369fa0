"""Which attribution to believe: a panel of dots a measure, beside random scores, and the curves."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from attnlens.analyses.faithfulness import MEASURES, Faithfulness
from attnlens.views.narrative import plural
from attnlens.views.panels import interval_text, number_text
from attnlens.views.report_parts import Drawn, Part, Table
from attnlens.views.shown import show
from attnlens.views.theme import INK, styled

TITLES = {
    "loo_spearman": "Rank agreement with leave-one-out",
    "gradient_spearman": "Rank agreement with the gradient",
    "deletion": "Deletion area",
    "insertion": "Insertion area",
    "abpc": "Area between the curves",
    "comprehensiveness": "Comprehensiveness",
    "sufficiency": "Sufficiency",
    "pointing": "Points at the source",
}
PLAIN, WORSE, CHANCE, BAND = "#7a8488", "#c2562a", "#9aa3a6", "rgba(122,132,136,0.18)"
GRID = "#e4e6e2"
SAID = {1: INK, 0: PLAIN, -1: WORSE}
LINES = (INK, "#c2562a", "#7a5ea8", "#b8892b", "#1f4e79")
ACROSS = 4


@show.register
def show_faithfulness(found: Faithfulness) -> go.Figure:
    """A panel of dots a measure, methods from the largest area between curves down; the curves.

    A dot is dark where the method is clearly better than random scores, rust where clearly worse:
    where the interval of their difference, prompt by prompt, leaves 0 out.
    """
    measures = [name for name in MEASURES if not bool(found[name].mean.isnan().all())]
    methods = ordered(found)
    rows = -(-len(measures) // ACROSS)
    tall = 24 * len(methods) + 30
    blank = [None] * (rows * ACROSS - len(measures))
    titles = [_title(name) for name in measures] + ["" for _ in blank]
    curves = ["M while the most relevant tokens go first", "M while the least relevant go first"]
    figure = make_subplots(
        rows + 1,
        ACROSS,
        horizontal_spacing=0.03,
        vertical_spacing=92 / (rows * tall + 330 + 100 * rows),
        row_heights=[*[tall] * rows, 330],
        specs=[
            *_specs(rows, len(measures)),
            [{"colspan": 2}, None, {"colspan": 2}, None],
        ],
        subplot_titles=[*titles[: len(measures)], *curves],
    )
    on = f"{found.task.replace('_', ' ')}, {plural(found.prompts, 'prompt')}"
    title = f"Which attribution to believe, on {on}; grey band: random scores"
    styled(figure, title, rows * tall + 330 + 110 * rows)
    for number, name in enumerate(measures):
        _add_dots(figure, found, name, methods, number // ACROSS + 1, number % ACROSS + 1)
    _add_curves(figure, found, methods, rows + 1)
    figure.update_layout(
        margin={"l": 150, "t": 100, "b": 100},
        legend={"orientation": "h", "yref": "container", "y": 0.005, "yanchor": "bottom", "x": 0},
    )
    layout: Any = figure.layout
    for note in layout.annotations:
        note.update(font_size=12)
    return figure


def ordered(found: Faithfulness) -> list[str]:
    """The methods but random, from the largest area between the curves down."""
    area = dict(zip(found.methods, found["abpc"].mean.nan_to_num(-np.inf).tolist(), strict=True))
    return sorted((name for name in found.methods if name != "random"), key=lambda n: -area[n])


def _specs(rows: int, count: int) -> list[list[dict[str, Any] | None]]:
    cells = [{} if number < count else None for number in range(rows * ACROSS)]
    return [cells[row * ACROSS : (row + 1) * ACROSS] for row in range(rows)]


def _title(measure: str) -> str:
    return f"{TITLES[measure]}<br><sub>{'more' if MEASURES[measure] else 'less'} is better</sub>"


def _add_dots(
    figure: go.Figure, found: Faithfulness, measure: str, methods: Sequence[str], row: int, col: int
) -> None:
    """Dots with intervals, and a band and a line where random scores are."""
    place: Any = {"row": row, "col": col}
    frame = found.to_frame().set_index("method")
    chance = frame.loc["random"]
    records: list[dict[str, Any]] = frame.loc[list(methods)[::-1]].to_dict("records")
    mean, low, high = (
        np.array([record[f"{measure}{end}"] for record in records]) for end in ("", "_low", "_high")
    )
    verdicts = judged(found, measure)
    texts = [
        f"{interval_text(record, measure)}<br>random {number_text(chance[measure])}"
        for record in records
    ]
    bounds = {
        "type": "data", "symmetric": False, "thickness": 1.4, "width": 0, "color": CHANCE,
        "array": np.nan_to_num(high - mean), "arrayminus": np.nan_to_num(mean - low),
    }  # fmt: skip
    dots = go.Scatter(
        x=mean,
        y=[html.escape(name) for name in methods[::-1]],
        mode="markers",
        marker={"size": 9, "color": [SAID[verdicts[name]] for name in methods[::-1]]},
        error_x=bounds,
        customdata=texts,
        hovertemplate="<b>%{y}</b> %{x:.3f}<br>%{customdata}<extra></extra>",
        showlegend=False,
    )
    figure.add_trace(dots, row=row, col=col)
    if not np.isnan(chance[f"{measure}_low"]):
        low_end, high_end = chance[f"{measure}_low"], chance[f"{measure}_high"]
        figure.add_vrect(low_end, high_end, fillcolor=BAND, line_width=0, layer="below", **place)
    if not np.isnan(chance[measure]):
        dotted = {"color": CHANCE, "dash": "dot", "width": 1}
        figure.add_vline(chance[measure], line=dotted, **place)
    ends = [*low, *high, *mean, *(chance[f"{measure}{end}"] for end in ("", "_low", "_high"))]
    least, greatest = np.nanmin(ends), np.nanmax(ends)
    spare = 0.06 * (greatest - least) or 0.5
    figure.update_xaxes(
        range=[least - spare, greatest + spare],
        gridcolor=GRID, zeroline=True, zerolinecolor=GRID, nticks=5, tickfont_size=10,
        row=row, col=col,
    )  # fmt: skip
    figure.update_yaxes(
        showticklabels=col == 1, gridcolor=GRID, tickfont_size=11, range=[-0.6, len(methods) - 0.4],
        row=row, col=col,
    )  # fmt: skip


def judged(found: Faithfulness, measure: str) -> dict[str, int]:
    """Of each method 1 where it is clearly better than random scores, -1 where worse, else 0."""
    _, low, high = (bounds.tolist() for bounds in found.over_random(measure))
    sign = 1 if MEASURES[measure] else -1
    return {
        name: sign if least > 0 else -sign if most < 0 else 0
        for name, least, most in zip(found.methods, low, high, strict=True)
    }


def _add_curves(figure: go.Figure, found: Faithfulness, methods: Sequence[str], row: int) -> None:
    """The best methods in colours, the others thin, random scores dotted."""
    shares = found.fractions.numpy()
    named = list(methods[: len(LINES)])
    colours = dict(zip(named, LINES, strict=False)) | {"random": PLAIN}
    thin = [name for name in methods if name not in colours]
    for column, curves in ((1, found.morf), (3, found.lerf)):
        for name in [*thin, "random", *named[::-1]]:
            line = {"color": colours.get(name, "#cdd2d0"), "width": 2 if name in named else 1.2}
            if name == "random":
                line |= {"dash": "dot", "width": 2}
            figure.add_trace(
                go.Scatter(
                    x=shares,
                    y=curves[found.methods.index(name)].numpy(),
                    mode="lines",
                    line=line,
                    name=html.escape(name),
                    legendgroup=name,
                    legendrank=named.index(name) if name in named else 99,
                    showlegend=column == 1 and name in colours,
                    hovertemplate=f"{html.escape(name)}<br>%{{x:.0%}} erased: %{{y:.2f}}"
                    "<extra></extra>",
                ),
                row=row,
                col=column,
            )
        figure.update_xaxes(
            title="share of the tokens erased", tickformat=".0%", range=[0, 1.04], gridcolor=GRID,
            zeroline=False,
            row=row, col=column,
        )  # fmt: skip
        figure.update_yaxes(
            title="M (logits)" if column == 1 else None, gridcolor=GRID, zerolinecolor=CHANCE,
            row=row, col=column,
        )  # fmt: skip


def faithfulness_lines(found: Faithfulness) -> tuple[str, ...]:
    """Who is to be believed, in short."""
    methods = ordered(found)
    what = f"{plural(found.prompts, 'prompt')} of {found.task.replace('_', ' ')}"
    first = f"Judged: {plural(len(methods), 'method')} on {what}; erasing took "
    lines = [f"{first}{plural(found.forwards, 'forward')}."]
    for measure in ("abpc", "loo_spearman", "pointing"):
        known = [n for n in methods if measure != "loo_spearman" or n != "leave_one_out"]
        line = _best(found, measure, known)
        if line:
            lines.append(line)
    verdicts = judged(found, "abpc")
    behind = [name for name in methods if verdicts[name] < 1]
    if behind:
        lines.append(
            f"Not clearly better than random scores by the area between the curves: "
            f"{', '.join(behind)}."
        )
    return tuple(lines)


def _best(found: Faithfulness, measure: str, methods: Sequence[str]) -> str:
    """`Area between the curves: attnlrp 15.2 (13.1 to 17.0), ...; random -0.2.`"""
    frame = found.to_frame().set_index("method")
    values = frame.loc[list(methods)].dropna(subset=[measure])
    if values.empty:
        return ""
    best = values.sort_values(measure, ascending=not MEASURES[measure], kind="stable").head(3)
    told = [
        f"{name} {number_text(record[measure])} ({interval_text(record, measure)})"
        for name, record in zip(best.index, best.to_dict("records"), strict=True)
    ]
    chance = number_text(float(frame.loc["random", measure]))
    return f"{TITLES[measure]}: {', '.join(told)}; random {chance}."


def faithfulness_part(found: Faithfulness) -> Part:
    """What a report says of the bench."""
    headings: dict[str, str] = {name: TITLES[name].lower() for name in MEASURES}
    frame = found.to_frame().set_index("method").loc[[*ordered(found), "random"]].reset_index()
    left_out = pd.DataFrame({"method": found.failed.keys(), "why": found.failed.values()})
    return Part(
        title="Which attribution to believe",
        lines=faithfulness_lines(found),
        prose=(
            "Every method scores the tokens of a prompt for M, the logit of the right answer less "
            "that of the wrong one. Then tokens are erased, and M tells which scores meant "
            "something. Areas are under M over the share of tokens erased, most relevant first "
            "(deletion) and least relevant first (insertion, read backwards); comprehensiveness is "
            "the drop of M without the most relevant 1, 5, 10, 20 and 50 %, sufficiency the drop "
            "with them alone. No single measure is the truth: believe what several agree on. "
            f"In place of an erased token: {found.in_place}."
        ),
        figures={
            "faithfulness": Drawn(
                show(found),
                "Means over prompts with their intervals. Grey band and dotted line: random "
                "scores. Dark dots are clearly better than random, rust ones clearly worse.",
            )
        },
        tables={
            "faithfulness": Table(
                frame, "measures by method, means over prompts", ("method", *MEASURES), headings
            ),
            "faithfulness-curves": Table(found.curves_frame(), "deletion curves by method", None),
            "faithfulness-prompts": Table(found.prompts_frame(), "measures by prompt", None),
            **({"methods-left-out": Table(left_out, "methods left out")} if found.failed else {}),
        },
        notes=found.notes,
    )
