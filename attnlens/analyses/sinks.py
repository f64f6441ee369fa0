"""Attention sinks: keys that draw attention whatever they say, at any position.

Gu et al. 2024, When attention sink emerges in language models; Yu et al. 2024, Unveiling and
harnessing hidden attention sinks (ACT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.per_head import head_frame
from attnlens.analyses.reading import Progress, Reading, Texts
from attnlens.analyses.running import Method, method_note
from attnlens.analyses.sink_tally import SinkSettings, SinkTally, SinkToken, keys_are_text
from attnlens.analyses.streaming import Counted, fold
from attnlens.analyses.uncertainty import Interval
from attnlens.anatomy import Head
from attnlens.lens import Lens


@dataclass(frozen=True)
class Sinks:
    """Sinks of every head; positions count from each prompt's first token.

    Attributes:
        heads: the heads, in the order of every `head` axis.
        tokens: the commonest token at each position; empty where tokens are unknown.
        first_token: mean weight on the first token, `F = mean_t A[t, 0]`, a head.
        first_token_all: the same over all heads.
        column_mass: `alpha_k`, the mean weight that key k gets from the rows that see it.
        share: the mean weight that key k gets from all rows; it sums to the row mass.
        sink_rate: share of the prompts in which `alpha_k > epsilon`.
        rate: the sink rate at each position over all heads.
        learned: what learned sinks take of each row, 1 - row sum; 0 where there are none.
        prompts: number of prompts that reach each position.
        calibration: calibration sinks, the largest share first; at most `settings.most`.
        calibration_total: how many there are in all.
        method: how the intervals were made; "poisson bootstrap" where the texts are many.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    tokens: tuple[str, ...]
    first_token: Interval
    first_token_all: Interval
    column_mass: Float[Tensor, "head key"]
    share: Float[Tensor, "head key"]
    sink_rate: Float[Tensor, "head key"]
    rate: Interval
    learned: Float[Tensor, " head"]
    prompts: tuple[int, ...]
    calibration: tuple[SinkToken, ...]
    calibration_total: int
    method: Method
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
        return self.tokens[position] if position < len(self.tokens) else ""

    def _key_of(self, head: Head, position: int) -> str:
        return self.token_at(position) if keys_are_text(head) else ""

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
                "strongest_token": [
                    self._key_of(head, place)
                    for head, place in zip(self.heads, places, strict=True)
                ],
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
                    "strongest_token": self._key_of(self.heads[own[0]], place),
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
    lens: Lens,
    texts: Texts,
    settings: SinkSettings | None = None,
    batch_size: int = 8,
    *,
    max_tokens: int | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Sinks:
    """Where every head's attention gathers, streamed over the texts.

    `alpha_k = 1 / (T - k + 1) * sum_{i >= k} A[i, k]` when causal, and the sink rate is the mean
    over prompts, layers and heads of `[alpha_k > epsilon]` (Gu et al. 2024). No position is taken
    to be the sink beforehand.

    `texts` may be an iterator of any length, and `max_tokens`, `state` and `progress` are those of
    `profile`: memory grows with the longest text, not with their number.

    Raises:
        InputError: no text, an empty one, one over the context; a state of other texts, another
            model or other settings.
        FileError: a state that is damaged or cannot be written.

    """
    settings = settings or SinkSettings()
    tally = SinkTally(lens, settings)
    reading = Reading(batch_size, max_tokens, state, progress)
    counted = fold(lens, texts, tally, settings.layers, reading)
    learned = torch.tensor([tally.anatomy[head.site].sinks for head in tally.heads])
    return Sinks(
        heads=tally.heads,
        tokens=lens.token_texts(tally.commonest.ids()),
        first_token=tally.first.interval(),
        first_token_all=tally.first_all.interval(),
        column_mass=tally.alpha.mean(),
        share=tally.share.mean(),
        sink_rate=tally.sunk.mean(),
        rate=tally.rate.interval(),
        learned=(1 - tally.row_mass.mean()).clamp_min(0) * learned,
        prompts=tally.reach,
        calibration=tally.calibration,
        calibration_total=tally.over,
        method=tally.first.method,
        settings=settings,
        notes=(*_notes(tally, counted), *counted.notes(max_tokens), *method_note(tally.first)),
    )


def _notes(tally: SinkTally, counted: Counted) -> tuple[str, ...]:
    notes: list[str] = []
    longest = counted.longest
    if counted.prompts < 2:
        notes.append("One text gives no interval over texts; give several.")
    if tally.settings["rule"] == "paper" and 0 < counted.shortest <= 5:
        notes.append("A prompt of 5 tokens or fewer has no calibration sink by the rule 5 / S.")
    if longest > 64:
        notes.append(
            f"Prompts have up to {longest} tokens; Gu et al. take epsilon = 0.3 at 64 tokens, and "
            "longer texts lower column means and sink rates."
        )
    if any(site.sinks for site in tally.anatomy.sites):
        notes.append("Learned sinks take a share of each row (`learned`), which no key gets.")
    return tuple(notes)
