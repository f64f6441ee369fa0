"""A circuit: the edges of a model that are kept, why they were, and what is known of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.anatomy.network import Network, Receiver, Sender
from attnlens.errors import FileError, InputError
from attnlens.files import write_atomically
from attnlens.graphs.circuit import circuit_graph
from attnlens.graphs.plain import json_value

if TYPE_CHECKING:
    from attnlens.analyses.circuit_curve import FaithfulnessCurve
    from attnlens.analyses.circuit_evaluation import CircuitEvaluation
    from attnlens.analyses.circuit_overlap import CircuitOverlap
    from attnlens.lens import Lens
    from attnlens.tasks import Task

SCHEMA = 1
"""Version of the file; raised when an older attnlens could misread a newer one."""


@dataclass(frozen=True)
class Circuit:
    """Edges that are kept, out of a model's network; `circuit.evaluate` says what they can do.

    Attributes:
        network: all nodes and edges of the model.
        kept: the circuit.
        score: of every edge of the network, by which it was chosen or not.
        chosen: share of resamples of the prompts in which each edge is chosen by the same rule
            (before edges that lead nowhere are dropped); NaN where that is not known.
        about: how the circuit was found: model, task, metric, method, granularity, ablation,
            direction, positions, selection.
        evaluation, curve: what an evaluation and a faithfulness curve found, as plain values, of a
            circuit that was read from a file; None where there were none.

    """

    network: Network
    kept: Bool[Tensor, "sender receiver"]
    score: Float[Tensor, " edge"]
    chosen: Float[Tensor, " edge"]
    about: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None = field(default=None, repr=False)
    curve: Mapping[str, Any] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Number of edges kept."""
        return int(self.kept.sum())

    @property
    def share(self) -> float:
        """Share of the model's edges that are kept."""
        return len(self) / len(self.network)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes at the ends of its edges, in the order in which they run."""
        return self.network.nodes_of(self.kept)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of its edges: `L0H1->L1H2<k>`."""
        names = self.network.edge_names
        return tuple(names[number] for number in self.network.numbers(self.kept).tolist())

    @classmethod
    def of(
        cls, network: Network, edges: Sequence[str], about: Mapping[str, Any] | None = None
    ) -> Circuit:
        """A circuit of edges by name, found by whatever way.

        Raises:
            InputError: a name that no edge of the network has, or none.

        """
        if not edges:
            raise InputError("A circuit has one edge at least; name some: ['embed->L0H1<v>', ...].")
        unknown = torch.full((len(network),), torch.nan, dtype=torch.float64)
        told = {"granularity": "edges", "selection": "given by name"} | dict(about or {})
        return cls(network, network.mask(network.find(edges)), unknown, unknown, told)

    def without(self, node: str) -> Circuit:
        """The circuit without a node, and without edges that then lead nowhere."""
        others = [name for name in self.nodes if name != node]
        kept = self.network.alive(self.kept & self.network.between(others))
        return replace(self, kept=kept, evaluation=None, curve=None)

    def to_frame(self) -> pd.DataFrame:
        """One row a kept edge, the largest score by size first: score, and how often chosen."""
        numbers = self.network.numbers(self.kept)
        order = self.score[numbers].abs().nan_to_num().argsort(descending=True, stable=True)
        numbers = numbers[order]
        pairs = self.network.edges[numbers].tolist()
        return pd.DataFrame(
            {
                "edge": [self.network.edge_names[number] for number in numbers.tolist()],
                "sender": [self.network.senders[a].name for a, _ in pairs],
                "receiver": [self.network.receivers[b].name for _, b in pairs],
                "score": self.score[numbers].numpy(),
                "chosen": self.chosen[numbers].numpy(),
            }
        )

    def to_graph(self) -> nx.MultiDiGraph[str]:
        """The circuit as a graph, for `export_graph`: see `graphs.circuit_graph`."""
        attributes = dict(self.about) | {"edges": len(self), "of": len(self.network)}
        scores, chosen = self._matrix(self.score), self._matrix(self.chosen)
        return circuit_graph(self.network, self.kept, scores, chosen, attributes)

    def evaluate(self, lens: Lens, task: Task, **settings: Any) -> CircuitEvaluation:
        """What the circuit does by itself, and the model without it: see `evaluate_circuit`."""
        from attnlens.analyses.circuit_evaluation import evaluate_circuit

        return evaluate_circuit(lens, task, self, **settings)

    def compare(self, other: Circuit) -> CircuitOverlap:
        """What two circuits share, beside chance: see `overlap`."""
        from attnlens.analyses.circuit_overlap import overlap

        return overlap(self, other)

    def save(
        self,
        path: str | Path,
        evaluation: CircuitEvaluation | None = None,
        curve: FaithfulnessCurve | None = None,
    ) -> Path:
        """Write the circuit to a JSON file, with what was found of it, whole or not at all.

        Raises:
            FileError: a file that cannot be written.

        """
        found = self.evaluation if evaluation is None else evaluation.to_record()
        areas = self.curve if curve is None else curve.to_record()
        content = {
            "attnlens circuit": SCHEMA,
            "about": json_value(self.about, "about"),
            "evaluation": json_value(found, "evaluation"),
            "curve": json_value(areas, "curve"),
            "edges": list(self.edges),
            "network": _network_record(self.network),
            "score": _numbers(self.score),
            "chosen": _numbers(self.chosen),
        }
        return write_atomically(path, json.dumps(content, ensure_ascii=False, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read a circuit that `save` wrote.

        Raises:
            FileError: a missing or damaged file, or one of a newer attnlens.

        """
        try:
            content = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise FileError(f"{path} is no circuit file: {error}.") from error
        try:
            return _from_record(content)
        except (KeyError, TypeError, ValueError, IndexError, InputError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise FileError(
                f"{path} is no circuit file of attnlens, or damaged: {what}."
            ) from error

    def _matrix(self, values: Tensor) -> Float[Tensor, "sender receiver"] | None:
        if bool(values.isnan().any()):
            return None
        found = torch.zeros(self.network.exists.shape, dtype=torch.float64)
        found[self.network.edges[:, 0], self.network.edges[:, 1]] = values.double()
        return found


def _numbers(values: Tensor) -> list[float] | None:
    """Numbers as JSON holds them; None where they are not known."""
    return None if bool(values.isnan().any()) else values.double().tolist()


def _network_record(network: Network) -> dict[str, Any]:
    return {
        "senders": [[s.name, s.kind, s.part, s.layer, s.head] for s in network.senders],
        "receivers": [
            [r.name, r.kind, r.part, r.layer, r.head, list(r.nodes)] for r in network.receivers
        ],
        # By receiver, as many of the senders as it may see are fewer than all: their numbers.
        "exists": [column.nonzero()[:, 0].tolist() for column in network.exists.T],
    }


def _from_record(content: Any) -> Circuit:
    version = content["attnlens circuit"]
    if not isinstance(version, int) or not 1 <= version <= SCHEMA:
        raise ValueError(f"its version is {version!r} and this attnlens reads {SCHEMA}; update it")
    record = content["network"]
    senders = tuple(Sender(*row) for row in record["senders"])
    receivers = tuple(
        Receiver(name, kind, part, layer, head, tuple(nodes))
        for name, kind, part, layer, head, nodes in record["receivers"]
    )
    exists = torch.zeros(len(senders), len(receivers), dtype=torch.bool)
    if len(record["exists"]) != len(receivers):
        raise ValueError("it does not say what every input may see")
    for column, rows in enumerate(record["exists"]):
        exists[rows, column] = True
    network = Network(senders, receivers, exists)
    _check_names(network)
    score, chosen = (_values(content[name], len(network), name) for name in ("score", "chosen"))
    kept = network.mask(network.find(content["edges"]))
    about, found, areas = dict(content["about"]), content["evaluation"], content["curve"]
    for name, own in (("evaluation", found), ("curve", areas)):
        if not isinstance(own, dict | None):
            raise ValueError(f"its {name} is {own!r}")
    return Circuit(network, kept, score, chosen, about, found, areas)


def _check_names(network: Network) -> None:
    """Raise ValueError where nodes have no names, or an input is that of a node there is not."""
    nodes = network.nodes
    if not all(isinstance(name, str) for name in nodes):
        raise ValueError("a node's name is no text")
    for receiver in network.receivers:
        if not receiver.nodes or not set(receiver.nodes) <= set(nodes):
            raise ValueError(f"{receiver.name} is no input of its nodes")


def _values(given: Any, count: int, name: str) -> Float[Tensor, " edge"]:
    if given is None:
        return torch.full((count,), torch.nan, dtype=torch.float64)
    values = torch.tensor(given, dtype=torch.float64)
    if values.shape != (count,):
        raise ValueError(f"{name} holds {len(given)} numbers for {count} edges")
    return values
