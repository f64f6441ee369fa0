"""Information-flow routes: which parts of the sums in a model carry what one position becomes.

Ferrando and Voita 2024, Information flow routes: automatically interpreting language models at
scale. Every stream is a sum: after attention, of the stream before it and of one vector
`A_h[t, s] v_s W_O^h` for each head and source; after the MLP, of the stream and what the MLP wrote.
How much a part counts is how much nearer to 0 the sum would be without it:

    proximity_j = max(0, |y|_1 - |y - z_j|_1),   importance_j = proximity_j / sum_i proximity_i

Parts under a threshold are dropped, the others scaled to sum to 1, and the routes are what is
reached downwards from the target position. One forward pass; only rows that a route reaches are
taken apart, a block of them at a time.

What the paper leaves open, and how it is here. Biases of the output projection, and of norms behind
it, are a part of their own, in which a route ends. Norms that parts go through on their way to the
sum (Gemma 2, OLMo 2), or that the sum goes through (BERT), are the linear maps that they are in
this run, their statistics held (Kobayashi et al. 2021). A block that adds attention and MLP to the
stream at once (Phi, GPT-NeoX, Cohere) is one sum of all parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attribution import Attribution, Ledger, over_tokens
from attnlens.analyses.per_head import head_frame
from attnlens.analyses.route_trace import Edges, Traced, trace_routes
from attnlens.analyses.target import Explained, Target, TargetSpec, settle
from attnlens.anatomy import Anatomy, Head, Site
from attnlens.anatomy.weights import output_weight
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.graphs.routes import KINDS, route_graph
from attnlens.hooks.probe import evaluating
from attnlens.hooks.session import Session
from attnlens.hooks.sublayers import Sublayers
from attnlens.hooks.tokens import Sides, Tokens
from attnlens.lens import Batch, Inputs, Lens

THRESHOLD = 0.04


@dataclass(frozen=True)
class Routes:
    """The routes to one position of each prompt; positions are those of its own tokens."""

    tokens: tuple[tuple[str, ...], ...]
    target: tuple[int, ...]
    """The position of each prompt from which its routes were traced down."""
    layers: tuple[str, ...]
    """Names of the sites, from the bottom."""
    edges: tuple[tuple[Edges, ...], ...]
    """The kept edges of each prompt, layer by layer."""
    arriving: Float[Tensor, "batch layer position"]
    """How much of the target's importance arrives at the stream that enters each layer, edge
    weights multiplied along paths; last what leaves the top, which is 1 at the target."""
    heads: Float[Tensor, "batch head"]
    """How much of it passes through each head, in the order of `head_names`."""
    head_names: tuple[Head, ...]
    residual: Float[Tensor, "batch layer position"]
    """Importance of the stream among what attention is added to; NaN where no route comes."""
    mlp: Float[Tensor, "batch layer position"]
    """Importance of what the MLP wrote; NaN where no route comes."""
    bias: Float[Tensor, "batch layer position"]
    """Importance of biases, of both sums; NaN where no route comes."""
    lost: Float[Tensor, " batch"]
    """How much ends in biases: `arriving[:, 0].sum(-1) + lost` is 1."""
    steps: tuple[int, ...]
    """How many sums each block has: one where attention and MLP are added at once."""
    threshold: float
    notes: tuple[str, ...] = ()

    def of(self, prompt: int = 0) -> Float[Tensor, " position"]:
        """What arrives at each input token of one prompt."""
        return self.arriving[prompt, 0, : len(self.tokens[prompt])]

    def to_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a kept edge, from the top: layer, kind, head, query, source, importance, weight.

        `query_token` and `source_token` are their texts.
        """
        parts = [
            edges.to_frame().assign(layer=name)
            for name, edges in zip(self.layers, self.edges[prompt], strict=True)
        ]
        frame = pd.concat(parts[::-1], ignore_index=True)
        frame["kind"] = [KINDS[kind] for kind in frame["kind"]]
        numbers = zip(frame["layer"], frame["head"], strict=True)
        frame["head"] = [f"{layer}H{head}" if head >= 0 else None for layer, head in numbers]
        words = self.tokens[prompt]
        for column in ("query", "source"):
            frame[f"{column}_token"] = [words[place] for place in frame[column]]
        order = ["layer", "kind", "head", "query", "query_token", "source", "source_token"]
        return frame.reindex(columns=[*order, "importance", "weight"])

    def heads_frame(self, prompt: int = 0) -> pd.DataFrame:
        """One row a head: head, site, layer, index, passing."""
        return head_frame(self.head_names, {"passing": self.heads[prompt].double()})

    def graph(self, prompt: int = 0) -> nx.MultiDiGraph[str]:
        """The kept edges as a graph, whose every edge lies on a path to the target.

        Raises:
            InputError: a prompt that is not there.

        """
        if not -len(self.tokens) <= prompt < len(self.tokens):
            raise InputError(f"prompt={prompt}; there are routes of {len(self.tokens)} prompts.")
        attributes = {
            "method": "routes",
            "prompt": prompt,
            "target": self.target[prompt],
            "threshold": self.threshold,
            "layers": list(self.layers),
        }
        edges, words = self.edges[prompt], self.tokens[prompt]
        return route_graph(edges, self.layers, self.steps, words, attributes)


