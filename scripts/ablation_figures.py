"""Make the figures and tables of docs/ablation.md, from sweeps over the shipped model.

    python -m scripts.ablation_figures tiny_shakespeare.txt [NAME ...]

The text is the one that the model was trained on; its last 7 %, which the model has not seen, is
the plain text. Figures go to docs/figures/ablation-NAME.png, tables to the screen as Markdown. With
names only those are made. It takes two minutes on one core.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import attnlens as al
from attnlens.analyses.ablation import Ablation, Mode
from attnlens.analyses.screening import ScreenedAblation
from attnlens.tasks import Task
from attnlens.views.theme import styled
from attnlens.zoo import small_path

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
MODES = {"zero": "#34808b", "mean": "#1f4e79", "resample": "#9a3412"}
CONTROL, GRID = "#7a8488", "#e4e6e2"
SHOWN = (
    *("L0H2", "L0H3", "L0H5", "L1H7", "L1H0", "L2H3", "L2H4", "L2H0", "L2H6"),
    *("L2H7", "L2H1", "L2H2", "L2H5", "L3H4", "L3H5"),
)
QUIET = {"displayModeBar": False}
LAYER_2 = ("L2H3", "L2H4", "L2H0", "L2H6", "L2H7", "L2H1", "L2H2", "L2H5")
"""The heads of layer 2, that which costs most by itself first."""


class Study:
    """The model, the two tasks, and the sweeps that several figures share."""

    def __init__(self, text: Path) -> None:
        self.lens = al.load(small_path())
        whole = text.read_text(encoding="utf-8")
        held_out = whole[int(len(whole) * 0.93) :]
        self.repeat = al.tasks.repeated_tokens(self.lens, prompts=32, period=24)
        self.plain = al.tasks.plain_text(self.lens, held_out, prompts=32, max_tokens=96)
        self._known: dict[tuple[str, str], Ablation] = {}

    @property
    def tasks(self) -> tuple[Task, Task]:
        return self.repeat, self.plain

    def heads(self, task: Task, mode: str) -> Ablation:
        """Every head by itself."""
        key = task.name, mode
        if key not in self._known:
            self._known[key] = al.ablate(self.lens, task, mode=mode)
        return self._known[key]


def heads(study: Study) -> go.Figure:
    return al.show(study.heads(study.repeat, "zero"))


def tasks(study: Study) -> go.Figure:
    """Some heads on both tasks under three modes, beside the other heads of their layers."""
    titles = [name(task) for task in study.tasks]
    figure = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    for column, task in enumerate(study.tasks, start=1):
        for row, (mode, colour) in enumerate(MODES.items()):
            frame = study.heads(task, mode).to_frame().set_index("head").loc[list(SHOWN)]
            places = [i + 0.22 * (row - 1) for i in range(len(SHOWN))]
            figure.add_trace(
                go.Scatter(
                    x=frame["effect"],
                    y=places,
                    mode="markers",
                    marker={"color": colour, "size": 7},
                    error_x=interval(frame),
                    name=mode,
                    showlegend=column == 1,
                ),
                1,
                column,
            )
            figure.add_trace(
                go.Scatter(
                    x=frame["control"],
                    y=places,
                    mode="markers",
                    marker={"symbol": "line-ns", "size": 9, "line": {"color": CONTROL, "width": 2}},
                    name="other heads of its layer, each by itself (mean)",
                    legendrank=2000,
                    showlegend=column == 1 and row == 0,
                ),
                1,
                column,
            )
    styled(figure, "Ablating one head, by task and mode", 560, 1000)
    figure.update_xaxes(title="change of loss (nats)", gridcolor=GRID, zerolinecolor="#b9bfba")
    figure.update_yaxes(
        tickvals=list(range(len(SHOWN))),
        ticktext=[f"{h}  " for h in SHOWN],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.13, "x": 0}, margin={"t": 80})
    return figure


def interval(frame: pd.DataFrame) -> dict[str, Any]:
    """Error bars of effects."""
    return {
        "type": "data",
        "symmetric": False,
        "array": frame["effect_high"] - frame["effect"],
        "arrayminus": frame["effect"] - frame["effect_low"],
        "width": 0,
    }


def together(study: Study) -> go.Figure:
    """More and more heads of layer 2 at once, beside the sum of what each costs by itself."""
    figure = go.Figure()
    counts = list(range(1, len(LAYER_2) + 1))
    groups = {str(n): ",".join(LAYER_2[:n]) for n in counts}
    for task, colour in zip(study.tasks, ("#34808b", "#9a3412"), strict=True):
        frame = al.ablate_groups(study.lens, task, groups).to_frame()
        alone = study.heads(task, "zero").to_frame().set_index("head")["effect"]
        frame["sum of single effects"] = alone.loc[list(LAYER_2)].cumsum().tolist()
        print_table(f"{name(task)}: heads of layer 2 at once", frame.drop(columns="group"))
        figure.add_trace(
            go.Scatter(
                x=counts,
                y=frame["effect"],
                mode="lines+markers",
                line={"color": colour},
                error_y=interval(frame),
                name=name(task),
            )
        )
        figure.add_trace(
            go.Scatter(
                x=counts,
                y=frame["sum of single effects"],
                mode="lines",
                line={"color": colour, "dash": "dot"},
                name=f"{name(task)}, sum of what each costs by itself",
            )
        )
    styled(figure, "Zero ablation of several heads of layer 2 at once", 440, 1000)
    names = [LAYER_2[0], *(f"+ {head}" for head in LAYER_2[1:])]
    figure.update_xaxes(tickvals=counts, ticktext=names, title="ablated", showgrid=False)
    figure.update_yaxes(title="change of loss (nats)", gridcolor=GRID, zerolinecolor="#b9bfba")
    figure.update_layout(legend={"x": 0.02, "y": 0.98}, hovermode="x")
    return figure


def pairs(study: Study) -> go.Figure:
    return al.show(al.ablate_pairs(study.lens, study.repeat, "L2")).update_layout(width=760)


def positions(study: Study) -> go.Figure:
    short = al.tasks.repeated_tokens(study.lens, prompts=32, period=12)
    found = al.ablate_positions(study.lens, short, "L0H2,L0H3,L1H7,L2")
    return al.show(found).update_layout(width=1000)


def screened(study: Study) -> go.Figure:
    """First-order estimate beside exact effect, on tasks that the model is more or less sure of."""
    answers = al.tasks.indirect_object(study.lens, prompts=32)
    asked = {
        "repeated tokens, loss": (study.repeat, "loss"),
        "repeated tokens, logit difference": (study.repeat, "logit_difference"),
        "plain text, loss": (study.plain, "loss"),
        "indirect object, logit difference": (answers, "logit_difference"),
    }
    every = len(study.lens.anatomy.heads)
    found = {
        title: al.ablate_screened(study.lens, task, top=every, metric=metric)
        for title, (task, metric) in asked.items()
    }
    rows = {title: agreement(result) for title, result in found.items()}
    print_table("Screening", pd.DataFrame(rows).T.rename_axis("task").reset_index())
    figure = make_subplots(1, 4, subplot_titles=list(found), horizontal_spacing=0.05)
    for column, result in enumerate(found.values(), start=1):
        frame = result.to_frame()
        named = frame["effect"].abs().rank(ascending=False) <= 3
        low, high = float(frame["estimate"].min()), float(frame["estimate"].max())
        beyond = frame["estimate"] > (low + high) / 2
        figure.add_trace(
            go.Scatter(
                x=frame["estimate"],
                y=frame["effect"],
                mode="markers+text",
                marker={"color": "#34808b", "size": 7, "opacity": 0.8},
                text=frame["head"].where(named, ""),
                textposition=["middle left" if right else "middle right" for right in beyond],
                showlegend=False,
            ),
            1,
            column,
        )
        line = {"color": CONTROL, "dash": "dot", "width": 1}
        ends = go.Scatter(x=[low, high], y=[low, high], mode="lines", line=line, showlegend=False)
        figure.add_trace(ends, 1, column)
    styled(figure, "Estimated by one gradient, and exact (dotted: equal)", 400, 1240)
    figure.update_xaxes(title="estimate", gridcolor=GRID, zerolinecolor="#b9bfba")
    figure.update_yaxes(gridcolor=GRID, zerolinecolor="#b9bfba")
    figure.update_yaxes(title="exact effect", col=1)
    return figure.update_annotations(font_size=12).update_layout(margin={"t": 80})


def agreement(result: ScreenedAblation) -> dict[str, float]:
    """How estimates rank heads: signed, by size, and how many of the first five they find."""
    frame = result.to_frame()
    sizes = frame[["estimate", "effect"]].abs()
    first = [set(frame["head"][sizes[column].nlargest(5).index]) for column in sizes]
    return {
        "Spearman": result.agreement,
        "of sizes": sizes.corr(method="spearman").iloc[0, 1],
        "of the 5 largest found": len(first[0] & first[1]),
    }


def pruning(study: Study) -> go.Figure:
    return al.show(al.prune_heads(study.lens, study.repeat, step=2)).update_layout(width=1000)


def effects_table(study: Study) -> None:
    """Single heads and whole layers on both tasks, under three modes; one task under all modes."""
    names = ("L0H2", "L0H3", "L1H7", "L2H3")
    rows: list[dict[str, object]] = []
    for mode in Mode:
        few = al.ablate(study.lens, study.repeat, ",".join(names), mode=mode, controls=0)
        whole = al.ablate_layers(study.lens, study.repeat, "L2", mode=mode)
        effects = dict(zip(names, few.effect.tolist(), strict=True))
        rows.append({"mode": str(mode), **effects, "L2": float(whole.effect[0])})
    print_table("repeated tokens, every mode", pd.DataFrame(rows))
    for task in study.tasks:
        for mode in MODES:
            alone = study.heads(task, mode)
            layers = al.ablate_layers(study.lens, task, mode=mode).to_frame()
            frame = alone.to_frame().nlargest(5, "effect")
            frame = frame[["head", "effect", "effect_low", "effect_high", "control"]]
            clean = float(alone.clean.mean())
            print_table(f"{name(task)}, {mode}; nothing ablated: {clean:.3f} nats", frame)
            print_table(f"{name(task)}, {mode}, whole layers", layers)
        for some in ("L2H0,L2H3,L2H4", "L2H0,L2H3,L2H4,L2H6"):
            found = al.ablate_together(study.lens, task, some)
            bounds = f"{found.low:.3f} to {found.high:.3f}"
            control = ", ".join(f"{value:.3f}" for value in found.control.tolist())
            print(f"{name(task)}, {some}: {found.effect:.3f} ({bounds}); random: {control}\n")


def name(task: Task) -> str:
    return task.name.replace("_", " ")


def print_table(title: str, frame: pd.DataFrame) -> None:
    frame = frame.round(3)
    print(f"{title}\n")
    print("| " + " | ".join(map(str, frame.columns)) + " |")
    print("|" + "---|" * len(frame.columns))
    for row in frame.itertuples(index=False):
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def write(figure: go.Figure, path: Path) -> None:
    """The figure as PNG, by a Chromium that is on the path."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("Figures are drawn by chromium, and there is none on the path.")
    size = f"{figure.layout.width or 1000},{figure.layout.height or 450}"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.update_layout(width=int(size.split(",")[0]))
        style = "<style>body{margin:0;overflow:hidden}</style>"
        page.write_text(
            style + figure.to_html(include_plotlyjs=True, config=QUIET), encoding="utf-8"
        )
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--disable-background-networking", "--virtual-time-budget=8000"]
        flags += [f"--window-size={size}", f"--screenshot={path}", page.as_uri()]
        subprocess.run([browser, *flags], check=True, capture_output=True)
    print(f"{path}\n", file=sys.stderr)


DRAWN: Mapping[str, Callable[[Study], go.Figure]] = {
    function.__name__: function
    for function in (heads, tasks, together, pairs, positions, screened, pruning)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text", type=Path, help="the text that the model was trained on")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*DRAWN, "table"]))
    asked = parser.parse_args()
    study = Study(asked.text)
    wanted = asked.names or [*DRAWN, "table"]
    for which in wanted:
        if which == "table":
            effects_table(study)
        else:
            write(DRAWN[which](study), FIGURES / f"ablation-{which}.png")


if __name__ == "__main__":
    main()
