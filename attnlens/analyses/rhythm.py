"""Reasoning rhythm: how far local heads look back, and which tokens global heads return to.

Li et al. 2025, Attention illuminates LLM reasoning: the preplan-and-anchor rhythm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analyses.across_layers import ways_to_name
from attnlens.analyses.per_head import head_frame, side_by_side
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import Anatomy, Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.reducers import MeanDistance
from attnlens.hooks.tokens import Layout
from attnlens.lens import Inputs, Lens, Statistics
from attnlens.lens.inputs import Batch


@dataclass(frozen=True)
class Rhythm:
    """Two curves over the tokens of each prompt, positions from its first token; NaN past its end.

    Attributes:
        heads: the heads that were compared, in the order of `distance`.
        distance: `d_h`, mean distance in tokens a head, with its interval over prompts.
        local_heads, global_heads: the heads of least and of most distance, the extreme one first.
        waad: windowed average attention distance of each token's row, in tokens; high where the
            local heads look back past the phrase at hand.
        fai: future attention influence of each token, the mean weight that later rows give it; NaN
            where no row lies in its horizon.
        tokens: token texts of each prompt; empty where they are unknown.
        share, window, horizon: the settings of both.
        prompts: number of prompts.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    distance: Interval
    local_heads: tuple[Head, ...]
    global_heads: tuple[Head, ...]
    waad: Float[Tensor, "prompt position"]
    fai: Float[Tensor, "prompt position"]
    tokens: tuple[tuple[str, ...], ...]
    share: float
    window: int
    horizon: tuple[int, int]
    prompts: int
    notes: tuple[str, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return tuple((~self.waad.isnan()).sum(-1).tolist())

    def to_frame(self) -> pd.DataFrame:
        """One row a head: its distance with bounds, and whether it is local, global or neither."""
        kinds = dict.fromkeys(self.local_heads, "local") | dict.fromkeys(
            self.global_heads, "global"
        )
        return head_frame(
            self.heads,
            {
                "distance": self.distance.mean,
                "distance_low": self.distance.low,
                "distance_high": self.distance.high,
                "kind": [kinds.get(head, "") for head in self.heads],
            },
        )

    def by_token(self) -> pd.DataFrame:
        """One row a token: prompt, position, token, waad, fai."""
        frames: list[pd.DataFrame] = []
        for prompt, length in enumerate(self.lengths):
            words = self.tokens[prompt] if self.tokens else ("",) * length
            columns = {
                "prompt": prompt,
                "position": range(length),
                "token": words,
                "waad": self.waad[prompt, :length].tolist(),
                "fai": self.fai[prompt, :length].tolist(),
            }
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)


