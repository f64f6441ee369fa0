"""The report of the main job: one page, tables of heads, the rollout's graph and figures."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from attnlens.files import replacing, write_atomically
from attnlens.graphs import export_graph, rollout_graph
from attnlens.views.findings import Findings
from attnlens.views.grids import show_sink_positions
from attnlens.views.page import figure_page
from attnlens.views.ranking import show_ranking
from attnlens.views.report_page import first_head, report_page
from attnlens.views.shown import show

PLOTLY = "plotly.min.js"


def write_report(findings: Findings, folder: Path) -> None:
    """Write index.html, heads.csv, heads.parquet, rollout.graphml and figures/ into a folder.

    Raises FileError where a file cannot be written.
    """
    heads = findings.heads
    write_atomically(folder / "heads.csv", heads.to_csv(index=False, lineterminator="\n"))
    with replacing(folder / "heads.parquet") as temporary:
        heads.to_parquet(temporary, index=False)
    if findings.rollout is not None:
        export_graph(rollout_graph(findings.rollout), folder / "rollout.graphml")
    drawn = figures(findings)
    place = folder / "figures"
    place.mkdir()
    write_atomically(place / PLOTLY, get_plotlyjs())
    for name, figure in drawn.items():
        title = f"{findings.model}: {name.replace('-', ' ')}"
        write_atomically(place / f"{name}.html", figure_page(figure, title, PLOTLY))
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
    if findings.sinks is not None:
        drawn["sinks"] = show(findings.sinks)
        drawn["sink-positions"] = show_sink_positions(findings.sinks)
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
