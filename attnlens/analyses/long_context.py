"""Which heads need the far context, query by query, and whether a cheap estimate would tell.

Donhauser et al. 2025, Unveiling simplicities of attention: adaptive long-context head
identification (QAdA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analyses.per_head import HeadTable, Where, heads_of, side_by_side, within_sequence
from attnlens.analyses.uncertainty import bootstrap_ratio, check_bootstrap
from attnlens.anatomy import HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.tokens import Layout
from attnlens.lens import Inputs, Lens, Statistics

COUNTS = ("queries", "local", "estimated", "both", "far_mass", "estimated_far_mass")


@dataclass(frozen=True)
class LongContextHeads(HeadTable):
    """Rates of each head over its queries that have far keys, the texts' queries taken together.

    `local` is the share of queries that are local, `estimated` the share that the estimate calls
    local and `accuracy` the share on which both agree; `false_local` is the share called local of
    the queries that are not, `false_far` the share not called local of those that are. `far_mass`
    is the mean weight on the far keys, `estimated_far_mass` what the estimate makes of it.
    """

    tau: float
    window: int
    first: int
    prompts: int
    """Number of texts."""
    queries: Int[Tensor, " head"]
    """Queries that have far keys, over all texts; 0 in cross-attention."""
    notes: tuple[str, ...]


def long_context_heads(
    lens: Lens,
    texts: Inputs,
    tau: float = 0.9,
    window: int = 1024,
    first: int = 16,
    layers: HeadSpec | int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LongContextHeads:
    """How often each head needs a far key: one beyond the `first` keys and the `window` latest.

    A query is local where its far keys hold 1 - tau of its weight at most; what a learned sink
    takes counts as near. The estimate takes `n exp(q mu c + c^2 q Sigma q^T / 2)` for the sum of
    exponentials of its n far keys, of mean mu and covariance Sigma, under the module's scaling c
    (Donhauser et al. 2025). It is exact where their scores are equal, or normal in the limit; else
    it errs to either side (a few far keys sought, a low tail), and the rates say how often that
    turns the decision. A query whose far keys the head's own window hides is local.

    Raises:
        InputError: settings out of range, or no text longer than `first + window` tokens.

    """
    if not 0 < tau < 1:
        raise InputError(f"tau={tau} is out of range: between 0 and 1.")
    if not (isinstance(window, int) and isinstance(first, int) and window >= 1 and first >= 0):
        raise InputError(
            f"window={window}, first={first}: give whole numbers, window >= 1 and first >= 0."
        )
    check_bootstrap(resamples, confidence)
    reducer = Where(LocalQueries(tau, window, first), within_sequence)
    measured = lens.measure(texts, reducer, layers, batch_size)
    counts = side_by_side(measured, "local_queries")
    # Sites without far keys count nothing; a head whose weights are NaN keeps its NaN.
    counts = counts.masked_fill(counts[..., :1].isnan(), 0.0)
    queries, local, called, both, mass, estimated_mass = counts.unbind(-1)
    if not queries.any():
        _refuse(measured, window, first)
    rates = {
        "local": (local, queries),
        "estimated": (called, queries),
        "accuracy": (queries - local - called + 2 * both, queries),
        "false_local": (called - both, queries - local),
        "false_far": (local - both, local),
        "far_mass": (mass, queries),
        "estimated_far_mass": (estimated_mass, queries),
    }
    above, below = (torch.stack(part, -1) for part in zip(*rates.values(), strict=True))
    return LongContextHeads(
        heads_of(measured),
        tuple(rates),
        *bootstrap_ratio(above, below, resamples, confidence, seed),
        tau=tau,
        window=window,
        first=first,
        prompts=len(counts),
        queries=queries.sum(0).long(),
        notes=_notes(measured, queries),
    )


def estimated_log_sum(
    count: Tensor, mean: Float[Tensor, "*query"], variance: Float[Tensor, "*query"]
) -> Float[Tensor, "*query"]:
    """`ln(n exp(m + v / 2))`: log of the sum of n exponentials of scores of mean m and variance v.

    The scores of a query q on keys of mean mu and covariance Sigma have mean `q mu c` and variance
    `c^2 q Sigma q^T`, c the scaling. -inf for no keys.
    """
    return count.to(mean.dtype).log() + mean + variance / 2


@dataclass(frozen=True)
class LocalQueries:
    """Counts of local queries, exact and estimated, and sums of their weight on far keys.

    The moments of a query's scores over its far keys are its products with the moments of those
    keys, so the estimate reads no more of them than their mean and covariance. Taken from the
    scores it holds with a soft cap and position bias too.
    """

    tau: float
    window: int
    first: int
    name: str = "local_queries"
    columns: tuple[str, ...] = COUNTS

    def start(self, layout: Layout) -> Float[Tensor, "batch head count"]:
        """Nothing seen yet; sums are kept in float64."""
        shape = (layout.batch, layout.heads, len(COUNTS))
        return torch.zeros(shape, dtype=torch.float64, device=layout.device)

    def update(self, state: Float[Tensor, "batch head count"], block: Block) -> None:
        """Decide every query of the block, from its weights and from the moments of its scores."""
        counted = self._with_far_keys(block)
        if block.real is not None:
            counted = counted & block.real
        if not counted.any():
            return
        far = self._far(block)[:, None]
        if block.visible is not None:
            far = far & block.visible
        members = far.to(block.pattern.dtype)
        mass = torch.linalg.vecdot(block.pattern, members)
        estimate = estimated_mass(block, members)
        local, called = mass <= 1 - self.tau, estimate <= 1 - self.tau
        decided = torch.stack([local, called, local & called]).to(mass.dtype)
        decided = decided.where(~mass.isnan(), torch.nan)
        for column, values in enumerate((torch.ones_like(mass), *decided, mass, estimate)):
            kept = values.double().masked_fill(~counted[:, None], 0)  # padding may be NaN
            state[:, block.heads, column] += kept.sum(-1)

    def finish(self, state: Float[Tensor, "batch head count"]) -> Float[Tensor, "batch head count"]:
        """The counts."""
        return state

    def _far(self, block: Block) -> Bool[Tensor, "batch row key"]:
        """The far keys of each row among those of the block, hidden ones and padding too."""
        layout, t = block.layout, block.positions[:, None]
        keys = torch.arange(block.keys.start, block.keys.stop, device=layout.device)
        far = keys <= t - self.window
        if not layout.site.causal:
            far |= keys >= t + self.window
        return far & (keys >= (layout.first_key() + self.first)[:, None, None])

    def _with_far_keys(self, block: Block) -> Bool[Tensor, "batch row"]:
        """Rows that have a far key, whether they see it or not."""
        layout, t = block.layout, block.positions
        real = layout.key_tokens.real
        if real is None:
            real = torch.ones(layout.batch, layout.keys, dtype=torch.bool, device=layout.device)
        before = torch.nn.functional.pad(real.long().cumsum(-1), (1, 0))
        start = (layout.first_key() + self.first).clamp_max(layout.keys)[:, None]

        def between(low: Tensor, stop: Tensor) -> Tensor:
            stop = stop.clamp(0, layout.keys).expand(layout.batch, -1)
            return before.gather(1, stop) - before.gather(1, low.clamp(0, layout.keys))

        found = between(start.expand(-1, len(t)), t - self.window + 1) > 0
        if not layout.site.causal:
            end = torch.full_like(t, layout.keys)
            found |= between(torch.maximum(start, t + self.window), end) > 0
        return found


def estimated_mass(
    block: Block, far: Float[Tensor, "batch #head row key"]
) -> Float[Tensor, "batch head row"]:
    """Weight on the far keys (1 in `far`) by the estimate of their sum, the row's rest as it is."""
    scores = block.scores.to(block.pattern.dtype)
    count = far.sum(-1)
    mean = torch.linalg.vecdot(scores, far) / count.clamp_min(1)
    spread = (scores - mean[..., None]).mul_(far)
    variance = torch.linalg.vecdot(spread, spread) / count.clamp_min(1)
    near = torch.linalg.vecdot(block.pattern, 1 - far)
    if block.sinks is not None:
        near = near + (1 - block.row_sums).clamp_min(0)  # bfloat16 rows may round to over 1
    # ln A = score - lse, for the largest weight as for any.
    lse = scores.amax(-1) - block.pattern.amax(-1).log()
    return torch.sigmoid(estimated_log_sum(count, mean, variance) - lse - near.log())


def _refuse(measured: Statistics, window: int, first: int) -> None:
    longest = max(measured.lengths, default=0)
    raise InputError(
        f"No query has a key beyond the {first} first and its {window} latest: the longest text "
        f"has {longest} tokens. Give texts of more than {first + window}, or a smaller window."
    )


def _notes(measured: Statistics, queries: Float[Tensor, "prompt head"]) -> tuple[str, ...]:
    notes: list[str] = []
    short = int((queries.sum(1) == 0).sum())
    if short:
        notes.append(f"{short} of {len(queries)} texts are too short to have a query that counts.")
    if len(queries) - short < 2:
        notes.append("One text gives no interval over texts; give several.")
    if any(site.sinks for site in measured.anatomy.sites):
        notes.append("Learned sinks take a share of each row, which counts as near.")
    return tuple(notes)
