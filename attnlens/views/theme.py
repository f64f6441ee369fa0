"""How figures look: two colour scales, one font, and labels of tokens that cannot surprise."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

Scale = list[list[float | str]]

# Masses run from paper to ink; signed effects from blue over paper to rust. The page puts scales of
# the same names on a dark ground where the reader's system is dark (assets/page.js).
SEQUENTIAL: Scale = [
    [0.0, "#f6f5f0"],
    [0.15, "#d9e6e4"],
    [0.4, "#8fbfc0"],
    [0.7, "#34808b"],
    [1.0, "#0b3a4a"],
]
DIVERGING: Scale = [
    [0.0, "#1f4e79"],
    [0.25, "#86aecd"],
    [0.5, "#f6f5f0"],
    [0.75, "#e09a76"],
    [1.0, "#9a3412"],
]
SCALES = {"sequential": SEQUENTIAL, "diverging": DIVERGING}
DARK_SCALES: dict[str, Scale] = {
    "sequential": [
        [0.0, "#1d2225"],
        [0.15, "#21393e"],
        [0.4, "#2f6a72"],
        [0.7, "#57a9ab"],
        [1.0, "#d3f2e6"],
    ],
    "diverging": [
        [0.0, "#8cc0ee"],
        [0.25, "#3d6a93"],
        [0.5, "#1d2225"],
        [0.75, "#9a5433"],
        [1.0, "#f5ab80"],
    ],
}
INK = "#34808b"
FONT = "ui-sans-serif, system-ui, 'Segoe UI', 'Helvetica Neue', sans-serif"
LONGEST = 14


def styled(figure: go.Figure, title: str, height: int, width: int | None = None) -> go.Figure:
    """The figure with the house's font, margins and title."""
    figure.update_layout(
        title={"text": escaped(title), "x": 0, "xref": "paper", "font": {"size": 16}},
        font={"family": FONT, "size": 12, "color": "#22262a"},
        paper_bgcolor="#fdfdfb",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 70, "r": 20, "t": 60, "b": 50},
        height=height,
        width=width,
        hoverlabel={"font": {"family": FONT, "size": 13}, "align": "left"},
    )
    return figure


def colour_axis(
    scale: str, low: float, high: float, title: str, turned: bool = False
) -> dict[str, Any]:
    """A colour axis from `low` to `high` on a named scale, or from `high` to `low` where turned."""
    return {
        "colorscale": SCALES[scale],
        "reversescale": turned,
        "cmin": low,
        "cmax": high,
        "colorbar": {
            "title": {"text": escaped(title), "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
        },
    }


def visible(text: str, longest: int = LONGEST) -> str:
    """A token as one visible line of text: spaces as dots, controls as pictures."""
    shown = "".join(_visible(character) for character in text) or "\u2205"
    return shown if len(shown) <= longest else shown[: longest - 1] + "\u2026"


def token_label(text: str, longest: int = LONGEST) -> str:
    """A token as one visible line that plotly shows as it is."""
    return escaped(visible(text, longest))


def escaped(text: str) -> str:
    """Text for plotly, which reads markup in labels, but not `&quot;`."""
    return html.escape(text).replace("&quot;", '"')


def position_labels(tokens: Sequence[str] | None, count: int) -> list[str]:
    """One label a position, all different: the token and its number, or the number alone."""
    if tokens is None or len(tokens) != count:
        return [f"#{position}" for position in range(count)]
    return [f"{token_label(t)}<sub> {position}</sub>" for position, t in enumerate(tokens)]


def _visible(character: str) -> str:
    code = ord(character)
    if character == " ":
        return "\u00b7"
    if character == "\n":
        return "\u23ce"
    if code < 0x20:
        return chr(0x2400 + code)
    # Invisible characters, unpaired surrogates and those that turn the line around.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"\\u{code:04x}"
    return character