def routes(
    lens: Lens,
    inputs: Inputs,
    target: int | Sequence[int] | Target = -1,
    threshold: float = THRESHOLD,
    stack: str | None = None,
) -> Routes:
    """The routes by which information comes to a position (Ferrando and Voita 2024).

    `target` is a position of each prompt's tokens (-1 the last; one for all or one each), or a
    `Target`, of which the position alone matters. An edge is kept if its importance is at least
    `threshold`, or if no other part of its sum but the bias is stronger. `stack` is needed where a
    model has several ("text", "vision").

    Raises:
        InputError: a position or threshold out of range; no such stack.
        UnsupportedModelError: a model with several stacks, without an output projection that is fed
            the heads, or whose stream is no sum of stream, attention and MLP.

    """
    batch = lens.encode(inputs)
    _, traced, sites = _run(lens, batch, target, threshold, stack)
    return _result(lens, batch, traced, sites, threshold)


def route_scores(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    threshold: float = THRESHOLD,
    stack: str | None = None,
) -> Attribution:
    """Input tokens by the importance that arrives at them on routes to the target's position.

    Edge weights are multiplied along paths from the target down and summed over paths, so scores
    are not negative and, with what ends in biases, sum to 1. The token that the target names does
    not matter, only its position: that of its logits, and of a classifier or a function the last
    under causal attention, else the first. Errors as of `routes`.
    """
    batch = lens.encode(inputs)
    explained = settle(lens, batch, target)
    at = target.at if isinstance(target, Target) else -1
    if explained.reads is None:
        at = -1 if _sites(lens.anatomy_for(batch), stack)[-1].causal else 0
    output, traced, sites = _run(lens, batch, at, threshold, stack, explained)
    found = _result(lens, batch, traced, sites, threshold)
    scores = found.arriving[:, 0]
    lost = found.lost
    ledger = Ledger(
        torch.ones_like(lost), {"tokens": traced.arriving[:, 0].sum(-1).cpu(), "biases": lost}
    )
    return Attribution(
        method="routes",
        tokens=found.tokens,
        scores=scores,
        target=explained.names,
        value=explained.metric(output).detach(),
        settings={"threshold": threshold, "stack": stack, "at": found.target},
        layers=found.arriving,
        layer_names=(*found.layers, "final"),
        heads=found.heads,
        head_names=found.head_names,
        ledger=ledger,
        notes=(
            *found.notes,
            "Routes lead to a position: every token that could be explained there has the same.",
        ),
        make_graph=found.graph,
    )


