"""Attention sinks: keys that draw attention whatever they say, at any position.

Gu et al. 2024, When attention sink emerges in language models; Yu et al. 2024, Unveiling and
harnessing hidden attention sinks (ACT).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.per_head import head_frame, heads_of, side_by_side
from attnlens.analyses.uncertainty import Interval, bootstrap_mean
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.reducers import ColumnMass, FirstTokenMass, Mean, RowMean
from attnlens.hooks.tokens import Layout
from attnlens.lens import Inputs, Lens, Statistics

Rule = Literal["paper", "code"]


@dataclass(frozen=True)
class SinkSettings:
    """What changes the answer.

    Attributes:
        epsilon: column mean over which a key counts as a sink; .3 in Gu et al., at 64 tokens.
            Longer texts lower column means, so rates of different lengths do not compare.
        rule: which keys are calibration sinks: a share of the attention over 5 / S ("paper", S
            keys) or over .1 ("code", the paper's published code).
        layers: the layers to measure; all where None.
        resamples, confidence, seed: of the bootstrap over prompts.

    Raises:
        InputError: an unknown rule, or epsilon outside 0 to 1.

    """

    epsilon: float = 0.3
    rule: Rule = "paper"
    layers: HeadSpec | None = None
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("paper", "code"):
            raise InputError(f"There is no rule {self.rule!r}; choose 'paper' or 'code'.")
        if not 0 < self.epsilon < 1:
            raise InputError(f"epsilon={self.epsilon} is out of range: between 0 and 1.")


@dataclass(frozen=True)
class SinkToken:
    """A calibration sink: a key of one prompt that a head gives more than the rule's share."""

    prompt: int
    position: int
    token: str
    head: Head
    share: float


@dataclass(frozen=True)
class Sinks:
    """Sinks of every head; positions count from each prompt's first token.

    Attributes:
        heads: the heads, in the order of every `head` axis.
        tokens: token texts of each prompt.
        first_token: mean weight on the first token, `F = mean_t A[t, 0]`, a head.
        first_token_all: the same over all heads.
        column_mass: `alpha_k`, the mean weight that key k gets from the rows that see it.
        share: the mean weight that key k gets from all rows; it sums to the row mass.
        sink_rate: share of the prompts in which `alpha_k > epsilon`.
        rate: the sink rate at each position over all heads.
        learned: what learned sinks take of each row, 1 - row sum; 0 where there are none.
        prompts: number of prompts that reach each position.
        calibration: calibration sinks, the largest share first.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    tokens: tuple[tuple[str, ...], ...]
    first_token: Interval
    first_token_all: Interval
    column_mass: Float[Tensor, "head key"]
    share: Float[Tensor, "head key"]
    sink_rate: Float[Tensor, "head key"]
    rate: Interval
    learned: Float[Tensor, " head"]
    prompts: tuple[int, ...]
    calibration: tuple[SinkToken, ...]
    settings: SinkSettings
    notes: tuple[str, ...]

    @property
    def strongest(self) -> Sequence[int]:
        """The position that gets most of each head's attention, counted over all rows.

        Not by column mean: the last key is seen by one row, so a head that looks at its own token
        would have its sink there.
        """
        return self.share.nan_to_num(-1.0).argmax(-1).tolist()

    def token_at(self, position: int) -> str:
        """The commonest token at a position, over the prompts; "" where tokens are unknown."""
        found = Counter(own[position] for own in self.tokens if position < len(own))
        return found.most_common(1)[0][0] if found else ""

    def to_frame(self) -> pd.DataFrame:
        """One row a head: first-token mass and sink rate, strongest sink, learned."""
        places = self.strongest
        rows = range(len(self.heads))
        return head_frame(
            self.heads,
            {
                "first_token": self.first_token.mean,
                "first_token_low": self.first_token.low,
                "first_token_high": self.first_token.high,
                "sink_rate": self.sink_rate[:, 0],
                "strongest": places,
                "strongest_token": [self.token_at(place) for place in places],
                "strongest_mass": [float(self.share[h, places[h]]) for h in rows],
                "strongest_rate": [float(self.sink_rate[h, places[h]]) for h in rows],
                "learned": self.learned,
            },
        )

    def by_layer(self) -> pd.DataFrame:
        """One row a site: means over its heads, and the position that gets most attention there."""
        rows: list[dict[str, object]] = []
        for site in dict.fromkeys(head.site for head in self.heads):
            own = [i for i, head in enumerate(self.heads) if head.site == site]
            share = self.share[own].mean(0)
            place = int(share.nan_to_num(-1.0).argmax())
            rows.append(
                {
                    "site": site,
                    "first_token": float(self.first_token.mean[own].mean()),
                    "sink_rate": float(self.sink_rate[own, 0].mean()),
                    "strongest": place,
                    "strongest_token": self.token_at(place),
                    "strongest_mass": float(self.share[own, place].mean()),
                    "strongest_rate": float(self.sink_rate[own, place].mean()),
                    "learned": float(self.learned[own].mean()),
                }
            )
        return pd.DataFrame(rows)

    def by_position(self) -> pd.DataFrame:
        """One row a position: its commonest token, column mass, share and rate over all heads."""
        positions = range(self.share.shape[1])
        return pd.DataFrame(
            {
                "position": positions,
                "token": [self.token_at(position) for position in positions],
                "prompts": self.prompts,
                "column_mass": self.column_mass.nanmean(0).tolist(),
                "share": self.share.nanmean(0).tolist(),
                "sink_rate": self.rate.mean.tolist(),
                "sink_rate_low": self.rate.low.tolist(),
                "sink_rate_high": self.rate.high.tolist(),
            }
        )


def sinks(
    lens: Lens, texts: Inputs, settings: SinkSettings | None = None, batch_size: int = 8
) -> Sinks:
    """Where every head's attention gathers, streamed over the texts.

    `alpha_k = 1 / (T - k + 1) * sum_{i >= k} A[i, k]` when causal, and the sink rate is the mean
    over prompts, layers and heads of `[alpha_k > epsilon]` (Gu et al. 2024). No position is taken
    to be the sink beforehand.
    """
    settings = settings or SinkSettings()
    reducers = (FirstTokenMass(), ColumnMass(), ColumnShare(), RowMass())
    measured = lens.measure(texts, reducers, settings.layers, batch_size)
    heads = heads_of(measured)
    alpha, share = side_by_side(measured, "columns"), side_by_side(measured, "share")
    first = side_by_side(measured, "first_token")
    known = ~alpha.isnan()
    sunk = (alpha > settings.epsilon).double().masked_fill(~known, torch.nan)
    bootstrap = (settings.resamples, settings.confidence, settings.seed)
    learned = (1 - side_by_side(measured, "row_mass").nanmean(0)).clamp_min(0)
    has_learned = torch.tensor([measured.anatomy[head.site].sinks for head in heads])
    return Sinks(
        heads=heads,
        tokens=measured.tokens,
        first_token=bootstrap_mean(first, *bootstrap),
        first_token_all=bootstrap_mean(first.nanmean(1), *bootstrap),
        column_mass=alpha.nanmean(0),
        share=share.nanmean(0),
        sink_rate=sunk.nanmean(0),
        rate=bootstrap_mean(sunk.nanmean(1), *bootstrap),
        learned=learned * has_learned,
        prompts=tuple(known.any(1).sum(0).tolist()),
        calibration=_calibration(share, heads, measured, settings.rule),
        settings=settings,
        notes=_notes(measured, settings),
    )


def calibration_threshold(rule: Rule, keys: Tensor) -> Tensor:
    """Share over which a key is a calibration sink: `5 / S` (paper) or .1 (its code)."""
    return 5 / keys.double() if rule == "paper" else torch.full_like(keys, 0.1, dtype=torch.float64)


def _calibration(
    share: Float[Tensor, "prompt head key"],
    heads: Sequence[Head],
    measured: Statistics,
    rule: Rule,
) -> tuple[SinkToken, ...]:
    keys = (~share.isnan()).sum(-1, keepdim=True)
    found = (share > calibration_threshold(rule, keys)).nonzero()
    over = [(p, h, k, float(share[p, h, k])) for p, h, k in found.tolist()]
    return tuple(
        SinkToken(p, k, _token(measured, heads[h], p, k), heads[h], value)
        for p, h, k, value in sorted(over, key=lambda entry: -entry[3])
    )


def _token(measured: Statistics, head: Head, prompt: int, position: int) -> str:
    """Token text of a key; "" where the keys are no tokens of the text (a decoder, an image)."""
    text_keys = head.stack in ("", "enc", "cross") and bool(measured.tokens)
    own = measured.tokens[prompt] if text_keys else ()
    return own[position] if position < len(own) else ""


def _notes(measured: Statistics, settings: SinkSettings) -> tuple[str, ...]:
    notes: list[str] = []
    longest = max(measured.lengths, default=0)
    if settings.rule == "paper" and 0 < min(measured.lengths, default=0) <= 5:
        notes.append("A prompt of 5 tokens or fewer has no calibration sink by the rule 5 / S.")
    if longest > 64:
        notes.append(
            f"Prompts have up to {longest} tokens; Gu et al. take epsilon = 0.3 at 64 tokens, and "
            "longer texts lower column means and sink rates."
        )
    if any(site.sinks for site in measured.anatomy.sites):
        notes.append("Learned sinks take a share of each row (`learned`), which no key gets.")
    return tuple(notes)


@dataclass(frozen=True)
class ColumnShare(ColumnMass):
    """Mean weight that each key gets from all real rows, those that cannot see it counted as 0."""

    name: str = "share"

    def update(self, state: tuple[Layout, Tensor, Tensor], block: Block) -> None:
        """Add the columns of the real rows."""
        _, sums, counts = state
        sums[:, block.heads, block.keys] += block.column_sums()
        if block.heads.start == 0:
            real = block.real
            counts += (
                block.rows.stop - block.rows.start if real is None else real.sum(-1)[:, None, None]
            )


@dataclass(frozen=True)
class RowMass(RowMean):
    """Mean sum of a row: 1, or less where learned sinks take a share."""

    name: str = "row_mass"

    def update(self, state: Mean, block: Block) -> None:
        """Add the sum of each row."""
        state.add(block, block.row_sums)
