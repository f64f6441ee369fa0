"""A model as a graph of nodes: what writes to the residual stream, what reads it, and the edges.

Nodes are the embeddings (`embed`), heads (`L3H5`), MLPs (`L3.mlp`) and the `logits`. A node writes
once, and reads by inputs: a head by its query, key and value (`L3H5<q>`), an MLP and the logits by
one each. Heads that share keys and values share these inputs: `L3G1<k>` is that of group 1. An edge
is what one node wrote, as one input of a later node reads it: `L0H1->L1H2<k>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnlens.errors import InputError

LOGITS = "logits"
ARROW = "->"

SenderKind = Literal["embed", "head", "mlp"]
InputKind = Literal["q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True)
class Sender:
    """A node that writes to the residual stream."""

    name: str
    kind: SenderKind
    part: str
    """What writes it: `embed`, the head's site (`L3`), or `L3.mlp`."""
    layer: int
    """-1 of embeddings."""
    head: int = 0
    """Which head of its site."""


@dataclass(frozen=True)
class Receiver:
    """One input of a node, by which it reads the residual stream."""

    name: str
    kind: InputKind
    part: str
    """Whose it is: a site (`L3`), `L3.mlp`, or `logits`."""
    layer: int
    """One more than the last layer's of `logits`."""
    head: int
    """Which query head of its site, or which group of keys and values."""
    nodes: tuple[str, ...]
    """The nodes that read by it: several where heads share keys and values."""


@dataclass(frozen=True)
class Network:
    """Nodes and edges of a model, in the order in which they run.

    Attributes:
        senders, receivers: the axes.
        exists: whether a sender is part of what a receiver reads.

    """

    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    exists: Bool[Tensor, "sender receiver"]

    @cached_property
    def edges(self) -> Int[Tensor, "edge 2"]:
        """Sender and receiver of every edge, by receiver, then sender."""
        receiver, sender = self.exists.T.nonzero().T
        return torch.stack([sender, receiver], dim=1)

    def __len__(self) -> int:
        """Number of edges."""
        return int(self.exists.sum())

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes, in the order in which they run."""
        return (*(sender.name for sender in self.senders), LOGITS)

    @cached_property
    def edge_names(self) -> tuple[str, ...]:
        """`L0H1->L1H2<k>` of every edge, in the order of `edges`."""
        return tuple(
            f"{self.senders[a].name}{ARROW}{self.receivers[b].name}" for a, b in self.edges.tolist()
        )

    @cached_property
    def layers(self) -> dict[str, int]:
        """The layer of every node."""
        found = {sender.name: sender.layer for sender in self.senders}
        return found | {LOGITS: max(found.values()) + 1}

    def find(self, names: str | Iterable[str]) -> Int[Tensor, " edge"]:
        """Numbers of the edges of some names.

        Raises:
            InputError: a name that no edge has.

        """
        wanted = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in wanted if name not in self._numbers]
        if unknown:
            some = ", ".join(self.edge_names[:2])
            raise InputError(
                f"There is no edge {unknown[0]!r}. Edges are written sender{ARROW}receiver, like "
                f"{some}, with heads L3H5<q>, MLPs L3.mlp, embed and logits; network.edge_names "
                "lists them."
            )
        return torch.tensor([self._numbers[name] for name in wanted], dtype=torch.long)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.edge_names)}

    def mask(self, edges: Int[Tensor, " edge"] | Sequence[int]) -> Bool[Tensor, "sender receiver"]:
        """Which pairs of sender and receiver some edges, by number, are."""
        kept = torch.zeros_like(self.exists)
        pairs = self.edges[torch.as_tensor(edges, dtype=torch.long)]
        kept[pairs[:, 0], pairs[:, 1]] = True
        return kept

    def numbers(self, mask: Bool[Tensor, "sender receiver"]) -> Int[Tensor, " edge"]:
        """Numbers of the edges that a mask keeps."""
        return mask[self.edges[:, 0], self.edges[:, 1]].nonzero()[:, 0]

    @cached_property
    def reads(self) -> Bool[Tensor, "receiver node"]:
        """Which node reads by which receiver; nodes in the order of `nodes`."""
        place = {name: number for number, name in enumerate(self.nodes)}
        found = torch.zeros(len(self.receivers), len(place), dtype=torch.bool)
        for number, receiver in enumerate(self.receivers):
            found[number, [place[name] for name in receiver.nodes]] = True
        return found

    def alive(self, mask: Bool[Tensor, "sender receiver"]) -> Bool[Tensor, "sender receiver"]:
        """The edges of a mask that lie on a way from embeddings to logits; others carry nothing.

        An edge into a node that writes to nobody, or out of one that reads nothing, is dropped, and
        so on until none is left to drop.
        """
        # Nodes run in order, so one pass up and one down follow all ways.
        kept = mask & self.exists
        reads = self.reads
        fed = torch.tensor([sender.kind == "embed" for sender in self.senders])
        for number, sender in enumerate(self.senders):
            if sender.kind != "embed":
                fed[number] = kept[:, reads[:, number]].any()
            if not fed[number]:
                kept[number] = False
        heard = torch.zeros(len(self.nodes), dtype=torch.bool)
        heard[-1] = True
        for number in reversed(range(len(self.senders))):
            kept[number] &= (reads & heard).any(1)
            heard[number] = kept[number].any()
        return kept

    def nodes_of(self, mask: Bool[Tensor, "sender receiver"]) -> tuple[str, ...]:
        """Names of the nodes at either end of the edges of a mask, in order.

        Of heads that share a key or value those that write to another node are at its end, all
        where none does, as in `circuit_graph`.
        """
        at = torch.zeros(len(self.nodes), dtype=torch.bool)
        at[:-1] = mask.any(1)
        readers = self.reads[mask.any(0)]
        writing = readers & at
        at |= torch.where(writing.any(1, keepdim=True), writing, readers).any(0)
        return tuple(name for name, there in zip(self.nodes, at.tolist(), strict=True) if there)

    def between(self, nodes: Iterable[str]) -> Bool[Tensor, "sender receiver"]:
        """All edges between some nodes.

        Raises:
            InputError: a name that no node has.

        """
        wanted = set(nodes)
        unknown = sorted(wanted - set(self.nodes))
        if unknown:
            raise InputError(
                f"There is no node {unknown[0]!r}; there are {', '.join(self.nodes[:4])}, ..."
            )
        sending = torch.tensor([sender.name in wanted for sender in self.senders])
        receiving = torch.tensor([bool(wanted.intersection(r.nodes)) for r in self.receivers])
        return self.exists & sending[:, None] & receiving
