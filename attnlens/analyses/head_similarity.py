"""How alike the maps of heads are: Jensen-Shannon divergence of all pairs, clusters, a plane.

Clark et al. 2019, What does BERT look at? (section 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.across_layers import (
    PromptRows,
    check_rows,
    comparable_sites,
    prompt_rows,
)
from attnlens.analyses.clusters import Tree, plane, tree
from attnlens.analyses.per_head import head_frame
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens

Linkage = Literal["ward", "average", "complete", "single"]

BLOCK_BYTES = 1 << 20
"""Weights held at a time, and mixtures of two heads: tensors of this size stay near the cache."""
DEVICE_BYTES = 256 << 20
"""The same where the model is not on the CPU: fewer, larger steps."""
KEPT_BYTES = 256_000_000
"""Room for the matrices of each prompt, from which the interval of each pair is taken."""
WEAK = 0.25
"""Mean silhouette below which Kaufman and Rousseeuw 1990 see no substantial structure."""


@dataclass(frozen=True)
class HeadSimilarity:
    """Divergence of every pair of heads, and what follows from it.

    Attributes:
        heads: the heads, in the order of every `head` axis.
        divergence: `mean_t JS(A_i[t], A_j[t])` in nats, 0 to ln 2: a mean over a prompt's rows,
            then over prompts.
        low, high: bounds of each pair; None where the matrices of all prompts took too much room.
        sites: names of the sites, in the order of every `site` axis.
        layers: mean divergence between the heads of two sites, `site site`; on the diagonal
            between the different heads of one site, NaN where it has one head.
        merges: scipy's linkage matrix over the Jensen-Shannon distance, the root of the divergence.
        order: the heads in an order that puts similar ones side by side.
        clusters: cluster of each head, numbered along the order.
        silhouette: -1 to 1 a head; near 1 where a head is far nearer to its own cluster.
        plane: a point a head, by classical scaling of the distance. All axes together would be
            exact, for the root of the divergence is a Euclidean distance.
        shares: how much of the spread of the heads each axis of the plane shows.
        prompts: number of prompts.
        rows: rows that counted, over all prompts.
        rows_a_prompt, linkage, seed: the settings; `rows_a_prompt` None means all rows.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    divergence: Float[Tensor, "head head"]
    low: Float[Tensor, "head head"] | None
    high: Float[Tensor, "head head"] | None
    sites: tuple[str, ...]
    layers: Interval
    merges: Float[Tensor, "merge 4"]
    order: tuple[int, ...]
    clusters: tuple[int, ...]
    silhouette: Float[Tensor, " head"]
    plane: Float[Tensor, "head 2"]
    shares: tuple[float, float]
    prompts: int
    rows: int
    rows_a_prompt: int | None
    linkage: Linkage
    seed: int
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: cluster, silhouette, place in the plane and the order, nearest head."""
        others = self.divergence.clone().fill_diagonal_(torch.inf)
        nearest = others.min(1)
        place = {head: place for place, head in enumerate(self.order)}
        return head_frame(
            self.heads,
            {
                "cluster": self.clusters,
                "silhouette": self.silhouette,
                "x": self.plane[:, 0],
                "y": self.plane[:, 1],
                "order": [place[head] for head in range(len(self.heads))],
                "nearest": [str(self.heads[head]) for head in nearest.indices.tolist()],
                "nearest_divergence": nearest.values,
            },
        )

    def pairs(self) -> pd.DataFrame:
        """One row a pair of heads, the most alike first: divergence, and bounds where known."""
        first, second = torch.triu_indices(len(self.heads), len(self.heads), 1).tolist()
        frame = pd.DataFrame(
            {
                "head": [str(self.heads[head]) for head in first],
                "other": [str(self.heads[head]) for head in second],
                "divergence": self.divergence[first, second].tolist(),
            }
        )
        if self.low is not None and self.high is not None:
            frame["divergence_low"] = self.low[first, second].tolist()
            frame["divergence_high"] = self.high[first, second].tolist()
        return frame.sort_values("divergence", ignore_index=True)

    def by_layer(self) -> pd.DataFrame:
        """One row a pair of sites: mean divergence between their heads, and its bounds."""
        count = len(self.sites)
        kept = [(a, b) for a in range(count) for b in range(a, count)]
        return pd.DataFrame(
            {
                "site": [self.sites[a] for a, _ in kept],
                "other": [self.sites[b] for _, b in kept],
                "divergence": [float(self.layers.mean[pair]) for pair in kept],
                "divergence_low": [float(self.layers.low[pair]) for pair in kept],
                "divergence_high": [float(self.layers.high[pair]) for pair in kept],
            }
        )


def head_similarity(
    lens: Lens,
    texts: Inputs,
    rows: int | None = 64,
    clusters: int | None = None,
    layers: HeadSpec | int | None = None,
    linkage: Linkage = "ward",
    batch_size: int | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> HeadSimilarity:
    """Compare the maps of all heads of all layers: `D_ij = mean_t JS(A_i[t], A_j[t])` in nats.

    `JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2` (Clark et al. 2019, who sum over the rows of all
    texts instead of taking means; their code mixes each row with .001 of an even one first, which
    is not done here). What learned sinks take of a row is one more outcome. `rows` of each prompt
    are drawn at random, None takes all: time grows with heads^2 x rows x tokens. The tree is over
    the Jensen-Shannon distance, the root of `D`, a Euclidean one as Ward's linkage wants it.
    `clusters` cuts the tree into so many; without it the cut of best mean silhouette is taken.

    Raises:
        InputError: layers of several stacks, fewer than two heads, or settings out of range.

    """
    check_bootstrap(resamples, confidence)
    sites = comparable_sites(lens, layers)
    heads = tuple(site.head(number) for site in sites for number in range(site.heads))
    _check(rows, clusters, linkage, len(heads))
    sums = _Sums(sites)
    for prompt in prompt_rows(lens, texts, sites, batch_size):
        sums.add(prompt.number, *_divergence(prompt, prompt.sample(rows, seed)))
    bootstrap = (resamples, confidence, seed)
    low, high = sums.bounds(*bootstrap)
    divergence = sums.mean()
    _refuse_nan(divergence, heads)
    found = tree(divergence.sqrt().numpy(), linkage, clusters)
    points, shares = plane(divergence.numpy())
    return HeadSimilarity(
        heads,
        divergence,
        low,
        high,
        tuple(site.name for site in sites),
        bootstrap_mean(sums.between_sites(), *bootstrap),
        torch.from_numpy(found.merges),
        tuple(found.order.tolist()),
        tuple(found.labels.tolist()),
        torch.from_numpy(found.silhouette),
        torch.from_numpy(points),
        (float(shares[0]), float(shares[1])),
        prompts=sums.prompts,
        rows=sums.rows,
        rows_a_prompt=rows,
        linkage=linkage,
        seed=seed,
        notes=_notes(sums, sites, found, clusters),
    )


def _divergence(prompt: PromptRows, rows: Sequence[int]) -> tuple[Float[Tensor, "head head"], int]:
    """Mean divergence over the given rows of one prompt, and how many these are."""
    budget = BLOCK_BYTES if prompt.rules[0].query.device.type == "cpu" else DEVICE_BYTES
    heads = sum(rule.shape[1] for rule in prompt.rules)
    total = torch.zeros(heads, heads, dtype=torch.float64)
    for block in outcomes(prompt, rows, budget):
        total += jensen_shannon(block, budget).cpu()
    return total / len(rows), len(rows)


def jensen_shannon(
    p: Float[Tensor, "head row outcome"], budget: int = BLOCK_BYTES
) -> Float[Tensor, "head head"]:
    """`sum_t JS(p_i[t], p_j[t])` of all pairs in nats, by blocks of pairs of about `budget` bytes.

    Exactly 0 for equal distributions and rows x ln 2 for disjoint ones; float64.
    """
    heads = len(p)
    own = _entropy(p)
    total = torch.zeros(heads, heads, dtype=torch.float64, device=p.device)
    step = max(budget // (p[0].numel() * p.element_size()), 1)
    for head in range(heads - 1):
        for start in range(head + 1, heads, step):
            others = slice(start, start + step)
            mixed = _entropy((p[others] + p[head]) / 2)
            total[head, others] = (mixed - (own[others] + own[head]) / 2).sum(1)
    return (total + total.T).clamp_min(0)


def outcomes(
    prompt: PromptRows, rows: Sequence[int], budget: int
) -> Iterator[Float[Tensor, "head row outcome"]]:
    """Blocks of rows as distributions: what learned sinks take of a row is one more outcome."""
    for maps in prompt.blocks(rows, budget):
        if not prompt.leaks:
            yield maps
            continue
        rest = (1 - maps.sum(-1, keepdim=True)).clamp_min(0)
        yield torch.cat([maps, rest], -1)


def _entropy(p: Float[Tensor, "*head outcome"]) -> Float[Tensor, "*head"]:
    """Entropy in nats, in float64; a clamped logarithm is twice as fast as torch's own `entr`."""
    logs = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
    return -torch.linalg.vecdot(p, logs).double()


