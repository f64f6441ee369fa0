"""Faithfulness against the share of edges kept: how well scores rank edges.

Mueller et al. 2025 (MIB: a mechanistic interpretability benchmark).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.circuit_evaluation import Faithfulness
from attnlens.analyses.edge_runs import EdgeAblation, EdgeRuns, Progress
from attnlens.analyses.edge_scores import EdgeScores
from attnlens.analyses.selection import Selection
from attnlens.analyses.uncertainty import Interval
from attnlens.anatomy.network import Network
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens
from attnlens.tasks import Task

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges that are kept, as the benchmark has them."""


@dataclass(frozen=True)
class FaithfulnessCurve:
    """Faithfulness of the circuits of the largest edges, one for each share of edges.

    Attributes:
        method: how edges were scored.
        fractions, edges: shares of the model's edges that are kept, and how many these are.
        faithfulness: f of each circuit, with bounds over prompts.
        random: f of circuits of random edges, nested in the same way, a draw a row.
        cpr: area under f over the share of edges; higher is better. With bounds over prompts.
        cmd: area under |1 - f|; lower is better: 0 of circuits that do what the model does.
        random_cpr, random_cmd: the same of each random draw.

    """

    task: str
    metric: str
    method: str
    ablation: EdgeAblation
    fractions: tuple[float, ...]
    edges: tuple[int, ...]
    faithfulness: Interval
    random: Float[Tensor, "draw fraction"]
    cpr: Interval
    cmd: Interval
    random_cpr: Float[Tensor, " draw"]
    random_cmd: Float[Tensor, " draw"]
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a share of edges: faithfulness with bounds, and the mean of random ones."""
        chance = (
            self.random.mean(0)
            if len(self.random)
            else torch.full_like(self.faithfulness[0], torch.nan)
        )
        return pd.DataFrame(
            {
                "fraction": list(self.fractions),
                "edges": list(self.edges),
                "faithfulness": self.faithfulness.mean.numpy(),
                "faithfulness_low": self.faithfulness.low.numpy(),
                "faithfulness_high": self.faithfulness.high.numpy(),
                "random": chance.numpy(),
            }
        )

    def to_record(self) -> dict[str, Any]:
        """As a circuit's file holds it; what is not known is left out."""
        rows = [
            {str(name): value for name, value in row.items() if value == value}
            for row in self.to_frame().to_dict("records")
        ]
        areas = {
            name: {key: float(value) for key, value in own._asdict().items() if value == value}
            for name, own in (("cpr", self.cpr), ("cmd", self.cmd))
        }
        return {
            "task": self.task,
            "metric": self.metric,
            "method": self.method,
            "ablation": str(self.ablation),
            "curve": rows,
            **areas,
            "random cpr": self.random_cpr.tolist(),
            "random cmd": self.random_cmd.tolist(),
            "confidence": self.confidence,
        }


def faithfulness_curve(
    lens: Lens,
    task: Task,
    scores: EdgeScores,
    fractions: Sequence[float] = FRACTIONS,
    greedy: bool = False,
    draws: int = 5,
    reference: Inputs | None = None,
    batch_size: int = 16,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> FaithfulnessCurve:
    """Faithfulness of the circuits of the largest edges by size, and the areas CPR and CMD.

    Edges that lead nowhere are dropped, but counted among those kept. The areas are by the rule of
    trapezoids over the fractions given. A task other than the scores' tells how well they carry
    over. Errors as for `evaluate_circuit`.

    Raises:
        InputError: fractions that are not in (0, 1] and rising, or scores of another model.

    """
    wanted = tuple(float(fraction) for fraction in fractions)
    rising = all(a < b for a, b in pairwise(wanted))
    if not wanted or not rising or not 0 < wanted[0] <= wanted[-1] <= 1:
        raise InputError(f"fractions={wanted}; give shares of edges over 0, up to 1, rising.")
    own = lens.wiring.network
    if own.senders != scores.network.senders or own.receivers != scores.network.receivers:
        raise InputError(f"The scores are of another model than {lens.anatomy.model}.")
    scoring = scores.scoring
    runs = EdgeRuns(lens, task, scoring.metric, scoring.ablation, reference, batch_size)
    counts = [max(1, round(fraction * len(own))) for fraction in wanted]
    generator = torch.Generator().manual_seed(seed)
    ranks = [torch.rand(len(own), generator=generator) for _ in range(draws)]
    choices = [own.exists, torch.zeros_like(own.exists)]
    choices += [_largest(own, scores.score, count, greedy) for count in counts]
    choices += [_largest(own, rank, count, greedy) for rank in ranks for count in counts]
    values = runs.run(choices, progress)
    share = Faithfulness(values[0], values[1], seed, resamples, confidence)
    by_method, by_chance = values[2 : 2 + len(counts)], values[2 + len(counts) :]
    chance = share.share(by_chance).unflatten(0, (draws, len(counts)))
    return FaithfulnessCurve(
        task.name,
        runs.metric,
        scoring.method,
        runs.ablation,
        wanted,
        tuple(counts),
        share.of(by_method),
        chance,
        *_areas(share, by_method, wanted),
        area(chance, wanted),
        area((1 - chance).abs(), wanted),
        confidence,
        share.notes(),
    )


def area(f: Float[Tensor, "*any fraction"], fractions: Sequence[float]) -> Float[Tensor, "*any"]:
    """Area under values at some fractions, by trapezoids."""
    if len(fractions) == 1:
        return torch.zeros_like(f[..., 0])
    return torch.trapezoid(f, torch.tensor(fractions, dtype=f.dtype))


def _largest(network: Network, score: Tensor, count: int, greedy: bool) -> Tensor:
    chosen = Selection(top=count, greedy=greedy).pick(network, score)
    return network.alive(network.mask(chosen.nonzero()[:, 0]))


def _areas(
    share: Faithfulness, values: Float[Tensor, "fraction prompt"], fractions: Sequence[float]
) -> tuple[Interval, Interval]:
    """CPR and CMD; bounds by resamples of prompts, of each of which f and areas are made anew."""
    prompts = values.shape[1]
    generator = torch.Generator().manual_seed(share.seed)
    drawn = torch.randint(prompts, (share.resamples, prompts), generator=generator)
    above = (values - share.empty)[:, drawn].mean(-1).T
    below = (share.full - share.empty)[drawn].mean(-1)[:, None]
    resampled = above / below
    tail = (1 - share.confidence) / 2
    wanted = torch.tensor([tail, 1 - tail], dtype=resampled.dtype)
    f = share.share(values)
    found: list[Interval] = []
    for own, many in ((f, resampled), ((1 - f).abs(), (1 - resampled).abs())):
        low, high = torch.nanquantile(area(many, fractions), wanted)
        if prompts < 2:
            low = high = torch.tensor(torch.nan, dtype=f.dtype)
        found.append(Interval(area(own, fractions), low, high))
    return found[0], found[1]
