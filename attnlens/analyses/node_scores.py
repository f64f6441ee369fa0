"""What every node of a model is worth to a task: heads, MLPs and embeddings as wholes.

A node's score is by how much the metric changes when all that it writes is what it writes in a
reference: exactly, from gradients (attribution patching, Nanda 2023), or from gradients averaged
along a line of inputs; see `edge_scores.py`, which has the same methods of edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.circuit import Circuit
from attnlens.analyses.edge_runs import EdgeAblation, EdgeRuns, Progress, directed
from attnlens.analyses.scoring import Method, Scoring, first_order, scoring_of
from attnlens.anatomy.network import LOGITS, Network
from attnlens.errors import InputError
from attnlens.hooks.edge_gradients import node_scores
from attnlens.lens import Inputs, Lens
from attnlens.sweeps.patches import Direction
from attnlens.tasks import Task


@dataclass(frozen=True)
class NodeScores:
    """A score of every node that writes, in the order of `network.senders`.

    Attributes:
        score: mean change of the metric over prompts when the node writes what it does in the
            reference; denoising, when it is put back. With bounds.
        by_prompt: of each prompt.
        scoring: how they were made.

    """

    network: Network
    score: Float[Tensor, " sender"]
    low: Float[Tensor, " sender"]
    high: Float[Tensor, " sender"]
    by_prompt: Float[Tensor, "prompt sender"]
    scoring: Scoring
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a node, the largest by size first: score with bounds."""
        order = self.score.abs().argsort(descending=True, stable=True)
        nodes = [self.network.senders[number] for number in order.tolist()]
        return pd.DataFrame(
            {
                "node": [node.name for node in nodes],
                "kind": [node.kind for node in nodes],
                "layer": [node.layer for node in nodes],
                "score": self.score[order].numpy(),
                "score_low": self.low[order].numpy(),
                "score_high": self.high[order].numpy(),
            }
        )

    def circuit(self, top: int, resamples: int = 200) -> Circuit:
        """The circuit of all edges between the `top` nodes by size, embeddings and logits.

        `chosen` of the circuit is the share of resamples of the prompts in which both ends of an
        edge are among these nodes; scores of its edges are those of their senders.
        """
        if top < 1:
            raise InputError(f"top={top}; a circuit has one node at least.")
        nodes = self.network.senders
        fixed = torch.tensor([node.kind == "embed" for node in nodes])
        sizes = self.score.abs().masked_fill(fixed, -1)
        names = [nodes[number].name for number in sizes.argsort(descending=True)[:top].tolist()]
        always = [node.name for node in nodes if node.kind == "embed"]
        kept = self.network.alive(self.network.between([*always, *names, LOGITS]))
        senders, receivers = self.network.edges.T
        about = self.scoring.facts() | {
            "granularity": "nodes",
            "selection": f"top {top}",
            "prompts": len(self.by_prompt),
            "resamples": resamples,
            "seed": self.scoring.seed,
        }
        within = self._within(top, fixed, resamples)
        reads = self.network.reads.double()
        heard = (within @ reads[:, :-1].T.double()).gt(0) | (reads[:, -1] > 0)
        both = within[:, senders] * heard[:, receivers]
        return Circuit(self.network, kept, self.score[senders], both.mean(0), about)

    def _within(self, top: int, fixed: Tensor, resamples: int) -> Float[Tensor, "resample sender"]:
        """Which nodes are among the `top` in each resample of the prompts; embeddings always."""
        generator = torch.Generator().manual_seed(self.scoring.seed)
        prompts = len(self.by_prompt)
        drawn = torch.randint(prompts, (resamples, prompts), generator=generator)
        sizes = self.by_prompt[drawn].mean(1).abs().masked_fill(fixed, -1)
        found = torch.zeros_like(sizes)
        found.scatter_(1, sizes.argsort(1, descending=True)[:, :top], 1.0)
        return found.masked_fill(fixed, 1.0)


def nodes(
    lens: Lens,
    task: Task,
    method: Method = "eap-ig",
    steps: int = 10,
    ablation: EdgeAblation | str = EdgeAblation.RESAMPLE,
    direction: Direction = "noise",
    metric: str | None = None,
    reference: Inputs | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> NodeScores:
    """Score every node of the model on a task; arguments and errors as for `edges`.

    `eap`: `sum over positions of (u' - u) . dM/du`; "exact": all edges out of the node are cut.
    """
    scoring, notes = scoring_of(
        lens, task, method, steps, ablation, direction, metric, seed, resamples, confidence
    )
    network = lens.wiring.network
    own = directed(task, direction, scoring.ablation)
    if method == "exact":
        runs = EdgeRuns(lens, own, scoring.metric, scoring.ablation, reference, batch_size)
        kept = network.exists.repeat(len(network.senders) + 1, 1, 1)
        kept[torch.arange(len(network.senders)), torch.arange(len(network.senders))] = False
        values = runs.run(kept, progress)
        by_prompt = (values[:-1] - values[-1]).T
    else:
        by_prompt = first_order(lens, own, scoring, node_scores, reference, batch_size, progress)
    return NodeScores(network, *scoring.interval(by_prompt), by_prompt, scoring, notes)
