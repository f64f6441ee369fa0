"""What a circuit does: by itself, taken out of the model, without one node, and beside chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.edge_runs import EdgeAblation, EdgeRuns, Progress
from attnlens.analyses.uncertainty import Interval, bootstrap_ratio, check_bootstrap
from attnlens.anatomy.network import Network
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens
from attnlens.tasks import Task

_NOTHING = 1e-6
"""A gap between the whole model and none of it, as a share of the metric, that is none."""


@dataclass(frozen=True)
class Faithfulness:
    """Shares of a task, `f = (M - M(empty)) / (M(full) - M(empty))`, over prompts.

    Raises:
        InputError: the whole model and the model with every edge cut do the same.

    """

    full: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    seed: int
    resamples: int
    confidence: float

    def __post_init__(self) -> None:
        check_bootstrap(self.resamples, self.confidence)
        size = float(torch.stack([self.full, self.empty]).abs().max())
        if not abs(self.gap) > _NOTHING * max(size, 1e-12):
            raise InputError(
                f"The whole model gives {float(self.full.mean()):.4g} on this task and the model "
                f"with every edge cut {float(self.empty.mean()):.4g}: there is nothing that a "
                "circuit could explain. Take prompts on which the model succeeds, or another "
                "metric or ablation."
            )

    @property
    def gap(self) -> float:
        """`M(full) - M(empty)`, a mean over prompts."""
        return float((self.full - self.empty).mean())

    def of(self, values: Float[Tensor, "*any prompt"]) -> Interval:
        """f of some values, with its interval: a ratio of means."""
        above = (values - self.empty).movedim(-1, 0)
        below = (self.full - self.empty).view(-1, *[1] * (values.ndim - 1))
        return bootstrap_ratio(above, below, self.resamples, self.confidence, self.seed)

    def share(self, values: Float[Tensor, "*any prompt"]) -> Float[Tensor, "*any"]:
        """f without its interval."""
        return (values - self.empty).mean(-1) / self.gap

    def notes(self) -> tuple[str, ...]:
        """What to beware of."""
        by_prompt = self.full - self.empty
        if len(by_prompt) < 2:
            return ("One prompt gives no interval over prompts; give several.",)
        apart = float(by_prompt.mean().abs() / (by_prompt.std() / len(by_prompt) ** 0.5))
        if apart < 2:
            note = (
                "The whole model and none of it differ by less than twice the standard error over "
                "prompts: faithfulness divides by what may be 0."
            )
            return (note,)
        return ()


@dataclass(frozen=True)
class CircuitEvaluation:
    """Metric and faithfulness of a circuit on a task.

    Attributes:
        task, metric, ablation: what was graded, and what is read along edges that are cut.
        circuit: the circuit; `edges` of it kept, of `of` in the model.
        full, empty: the metric of each prompt with no edge cut, and with all.
        inside, outside: with the circuit alone, and with its edges cut alone.
        faithfulness: f of the circuit, 1 where it does all that the model does; it may pass 1.
        completeness: f of the model without the circuit, 0 where nothing is left.
        nodes: nodes of the circuit, but for embeddings and logits.
        minimality: by how much f falls when a node is taken out of the circuit, with bounds; 0 for
            a node that is not needed.
        random, random_outside: f of circuits of as many edges at random, and of the model without
            their edges.

    """

    task: str
    metric: str
    ablation: EdgeAblation
    edges: int
    of: int
    full: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    inside: Float[Tensor, " prompt"]
    outside: Float[Tensor, " prompt"]
    faithfulness: Interval
    completeness: Interval
    nodes: tuple[str, ...]
    minimality: Interval
    random: Float[Tensor, " draw"]
    random_outside: Float[Tensor, " draw"]
    seed: int
    resamples: int
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a measure: faithfulness, completeness, each node's minimality; with bounds."""
        rows: list[dict[str, Any]] = []
        for name, found in (
            ("faithfulness", self.faithfulness),
            ("completeness", self.completeness),
        ):
            rows.append({"measure": name, "node": "", **_bounds(found)})
        for number, node in enumerate(self.nodes):
            own = Interval(*(bound[number] for bound in self.minimality))
            rows.append({"measure": "minimality", "node": node, **_bounds(own)})
        for name, draws in (
            ("faithfulness, random", self.random),
            ("completeness, random", self.random_outside),
        ):
            if len(draws):
                tail = (1 - self.confidence) / 2
                low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype))
                rows.append(
                    {"measure": name, "node": "", **_bounds(Interval(draws.mean(), low, high))}
                )
        return pd.DataFrame(rows)

    def to_record(self) -> dict[str, Any]:
        """As a circuit's file holds it."""
        frame = self.to_frame()
        means = {name: float(getattr(self, name).mean()) for name in _MEANS}
        return {
            "task": self.task,
            "metric": self.metric,
            "ablation": str(self.ablation),
            "prompts": len(self.full),
            "means": means,
            "measures": [
                {str(k): v for k, v in row.items() if v == v} for row in frame.to_dict("records")
            ],
            "random draws": len(self.random),
            "seed": self.seed,
            "resamples": self.resamples,
            "confidence": self.confidence,
            "notes": list(self.notes),
        }


