"""The shell of an HTML page that opens offline: one file, plotly inside it once, no request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from attnlens.views.markup import Html, element, figure_data, joined, script_value
from attnlens.views.theme import DARK_SCALES

# Nothing may be fetched: what the page needs is in it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it shows, what it sorts by, and a share from 0 to 1 as a bar."""

    shown: str
    value: float | str | None = None
    share: float | None = None


@dataclass
class Page:
    """A page that is put together section by section."""

    title: str
    subtitle: str
    _body: list[Html] = field(default_factory=list)
    _contents: list[Html] = field(default_factory=list)
    _figures: int = 0

    def section(self, title: str) -> None:
        """Begin a section."""
        anchor = f"section-{len(self._contents) + 1}"
        self._contents.append(element("a", title, href=f"#{anchor}"))
        self._body.append(element("h2", title, id=anchor))

    def subsection(self, title: str) -> None:
        """Begin a part of a section."""
        self._body.append(element("h3", title))

    def prose(self, *parts: str) -> None:
        """A paragraph."""
        self._body.append(element("p", *parts))

    def points(self, items: Sequence[str]) -> None:
        """A list of sentences."""
        self._body.append(element("ul", *(element("li", item) for item in items)))

    def note(self, *parts: str) -> None:
        """A paragraph set apart: a caution, or what was left out."""
        self._body.append(element("p", *parts, class_="note"))

    def add(self, markup: Html) -> None:
        """Markup of one's own."""
        self._body.append(markup)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], caption: str = ""
    ) -> None:
        """A table that sorts by the column whose head is clicked."""
        head = element("tr", *(element("th", name, scope="col") for name in columns))
        body = [element("tr", *(_cell(cell) for cell in row)) for row in rows]
        parts = [element("thead", head), element("tbody", *body)]
        if caption:
            parts.insert(0, element("caption", caption))
        self._body.append(
            element("div", element("table", *parts, class_="sortable"), class_="wide scroll")
        )

    def figure(self, figure: go.Figure, caption: str) -> None:
        """A plotly figure with a caption; the figure's own title is left to the caption."""
        self._figures += 1
        name = f"figure-{self._figures}"
        drawn = go.Figure(figure)
        drawn.update_layout(title=None, margin_t=34)
        height = height_of(drawn, 400)
        self._body.append(
            element(
                "figure",
                element("div", class_="plot", data_figure=name, style=f"height:{height}px"),
                figure_data(drawn, name),
                element("figcaption", caption),
                class_="wide",
            )
        )

    def html(self) -> str:
        """The whole page."""
        contents = element("nav", *_between(self._contents, " \u00b7 "), aria_label="Contents")
        header = element(
            "header", element("h1", self.title), element("p", self.subtitle, class_="lead")
        )
        main = element("main", header, contents, *self._body)
        return document(self.title, main, Html(f"<script>{get_plotlyjs()}</script>"))


def figure_page(figure: go.Figure, title: str, plotly_file: str) -> str:
    """A page with one figure, whose plotly is the file of that name beside it."""
    height = height_of(figure, 450)
    body = element(
        "main",
        element("div", class_="plot", data_figure="figure", style=f"height:{height}px"),
        figure_data(figure, "figure"),
        class_="single",
    )
    library = element("script", src=plotly_file)
    return document(title, body, library, "script-src 'self' file: 'unsafe-inline'")


def height_of(figure: go.Figure, default: int) -> int:
    """The height that a figure asks for, in pixels."""
    layout: Any = figure.layout
    return int(layout.height or default)


def document(title: str, body: Html, library: Html, scripts: str = "") -> str:
    """A complete HTML document around a body."""
    policy = POLICY.replace("script-src 'unsafe-inline'", scripts or "script-src 'unsafe-inline'")
    head = joined(
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        Html(f"<style>{_asset('page.css')}</style>"),
        library,
    )
    scales = f"const DARK_SCALES = {script_value(DARK_SCALES)};"
    code = Html(f"<script>{scales}\n{_asset('page.js')}</script>")
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}{code}</body></html>\n'


def _cell(cell: str | Cell) -> Html:
    if not isinstance(cell, Cell):
        return element("td", cell)
    return element(
        "td",
        cell.shown,
        data_value=None if cell.value is None else str(cell.value),
        class_=_kind(cell.value),
        style=None if cell.share is None else f"--share:{min(max(cell.share, 0), 1):.3f}",
    )


def _kind(value: float | str | None) -> str | None:
    if isinstance(value, str):
        return None
    return "number below" if value is not None and value < 0 else "number"


def _between(items: Sequence[Html], separator: str) -> list[str]:
    return [part for item in items for part in (item, separator)][:-1]


def _asset(name: str) -> str:
    return (files("attnlens.views") / "assets" / name).read_text(encoding="utf-8")
