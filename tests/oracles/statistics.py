"""Every head statistic from a dense map, one weight at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def prompts(
    pattern: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
) -> list[Tensor]:
    """The maps `head query key` of each prompt, padding cut out."""
    found: list[Tensor] = []
    for index, own in enumerate(pattern.double()):
        rows = torch.ones(own.shape[1], dtype=torch.bool) if queries is None else queries[index]
        columns = torch.ones(own.shape[2], dtype=torch.bool) if keys is None else keys[index]
        found.append(own[:, rows][:, :, columns])
    return found


def each_head(statistic: Callable[[list[list[float]]], object], maps: Tensor) -> Tensor:
    """A statistic of every head of one prompt."""
    return torch.tensor([statistic(head.tolist()) for head in maps])


def first_token(a: list[list[float]]) -> float:
    return sum(row[0] for row in a) / len(a)


def entropy(a: list[list[float]]) -> float:
    return -sum(p * math.log(p) for row in a for p in row if p > 0) / len(a)


def distance(a: list[list[float]]) -> float:
    return sum(p * abs(t - s) for t, row in enumerate(a) for s, p in enumerate(row)) / len(a)


def offset(back: int) -> Callable[[list[list[float]]], float]:
    def mass(a: list[list[float]]) -> float:
        there = [row[t - back] for t, row in enumerate(a) if 0 <= t - back < len(row)]
        return sum(there) / len(there) if there else math.nan

    return mass


def token_mass(ids: Sequence[int], chosen: set[int]) -> Callable[[list[list[float]]], float]:
    def mass(a: list[list[float]]) -> float:
        return sum(p for row in a for s, p in enumerate(row) if ids[s] in chosen) / len(a)

    return mass


def copies(ids: Sequence[int], shift: int) -> Callable[[list[list[float]]], float]:
    """Mass on keys `shift` after earlier copies of the row's token, over rows that have one."""

    def mass(a: list[list[float]]) -> float:
        values = []
        for t, row in enumerate(a):
            keys = [s for s in range(shift, t) if ids[s - shift] == ids[t]]
            if keys:
                values.append(sum(row[s] for s in keys))
        return sum(values) / len(values) if values else math.nan

    return mass


def columns(visible: Tensor) -> Callable[[list[list[float]]], list[float]]:
    """Mean of each column over the rows that see it."""

    def mass(a: list[list[float]]) -> list[float]:
        found = []
        for s in range(len(a[0])):
            seen = [row[s] for t, row in enumerate(a) if visible[t, s]]
            found.append(sum(seen) / len(seen) if seen else math.nan)
        return found

    return mass


def argmax(a: list[list[float]]) -> list[int]:
    return [row.index(max(row)) for row in a]
