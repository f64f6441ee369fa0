"""Rotary embedding: which pairs of channels of q and k turn with the position, and how fast.

`(q_a, q_b)` at position t is `R(t f) (q_a, q_b)` for a frequency f of the model's own table. Models
put the partners of a pair half the rotary width apart or next to each other, turn all channels or
some, and may have a table for each kind of layer; so the rule of a site is recognised by numbers:
what shifting all positions does to q and k.

Su et al. 2021, RoFormer: enhanced transformer with rotary position embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

RotaryLayout = Literal["half", "interleaved", "none", "unknown"]

TOLERANCE = 0.1
"""Largest mean error of a rule, relative to the channels: room for bfloat16, far below a turn."""


@dataclass(frozen=True)
class Table:
    """A table of rotary frequencies that a model holds."""

    name: str
    """Qualified name of the buffer."""
    frequencies: Float[Tensor, " pair"]


@dataclass(frozen=True)
class Rotary:
    """How the channels of q and k at one site turn with the position.

    Attributes:
        layout: partners are `half` the rotary width apart or next to each other (`interleaved`);
            `none` turns; `unknown` where no table of the model explains what was seen.
        frequencies: radians a token; 0 for a channel that does not turn, NaN where unknown.
        partner: the channel that each turns with, itself where it does not turn.
        table: name of the buffer with the frequencies.
        error: mean error of the rule relative to the size of the channels.

    """

    layout: RotaryLayout
    frequencies: Float[Tensor, " channel"]
    partner: Int[Tensor, " channel"]
    table: str | None = None
    error: float = 0.0

    @property
    def wavelengths(self) -> Float[Tensor, " channel"]:
        """Tokens a full turn takes, `2 pi / f`; infinite for a channel that does not turn."""
        return 2 * math.pi / self.frequencies

    def turn(self, x: Float[Tensor, "n channel"], shift: float) -> Float[Tensor, "n channel"]:
        """Channels `shift` tokens later: each pair turned by its angle."""
        angle = self.frequencies.to(x) * shift
        # The first of a pair loses what its partner gains.
        sign = torch.where(self.partner > torch.arange(len(self.partner)), -1.0, 1.0).to(x)
        return x * angle.cos() + sign * x[:, self.partner] * angle.sin()


def still(width: int, layout: RotaryLayout = "none") -> Rotary:
    """The rule of channels that do not turn; or of those nothing is known about."""
    fill = math.nan if layout == "unknown" else 0.0
    return Rotary(
        layout, torch.full((width,), fill, dtype=torch.float64), torch.arange(width), error=fill
    )


def tables(model: nn.Module) -> tuple[Table, ...]:
    """Tables of rotary frequencies (`inv_freq`) that a model holds, those that differ."""
    found: list[Table] = []
    for name, buffer in model.named_buffers():
        if "inv_freq" not in name or buffer.ndim != 1:
            continue
        values = buffer.detach().double().cpu()
        known = (table.frequencies for table in found)
        if not any(torch.equal(values, other) for other in known):
            found.append(Table(name, values))
    return tuple(found)


def rules(width: int, found: Sequence[Table]) -> Iterator[Rotary]:
    """Every way in which a head of `width` channels may use one of the tables.

    The turning channels come first or last in the head.
    """
    for table in found:
        pairs = len(table.frequencies)
        if 2 * pairs > width:
            continue
        for start in sorted({0, width - 2 * pairs}):
            order = torch.arange(start, start + 2 * pairs)
            yield _rule("half", width, table, order[:pairs], order[pairs:])
            if pairs > 1:
                yield _rule("interleaved", width, table, order[::2], order[1::2])


def recognise(
    before: Float[Tensor, "n channel"],
    shifted: Mapping[int, Float[Tensor, "n channel"]],
    found: Sequence[Table],
) -> Rotary:
    """The rule that turns `before` into what q or k is with all positions shifted.

    A rule counts when its error is small, and at most half that of any other.
    """
    width = before.shape[-1]
    tried = [still(width), *rules(width, found)]
    errors = [_error(rule, before, shifted) for rule in tried]
    order = sorted(range(len(tried)), key=errors.__getitem__)
    best = errors[order[0]]
    if not best <= TOLERANCE or (len(order) > 1 and best > errors[order[1]] / 2):
        return still(width, "unknown")
    rule = tried[order[0]]
    return Rotary(rule.layout, rule.frequencies, rule.partner, rule.table, best)


def _rule(layout: RotaryLayout, width: int, table: Table, first: Tensor, second: Tensor) -> Rotary:
    plain = still(width)
    frequencies, partner = plain.frequencies.clone(), plain.partner.clone()
    frequencies[first] = frequencies[second] = table.frequencies
    partner[first], partner[second] = second, first
    return Rotary(layout, frequencies, partner, table.name)


def _error(
    rule: Rotary,
    before: Float[Tensor, "n channel"],
    shifted: Mapping[int, Float[Tensor, "n channel"]],
) -> float:
    """Mean over channels of the error relative to the pair, so that no large channel decides."""
    size = before.square().mean(0)
    size = (size + size[rule.partner]).sqrt().clamp_min(1e-30)
    errors = [
        ((after - rule.turn(before, shift)).square().mean(0).sqrt() / size).mean()
        for shift, after in shifted.items()
    ]
    return float(torch.stack(errors).mean())