@torch.no_grad()
def _run(
    lens: Lens,
    batch: Batch,
    target: int | Sequence[int] | Target,
    threshold: float,
    stack: str | None,
    explained: Explained | None = None,
) -> tuple[Any, Traced, tuple[Site, ...]]:
    """The model's output, and the routes in padded positions."""
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold={threshold}; importances lie between 0 and 1.")
    anatomy = lens.anatomy_for(batch)
    sites = _sites(anatomy, stack)
    for site in sites:
        output_weight(lens.model, site)
    watched = Sublayers(anatomy, sites, lens.mlps)
    if explained is None:
        output = lens.observe(batch, watched)
    else:
        observers = (watched, *explained.observers(lens, batch))
        with evaluating(lens.model), Session(lens.model, anatomy, observers):
            output = lens.model(**batch.inputs)
    runs = [watched.runs[site.name] for site in sites]
    at = target.at if isinstance(target, Target) else target
    places = _places(batch.sides.queries(sites[0]), runs[0].entering.shape[:2], at)
    return output, trace_routes(lens.model, runs, places, threshold), sites


def _sites(anatomy: Anatomy, stack: str | None) -> tuple[Site, ...]:
    """The sites of the stack whose routes are traced."""
    if any(site.kind == "cross" for site in anatomy.sites):
        raise UnsupportedModelError(
            f"{anatomy.model} reads another stream by cross-attention, and routes are traced in "
            'one. Other methods take both: al.attribute(..., method="chefer").'
        )
    stacks = anatomy.stacks
    if stack is None and (len(stacks) == 1 or "" in stacks):
        stack = stacks[0] if len(stacks) == 1 else ""
    if stack not in stacks:
        names = " or ".join(f'stack="{name}"' for name in stacks)
        raise InputError(f"Say which stack of {anatomy.model} to trace routes in: {names}.")
    return tuple(site for site in anatomy.sites if site.stack == stack)


def _places(tokens: Tokens, shape: Sequence[int], target: int | Sequence[int]) -> tuple[int, ...]:
    """The padded position of each prompt's target."""
    batch, length = shape
    wanted = [index(place) for place in np.ravel(target)] * (1 if np.ndim(target) else batch)
    if len(wanted) != batch:
        raise InputError(f"target names {len(wanted)} positions for {batch} prompts.")
    real = tokens.cut(length).real
    found: list[int] = []
    for prompt, position in enumerate(wanted):
        own = range(length) if real is None else real[prompt].nonzero()[:, 0].tolist()
        if not -len(own) <= position < len(own):
            raise InputError(
                f"target={position} is not in prompt {prompt}, which has {len(own)} positions."
            )
        found.append(own[position])
    return tuple(found)


def _result(
    lens: Lens, batch: Batch, traced: Traced, sites: tuple[Site, ...], threshold: float
) -> Routes:
    """The trace in positions of each prompt's own tokens."""
    tokens = batch.sides.queries(sites[0]).cut(traced.arriving.shape[-1])
    # Patches of an image may be as many as the tokens of the text beside it.
    own_side = replace(batch, sides=Sides(tokens))
    words, arriving = over_tokens(lens, own_side, traced.arriving)
    parts = (traced.residual, traced.mlp, traced.bias)
    residual, mlp, bias = (over_tokens(lens, own_side, part)[1] for part in parts)
    edges, target = traced.edges, traced.target
    if tokens.real is not None:
        own = tokens.real.cumsum(-1).cpu() - 1
        edges = tuple(
            tuple(layer.moved(place) for layer in layers)
            for layers, place in zip(edges, own, strict=True)
        )
        target = tuple(int(own[b, place]) for b, place in enumerate(target))
    heads = tuple(site.head(h) for site in sites for h in range(site.heads))
    return Routes(
        words,
        target,
        tuple(site.name for site in sites),
        edges,
        arriving.float(),
        traced.heads,
        heads,
        residual,
        mlp,
        bias,
        traced.lost,
        traced.steps,
        threshold,
        _notes(lens.anatomy_for(batch), traced),
    )


def _notes(anatomy: Anatomy, traced: Traced) -> tuple[str, ...]:
    notes: list[str] = []
    if traced.empty:
        notes.append(
            f"{traced.empty} sums have no part that brings them nearer to 0; their routes follow "
            "the residual stream."
        )
    most = float(traced.lost.max())
    if most >= 0.05:
        notes.append(f"Up to {most:.0%} of a target's importance ends in biases.")
    if traced.parallel:
        notes.append("Blocks that add attention and MLP at once are one sum of all parts.")
    return tuple(notes)
