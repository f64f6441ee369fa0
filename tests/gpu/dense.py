"""What the Triton kernels must find, from dense maps in float64."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlens.kernels.triton_columns import column_sums
from attnlens.kernels.triton_pairs import weights_of_pairs
from attnlens.kernels.triton_rows import mass, row_statistics
from attnlens.kernels.triton_scores import Spans, Tile, prepared

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@dataclass
class Case:
    """One call; q and k in the dtype that the kernels get."""

    query: Tensor
    key: Tensor
    first: Tensor
    stop: Tensor
    scaling: float = 0.3
    cap: float | None = None
    sinks: Tensor | None = None
    positions: Tensor | None = None

    @property
    def spans(self) -> Spans:
        return prepared(self.query, self.key, self.scaling, self.cap, self.first, self.stop)

    @property
    def near(self) -> Tensor:
        rows = torch.arange(self.query.shape[2], device=self.query.device)
        return rows[None] if self.positions is None else self.positions

    def seen(self) -> Tensor:
        """Bool, batch row key."""
        s = torch.arange(self.key.shape[2], device=self.key.device)
        seen = (s >= self.first[..., None]) & (s < self.stop[..., None])
        return seen.expand(self.query.shape[0], -1, -1)

    def scores(self) -> Tensor:
        repeats = self.query.shape[1] // self.key.shape[1]
        key = self.key.double().repeat_interleave(repeats, 1)
        # Products with a hidden key are never taken: what lies there may be anything.
        seen = self.seen()
        key = key.masked_fill(~seen.any(1)[:, None, :, None], 0)
        scores = self.query.double() @ key.transpose(-1, -2) * self.scaling
        if self.cap is not None:
            scores = self.cap * (scores / self.cap).tanh()
        return scores.masked_fill(~seen[:, None], -torch.inf)

    def lse(self) -> Tensor:
        scores = self.scores()
        if self.sinks is not None:
            column = self.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        return scores.logsumexp(-1)

    def pattern(self) -> Tensor:
        blind = ~self.seen().any(-1)[:, None, :, None]
        return (self.scores() - self.lse()[..., None]).exp().masked_fill(blind, 0)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Relative to the largest of 1 and the wanted value."""
    assert found.shape == wanted.shape, what
    if not wanted.numel():  # no row of the case sees a key
        return
    error = ((found.double() - wanted) / wanted.abs().clamp_min(1)).abs()
    assert not error.isnan().any(), what
    assert float(error.max()) <= tolerance, (what, float(error.max()))


def check(case: Case, tolerance: float, tile: Tile | None = None) -> None:
    """Every kernel on one call against its definition."""
    pattern, seen, spans = case.pattern(), case.seen(), case.spans
    blind = ~seen.any(-1)[:, None].expand(pattern.shape[:3])
    found = row_statistics(spans, case.sinks, case.near, tile=tile)
    assert found.entropy is not None
    assert found.distance is not None
    assert found.largest is not None
    assert found.lse[blind].eq(torch.inf).all()
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    far = (case.near[..., None] - keys).abs().double()
    near = assert_near
    near(found.lse[~blind], case.lse()[~blind], tolerance, "lse")
    near(found.row_sums, pattern.sum(-1), tolerance, "row sums")
    near(found.peak, pattern.amax(-1), tolerance, "peak")
    near(found.entropy, torch.special.entr(pattern).sum(-1), 2 * tolerance, "entropy")
    near(found.distance, (pattern * far[:, None]).sum(-1), 2 * tolerance, "distance")
    # The weight at the key found is the largest there is, to rounding; ties have their own test.
    at = pattern.gather(-1, found.largest.long()[..., None])[..., 0]
    near(at, pattern.amax(-1), tolerance, "largest")

    near(column_sums(spans, found.lse, tile), pattern.sum(2), 2 * tolerance, "column sums")
    values = torch.rand(pattern.shape[0], len(keys), device=pattern.device)
    wanted = (pattern * values.double()[:, None, None]).sum(-1)
    near(mass(spans, found.lse, values, tile), wanted, tolerance, "mass")
    batch, _, rows, count = pattern.shape
    prompt, row = (torch.randint(0, n, (40,), device=pattern.device) for n in (batch, rows))
    key = torch.randint(-1, count + 1, (40,), device=pattern.device)
    wanted = pattern[prompt, :, row, key.clamp(0, count - 1)]
    wanted = wanted.masked_fill(((key < 0) | (key >= count))[:, None], 0).T
    near(weights_of_pairs(spans, found.lse, prompt, row, key), wanted, tolerance, "pairs")
