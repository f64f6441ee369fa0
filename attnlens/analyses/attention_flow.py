"""Attention flow: how much of an input token can reach a position, layer upon layer.

Abnar and Zuidema 2020, Quantifying attention flow in transformers. Positions between layers are
nodes, and the fused map of a layer with its residual share gives the capacities of the edges:

    capacity((l, t) -> (l - 1, s)) = Ã_l[t, s],   Ã_l = (1 - share) A_l + share I
    flow[t, s] = maximum flow from (L, t) to (0, s)

Always `rollout <= flow <= min(sum_j Ã_L[t, j], sum_i Ã_1[i, s])`: rollout is one flow among the
feasible ones, and no more leaves the target, or enters the source, than its edges carry. Where the
upper bound is reached the pair is saturated, and what lies between says nothing any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import index

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnlens.analyses.max_flow import FlowNetwork, Flows, max_flows
from attnlens.analyses.rollout import Rollout, RolloutSettings, maps_notes, rollout
from attnlens.anatomy import Site
from attnlens.errors import InputError
from attnlens.graphs.flow import flow_graph
from attnlens.lens import Trace

Positions = int | Sequence[int] | None
"""Positions among a prompt's tokens, negative from its end; all where None."""

RESOLUTION = 1e-8
"""How near to its bound a flow counts as saturated: capacities are rounded to about 1e-9."""


