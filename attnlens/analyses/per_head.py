"""What analyses of heads share: statistics of all sites side by side, tables of a row a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.uncertainty import Interval, bootstrap_mean
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.measure import join_ragged
from attnlens.hooks.reducers import Reducer
from attnlens.hooks.tokens import Layout
from attnlens.lens import Statistics


@dataclass(frozen=True)
class HeadTable:
    """Numbers of every head, with bootstrap intervals over prompts."""

    heads: tuple[Head, ...]
    names: tuple[str, ...]
    """Names of the numbers, in the order of the last axis."""
    mean: Float[Tensor, "head number"]
    low: Float[Tensor, "head number"]
    high: Float[Tensor, "head number"]

    def __getitem__(self, name: str) -> Interval:
        """Mean and bounds of one number, each `head`."""
        if name not in self.names:
            raise InputError(f"There is no {name!r} here; there is {', '.join(self.names)}.")
        column = self.names.index(name)
        return Interval(self.mean[:, column], self.low[:, column], self.high[:, column])

    def to_frame(self) -> pd.DataFrame:
        """One row a head: head, site, layer, index, each number and its `_low` and `_high`."""
        numbers: dict[str, Tensor] = {}
        for name in self.names:
            interval = self[name]
            numbers |= {name: interval.mean, f"{name}_low": interval.low}
            numbers[f"{name}_high"] = interval.high
        return head_frame(self.heads, numbers)


def head_frame(
    heads: Sequence[Head], numbers: Mapping[str, Tensor | Sequence[Any]]
) -> pd.DataFrame:
    """A table of one row a head from columns of `head`."""
    frame = pd.DataFrame(
        {
            "head": [str(head) for head in heads],
            "site": [head.site for head in heads],
            "layer": [head.layer for head in heads],
            "index": [head.head for head in heads],
        }
    )
    for name, values in numbers.items():
        frame[name] = values.tolist() if isinstance(values, Tensor) else list(values)
    return frame


def heads_of(statistics: Statistics) -> tuple[Head, ...]:
    """The heads of all measured sites, in the order in which `side_by_side` puts them."""
    first = next(iter(statistics.values.values()))
    return tuple(
        statistics.anatomy[site].head(number)
        for site in first
        for number in range(statistics.anatomy[site].heads)
    )


def side_by_side(statistics: Statistics, name: str) -> Float[Tensor, "prompt head ..."]:
    """One statistic of all sites along the head axis; where sites differ in size, NaN fills up."""
    tensors = [tensor.transpose(0, 1) for tensor in statistics[name].values()]
    return join_ragged(tensors).transpose(0, 1).double().cpu()


def table_of(
    values: Mapping[str, Float[Tensor, "prompt head"]],
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[tuple[str, ...], Interval]:
    """Names and intervals, each `head number`, of several numbers a prompt and head."""
    stacked = torch.stack(list(values.values()), dim=-1)
    return tuple(values), bootstrap_mean(stacked, resamples, confidence, seed)


def over_tokens(layout: Layout) -> bool:
    """Whether both rows and columns of a site are tokens whose ids are known."""
    return layout.query_tokens.ids is not None and layout.key_tokens.ids is not None


def within_tokens(layout: Layout) -> bool:
    """Whether a site attends within one sequence of tokens, so that equal tokens can be found."""
    return over_tokens(layout) and layout.site.kind != "cross"


def within_sequence(layout: Layout) -> bool:
    """Whether rows and columns count the same positions, so that a distance means something."""
    return layout.site.kind != "cross"


@dataclass(frozen=True)
class Where:
    """A reducer that is asked only at sites where it makes sense; elsewhere its result is NaN."""

    reducer: Reducer
    applies: Callable[[Layout], bool]

    @property
    def name(self) -> str:
        """The reducer's own name."""
        return self.reducer.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The reducer's own columns."""
        return self.reducer.columns

    @property
    def reads(self) -> tuple[str, ...] | None:
        """What the reducer says it reads."""
        return getattr(self.reducer, "reads", None)

    def start(self, layout: Layout) -> tuple[Layout, Any]:
        """The reducer's state, or None at a site it does not apply to."""
        return layout, self.reducer.start(layout) if self.applies(layout) else None

    def update(self, state: tuple[Layout, Any], block: Block) -> None:
        """Pass the block on where the reducer applies."""
        if state[1] is not None:
            self.reducer.update(state[1], block)

    def finish(self, state: tuple[Layout, Any]) -> Tensor:
        """The statistic, or NaN a head."""
        layout, inner = state
        if inner is not None:
            return self.reducer.finish(inner)
        # A list of one name is one number a head, without an axis of its own.
        shape = (layout.batch, layout.heads, *((len(self.columns),) if self._is_list else ()))
        return torch.full(shape, torch.nan, device=layout.device)

    @property
    def _is_list(self) -> bool:
        return self.columns != (self.name,)
