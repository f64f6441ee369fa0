"""The report of the main job: one page, tables of heads, the rollout's graph and figures."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from attnlens.files import write_atomically
from attnlens.graphs import export_graph, rollout_graph
from attnlens.views.findings import Findings
from attnlens.views.ranking import show_ranking
from attnlens.views.report_page import first_head, report_page
from attnlens.views.report_parts import write_figures, write_frame, write_tables
from attnlens.views.shown import show


def write_report(findings: Findings, folder: Path) -> None:
    """Write index.html, heads.csv, heads.parquet, tables/, rollout.graphml, figures/ to a folder.

    Raises FileError where a file cannot be written.
    """
    write_frame(findings.heads, folder / "heads")
    write_tables(folder, findings.parts)
    if findings.rollout is not None:
        export_graph(rollout_graph(findings.rollout), folder / "rollout.graphml")
    drawn = figures(findings)
    write_figures(folder, drawn, findings.model)
    write_atomically(folder / "index.html", report_page(findings, drawn))


def figures(findings: Findings) -> dict[str, go.Figure]:
    """Every figure that the findings have something for, by file name."""
    drawn: dict[str, go.Figure] = {}
    if findings.types is not None:
        drawn["head-types"] = show(findings.types)
    if findings.profile is not None:
        # The special tokens one by one are in the tables.
        names = [name for name in findings.profile.names if not name.startswith("special_")]
        drawn["profile"] = show(findings.profile, ",".join(names))
    for part in findings.parts:
        drawn |= {name: own.figure for name, own in part.figures.items()}
    if findings.repeated is not None:
        drawn["repeated"] = show(findings.repeated)
    if findings.trace is not None:
        drawn["pattern"] = show(findings.trace, str(first_head(findings)))
        drawn["patterns-of-its-layer"] = show(findings.trace, first_head(findings).site)
    if findings.rollout is not None:
        drawn["rollout"] = show(findings.rollout)
    if findings.ablation is not None:
        drawn["ablation"] = show(findings.ablation)
        drawn["ranking"] = show_ranking(findings.ablation)
    return drawn
