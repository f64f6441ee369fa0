"""What two circuits share: nodes and edges, beside what circuits of their sizes share by chance."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import hypergeom
from torch import Tensor

from attnlens.analyses.circuit import Circuit
from attnlens.errors import InputError


@dataclass(frozen=True)
class Shared:
    """How many things of one kind two circuits have in common.

    Attributes:
        names: those in both.
        first, second: how many each has; of `total` in the model.
        expected: how many two sets of these sizes, drawn at random, share on average.
        p: chance that they share as many or more (hypergeometric).

    """

    names: tuple[str, ...]
    first: int
    second: int
    total: int
    expected: float
    p: float

    @classmethod
    def of(cls, first: tuple[str, ...], second: tuple[str, ...], total: int) -> Shared:
        """Of two sets of names."""
        other = set(second)
        both = tuple(name for name in first if name in other)
        a, b = len(first), len(second)
        p = float(hypergeom.sf(len(both) - 1, total, a, b)) if total else 1.0
        return cls(both, a, b, total, a * b / total if total else 0.0, p)

    @property
    def jaccard(self) -> float:
        """Share of those in either that are in both; 0 of two empty sets."""
        either = self.first + self.second - len(self.names)
        return len(self.names) / either if either else 0.0

    @property
    def of_smaller(self) -> float:
        """Share of the smaller set that is in both; 0 where it is empty."""
        smaller = min(self.first, self.second)
        return len(self.names) / smaller if smaller else 0.0


@dataclass(frozen=True)
class CircuitOverlap:
    """What two circuits of one model share.

    Attributes:
        first, second: what the circuits are: task and method.
        nodes: heads and MLPs; embeddings and logits are in every circuit and do not count.
        edges: edges.
        same_sign: of the shared edges, the share that help in both circuits or hinder in both, by
            the signs of their scores; NaN without scores.

    """

    first: str
    second: str
    nodes: Shared
    edges: Shared
    same_sign: float

    def to_frame(self) -> pd.DataFrame:
        """A row for nodes and one for edges."""
        rows = [
            {
                "of": name,
                "first": shared.first,
                "second": shared.second,
                "shared": len(shared.names),
                "jaccard": shared.jaccard,
                "share_of_smaller": shared.of_smaller,
                "expected_by_chance": shared.expected,
                "p": shared.p,
            }
            for name, shared in (("nodes", self.nodes), ("edges", self.edges))
        ]
        return pd.DataFrame(rows)


def overlap(first: Circuit, second: Circuit) -> CircuitOverlap:
    """Nodes and edges in both circuits, as Jaccard index and share of the smaller one.

    For reuse of parts across tasks: Merullo et al. 2024 (Circuit component reuse across tasks in
    transformer language models). Chance is that of sets drawn at random, the edges of one node as
    independent as others; circuits are no such sets, so `p` is a lower bound of how surprising an
    overlap is not.

    Raises:
        InputError: circuits of models with other nodes.

    """
    own, other = first.network, second.network
    if own.senders != other.senders or own.receivers != other.receivers:
        raise InputError(
            f"The circuits are of two models, with {len(own)} and {len(other)} edges between "
            "other nodes; compare circuits of one model."
        )
    inner = {sender.name for sender in own.senders if sender.kind != "embed"}
    a, b = (tuple(n for n in circuit.nodes if n in inner) for circuit in (first, second))
    shared = own.numbers(first.kept & second.kept)
    signs = helping(first)[shared] * helping(second)[shared]
    same = (
        float((signs > 0).double().mean())
        if len(shared) and bool(signs.isfinite().all())
        else float("nan")
    )
    return CircuitOverlap(
        _named(first),
        _named(second),
        Shared.of(a, b, len(inner)),
        Shared.of(first.edges, second.edges, len(own)),
        same,
    )


def helping(circuit: Circuit) -> Float[Tensor, " edge"]:
    """1 of an edge that helps, -1 of one that hinders; NaN where the score is not known.

    Cut, an edge that helps lowers the metric or raises a loss; put back, the other way round.
    """
    about = circuit.about
    turned = (about.get("metric") == "loss") == (about.get("direction") == "denoise")
    score = -circuit.score if turned else circuit.score
    return score.sign().masked_fill(score.isnan(), torch.nan)  # the sign of NaN is 0


def _named(circuit: Circuit) -> str:
    about = circuit.about
    parts = [str(about[name]) for name in ("task", "method", "selection") if name in about]
    return ", ".join(parts) or f"{len(circuit)} edges"
