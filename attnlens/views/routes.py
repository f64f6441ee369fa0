"""Routes as a layered drawing: tokens across, layers upwards, edges from what is read."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from attnlens.analyses.routes import Routes
from attnlens.views.heatmaps import check_prompt
from attnlens.views.panels import count_text
from attnlens.views.shown import show
from attnlens.views.theme import (
    INK,
    SEQUENTIAL,
    colour_axis,
    position_labels,
    styled,
    token_label,
    visible,
)

MOST = 300
"""Attention edges that are drawn; more hide each other."""
CLASSES = 8
PALE = 0.22
"""Place on the colour scale of the weakest edge, which is to be seen on paper."""
STEM, MLP, GROUND = "#c3c8c4", "#c0622d", "#e4e6e2"
LABELS = 60


@show.register
def show_routes(found: Routes, prompt: int = 0) -> go.Figure:
    """The kept edges of one prompt, attention in the colour of its weight; heads in hover texts."""
    check_prompt(prompt, len(found.tokens))
    drawing = _Drawing(found, prompt)
    pairs = drawing.pairs()
    strongest = pairs.nlargest(MOST, "weight").iloc[::-1]
    words, target = found.tokens[prompt], found.target[prompt]
    figure = go.Figure()
    height = 110 * len(found.layers) + 220
    title = f"Routes to \u201c{visible(words[target])}\u201d at {target}"
    styled(figure, f"{title}, parts of at least {found.threshold:.3g} of a sum", height)
    figure.add_trace(drawing.ground())
    figure.add_trace(drawing.stems("residual", STEM, "residual stream", 0.0))
    figure.add_trace(drawing.stems("mlp", MLP, "MLP", 0.16))
    top = max(float(strongest["weight"].max()) if len(strongest) else 0.0, 1e-6)
    for trace in drawing.attention(strongest, top):
        figure.add_trace(trace)
    figure.add_trace(drawing.nodes())
    figure.add_trace(drawing.target())
    drawing.axes(figure)
    if len(strongest) < len(pairs):
        text = f"the {MOST} strongest of {count_text(len(pairs), 'attention edge')} drawn"
        figure.add_annotation(
            text=text, x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
            yshift=4, showarrow=False, font={"size": 12, "color": "#7a8488"},
        )  # fmt: skip
    figure.update_layout(coloraxis=colour_axis("sequential", 0, top, "weight"))
    figure.update_layout(
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        margin={"t": 90, "b": 80},
    )
    return figure


@dataclass(frozen=True)
class _Drawing:
    """Where things of one prompt's routes stand: two levels a layer."""

    found: Routes
    prompt: int

    @property
    def count(self) -> int:
        """Positions."""
        return len(self.found.tokens[self.prompt])

    def _edges(self, kind: str) -> pd.DataFrame:
        """Edges of a kind, with the levels between which they run."""
        parts: list[pd.DataFrame] = []
        for layer, edges in enumerate(self.found.edges[self.prompt]):
            frame = edges.to_frame()
            frame = frame.loc[frame["kind"] == ("attention", "residual", "mlp").index(kind)]
            last = frame["step"] == self.found.steps[layer] - 1
            below = 2 * layer + frame["step"]
            above = np.where(last, 2 * layer + 2, 2 * layer + 1)
            parts.append(frame.assign(layer=layer, below=below, above=above))
        return pd.concat(parts, ignore_index=True)

    def pairs(self) -> pd.DataFrame:
        """Attention edges of a layer by query and source: all heads' weights together."""
        frame = self._edges("attention").sort_values("weight", ascending=False)
        frame["text"] = [
            f"{self.found.layers[layer]}H{head} {weight:.3f}"
            for layer, head, weight in zip(
                frame["layer"], frame["head"], frame["weight"], strict=True
            )
        ]
        by = ["layer", "query", "source", "below", "above"]
        grouped = frame.groupby(by, sort=False, as_index=False)
        return grouped.agg(weight=("weight", "sum"), heads=("text", list))

    def stems(self, kind: str, colour: str, name: str, bow: float) -> go.Scatter:
        """Edges within positions: the stream itself, straight, or the MLP beside it."""
        frame = self._edges(kind)
        x: list[float | None] = []
        y: list[float | None] = []
        texts: list[str | None] = []
        for row in frame.to_dict("records"):
            own_x, own_y = _bowed(row["query"], row["below"], row["query"], row["above"], bow)
            x += [*own_x, None]
            y += [*own_y, None]
            told = f"{name}, weight {row['weight']:.3f}, importance {row['importance']:.3f}"
            texts += [told] * len(own_x) + [None]
        return go.Scatter(
            x=x, y=y, mode="lines", line={"color": colour, "width": 1.3}, name=name,
            text=texts, hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip

    def attention(self, pairs: pd.DataFrame, top: float) -> list[go.Scatter]:
        """Attention edges: lines of a few colours, and points to hover over."""
        share = pairs["weight"].to_numpy(dtype=float) / top
        classes = np.minimum((share * CLASSES).astype(int), CLASSES - 1)
        records = pairs.to_dict("records")
        traces: list[go.Scatter] = []
        middles: list[tuple[float, float]] = []
        for number in range(CLASSES):
            x: list[float | None] = []
            y: list[float | None] = []
            for row in (r for r, own in zip(records, classes, strict=True) if own == number):
                own_x, own_y = _line(row)
                x += [*own_x, None]
                y += [*own_y, None]
            place = PALE + (1 - PALE) * (number + 0.5) / CLASSES
            colour = sample_colorscale(SEQUENTIAL, [place])[0]
            line = {"color": colour, "width": 1.2 + 2.2 * number / CLASSES}
            traces.append(
                go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False)
            )
        for row in records:
            own_x, own_y = _line(row)
            middles.append((own_x[len(own_x) // 2], own_y[len(own_y) // 2]))
        traces.append(
            go.Scatter(
                x=[x for x, _ in middles],
                y=[y for _, y in middles],
                mode="markers",
                marker={
                    "size": 13,
                    "opacity": 0,
                    "color": pairs["weight"].tolist(),
                    "coloraxis": "coloraxis",
                },
                customdata=[self._told(row) for row in records],
                hovertemplate="%{customdata}<extra></extra>",
                showlegend=False,
            )
        )
        return traces

    def _told(self, row: dict[Any, Any]) -> str:
        """What a hover text says of an attention edge."""
        query, source = (self._label(row[end]) for end in ("query", "source"))
        heads = row["heads"][:8]
        more = len(row["heads"]) - len(heads)
        rest = [f"and {more} more"] if more else []
        return "<br>".join(
            [f"<b>{query}</b> reads <b>{source}</b>, weight {row['weight']:.3f}", *heads, *rest]
        )

    def _label(self, position: int) -> str:
        return f"{token_label(self.found.tokens[self.prompt][position])} {position}"

    def ground(self) -> go.Scatter:
        """All positions of all streams, faintly."""
        levels = 2 * np.arange(len(self.found.layers) + 1)
        x, y = np.meshgrid(np.arange(self.count), levels)
        return go.Scatter(
            x=x.flatten(), y=y.flatten(), mode="markers", hoverinfo="skip", showlegend=False,
            marker={"size": 3, "color": GROUND},
        )  # fmt: skip

    def nodes(self) -> go.Scatter:
        """Streams that a route reaches, as large as what arrives there."""
        arriving = self.found.arriving[self.prompt, :, : self.count].double().numpy()
        levels, positions = arriving.nonzero()
        values = arriving[levels, positions]
        texts = [
            f"<b>{self._label(int(p))}</b>, {self._level(int(level))}<br>{value:.1%} arrives"
            for level, p, value in zip(levels, positions, values, strict=True)
        ]
        return go.Scatter(
            x=positions, y=2 * levels, mode="markers", customdata=texts, showlegend=False,
            marker={"size": 4 + 12 * np.sqrt(values), "color": INK, "line": {"width": 0}},
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip

    def _level(self, level: int) -> str:
        layers = self.found.layers
        return f"entering {layers[level]}" if level < len(layers) else f"leaving {layers[-1]}"

    def target(self) -> go.Scatter:
        """A ring around the target."""
        return go.Scatter(
            x=[self.found.target[self.prompt]], y=[2 * len(self.found.layers)], mode="markers",
            marker={"size": 22, "symbol": "circle-open", "color": MLP, "line": {"width": 2}},
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip

    def axes(self, figure: go.Figure) -> None:
        """Tokens along the bottom, names of layers at the left."""
        labels = position_labels(self.found.tokens[self.prompt], self.count)
        step = -(-self.count // LABELS)
        figure.update_xaxes(
            tickvals=list(range(0, self.count, step)),
            ticktext=labels[::step],
            tickangle=-45 if self.count > 8 else 0,
            range=[-0.7, self.count - 0.3],
            showgrid=False,
            zeroline=False,
        )
        names = [*self.found.layers, "out"]
        figure.update_yaxes(
            tickvals=list(range(0, 2 * len(names), 2)),
            ticktext=[html.escape(name) for name in names],
            range=[-0.4, 2 * len(names) - 1.4],
            showgrid=False,
            zeroline=False,
        )


def _line(row: dict[Any, Any]) -> tuple[list[float], list[float]]:
    """An attention edge; one of a position to itself bows to the left of the stream."""
    bow = -0.16 if row["source"] == row["query"] else 0.0
    return _bowed(row["source"], row["below"], row["query"], row["above"], bow, points=3)


def _bowed(
    x0: float, y0: float, x1: float, y1: float, bow: float, points: int = 9
) -> tuple[list[float], list[float]]:
    """Points of an edge, pushed sideways in the middle."""
    share = np.linspace(0, 1, points if not bow else 9)
    side = bow * 4 * share * (1 - share)
    return (x0 + (x1 - x0) * share + side).tolist(), (y0 + (y1 - y0) * share).tolist()
