"""How a model is wired: which modules write to the residual stream, and which read it where.

A writer is all heads of a site (its output projection), an MLP, or the embeddings (what enters the
first block). A reader is the query, key or value of a site, an MLP, or the logits. Each reads the
stream at a place, the input of a norm or of the module that reads, and what it finds there is a sum
of what earlier writers wrote, each with a factor. `find_wiring.py` finds all this in a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.anatomy.network import LOGITS, InputKind, Network, Receiver, Sender, SenderKind
from attnlens.anatomy.weights import Projection, output_weight


@dataclass(frozen=True)
class Writer:
    """A module that writes to the stream: all heads of a site together, an MLP, or embeddings."""

    name: str
    """`embed`, `L3` of the heads of a site, `L3.mlp`."""
    kind: SenderKind
    module: str
    """The module whose output it is; of embeddings, the block that they enter."""
    stream: str
    """Name of the embeddings that its residual stream begins with."""
    heads: int
    layer: int


@dataclass(frozen=True)
class Place:
    """Where the stream is read: the input of a module."""

    module: str
    norm: bool
    """Whether the module is a norm that those who read here share; else they read the stream."""
    factors: Mapping[str, float]
    """By what factor each writer that is seen here has been multiplied, in the order they ran."""


@dataclass(frozen=True)
class Reader:
    """An input of a site, an MLP or the logits."""

    part: str
    """The site (`L3`), `L3.mlp`, or `logits`."""
    kind: InputKind
    place: str
    """Module of the place where it reads."""
    modules: tuple[str, ...]
    """The modules that are given what is read: one linear module of q, k or v, those that an MLP
    begins with; none of the logits, which read whatever comes from their place."""
    projection: Projection | None
    """Which output features of the linear module are whose, for q, k and v."""
    layer: int
    inputs: int
    """Heads of a query, groups of a key or value, else 1."""


@dataclass(frozen=True)
class Wiring:
    """The writers and readers of a model in the order in which they run, and their places."""

    model: nn.Module
    anatomy: Anatomy
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    places: Mapping[str, Place]

    @cached_property
    def network(self) -> Network:
        """Nodes and edges, head by head."""
        senders = tuple(sender for writer in self.writers for sender in _senders(writer))
        receivers = tuple(r for reader in self.readers for r in self._receivers(reader))
        exists = torch.zeros(len(senders), len(receivers), dtype=torch.bool)
        for reader, columns in self.columns():
            for name in self.places[reader.place].factors:
                exists[self.rows[name], columns] = True
        return Network(senders, receivers, exists)

    @cached_property
    def rows(self) -> dict[str, slice]:
        """By writer, which senders of the network it has."""
        found: dict[str, slice] = {}
        start = 0
        for writer in self.writers:
            found[writer.name] = slice(start, start + writer.heads)
            start += writer.heads
        return found

    def senders(self, writers: Sequence[Writer]) -> list[int]:
        """Numbers of the senders of some writers."""
        rows = (self.rows[writer.name] for writer in writers)
        return [number for own in rows for number in range(own.start, own.stop)]

    def inputs(self, readers: Sequence[Reader]) -> list[int]:
        """Numbers of the receivers of some readers."""
        found = {(reader.part, reader.kind): columns for reader, columns in self.columns()}
        columns = (found[reader.part, reader.kind] for reader in readers)
        return [number for own in columns for number in range(own.start, own.stop)]

    def columns(self) -> Iterator[tuple[Reader, slice]]:
        """The readers, each with the receivers of the network that it has."""
        start = 0
        for reader in self.readers:
            yield reader, slice(start, start + reader.inputs)
            start += reader.inputs

    def factors(self, place: str) -> Float[Tensor, " sender"]:
        """The factor by which each sender of the network is seen at a place; 0 where it is not."""
        found = torch.zeros(len(self.network.senders), dtype=torch.float64)
        for name, factor in self.places[place].factors.items():
            found[self.rows[name]] = factor
        return found

    def added(self, writer: Writer, written: Tensor) -> Float[Tensor, "batch sender position d"]:
        """What the nodes of a writer add to the stream: heads `z W_O`, without biases.

        `written` is z, `batch position head d_v`, or else `batch position d_model`.
        """
        if writer.kind != "head":
            return written[:, None]
        weight = output_weight(self.model, self.anatomy[writer.name]).to(written)
        return torch.einsum("bthv,hvd->bhtd", written, weight)

    def normed(self, place: str, stream: Float[Tensor, "*rows position d_model"]) -> Tensor:
        """What those who read at a place are given of a stream, by the model's own norm."""
        if not self.places[place].norm:
            return stream
        flat = stream.reshape(-1, *stream.shape[-2:])
        # Hooks of the module are for the model's own stream; accelerate's way to run it stays.
        return self.model.get_submodule(place).forward(flat).reshape(stream.shape)

    def _receivers(self, reader: Reader) -> Iterator[Receiver]:
        kind, layer, part = reader.kind, reader.layer, reader.part
        if kind in ("mlp", "logits"):
            yield Receiver(part, kind, part, layer, 0, (part,))
            return
        site = self.anatomy[part]
        share = site.heads // reader.inputs
        for number in range(reader.inputs):
            heads = range(number * share, (number + 1) * share)
            nodes = tuple(f"{part}H{head}" for head in heads)
            # In a model without shared keys a group is a head.
            own = f"{part}G{number}" if kind != "q" and site.groups < site.heads else nodes[0]
            yield Receiver(f"{own}<{kind}>", kind, part, layer, number, nodes)


def _senders(writer: Writer) -> Iterator[Sender]:
    if writer.kind != "head":
        yield Sender(writer.name, writer.kind, writer.name, writer.layer)
        return
    for head in range(writer.heads):
        yield Sender(f"{writer.name}H{head}", "head", writer.name, writer.layer, head)


def logits_reader(place: str, modules: Sequence[str], layer: int) -> Reader:
    """The reader of the logits."""
    return Reader(LOGITS, "logits", place, tuple(modules), None, layer, 1)
