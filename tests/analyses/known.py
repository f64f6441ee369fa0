"""The name model's task, its 25 edges and their scores, made once for all tests of circuits."""

from __future__ import annotations

from functools import cache

import torch

import attnlens as al
from attnlens.analyses.edge_scores import EdgeScores
from attnlens.analyses.node_scores import NodeScores
from attnlens.analyses.scoring import Method
from attnlens.lens import Lens
from attnlens.tasks import Task
from attnlens.tasks.other_name import other_name
from attnlens.zoo import induction_model, name_circuit, name_model

HEADS = ("L0H1", "L0H2", "L1H0", "L2H1", "L2H3", "L3H0", "L3H2")
"""The heads of the name model's circuit."""
EDGES = frozenset(f"{a}->{b}<{kind}>" if kind else f"{a}->{b}" for a, b, kind in name_circuit())


@cache
def name_lens() -> Lens:
    return al.load(name_model().double())


@cache
def name_task() -> Task:
    return other_name(name_lens(), prompts=4, length=12)


@cache
def name_scores(method: Method) -> EdgeScores:
    return al.edges(name_lens(), name_task(), method)


@cache
def name_nodes(method: Method) -> NodeScores:
    return al.nodes(name_lens(), name_task(), method)


@cache
def induction_lens() -> Lens:
    return al.load(induction_model().double())


@cache
def induction_task() -> Task:
    return al.tasks.repeated_tokens(induction_lens(), prompts=4)


@cache
def in_circuit() -> torch.Tensor:
    """Which edges of the name model are the known ones, in the order of its network."""
    return torch.tensor([name in EDGES for name in name_lens().wiring.network.edge_names])
