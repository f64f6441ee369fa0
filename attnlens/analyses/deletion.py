"""Deletion: what a target is worth while tokens go in the order of their scores.

Two orders serve all measures: most relevant first (MoRF) and, its exact reverse, least relevant
first (LeRF). Putting tokens back into an emptied prompt, most relevant first, passes through the
very prompts that LeRF deletion passes through, in the other direction: an insertion curve is the
other deletion curve read backwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analyses.erasure import Eraser

FRACTIONS = torch.linspace(0, 1, 21, dtype=torch.float64)
"""Shares of the tokens at which curves are given."""
BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""ERASER's shares of the tokens."""


@dataclass(frozen=True)
class Ends:
    """What the target is worth on whole prompts, and without all tokens that may be erased."""

    whole: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]

    @classmethod
    def of(cls, eraser: Eraser) -> Ends:
        """Both, of the prompts of an eraser."""
        prompts = torch.arange(len(eraser.erasable))
        erased = torch.cat([torch.zeros_like(eraser.erasable), eraser.erasable])
        whole, empty = eraser.values(prompts.repeat(2), erased).chunk(2)
        return cls(whole, empty)


@dataclass(frozen=True)
class Deletion:
    """Curves and areas of one order; NaN for a prompt of which no token may be erased."""

    morf: Float[Tensor, "prompt fraction"]
    lerf: Float[Tensor, "prompt fraction"]
    areas: Float[Tensor, "prompt 2"]
    """Under the curve MoRF, under the curve LeRF."""
    comprehensiveness: Float[Tensor, " prompt"]
    sufficiency: Float[Tensor, " prompt"]


def delete(
    eraser: Eraser,
    scores: Float[Tensor, "prompt position"],
    ends: Ends,
    steps: int = 10,
    bins: Sequence[float] = BINS,
    seed: int = 0,
) -> Deletion:
    """Delete tokens by their scores, highest first and lowest first.

    The target is run at about `steps` evenly spread numbers of tokens, at every number where there
    are no more tokens than that; curves are straight between. Equal scores go in a random order,
    which is the seed's.
    """
    rank = ranks(scores, eraser.erasable, seed)
    counts = eraser.erasable.sum(1).tolist()
    wanted: list[dict[tuple[bool, int], int]] = []
    prompts: list[int] = []
    erased: list[Tensor] = []
    for prompt, count in enumerate(counts):
        rows: dict[tuple[bool, int], int] = {}
        for first, gone in _runs(count, steps, bins):
            rows[first, gone] = len(prompts)
            own = rank[prompt]
            out = own < gone if first else own >= count - gone
            prompts.append(prompt)
            erased.append(out & eraser.erasable[prompt])
        wanted.append(rows)
    values = torch.zeros(0)
    if prompts:
        values = eraser.values(torch.tensor(prompts), torch.stack(erased))
    found = [
        _measured(
            {key: float(values[row]) for key, row in rows.items()},
            float(ends.whole[prompt]),
            float(ends.empty[prompt]),
            count,
            steps,
            bins,
        )
        for prompt, (rows, count) in enumerate(zip(wanted, counts, strict=True))
    ]
    curves, numbers = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Deletion(curves[:, 0], curves[:, 1], numbers[:, :2], numbers[:, 2], numbers[:, 3])


def ranks(
    scores: Float[Tensor, "prompt position"], among: Bool[Tensor, "prompt position"], seed: int
) -> Int[Tensor, "prompt position"]:
    """Place of each token from the highest score on, ties at random; width where not among them."""
    found = torch.full(scores.shape, scores.shape[1])
    for prompt, own in enumerate(among):
        tokens = own.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed)
        shuffled = tokens[torch.randperm(len(tokens), generator=generator)]
        values = scores[prompt].double().cpu()[shuffled]
        order = shuffled[values.argsort(descending=True, stable=True)]
        found[prompt, order] = torch.arange(len(order))
    return found


def places(count: int, steps: int) -> list[int]:
    """Numbers of tokens at which a curve is measured: 0 to count, as many from either end."""
    if not count:
        return [0]
    near = {math.floor(step * count / steps + 0.5) for step in range(steps + 1)}
    near = set(range(count + 1)) if count <= steps else near
    return sorted(near | {count - place for place in near})


def most(share: float, count: int) -> int:
    """A share of some tokens, rounded up: one at least (a share of 0.3 of 10 is 3, not 4)."""
    return math.ceil(round(share * count, 9))


def _runs(count: int, steps: int, bins: Sequence[float]) -> list[tuple[bool, int]]:
    """What has to be run: (most relevant first, how many are gone), both ends left out."""
    curve = set(places(count, steps))
    shares = {most(share, count) for share in bins}
    first = sorted(curve | shares)
    last = sorted(curve | {count - share for share in shares})
    both = [(True, gone) for gone in first] + [(False, gone) for gone in last]
    return [(way, gone) for way, gone in both if 0 < gone < count]


def _measured(
    values: dict[tuple[bool, int], float],
    whole: float,
    empty: float,
    count: int,
    steps: int,
    bins: Sequence[float],
) -> tuple[Float[Tensor, "2 fraction"], Float[Tensor, "4"]]:
    """The two curves of a prompt; the areas under them, comprehensiveness and sufficiency."""
    if not count:
        none = torch.full((4,), torch.nan, dtype=torch.float64)
        return none[:2, None].expand(2, len(FRACTIONS)), none
    for way in (True, False):
        values |= {(way, 0): whole, (way, count): empty}
    gone = places(count, steps)
    shares = np.array(gone) / count
    curves = [np.array([values[way, place] for place in gone]) for way in (True, False)]
    drops = [
        [whole - values[True, most(share, count)] for share in bins],
        [whole - values[False, count - most(share, count)] for share in bins],
    ]
    numbers = [np.trapezoid(curve, shares) for curve in curves] + [np.mean(drop) for drop in drops]
    lines = [np.interp(FRACTIONS.numpy(), shares, curve) for curve in curves]
    return torch.tensor(np.array(lines)), torch.tensor(np.array(numbers))
