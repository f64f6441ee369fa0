"""Choosing edges by their scores: the largest, those over a threshold, or from the logits down."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.anatomy.network import Network
from attnlens.errors import InputError


@dataclass(frozen=True)
class Selection:
    """A rule by which edges are chosen, by the size of their scores.

    Attributes:
        top: so many edges, the largest.
        threshold: all edges of at least this size.
        greedy: edges join one by one, always the largest of those that enter a node which is
            there already; the logits are there first. So each edge leads to the logits.

    Raises:
        InputError: neither or both of `top` and `threshold`, or one that chooses nothing.

    """

    top: int | None = None
    threshold: float | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        if (self.top is None) == (self.threshold is None):
            raise InputError(
                "Say how many edges a circuit has, top=200, or from which score on, threshold=0.1."
            )
        if self.top is not None and self.top < 1:
            raise InputError(f"top={self.top}; a circuit has one edge at least.")
        if self.threshold is not None and not self.threshold >= 0:
            raise InputError(f"threshold={self.threshold}; sizes of scores are 0 or more.")

    def __str__(self) -> str:
        rule = f"top {self.top}" if self.top is not None else f"at least {self.threshold:g}"
        return f"{rule}, greedily from the logits" if self.greedy else rule

    def pick(self, network: Network, scores: Float[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        """Which edges are chosen; equal scores by the order of the edges."""
        sizes = scores.abs()
        if self.greedy:
            return self._from_logits(network, sizes)
        if self.threshold is not None:
            return sizes >= self.threshold
        order = sizes.argsort(descending=True, stable=True)
        chosen = torch.zeros(len(sizes), dtype=torch.bool)
        chosen[order[: self.top]] = True
        return chosen

    def _from_logits(self, network: Network, sizes: Tensor) -> Bool[Tensor, " edge"]:
        """Best first from the logits: a heap of the edges that enter what is there."""
        entering: list[list[int]] = [[] for _ in network.receivers]
        for edge, (_, receiver) in enumerate(network.edges.tolist()):
            entering[receiver].append(edge)
        inputs: dict[str, list[int]] = {}
        for number, receiver in enumerate(network.receivers):
            for node in receiver.nodes:
                inputs.setdefault(node, []).append(number)
        senders, values = network.edges[:, 0].tolist(), sizes.tolist()
        chosen = torch.zeros(len(values), dtype=torch.bool)
        heap: list[tuple[float, int]] = []
        opened: set[int] = set()

        def enter(node: str) -> None:
            for receiver in inputs.get(node, []):
                if receiver not in opened:
                    opened.add(receiver)
                    for edge in entering[receiver]:
                        heapq.heappush(heap, (-values[edge], edge))

        enter(network.nodes[-1])
        left = self.top if self.top is not None else len(values)
        while heap and left:
            size, edge = heapq.heappop(heap)
            if self.threshold is not None and -size < self.threshold:
                break
            chosen[edge] = True
            left -= 1
            enter(network.senders[senders[edge]].name)
        return chosen
