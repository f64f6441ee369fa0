"""Parts of a report, one a result: its sentences, figures and tables, on a page and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from attnlens.files import replacing, write_atomically
from attnlens.views.markup import element
from attnlens.views.page import Cell, Page, figure_page
from attnlens.views.panels import number_text
from attnlens.views.theme import visible

PLOTLY = "plotly.min.js"
TABLES = "tables"
MOST_ROWS = 200
"""Rows of a table that the page shows; the files hold all."""
WHOLE = {
    "layer", "index", "prompt", "position", "strongest", "text", "prompts", "channel", "arcs",
    "offset", "length", "depth", "counted", "runs", "apart", "partner", "tokens", "heads",
    "edges", "edges in", "edges out", "first", "second", "shared",
}  # fmt: skip
"""Columns of numbers that are written as they are."""


@dataclass(frozen=True)
class Drawn:
    """A figure and what its caption says."""

    figure: go.Figure
    caption: str


@dataclass(frozen=True)
class Table:
    """A table, and which of its columns the page shows: all where none are named.

    `headings` gives columns other names on the page, `bars` those that are drawn as bars.
    """

    frame: pd.DataFrame
    what: str
    shown: tuple[str, ...] | None = ()
    """None: the table is a file alone."""
    headings: Mapping[str, str] = field(default_factory=dict[str, str])
    bars: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """What a report says of one result.

    Attributes:
        title: of its section.
        lines: the findings in short, a sentence each.
        prose: what the numbers mean, for the page.
        figures, tables: by file name, without a suffix.
        notes: cautions.

    """

    title: str
    lines: tuple[str, ...]
    prose: str
    figures: Mapping[str, Drawn]
    tables: Mapping[str, Table]
    notes: tuple[str, ...] = ()


def add_part(page: Page, part: Part) -> None:
    """A part as a section: what it means, its figures, its tables, its notes."""
    page.section(part.title)
    page.prose(part.prose)
    for drawn in part.figures.values():
        page.figure(drawn.figure, drawn.caption)
    for table in part.tables.values():
        if table.shown is not None and len(table.frame):
            add_table(page, table)
    for note in part.notes:
        page.note(note)


def add_table(page: Page, table: Table) -> None:
    """A table of the page, its first rows where there are many."""
    frame = table.frame.head(MOST_ROWS)
    columns = list(table.shown or frame.columns)
    records: list[dict[Any, Any]] = frame.to_dict("records")
    tops = {name: max([1.0, *(abs(record[name]) for record in records)]) for name in table.bars}
    rows = [[_cell(name, record[name], tops.get(name)) for name in columns] for record in records]
    caption = table.what
    if len(table.frame) > len(frame):
        caption += f" (the first {len(frame)} of {len(table.frame):,})"
    headings = [table.headings.get(name, str(name).replace("_", " ")) for name in columns]
    page.table(headings, rows, caption[:1].upper() + caption[1:])


def write_page(
    folder: Path,
    title: str,
    subtitle: str,
    lines: Sequence[str],
    parts: Sequence[Part],
    others: Mapping[str, str] | None = None,
) -> None:
    """Parts as a folder: index.html, tables/ in CSV and Parquet, figures/.

    `others` are files that lie there too, by name, and what they hold.

    Raises FileError where a file cannot be written.
    """
    page = Page(title, subtitle)
    page.section("In short")
    page.points(lines)
    for part in parts:
        add_part(page, part)
    figures = {name: drawn.figure for part in parts for name, drawn in part.figures.items()}
    page.section("Files beside this page")
    beside = [_file_item(name, what) for name, what in (others or {}).items()]
    page.add(element("ul", *beside, *file_items(parts, figures)))
    write_tables(folder, parts)
    write_figures(folder, figures, title)
    write_atomically(folder / "index.html", page.html())


def write_tables(folder: Path, parts: Sequence[Part]) -> None:
    """The tables of all parts, in CSV and Parquet."""
    place = folder / TABLES
    for part in parts:
        for name, table in part.tables.items():
            place.mkdir(exist_ok=True)
            write_frame(table.frame, place / name)


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """One table as `path`.csv and `path`.parquet."""
    csv = frame.to_csv(index=False, lineterminator="\n")
    write_atomically(path.with_suffix(".csv"), csv)
    with replacing(path.with_suffix(".parquet")) as temporary:
        frame.to_parquet(temporary, index=False)


def write_figures(folder: Path, figures: Mapping[str, go.Figure], title: str) -> None:
    """Each figure as a page of its own, and the library that draws them once."""
    place = folder / "figures"
    place.mkdir()
    write_atomically(place / PLOTLY, get_plotlyjs())
    for name, figure in figures.items():
        heading = f"{title}: {name.replace('-', ' ')}"
        write_atomically(place / f"{name}.html", figure_page(figure, heading, PLOTLY))


def file_items(parts: Sequence[Part], figures: Mapping[str, go.Figure]) -> list[str]:
    """Links to the files of parts, as items of a list."""
    files: list[tuple[str, str]] = []
    for part in parts:
        for name, table in part.tables.items():
            files.append((f"{TABLES}/{name}.csv", table.what))
            files.append((f"{TABLES}/{name}.parquet", "the same, typed"))
    files += [
        (f"figures/{name}.html", f"the figure {name.replace('-', ' ')} alone") for name in figures
    ]
    return [_file_item(name, what) for name, what in files]


def _file_item(name: str, what: str) -> str:
    return element("li", element("a", name, href=name), f": {what}")


def _cell(column: str, value: Any, top: float | None) -> str | Cell:
    """A cell as a person reads it, sorted by its number."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return visible(str(value), 60) if "token" in column else str(value)
    if column in WHOLE:
        return Cell(f"{value:g}" if value == value else "n/a", value)
    return Cell(number_text(float(value)), float(value), abs(value) / top if top else None)
