"""How measuring grows: eight statistics at 1k to 32k tokens, and at batches of 1 to 64.

Two layers of GPT-2 small's shape with random weights. For each size the plain forward (sdpa, last
logits) and the same forward with the statistics streamed; seconds, and peak memory over the model's
own, each in a process of its own. A line is fitted through the logarithms: the exponent says how a
cost grows (1 linear, 2 quadratic). Attention is quadratic in length whatever is done; the memory
of streamed statistics must not be. Where dense maps would still fit (up to 4k), the eager forward
that keeps them is shown beside.

    python -m benchmarks.scaling [--json] [--longest 32768] [--widest 64] [--figure FILE.png]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks._shared import (
    THREADS,
    Claim,
    alternate,
    gpt2_small,
    in_own_process,
    plain,
    print_claims,
    random_ids,
)
from benchmarks._shared import peak_of as peak_of_run
from benchmarks.profile import attnlens_way

MODULE = "benchmarks.scaling"
LAYERS = 2
BATCH_TOKENS = 256
DENSE_TOKENS = 4096
WAYS = ("plain", "attnlens", "eager")


@dataclass(frozen=True)
class Point:
    """One way at one size."""

    way: str
    batch: int
    tokens: int
    seconds: float
    peak_mb: float


def run_of(way: str, model: Any, ids: Any) -> Any:
    """A way through one input; nothing but what it needs is kept."""
    import torch

    if way == "attnlens":
        return attnlens_way(model, ids)
    if way == "plain":
        return lambda: plain(model, ids)

    def eager() -> Any:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False, output_attentions=True).attentions

    return eager


def peak(way: str, batch: int, tokens: int) -> float:
    """Peak memory of one way at one size, libraries and model loaded before."""
    import torch

    torch.set_num_threads(THREADS)
    model = gpt2_small(LAYERS, tokens)
    run_of(way, model, random_ids((1, 8)))()
    return peak_of_run(run_of(way, model, random_ids((batch, tokens))))


def measure(sizes: Sequence[tuple[int, int]], rounds: int) -> list[Point]:
    """Every way at every (batch, tokens)."""
    import torch

    torch.set_num_threads(THREADS)
    points: list[Point] = []
    for batch, tokens in sizes:
        ids = random_ids((batch, tokens))
        ways = WAYS if tokens * math.sqrt(batch) <= DENSE_TOKENS else WAYS[:2]
        model = gpt2_small(LAYERS, tokens)
        runs = {way: run_of(way, model, ids) for way in ways if way != "eager"}
        if "eager" in ways:  # on a model of its own: it changes the kernel
            runs["eager"] = run_of("eager", gpt2_small(LAYERS, tokens), ids)
        times = alternate(runs, max(1, min(rounds, 40_000 // (batch * tokens))))
        for way in ways:
            seconds = statistics.median(times[way])
            point = Point(way, batch, tokens, seconds, in_own_process(MODULE, way, batch, tokens))
            points.append(point)
            print(f"{way:10s}{batch:6d}{tokens:8d}{seconds:10.2f} s{point.peak_mb:10.0f} MB")
    return points


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(max(cost, 1e-9)) for cost in costs]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def exponents(points: Sequence[Point], by: str) -> dict[str, float]:
    """Exponents of time and memory of each way, over the sizes that it ran."""
    found: dict[str, float] = {}
    for way in WAYS:
        own = [p for p in points if p.way == way]
        if len(own) < 2:
            continue
        sizes = [getattr(p, by) for p in own]
        found[f"{way} time"] = exponent(sizes, [p.seconds for p in own])
        found[f"{way} memory"] = exponent(sizes, [p.peak_mb for p in own])
    both = {p.way: [q for q in points if q.way == p.way] for p in points}
    extra = [b.seconds - a.seconds for a, b in zip(both["plain"], both["attnlens"], strict=True)]
    found["attnlens - plain time"] = exponent([getattr(p, by) for p in both["plain"]], extra)
    return found


def draw(lengths: Sequence[Point], batches: Sequence[Point], target: Path) -> None:
    """Four panels, written as PNG by a Chromium that is on the path."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("--figure needs chromium on the path.")
    titles = ("seconds by tokens", "MB by tokens", "seconds by batch", "MB by batch")
    figure = make_subplots(1, 4, subplot_titles=titles)
    colours = {"plain": "#7a8488", "attnlens": "#34808b", "eager": "#9a3412"}
    names = {"plain": "plain forward", "attnlens": "attnlens", "eager": "eager, maps kept"}
    for column, (points, by, cost) in enumerate(
        [
            (lengths, "tokens", "seconds"),
            (lengths, "tokens", "peak_mb"),
            (batches, "batch", "seconds"),
            (batches, "batch", "peak_mb"),
        ],
        start=1,
    ):
        for way in WAYS:
            own = [p for p in points if p.way == way]
            figure.add_trace(
                go.Scatter(
                    x=[getattr(p, by) for p in own],
                    y=[getattr(p, cost) for p in own],
                    name=names[way],
                    line={"color": colours[way]},
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(type="log", dtick=math.log10(2) * 2, tickformat="~s", row=1, col=column)
        figure.update_yaxes(type="log", row=1, col=column)
    figure.update_layout(
        template="plotly_white", width=1280, height=360, legend={"orientation": "h", "y": -0.15}
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "figure.html")
        figure.write_html(page, include_plotlyjs=True)
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--disable-background-networking", f"--user-data-dir={folder}/profile",
             "--window-size=1300,380", "--virtual-time-budget=8000",
             f"--screenshot={target.absolute()}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="last line is JSON with the claims")
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--widest", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figure", type=Path, help="draw to this PNG")
    parser.add_argument("--points", type=Path, help="write the points as JSON")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        way, batch, tokens = arguments.peak
        print(peak(way, int(batch), int(tokens)))
        return
    tokens = [1024 << n for n in range(20) if 1024 << n <= arguments.longest]
    sizes = [1 << n for n in range(20) if 1 << n <= arguments.widest]
    lengths = measure([(1, length) for length in tokens], arguments.rounds)
    batches = measure([(batch, BATCH_TOKENS) for batch in sizes], arguments.rounds)
    by_tokens, by_batch = exponents(lengths, "tokens"), exponents(batches, "batch")
    for name, found in (("tokens", by_tokens), ("batch", by_batch)):
        print(f"exponents by {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    if arguments.figure:
        draw(lengths, batches, arguments.figure)
    if arguments.points:
        arguments.points.write_text(json.dumps([asdict(p) for p in (*lengths, *batches)]))
    claims = [
        Claim("exponent of memory by tokens", round(by_tokens["attnlens memory"], 2), 1.1),
        Claim("exponent of time by batch", round(by_batch["attnlens time"], 2), 1.1),
    ]
    print_claims(claims, arguments.json)


if __name__ == "__main__":
    main()