class _Sums:
    """Running sums over prompts; the matrices of the prompts themselves while they fit."""

    def __init__(self, sites: Sequence[Site]) -> None:
        counts = torch.tensor([site.heads for site in sites])
        place = torch.arange(len(sites)).repeat_interleave(counts)
        self._member = torch.nn.functional.one_hot(place, len(sites)).double()
        self._pairs = torch.triu_indices(len(place), len(place), 1)
        self._total = torch.zeros(len(place), len(place), dtype=torch.float64)
        self._kept: dict[int, Tensor] | None = {}
        self._between: dict[int, Tensor] = {}
        self.rows = 0

    @property
    def prompts(self) -> int:
        return len(self._between)

    @property
    def kept(self) -> bool:
        """Whether the prompts' matrices fitted, from which the bounds of each pair are taken."""
        return self._kept is not None

    def add(self, number: int, divergence: Float[Tensor, "head head"], rows: int) -> None:
        """Take in one prompt's mean divergence over its rows."""
        self.rows += rows
        self._total += divergence
        sizes = self._member.sum(0)
        count = sizes[:, None] * sizes - torch.diag(sizes)
        self._between[number] = self._member.T @ divergence @ self._member / count
        if self._kept is not None:
            self._kept[number] = divergence[tuple(self._pairs)]
            if len(self._kept) * self._pairs.shape[1] * 8 > KEPT_BYTES:
                self._kept = None

    def mean(self) -> Float[Tensor, "head head"]:
        """Mean over prompts of every pair."""
        return self._total / self.prompts

    def bounds(
        self, resamples: int, confidence: float, seed: int
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Bounds of every pair, `head head` each; None where the prompts' matrices did not fit."""
        if self._kept is None:
            return None, None
        values = torch.stack([self._kept[number] for number in sorted(self._kept)])
        interval = bootstrap_mean(values, resamples, confidence, seed)
        low, high = (self._square(bound) for bound in (interval.low, interval.high))
        return low, high

    def between_sites(self) -> Float[Tensor, "prompt site site"]:
        """Mean divergence of each prompt between the heads of two sites."""
        return torch.stack([self._between[number] for number in sorted(self._between)])

    def _square(self, pairs: Float[Tensor, " pair"]) -> Float[Tensor, "head head"]:
        matrix = torch.zeros_like(self._total)
        matrix[tuple(self._pairs)] = pairs
        return matrix + matrix.T


def _check(rows: int | None, clusters: int | None, linkage: str, heads: int) -> None:
    if heads < 2:
        raise InputError("These layers have one head, and there is nothing to compare it with.")
    check_rows(rows)
    if clusters is not None and not 1 <= clusters <= heads:
        raise InputError(f"clusters={clusters} is out of range: 1 to {heads}, one for each head.")
    if linkage not in get_args(Linkage):
        raise InputError(
            f"There is no linkage {linkage!r}; choose {', '.join(map(repr, get_args(Linkage)))}."
        )


def _refuse_nan(divergence: Float[Tensor, "head head"], heads: Sequence[Head]) -> None:
    """Raise where heads have no divergence from any other: no tree holds them."""
    known = ~divergence.isnan()
    lost = [head for head, some in zip(heads, known.sum(1) > 1, strict=True) if not some]
    if lost:
        raise InputError(
            f"The weights hold NaN at {', '.join(dict.fromkeys(head.site for head in lost))}, so "
            "these heads are like no others. Load the model in a dtype with a larger range, "
            "bfloat16 or float32, or leave the layers out."
        )


def _notes(
    sums: _Sums, sites: Sequence[Site], found: Tree, clusters: int | None
) -> tuple[str, ...]:
    notes: list[str] = []
    if sums.prompts < 2:
        notes.append("One text gives no interval over texts; give several.")
    if not sums.kept:
        notes.append(
            f"Pairs have no intervals: the matrices of {sums.prompts} texts take over "
            f"{KEPT_BYTES:,} bytes. Give fewer texts, or fewer layers."
        )
    if clusters is None:
        score = float(found.silhouette.mean())
        weak = ", which is weak: these heads form no clear groups" if score < WEAK else ""
        notes.append(
            f"The number of clusters ({found.labels.max() + 1}) is that of best mean silhouette "
            f"({score:.2f}{weak}), taken from the same texts."
        )
    if any(site.sinks for site in sites):
        notes.append("What learned sinks take of a row counts as one more outcome beside the keys.")
    if any(site.causal for site in sites):
        notes.append("The first row of a causal map has one key: all heads agree on it.")
    return tuple(notes)