@dataclass(frozen=True)
class AttentionFlow:
    """Maximum flow from targets (the top) to sources (the input); padding at the right is 0."""

    tokens: tuple[tuple[str, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    """Positions of each prompt's targets, without padding."""
    sources: tuple[tuple[int, ...], ...]
    flow: Float[Tensor, "batch target source"]
    rollout: Float[Tensor, "batch target source"]
    """The lower bound: attention rollout of the same maps."""
    bound: Float[Tensor, "batch target source"]
    """The upper bound: the smaller of the target's row of the last layer and the source's column of
    the first, as far as some path joins the two."""
    maps: Float[Tensor, "batch layer query key"]
    """The fused map of each layer, before the residual share."""
    layers: tuple[str, ...]
    """Names of the sites, in the order of the layer axis."""
    settings: RolloutSettings
    skipped: Int[Tensor, " batch"]
    """Joined pairs of each prompt that needed no solve of their own."""
    notes: tuple[str, ...]

    @property
    def normalised(self) -> Float[Tensor, "batch target source"]:
        """Each target's flows as shares of their sum over the sources."""
        total = self.flow.sum(-1, keepdim=True)
        return self.flow / total.where(total > 0, 1)

    @property
    def joined(self) -> Bool[Tensor, "batch target source"]:
        """Pairs that some path joins."""
        return self.bound > 0

    @property
    def saturated(self) -> Bool[Tensor, "batch target source"]:
        """Joined pairs whose flow is the upper bound, whatever lies between."""
        return self.joined & (self.bound - self.flow <= RESOLUTION)

    @property
    def saturated_sources(self) -> Int[Tensor, "batch target"]:
        """How many sources are saturated for each target."""
        return self.saturated.sum(-1)

    def of(self, prompt: int) -> Float[Tensor, "target source"]:
        """The flows of one prompt, without padding."""
        return self.flow[prompt, : len(self.targets[prompt]), : len(self.sources[prompt])]

    def to_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a pair: target and source with their tokens, flow, share, both bounds, saturated.

        `share` is the flow over the sum of its target's flows.
        """
        targets, sources = self.targets[prompt], self.sources[prompt]
        index = pd.MultiIndex.from_product([targets, sources], names=["target", "source"])
        columns = {
            name: values[prompt, : len(targets), : len(sources)].flatten().numpy()
            for name, values in (
                ("flow", self.flow),
                ("share", self.normalised),
                ("rollout", self.rollout),
                ("bound", self.bound),
                ("saturated", self.saturated),
            )
        }
        table = pd.DataFrame(columns, index=index).reset_index()
        words = self.tokens[prompt]
        table.insert(1, "target_token", [words[i] for i in table["target"]])
        table.insert(3, "source_token", [words[i] for i in table["source"]])
        return table

    def graph(
        self, target: int = -1, source: int | None = None, prompt: int = 0, threshold: float = 0.0
    ) -> nx.MultiDiGraph[str]:
        """One maximum flow from a target to a source, as the edges that carry it.

        Edges have `weight`, their capacity, and `flow`; those that carry less than `threshold` are
        left out, but for the strongest into each node. A pair has many maximum flows as a rule, of
        equal value; this is one of them. The source of the largest flow where none is named. No
        edges where no path joins the two.

        Raises:
            InputError: a prompt, target or source that is not there.

        """
        if not 0 <= prompt < len(self.tokens):
            raise InputError(f"There is no prompt {prompt}; there are {len(self.tokens)}, from 0.")
        words = self.tokens[prompt]
        (target,) = _positions(target, len(words), "target", prompt)
        network = _network(self.maps[prompt], len(words), self.settings)
        if source is None:
            found = max_flows(network, np.array([target]), np.arange(len(words)))
            source = int(found.flow[0].argmax())
        (source,) = _positions(source, len(words), "source", prompt)
        return flow_graph(
            self.maps[prompt, :, : len(words), : len(words)],
            torch.from_numpy(network.carried(target, source)),
            words,
            (target, source),
            self.settings.residual,
            threshold,
            [int(name.rpartition("L")[2]) for name in self.layers],
            {"prompt": prompt, "sites": list(self.layers), "settings": asdict(self.settings)},
        )


def attention_flow(
    trace: Trace,
    targets: Positions = None,
    sources: Positions = None,
    settings: RolloutSettings | None = None,
    stack: str | None = None,
) -> AttentionFlow:
    """Attention flow of a trace that kept the patterns of a self-attention stack.

    `flow[t, s]` = maximum flow from t above the last layer to s below the first, with capacities
    `(1 - share) A_l + share I` (Abnar and Zuidema 2020), in float64. Heads, layers, residual share
    and stack are chosen as for `rollout`. A pair costs about a millisecond at 64 tokens and 12
    layers, and grows with their square: `targets=-1` asks for the last position alone.

    Raises:
        InputError: a target or source that a prompt does not have; a pattern, or some of its rows
            or heads, was not kept; no such stack.

    """
    rolled = rollout(trace, settings, stack)
    lengths = [len(words) for words in rolled.tokens]
    asked = [
        (_positions(targets, length, "target", b), _positions(sources, length, "source", b))
        for b, length in enumerate(lengths)
    ]
    sites = [trace.anatomy[name] for name in rolled.layers]
    return flow_through(rolled, sites, asked, maps_notes(trace.anatomy, sites, rolled.settings))


def flow_through(
    rolled: Rollout,
    sites: Sequence[Site],
    asked: Sequence[tuple[Sequence[int], Sequence[int]]],
    notes: tuple[str, ...] = (),
) -> AttentionFlow:
    """The flow through a rollout's maps, for each prompt from its targets to its sources."""
    found: list[Flows] = []
    tables: list[list[Tensor]] = []
    for maps, words, (targets, sources) in zip(rolled.maps, rolled.tokens, asked, strict=True):
        network = _network(maps, len(words), rolled.settings)
        own = max_flows(network, np.array(targets), np.array(sources))
        pairs = np.ix_(targets, sources)
        parts = (own.flow, network.rollout[pairs], network.bound[pairs])
        found.append(own)
        tables.append([torch.from_numpy(part) for part in parts])
    flow, low, high = (_padded(parts) for parts in zip(*tables, strict=True))
    result = AttentionFlow(
        rolled.tokens,
        tuple(tuple(targets) for targets, _ in asked),
        tuple(tuple(sources) for _, sources in asked),
        flow,
        low,
        high,
        rolled.maps,
        rolled.layers,
        rolled.settings,
        torch.tensor([own.skipped for own in found]),
        (),
    )
    return _noted(result, sites, found, notes)


def _noted(
    result: AttentionFlow, sites: Sequence[Site], found: Sequence[Flows], notes: tuple[str, ...]
) -> AttentionFlow:
    """The result with what its reader should know."""
    joined, saturated = int(result.joined.sum()), int(result.saturated.sum())
    skipped, solves = int(result.skipped.sum()), sum(own.solves for own in found)
    counted = f"{skipped} needed no solve of their own, {solves} solves in all"
    own = [f"{joined} pairs are joined by paths: {counted}."]
    if len(sites) > 1:
        text = (
            f"{saturated} of the {joined} pairs are saturated: their flow is all that the target's "
            "row or the source's column lets through, whatever lies between."
        )
        if saturated > joined / 2:
            text += (
                " A flow that fills its source's column no longer depends on the target: read such "
                "scores as columns of the lowest map, and rollout for what is the target's own."
            )
        own.append(text)
    if any(site.sinks for site in sites):
        own.append(
            "Learned sinks take a share of each row, which is not handed back: less than 1 leaves "
            "a target."
        )
    return replace(result, notes=(*own, *notes))


def _network(maps: Tensor, length: int, settings: RolloutSettings) -> FlowNetwork:
    """The network of one prompt's fused maps, without padding."""
    own = maps[:, :length, :length].detach().double().cpu()
    steps = (1 - settings.residual) * own + settings.residual * torch.eye(length).double()
    return FlowNetwork(steps.numpy())


def _positions(asked: Positions, length: int, role: str, prompt: int) -> tuple[int, ...]:
    """Positions among a prompt's tokens, counted from its start."""
    if asked is None:
        return tuple(range(length))
    each = [index(place) for place in np.ravel(asked)]
    wrong = [place for place in each if not -length <= place < length]
    if wrong or not each:
        raise InputError(
            f"There is no {role} {wrong or each} in prompt {prompt}, which has {length} tokens."
        )
    return tuple(place % length for place in each)


def _padded(parts: Sequence[Tensor]) -> Float[Tensor, "batch target source"]:
    """Tables of several prompts as one tensor, 0 at the right and below."""
    rows, columns = (max(part.shape[axis] for part in parts) for axis in (0, 1))
    return torch.stack(
        [
            nn.functional.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0]))
            for part in parts
        ]
    )
