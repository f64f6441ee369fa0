"""What plain transformers shows of a model's attention, and what the instrument shows beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.hooks import seam
from attnlens.hooks.block import Block
from attnlens.hooks.measure import Measure
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session
from attnlens.hooks.tokens import Layout, Sides


@dataclass(frozen=True)
class Collect:
    """Reducer that puts the blocks together again."""

    name: str = "collected"
    columns: tuple[str, ...] = ()

    def start(self, layout: Layout) -> list[Any]:
        return [layout, None]

    def update(self, state: list[Any], block: Block) -> None:
        layout = state[0]
        if state[1] is None:
            shape = (layout.batch, layout.heads, layout.queries, layout.keys)
            state[1] = block.pattern.new_zeros(shape)
        state[1][:, block.heads, block.rows, block.keys] = block.pattern

    def finish(self, state: list[Any]) -> Tensor:
        return state[1]


@dataclass
class Recorder(Observer):
    """Observer that notes the kernel's own weights and the rows recomputed from the same call."""

    sites: frozenset[str]
    weights: dict[str, Tensor | None] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)

    def see(self, site: Site, call: Call) -> Call:
        self.weights[site.name] = call.weights
        self.rows[site.name] = Rows.at(site, call).dense()
        self.calls[site.name] = call
        return call


@dataclass(frozen=True)
class Seen:
    """One site in one run of the model on its eager kernel."""

    site: Site
    eager: Tensor
    dense: Tensor
    streamed: Tensor
    padded: Tensor | None
    """Which query rows stand for padding; None where that is not known."""

    def error(self, rows: Tensor) -> float:
        """Largest difference from the eager weights over the rows that see a key."""
        blind = rows.sum(-1, keepdim=True) == 0
        return float((rows - self.eager).masked_fill(blind, 0).abs().max())

    @property
    def blind_real_rows(self) -> int:
        """Rows without a key that stand for a real token: there must be none."""
        blind = (self.dense.sum(-1) == 0).any(1)
        return int(blind.sum() if self.padded is None else (blind & ~self.padded).sum())


def record(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any]) -> Recorder:
    """Run a model as it is and note every site."""
    recorder = Recorder(frozenset(site.name for site in anatomy.sites))
    with torch.no_grad(), Session(model, anatomy, [recorder]):
        model(**inputs)
    return recorder


def compare_with_eager(
    model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any], block_bytes: int = 1
) -> list[Seen]:
    """Run a model on its eager kernel and put its own weights beside the recomputed rows."""
    sides = Sides.of(inputs)
    recorder = Recorder(frozenset(site.name for site in anatomy.sites))
    measure = Measure(anatomy.sites, [Collect()], sides, block_bytes)
    session = Session(model, anatomy, [recorder, measure])
    with torch.no_grad(), seam.kernel(model, "eager"), session:
        model(**inputs)
    found: list[Seen] = []
    for site in anatomy.sites:
        eager, dense = recorder.weights[site.name], recorder.rows[site.name]
        assert eager is not None, site.name
        real = sides.queries(site).cut(dense.shape[2]).real
        streamed = measure.results["collected"][site.name]
        found.append(Seen(site, eager, dense, streamed, None if real is None else ~real))
    return found
