"""What every edge of a model is worth to a task: exactly, or to first order from one gradient.

An edge `u -> v` is what one node wrote as one input of a later node reads it. Cutting it puts what
u writes in a reference (the corrupt twin of the prompt, a mean, nothing) in its place there, and
there alone. Its score is by how much the metric changes then.

- "exact": each edge is cut, one after another, everything after it computed anew.
- "eap" (Syed et al. 2023): `sum over positions of (u' - u) . dM/d in_v`, of all edges from two
  forwards and one backward. What a saturated softmax hides from gradients it does not see.
- "eap-ig" (Hanna et al. 2024): the same with the gradient averaged over `steps` inputs, at the
  midpoints of a line of embeddings from the reference's to the prompt's own.
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
from attnlens.analyses.selection import Selection
from attnlens.anatomy.network import Network
from attnlens.hooks.edge_gradients import edge_scores
from attnlens.lens import Inputs, Lens
from attnlens.sweeps.patches import Direction
from attnlens.tasks import Task


@dataclass(frozen=True)
class EdgeScores:
    """A score of every edge, in the order of `network.edges`.

    Attributes:
        network: nodes and edges.
        score: mean change of the metric over prompts when the edge is cut; below 0 where the edge
            helps. Denoising: when it is put back; above 0 where it helps. With bounds.
        by_prompt: of each prompt.
        scoring: how they were made.
        notes: what a reader should know.

    """

    network: Network
    score: Float[Tensor, " edge"]
    low: Float[Tensor, " edge"]
    high: Float[Tensor, " edge"]
    by_prompt: Float[Tensor, "prompt edge"]
    scoring: Scoring
    notes: tuple[str, ...]

    @property
    def matrix(self) -> Float[Tensor, "sender receiver"]:
        """Scores by sender and receiver; 0 where there is no edge."""
        found = torch.zeros(self.network.exists.shape, dtype=self.score.dtype)
        found[self.network.edges[:, 0], self.network.edges[:, 1]] = self.score
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row an edge, the largest by size first: score with bounds."""
        order = self.score.abs().argsort(descending=True, stable=True)
        pairs = self.network.edges[order].tolist()
        return pd.DataFrame(
            {
                "edge": [self.network.edge_names[number] for number in order.tolist()],
                "sender": [self.network.senders[a].name for a, _ in pairs],
                "receiver": [self.network.receivers[b].name for _, b in pairs],
                "score": self.score[order].numpy(),
                "score_low": self.low[order].numpy(),
                "score_high": self.high[order].numpy(),
            }
        )

    def circuit(
        self,
        top: int | None = None,
        threshold: float | None = None,
        greedy: bool = False,
        resamples: int = 200,
    ) -> Circuit:
        """The circuit of the edges with the largest scores by size; see `Selection`.

        Edges that lie on no way from embeddings to logits are dropped. `chosen` of the circuit is
        the share of `resamples` of the prompts in which the rule chooses each edge.
        """
        rule = Selection(top, threshold, greedy)
        kept = self.network.mask(rule.pick(self.network, self.score).nonzero()[:, 0])
        chosen = stability(self.network, self.by_prompt, rule, resamples, self.scoring.seed)
        about = self.scoring.facts() | {
            "granularity": "edges",
            "selection": str(rule),
            "prompts": len(self.by_prompt),
            "resamples": resamples,
            "seed": self.scoring.seed,
        }
        return Circuit(self.network, self.network.alive(kept), self.score, chosen, about)


def edges(
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
) -> EdgeScores:
    """Score every edge of the model on a task; the module's docstring has the methods.

    `steps` are of "eap-ig"; `reference` are the prompts of the mean, the corrupt ones where not
    given. Prompts run `batch_size` at a time; memory is that of a forward and backward, and the
    scores of all prompts. Accuracy has no gradient: that of the loss is taken, and a note says so.

    Raises:
        InputError: an unknown method, ablation or direction, no steps, or edits that are on.
        UnsupportedModelError: the residual stream is no sum of what nodes wrote (post-norm blocks,
            norms of what is written), so that edges are not defined.

    """
    scoring, notes = scoring_of(
        lens, task, method, steps, ablation, direction, metric, seed, resamples, confidence
    )
    network = lens.wiring.network
    own = directed(task, direction, scoring.ablation)
    if method == "exact":
        runs = EdgeRuns(lens, own, scoring.metric, scoring.ablation, reference, batch_size)
        by_prompt = cut_one_by_one(runs, progress)
    else:
        found = first_order(lens, own, scoring, edge_scores, reference, batch_size, progress)
        by_prompt = found[:, network.edges[:, 0], network.edges[:, 1]]
    return EdgeScores(network, *scoring.interval(by_prompt), by_prompt, scoring, notes)


def cut_one_by_one(runs: EdgeRuns, progress: Progress | None) -> Float[Tensor, "prompt edge"]:
    """By how much the metric of each prompt changes without each edge."""
    network = runs.network
    values = torch.zeros(len(network), len(runs.task), dtype=torch.float64)
    step = runs.side_by_side()
    for start in range(0, len(network), step):
        pairs = network.edges[start : start + step]
        kept = network.exists.repeat(len(pairs), 1, 1)
        kept[torch.arange(len(pairs)), pairs[:, 0], pairs[:, 1]] = False
        values[start : start + step] = runs.run(kept)
        if progress is not None:
            progress(min(start + step, len(network)), len(network))
    whole = runs.run(network.exists[None])
    return (values - whole).T


def stability(
    network: Network,
    by_prompt: Float[Tensor, "prompt edge"],
    rule: Selection,
    resamples: int,
    seed: int,
) -> Float[Tensor, " edge"]:
    """In what share of resamples of the prompts a rule chooses each edge."""
    generator = torch.Generator().manual_seed(seed)
    prompts = len(by_prompt)
    chosen = torch.zeros(len(network), dtype=torch.float64)
    for _ in range(resamples):
        drawn = torch.randint(prompts, (prompts,), generator=generator)
        times = torch.bincount(drawn, minlength=prompts).to(by_prompt)
        chosen += rule.pick(network, times @ by_prompt / prompts)
    return chosen / resamples
