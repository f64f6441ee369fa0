"""Attention flow as an attribution: the flow to the position that a target is read at."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from attnlens.analyses.attention_flow import flow_through
from attnlens.analyses.attribution import Attribution
from attnlens.analyses.fusing import RolloutSettings
from attnlens.analyses.rollout import maps_notes, rollout
from attnlens.analyses.rollout_attribution import Read
from attnlens.analyses.target import TargetSpec
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens


def flow_attribution(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    settings: RolloutSettings | None = None,
    stack: str | None = None,
    row: int | None = None,
) -> Attribution:
    """Maximum flow from the position whose logits the target reads to every input token.

    Abnar and Zuidema 2020; `attention_flow` says more (bounds, saturated sources), and is what
    scores every position at once. Row and stack are chosen as for `rollout_attribution`. The graph
    is one maximum flow to the token of the highest score.

    Raises:
        InputError: a target, stack, layer, head or row that is not there, or a stack in which the
            target's logits have no row and none is given.
        BudgetError: a text whose maps do not fit.

    """
    read = Read.of(lens, inputs, target, settings or RolloutSettings(), stack, row)
    trace = read.trace()
    rolled = rollout(trace, read.settings, stack)
    sites = [trace.anatomy[name] for name in rolled.layers]
    asked = [_asked(row, len(words)) for row, words in zip(read.rows, rolled.tokens, strict=True)]
    notes = maps_notes(trace.anatomy, sites, read.settings)
    found = flow_through(rolled, sites, asked, notes)

    def graph(prompt: int) -> nx.MultiDiGraph[str]:
        return found.graph(read.rows[prompt], None, prompt)

    return read.attribution("attention_flow", found.flow, (), found.notes, make_graph=graph)


def _asked(row: int, length: int) -> tuple[Sequence[int], Sequence[int]]:
    """One target and all sources of a prompt."""
    if not -length <= row < length:
        raise InputError(f"row={row} is not in a prompt of {length} tokens.")
    return [row % length], range(length)