_MEANS = ("full", "empty", "inside", "outside")


def evaluate_circuit(
    lens: Lens,
    task: Task,
    circuit: Circuit,
    ablation: EdgeAblation | str | None = None,
    metric: str | None = None,
    reference: Inputs | None = None,
    draws: int = 20,
    batch_size: int = 16,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> CircuitEvaluation:
    """Keep the circuit and cut the rest, cut the circuit and keep the rest, leave out each node.

    `f = (M - M(empty)) / (M(full) - M(empty))`. Ablation and metric are those by which the circuit
    was found where not given. `draws` circuits of as many edges, drawn at random, stand beside it.
    Faithfulness, completeness, minimality: Wang et al. 2022 (Interpretability in the wild).

    Raises:
        InputError: a circuit of another model, or a task on which the whole model and none of it
            do the same.
        UnsupportedModelError: a model whose edges are not defined.

    """
    check_network(lens, circuit)
    if draws < 0:
        raise InputError(f"draws={draws}; give 0 or more.")
    told: Mapping[str, Any] = circuit.about
    kind = ablation or told.get("ablation", EdgeAblation.RESAMPLE)
    graded = metric or (told.get("metric") if told.get("task") == task.name else None)
    runs = EdgeRuns(lens, task, graded, kind, reference, batch_size)
    network = circuit.network
    nodes = inner_nodes(circuit)
    chance = random_circuits(network, len(circuit), draws, seed)
    everything, nothing = network.exists, torch.zeros_like(network.exists)
    outside = network.exists & ~circuit.kept
    choices = [everything, nothing, circuit.kept, outside]
    choices += [circuit.without(node).kept for node in nodes]
    choices += [*chance, *(network.exists & ~kept for kept in chance)]
    values = runs.run(choices, progress)
    share = Faithfulness(values[0], values[1], seed, resamples, confidence)
    without = values[4 : 4 + len(nodes)]
    drawn = share.share(values[4 + len(nodes) :])
    return CircuitEvaluation(
        task.name,
        runs.metric,
        runs.ablation,
        len(circuit),
        len(network),
        values[0],
        values[1],
        values[2],
        values[3],
        share.of(values[2]),
        share.of(values[3]),
        nodes,
        _drops(share, values[2], without),
        drawn[:draws],
        drawn[draws:],
        seed,
        resamples,
        confidence,
        (*share.notes(), *_apart(runs, values[0])),
    )


def check_network(lens: Lens, circuit: Circuit) -> None:
    """Raise InputError where a circuit is of a model with other nodes or edges."""
    own = lens.wiring.network
    if own.senders != circuit.network.senders or own.receivers != circuit.network.receivers:
        raise InputError(
            f"The circuit is of a model with {len(circuit.network.senders)} nodes and "
            f"{len(circuit.network)} edges, and {lens.anatomy.model} has {len(own.senders)} and "
            f"{len(own)}: a circuit is evaluated on the model it was found in."
        )


def inner_nodes(circuit: Circuit) -> tuple[str, ...]:
    """The nodes of a circuit that can be taken out: heads and MLPs."""
    kinds = {sender.name: sender.kind for sender in circuit.network.senders}
    return tuple(node for node in circuit.nodes if kinds.get(node, "embed") != "embed")


def random_circuits(network: Network, edges: int, draws: int, seed: int) -> list[Tensor]:
    """Circuits of so many edges, each set of edges as likely as another."""
    generator = torch.Generator().manual_seed(seed)
    return [
        network.mask(torch.randperm(len(network), generator=generator)[:edges])
        for _ in range(draws)
    ]


def _drops(share: Faithfulness, inside: Tensor, without: Tensor) -> Interval:
    """f of the circuit less f without each node."""
    drops = (inside - without).T
    below = (share.full - share.empty)[:, None]
    return bootstrap_ratio(drops, below, share.resamples, share.confidence, share.seed)


def _apart(runs: EdgeRuns, whole: Tensor) -> tuple[str, ...]:
    """A note where the sum of all edges is not the model, but for rounding."""
    apart = float((runs.full - whole).abs().max())
    if apart <= 1e-3 * max(1.0, float(runs.full.abs().max())):
        return ()
    note = (
        f"With every edge kept the metric differs from the model's by up to {apart:.2g}: sums in "
        "the model's narrow type round. Load it in float32 for numbers of small circuits."
    )
    return (note,)


def _bounds(found: Interval) -> dict[str, float]:
    return {"value": float(found.mean), "low": float(found.low), "high": float(found.high)}
