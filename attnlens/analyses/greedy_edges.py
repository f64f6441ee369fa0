"""A circuit by removal: edges go, one after another, whose cut costs less than a threshold.

Conmy et al. 2023 (Towards automated circuit discovery for mechanistic interpretability). Each edge
is tried on the circuit as it is by then, so the order in which edges are visited is part of the
result. Edges that follow one another in that order are tried side by side, as if each went; where
one has to stay, those after it are tried again. So the decisions are those of trying one by one,
in a fraction of the forward passes where most edges go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.circuit_evaluation import Faithfulness, check_network
from attnlens.analyses.edge_runs import EdgeAblation, EdgeRuns, Progress
from attnlens.anatomy.network import Network
from attnlens.errors import FileError, InputError
from attnlens.files import write_atomically
from attnlens.lens import Inputs, Lens
from attnlens.sweeps.fingerprint import model_facts, task_facts
from attnlens.tasks import Task

Order = Literal["from logits", "from embeddings", "random", "scores"]
"""How edges are visited: receivers from the last to the first and the senders of each from the last
to the first (the paper's); the other way round; at random; or those of the smallest scores first.
"""

_FORMAT = "attnlens edge removal 1"


@dataclass(frozen=True)
class _State:
    """What has been decided: for the first edges of the order, whether each stays."""

    facts: Mapping[str, Any]
    stays: tuple[bool, ...]
    costs: tuple[float, ...]

    def save(self, path: Path) -> None:
        content = {"format": _FORMAT, "facts": self.facts, "stays": self.stays, "costs": self.costs}
        write_atomically(path, json.dumps(content))


def remove_edges(
    lens: Lens,
    task: Task,
    threshold: float,
    order: Order = "from logits",
    scores: Float[Tensor, " edge"] | None = None,
    start: Circuit | None = None,
    ablation: EdgeAblation | str = EdgeAblation.RESAMPLE,
    metric: str | None = None,
    reference: Inputs | None = None,
    batch_size: int = 16,
    seed: int = 0,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """Remove every edge without which the circuit loses less than `threshold` of the task.

    The loss is a share of the gap between the whole model and none of it: `f(circuit) - f(without
    the edge) < threshold`. Removal begins with the whole network, or with the edges of `start`, so
    that fast scores may leave the sure ones out. With a `state` file decisions are kept every few
    seconds' worth of work, and the same call goes on from there. Scores of the circuit are what the
    edges cost when they were tried.

    Raises:
        InputError: a threshold of 0 or less, an unknown order, scores that are not one an edge,
            or as for `evaluate_circuit`.
        FileError: a state file of another removal, or one that cannot be written.

    """
    if not threshold > 0:
        raise InputError(
            f"threshold={threshold}; give the share of the task an edge may cost, over 0."
        )
    if start is not None:
        check_network(lens, start)
    runs = EdgeRuns(lens, task, metric, ablation, reference, batch_size)
    network = runs.network
    first = network.exists if start is None else start.kept & network.exists
    visits = _visits(network, first, order, scores, seed)
    ends = runs.run([first, torch.zeros_like(first)])
    whole = runs.run(network.exists[None])[0]
    share = Faithfulness(whole, ends[1], seed, 1, 0.95)
    facts = _facts(lens, runs, threshold, order, seed, visits)
    removal = _Removal(runs, share, threshold, visits, first, float(share.share(ends[0])))
    path = None if state is None else Path(state)
    removal.decided = _begun(path, facts)
    removal.work(path, progress)
    kept, cost = removal.result()
    about = {
        "task": task.name, "metric": runs.metric, "model": lens.anatomy.model, "method": "removal",
        "ablation": str(runs.ablation), "direction": "noise", "positions": "all", "steps": 0,
        "granularity": "edges", "selection": f"each edge costs {threshold:g} of the task or more",
        "order": order, "prompts": len(task), "seed": seed,
        "began with": len(visits), "forward passes": removal.passes,
    }  # fmt: skip
    unknown = torch.full((len(network),), torch.nan, dtype=torch.float64)
    return Circuit(network, network.alive(kept), cost, unknown, about)


class _Removal:
    """The edges in the order of their visits, and what has been decided of them."""

    def __init__(
        self,
        runs: EdgeRuns,
        share: Faithfulness,
        threshold: float,
        visits: Int[Tensor, " visit"],
        first: Tensor,
        value: float,
    ) -> None:
        self.decided = _State({}, (), ())
        self.passes = 0
        self._runs = runs
        self._share = share
        self._threshold = threshold
        self._visits = visits
        self._first = first
        self._whole = value

    def work(self, path: Path | None, progress: Progress | None) -> None:
        """Decide of all edges that are left."""
        side_by_side = min(self._runs.side_by_side(), 64)
        kept = self._kept()
        value = self._value(kept) if self.decided.stays else self._whole
        # At first most edges may stay; a guess that is often right is worth longer ones.
        ahead = 1
        while (done := len(self.decided.stays)) < len(self._visits):
            tried = self._visits[done : done + min(ahead, side_by_side)]
            values = self._without(kept, tried)
            self.passes += 1
            stays, costs = list(self.decided.stays), list(self.decided.costs)
            for edge, after in zip(tried.tolist(), values, strict=True):
                cost = value - after
                stays.append(cost >= self._threshold)
                costs.append(cost)
                if stays[-1]:
                    break
                value = after
                a, b = self._runs.network.edges[edge].tolist()
                kept[a, b] = False
            right = not stays[-1]
            ahead = min(2 * ahead, side_by_side) if right else max(1, ahead // 2)
            self.decided = _State(self.decided.facts, tuple(stays), tuple(costs))
            if path is not None:
                self.decided.save(path)
            if progress is not None:
                progress(len(stays), len(self._visits))

    def result(self) -> tuple[Tensor, Float[Tensor, " edge"]]:
        """The edges that stay, and what each cost when it was tried (below 0: by being cut)."""
        network = self._runs.network
        cost = torch.zeros(len(network), dtype=torch.float64)
        cost[self._visits] = (
            -torch.tensor(self.decided.costs, dtype=torch.float64) * self._share.gap
        )
        return self._kept(), cost

    def _kept(self) -> Tensor:
        network = self._runs.network
        stays = torch.tensor(self.decided.stays, dtype=torch.bool)
        gone = network.edges[self._visits[: len(stays)][~stays]]
        kept = self._first.clone()
        kept[gone[:, 0], gone[:, 1]] = False
        return kept

    def _value(self, kept: Tensor) -> float:
        return float(self._share.share(self._runs.run(kept[None])[0]))

    def _without(self, kept: Tensor, tried: Int[Tensor, " visit"]) -> list[float]:
        """f without the first, the first two, ... of some edges."""
        choices = kept.repeat(len(tried), 1, 1)
        for number, (a, b) in enumerate(self._runs.network.edges[tried].tolist()):
            choices[number:, a, b] = False
        return self._share.share(self._runs.run(choices)).tolist()


def _visits(
    network: Network, first: Tensor, order: Order, scores: Tensor | None, seed: int
) -> Int[Tensor, " visit"]:
    if order not in get_args(Order):
        raise InputError(f"There is no order {order!r}; choose {', '.join(get_args(Order))}.")
    if (order == "scores") != (scores is not None):
        raise InputError('scores= go with order="scores", and it needs them: edges(...).score.')
    if scores is not None and scores.shape != (len(network),):
        raise InputError(
            f"scores of shape {tuple(scores.shape)} for {len(network)} edges; give one an edge: "
            "edges(...).score."
        )
    numbers = network.numbers(first)
    if order == "from logits":
        return numbers.flip(0)
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        return numbers[torch.randperm(len(numbers), generator=generator)]
    if scores is not None:
        return numbers[scores[numbers].abs().argsort(stable=True)]
    return numbers


def _facts(
    lens: Lens, runs: EdgeRuns, threshold: float, order: Order, seed: int, visits: Tensor
) -> dict[str, Any]:
    """By what a state file is known again."""
    return {
        "model": model_facts(lens)["weights"],
        "task": task_facts(runs.task, runs.metric),
        "ablation": str(runs.ablation),
        "threshold": threshold,
        "order": order,
        "seed": seed,
        "visits": len(visits),
        "visited": hashlib.sha256(str(visits.tolist()).encode()).hexdigest()[:16],
    }


def _begun(path: Path | None, facts: Mapping[str, Any]) -> _State:
    """What was decided before, if anything."""
    if path is None or not path.exists():
        return _State(facts, (), ())
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError("it is of another kind")
        if not isinstance(content["facts"], dict):
            raise ValueError("it does not say of what")
        stays, costs = tuple(map(bool, content["stays"])), tuple(map(float, content["costs"]))
        if len(stays) != len(costs) or len(stays) > facts["visits"]:
            raise ValueError("it holds too many decisions")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{path} is no state of an edge removal, or damaged ({error}); give another file."
        ) from error
    other = [name for name, value in facts.items() if content["facts"].get(name) != value]
    if other:
        raise FileError(
            f"{path} is the state of another removal: its {', '.join(other)} differ. Give another "
            "file, or the same model, task and settings as before."
        )
    return _State(facts, stays, costs)