def rhythm(
    lens: Lens,
    texts: Inputs,
    share: float = 0.3,
    window: int = 10,
    horizon: tuple[int, int] = (10, 50),
    layers: HeadSpec | int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Rhythm:
    """Distance of every head, then the curves of the local and the global heads.

    `d_h = mean_t sum_s A[t, s] |t - s|`; over the `share` of the heads with the least d_h
    `WAAD_t = mean_h sum_s A[t, s] min(|t - s|, window)`, over the share with the most
    `FAI_s = mean_h mean_t A[t, s]` for the rows t from s + horizon[0] to s + horizon[1] that exist
    (Li et al. 2025). Two passes over the texts: the heads are chosen by their distance over all of
    them, then averaged, and only their layers are measured again. Causal heads where a model has
    stacks of both sorts.

    Raises:
        InputError: settings out of range, layers of several stacks, or a single head.

    """
    _check(share, window, horizon)
    check_bootstrap(resamples, confidence)
    batch = lens.encode(texts)
    heads = _of_one_stack(lens.anatomy_for(batch).layers(layers))
    first = lens.measure(batch.inputs, MeanDistance(), heads, batch_size)
    distance = bootstrap_mean(side_by_side(first, "distance"), resamples, confidence, seed)
    near, far = choose(heads, distance.mean, share)
    curves = (
        WindowedDistance(_by_site(near), window),
        FutureInfluence(_by_site(far), horizon),
    )
    second = lens.measure(batch.inputs, curves, near + far, batch_size)
    return Rhythm(
        heads=heads,
        distance=distance,
        local_heads=near,
        global_heads=far,
        waad=_mean_over_heads(second, "waad", near),
        fai=_mean_over_heads(second, "fai", far),
        tokens=_tokens(lens, batch, first.anatomy, heads[0]),
        share=share,
        window=window,
        horizon=horizon,
        prompts=len(batch.lengths),
        notes=_notes(first.anatomy, heads, distance.mean, len(batch.lengths), horizon),
    )


def choose(
    heads: Sequence[Head], distance: Float[Tensor, " head"], share: float
) -> tuple[tuple[Head, ...], tuple[Head, ...]]:
    """The `share` of the heads with the least distance and with the most, one of each at least.

    Heads whose distance is NaN are neither.
    """
    if len(heads) < 2:
        raise InputError(
            f"There is a single head here, {heads[0]}; local and global heads need two to compare. "
            "Name more layers."
        )
    order = [n for n in distance.argsort(stable=True).tolist() if not distance[n].isnan()]
    if len(order) < 2:
        raise InputError(
            f"{len(heads) - len(order)} of {len(heads)} heads have no distance: their weights are "
            "NaN. Load the model in a dtype with a larger range, bfloat16 or float32."
        )
    count = max(1, int(share * len(order) + 1e-9))
    return (
        tuple(heads[number] for number in order[:count]),
        tuple(heads[number] for number in order[::-1][:count]),
    )


@dataclass(frozen=True)
class _Curve:
    """State of a curve over positions: a sum over the chosen heads of one site."""

    layout: Layout
    heads: tuple[int, ...]
    total: Float[Tensor, "batch 1 position"]

    @classmethod
    def zero(cls, layout: Layout, chosen: Mapping[str, Sequence[int]], positions: int) -> _Curve:
        """Nothing seen yet; sums are kept in float64."""
        total = torch.zeros(layout.batch, 1, positions, dtype=torch.float64, device=layout.device)
        return cls(layout, tuple(chosen.get(layout.site.name, ())), total)

    def within(self, block: Block) -> list[int]:
        """The chosen heads of a block, counted from its first."""
        here = range(block.heads.start, block.heads.stop)
        return [head - here.start for head in self.heads if head in here]


@dataclass(frozen=True)
class WindowedDistance:
    """`sum_s A[t, s] min(|t - s|, W)` of each row, summed over the chosen heads of each site."""

    heads: Mapping[str, Sequence[int]]
    """Heads by site."""
    window: int
    name: str = "waad"
    columns: tuple[str, ...] = ()
    reads = ("row_sums", "at")

    def start(self, layout: Layout) -> _Curve:
        """Room for one number a row."""
        return _Curve.zero(layout, self.heads, layout.queries)

    def update(self, state: _Curve, block: Block) -> None:
        """Every weight counts W, less what the keys inside the window are nearer."""
        own = state.within(block)
        if not own:
            return
        first = 0 if state.layout.site.causal else 1 - self.window
        values = self.window * block.row_sums.double()
        for offset in range(first, self.window):
            values -= (self.window - abs(offset)) * block.at(block.partners - offset)
        state.total[:, 0, block.rows] += values[:, own].sum(1)

    def finish(self, state: _Curve) -> Float[Tensor, "batch 1 query"]:
        """The curve from the first real row on."""
        return state.layout.align_queries(state.total, torch.nan)


@dataclass(frozen=True)
class FutureInfluence:
    """Mean weight of a key over the rows `low` to `high` after it, summed over the chosen heads."""

    heads: Mapping[str, Sequence[int]]
    """Heads by site."""
    horizon: tuple[int, int]
    name: str = "fai"
    columns: tuple[str, ...] = ()
    reads = ("band_sums",)

    def start(self, layout: Layout) -> _Curve:
        """Room for one number a key."""
        return _Curve.zero(layout, self.heads, layout.keys)

    def update(self, state: _Curve, block: Block) -> None:
        """Add the diagonal band."""
        own = state.within(block)
        if own:
            state.total[:, 0] += block.band_sums(*self.horizon)[:, own].sum(1)

    def finish(self, state: _Curve) -> Float[Tensor, "batch 1 key"]:
        """The curve from the first real key on; NaN where no row is in the horizon."""
        rows = rows_after(state.layout, *self.horizon)
        return state.layout.align_keys(state.total / rows[:, None], torch.nan)


def rows_after(layout: Layout, low: int, high: int) -> Int[Tensor, "#batch key"]:
    """How many real rows lie `low` to `high` positions after each key."""
    real = layout.query_tokens.real
    if real is None:
        real = torch.ones(1, layout.queries, dtype=torch.bool, device=layout.device)
    before = torch.nn.functional.pad(real.long().cumsum(-1), (1, 0))
    keys = torch.arange(layout.keys, device=layout.device) - layout.offset
    ends = [(keys + reach).clamp(0, layout.queries) for reach in (low, high + 1)]
    return before[:, ends[1]] - before[:, ends[0]]


def _check(share: float, window: int, horizon: tuple[int, int]) -> None:
    if not 0 < share <= 0.5:
        raise InputError(f"share={share} is out of range: over 0, and .5 at most.")
    if not (isinstance(window, int) and window >= 1):
        raise InputError(f"window={window!r} is out of range: 1 token or more.")
    match horizon:
        case (int() as low, int() as high) if 0 <= low <= high:
            return
        case _:
            raise InputError(
                f"horizon={horizon!r} is out of range: (nearest row, farthest row), 0 or more, the "
                "farthest last."
            )


def _of_one_stack(sites: Sequence[Site]) -> tuple[Head, ...]:
    """Heads of the stack whose tokens the curves run over: the causal one where there are several.

    Cross-attention is left out.
    """
    own = [site for site in sites if site.kind != "cross"]
    stacks = list(dict.fromkeys(site.stack for site in own))
    if len(stacks) > 1:
        stacks = list(dict.fromkeys(site.stack for site in own if site.causal)) or stacks
    if not stacks:
        raise InputError(
            "These layers are cross-attention alone; a curve runs over the tokens of a stack that "
            "attends to itself. Name its layers."
        )
    if len(stacks) > 1:
        raise InputError(
            "These layers are of several stacks, and a curve runs over the tokens of one. Name its "
            f"layers: {ways_to_name(stacks)}."
        )
    return tuple(
        site.head(head) for site in own if site.stack == stacks[0] for head in range(site.heads)
    )


def _by_site(heads: Sequence[Head]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for head in heads:
        found.setdefault(head.site, []).append(head.head)
    return found


def _mean_over_heads(
    measured: Statistics, name: str, heads: Sequence[Head]
) -> Float[Tensor, "prompt position"]:
    sites = _by_site(heads)
    return sum((measured[name][site][:, 0].cpu() for site in sites), torch.tensor(0.0)) / len(heads)


def _tokens(lens: Lens, batch: Batch, anatomy: Anatomy, head: Head) -> tuple[tuple[str, ...], ...]:
    """Token texts of the stack that a head is of, padding left out."""
    own = batch.sides.queries(anatomy[head.site])
    if own.ids is None:
        return ()
    real = torch.ones_like(own.ids).bool() if own.real is None else own.real
    return tuple(lens.token_texts(i[r].tolist()) for i, r in zip(own.ids, real, strict=True))


def _notes(
    anatomy: Anatomy,
    heads: Sequence[Head],
    distance: Float[Tensor, " head"],
    prompts: int,
    horizon: tuple[int, int],
) -> tuple[str, ...]:
    sites = [anatomy[head.site] for head in heads]
    notes = [
        "Two passes over the texts: heads chosen by mean distance over all texts, then averaged.",
        f"The last {horizon[0]} tokens of a text have no FAI (NaN): no row lies in their horizon.",
    ]
    if not all(site.causal for site in sites):
        notes.append("Heads that see both sides: distances are |t - s|, FAI counts later rows.")
    if any(site.sinks for site in sites):
        notes.append("Learned sinks take a share of each row, which counts as no distance.")
    unknown = int(distance.isnan().sum())
    if unknown:
        notes.append(f"{unknown} of {len(heads)} heads have no distance (NaN), so are no kind.")
    if prompts < 2:
        notes.append("One text gives no interval over texts; give several.")
    return tuple(notes)
