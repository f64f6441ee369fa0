"""Attention rollout as an attribution: the row of the position that a target is read at.

Abnar and Zuidema 2020. Which token is explained does not matter to it, nor what the values carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attention_gradient import over_sides
from attnlens.analyses.attribution import Attribution
from attnlens.analyses.fusing import RolloutSettings
from attnlens.analyses.rollout import chosen_sites, rollout, rollout_from
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.analyses.weight_gradients import DECODER, TEXT, query_side
from attnlens.anatomy import Anatomy, Site
from attnlens.errors import InputError
from attnlens.graphs.flow import node_name, rollout_graph
from attnlens.graphs.prune import prune_graph
from attnlens.hooks.residual import FINAL
from attnlens.lens import Batch, Inputs, Lens, Trace


def rollout_attribution(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    settings: RolloutSettings | None = None,
    stack: str | None = None,
    row: int | None = None,
) -> Attribution:
    """The row `e_t Ã_L ... Ã_1` of the position t whose logits the target reads.

    The row is that of the target's logits, else `row` among the prompt's tokens (by default the
    last under causal attention, else the first). `layers` has the spread that enters each site and
    the start. Of an encoder-decoder `stack` chooses one side; the other's tokens score 0. The graph
    runs the prompts again.

    Raises:
        InputError: a target, stack, layer, head or row that is not there, or a stack in which the
            target's logits have no row and none is given.

    """
    read = Read.of(lens, inputs, target, settings or RolloutSettings(), stack, row)
    found = rollout_from(lens, read.batch.inputs, read.rows, read.settings, stack)
    start = torch.zeros_like(found.reached[:, :1])
    start[range(len(found.target)), 0, list(found.target)] = 1

    def graph(prompt: int) -> nx.MultiDiGraph[str]:
        whole = rollout_graph(rollout(read.trace(), read.settings, stack), prompt)
        return prune_graph(whole, node_name(read.site.layer + 1, found.target[prompt]))

    return read.attribution(
        "rollout",
        torch.cat([found.reached, start], dim=1),
        layer_names=(*found.layers, FINAL),
        notes=found.notes,
        make_graph=graph,
    )


@dataclass(frozen=True)
class Read:
    """A target, and the row of a stack that stands for it in methods that know rows alone."""

    lens: Lens
    batch: Batch
    explained: Explained
    settings: RolloutSettings
    stack: str | None
    row: int | None
    site: Site
    """The last site that is rolled through."""
    rows: list[int]
    """Each prompt's row, among its real tokens."""

    @classmethod
    def of(
        cls,
        lens: Lens,
        inputs: Inputs,
        target: TargetSpec,
        settings: RolloutSettings,
        stack: str | None,
        row: int | None,
    ) -> Read:
        """Settle the target and find its row."""
        batch = lens.encode(inputs)
        anatomy = lens.anatomy_for(batch)
        site = chosen_sites(anatomy, settings, stack)[0][-1]
        explained = settle(lens, batch, target)
        rows = _rows(anatomy, batch, explained, site, row)
        return cls(lens, batch, explained, settings, stack, row, site, rows)

    def trace(self) -> Trace:
        """A run that keeps the patterns which the settings choose."""
        layers, heads = self.settings.layers, self.settings.heads
        return self.lens.run(self.batch.inputs, keep="pattern", layers=layers, heads=heads)

    def attribution(
        self,
        method: str,
        spread: Float[Tensor, "batch layer position"],
        layer_names: tuple[str, ...],
        notes: tuple[str, ...],
        **more: Any,
    ) -> Attribution:
        """The lowest layer of a spread as scores; positions of the spread stand at the left."""
        words, placed, _ = over_sides(self.lens, self.batch, self._by_side(spread))
        told = "Only the position matters here: any token that is read there has these scores."
        if len({TEXT, DECODER} & set(self._by_side(spread))) > 1:
            told += " Tokens of the other stack are not scored; they have 0."
        return Attribution(
            method=method,
            tokens=words,
            scores=placed[:, 0],
            target=self.explained.names,
            value=self.explained.value(self.lens, self.batch),
            settings=asdict(self.settings) | {"stack": self.stack, "row": self.row},
            layers=placed if layer_names else None,
            layer_names=layer_names,
            notes=(told, *notes),
            **more,
        )

    def _by_side(
        self, spread: Float[Tensor, "batch layer position"]
    ) -> Mapping[str, Float[Tensor, "batch layer padded"]]:
        """The spread in the padded input, and 0 for the tokens of the other stack."""
        sides, own = self.batch.sides, query_side(self.lens.anatomy_for(self.batch), self.site)
        real = sides.queries(self.site).cut(spread.shape[-1]).real
        padded = spread
        if real is not None:
            padded = torch.zeros_like(spread)
            for prompt, places in enumerate(real):
                padded[prompt][:, places] = spread[prompt, :, : int(places.sum())]
        if sides.decoder is None or own not in (TEXT, DECODER):
            return {own: padded}
        found: dict[str, Tensor] = {}
        for side, tokens in ((TEXT, sides.text), (DECODER, sides.decoder)):
            if side == own:
                found[side] = padded
            elif tokens.ids is not None:
                found[side] = padded.new_zeros(*padded.shape[:2], tokens.ids.shape[1])
        return found


def _rows(
    anatomy: Anatomy, batch: Batch, explained: Explained, site: Site, row: int | None
) -> list[int]:
    """Each prompt's row among its real tokens."""
    if row is not None or explained.reads is None:
        wanted = row if row is not None else -1 if site.causal else 0
        return [wanted] * batch.size
    if query_side(anatomy, site) != (DECODER if batch.sides.decoder else TEXT):
        raise InputError(
            f"The target's logits have no row in {site.name}: they are read in another stack. "
            "Choose that one (stack=), or say which row is explained: row=0."
        )
    reads: list[int] = explained.reads[:, 0].tolist()
    real = batch.sides.queries(site).real
    if real is None:
        return reads
    return [int(real[prompt, :place].sum()) for prompt, place in enumerate(reads)]
