"""Tables: the anatomy of a model and its self-check, as figures and as rows for the page."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from attnlens.anatomy import Anatomy
from attnlens.hooks.check import Check
from attnlens.views.shown import show
from attnlens.views.theme import styled

Rows = list[tuple[str, ...]]

ANATOMY_COLUMNS = ("site", "kind", "heads", "groups", "d_qk", "d_v", "mask", "sinks", "module")
CHECK_COLUMNS = ("site", "row error", "drift", "row sum", "moves the output")


def anatomy_rows(anatomy: Anatomy) -> Rows:
    """One row a site, in the order of ANATOMY_COLUMNS."""
    rows: Rows = []
    for site in anatomy.sites:
        mask = "causal" if site.causal else "full"
        mask += f", window {site.window}" if site.window is not None else ""
        module = site.module if site.call == 0 else f"{site.module} (call {site.call})"
        numbers = (str(n) for n in (site.heads, site.groups, site.d_qk, site.d_v))
        sinks = "learned" if site.sinks else "none"
        rows.append((site.name, site.kind, *numbers, mask, sinks, module))
    return rows


def check_rows(check: Check) -> Rows:
    """One row a site, in the order of CHECK_COLUMNS."""
    return [
        (
            site.site,
            f"{site.row_error:.1e}",
            f"{site.drift:.1e}",
            f"{site.row_sum:.4f}",
            "yes" if site.moves else "no",
        )
        for site in check.sites
    ]


@show.register
def show_anatomy(anatomy: Anatomy) -> go.Figure:
    """The attention sites of a model as a table."""
    title = f"{anatomy.model}: {len(anatomy.heads)} heads at {len(anatomy.sites)} sites"
    return _table(title, ANATOMY_COLUMNS, anatomy_rows(anatomy))


@show.register
def show_check(check: Check) -> go.Figure:
    """The self-check as a table, the verdict in its title."""
    verdict = "passed" if check.passed else "failed: " + ". ".join(check.problems)
    title = f"Self-check of {check.model} in {check.dtype}: {verdict}"
    return _table(title, CHECK_COLUMNS, check_rows(check))


def _table(title: str, columns: Sequence[str], rows: Rows) -> go.Figure:
    cells = [[html.escape(row[i]) for row in rows] for i in range(len(columns))]
    figure = go.Figure(
        go.Table(
            header={"values": [f"<b>{name}</b>" for name in columns], "align": "left"},
            cells={"values": cells, "align": "left", "height": 24},
            columnwidth=[
                max(len(text) for text in (name, *column)) + 2
                for name, column in zip(columns, cells, strict=True)
            ],
        )
    )
    return styled(figure, title, min(90 + 24 * (len(rows) + 2), 900))


def aligned(columns: Sequence[str], rows: Rows) -> str:
    """A table as lines of text."""
    table = [tuple(columns), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
