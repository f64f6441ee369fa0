"""What is kept of sinks while texts stream by: sums by head and position, the largest sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import nsmallest
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analyses.commonest import Commonest
from attnlens.analyses.per_head import heads_of, side_by_side
from attnlens.analyses.reading import Window
from attnlens.analyses.running import RunningMean, RunningSum
from attnlens.analyses.streaming import heads_named
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.reducers import ColumnMass, FirstTokenMass, Mean, Reducer, RowMean
from attnlens.hooks.tokens import Layout
from attnlens.lens import Lens, Statistics

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
        most: calibration sinks to list; all are counted.
        resamples, confidence, seed: of the bootstrap over prompts.

    Raises:
        InputError: an unknown rule, epsilon outside 0 to 1, or none to list.

    """

    epsilon: float = 0.3
    rule: Rule = "paper"
    layers: HeadSpec | None = None
    most: int = 200
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("paper", "code"):
            raise InputError(f"There is no rule {self.rule!r}; choose 'paper' or 'code'.")
        if not 0 < self.epsilon < 1:
            raise InputError(f"epsilon={self.epsilon} is out of range: between 0 and 1.")
        if self.most < 1:
            raise InputError(f"most={self.most}: list one calibration sink or more.")


@dataclass(frozen=True)
class SinkToken:
    """A calibration sink: a key of one prompt that a head gives more than the rule's share."""

    prompt: int
    position: int
    token: str
    head: Head
    share: float


class SinkTally:
    """Sums of every head and position, and the largest calibration sinks."""

    name = "sinks"

    def __init__(self, lens: Lens, settings: SinkSettings) -> None:
        bootstrap = (settings.resamples, settings.confidence, settings.seed)
        self.first, self.first_all = RunningMean(*bootstrap), RunningMean(*bootstrap)
        self.rate = RunningMean(*bootstrap)
        self.alpha, self.share, self.sunk = RunningSum(), RunningSum(), RunningSum()
        self.row_mass, self._reach = RunningSum(), RunningSum()
        self.commonest = Commonest()
        self.heads: tuple[Head, ...] = ()
        self.anatomy = lens.anatomy
        self.over = 0
        """How many calibration sinks there are."""
        self._largest: list[tuple[float, int, int, int, str]] = []
        """Of these the largest: minus the share, prompt, number of the head, position, token."""
        self._lens, self._settings = lens, settings

    @property
    def settings(self) -> Mapping[str, Any]:
        """What has to be the same to go on."""
        return {k: v for k, v in asdict(self._settings).items() if k != "layers"}

    def begin(self, window: Window) -> Sequence[Reducer]:
        """Count the tokens of a window; what is measured is always the same."""
        for ids in window.ids:
            self.commonest.add(ids)
        return FirstTokenMass(), ColumnMass(), ColumnShare(), RowMass()

    def add(self, measured: Statistics, prompts: Int[Tensor, " prompt"]) -> None:
        """Add one batch."""
        self.heads, self.anatomy = heads_of(measured), measured.anatomy
        first = side_by_side(measured, "first_token")
        self.first.add(first, prompts)
        self.first_all.add(first.nanmean(1), prompts)
        alpha = side_by_side(measured, "columns")
        known = ~alpha.isnan()
        sunk = (alpha > self._settings.epsilon).double().masked_fill(~known, torch.nan)
        self.alpha.add(alpha)
        self.sunk.add(sunk)
        self.rate.add(sunk.nanmean(1), prompts)
        self._reach.add(torch.where(known.any(1), 1.0, torch.nan))
        self.row_mass.add(side_by_side(measured, "row_mass"))
        share = side_by_side(measured, "share")
        self.share.add(share)
        self._keep_largest(share, measured, prompts)

    def _keep_largest(
        self, share: Float[Tensor, "prompt head key"], measured: Statistics, prompts: Tensor
    ) -> None:
        keys, most = (~share.isnan()).sum(-1, keepdim=True), self._settings.most
        # In the precision of the shares: one that equals the threshold is not over it.
        over = share > calibration_threshold(self._settings.rule, keys).float()
        values = share[over]
        self.over += len(values)
        if len(values) > most:  # no more than can be among the largest are looked at one by one
            over &= share >= values.topk(most).values[-1]
        found = [
            (-float(share[p, h, k]), int(prompts[p]), h, k, _token(measured, self.heads[h], p, k))
            for p, h, k in over.nonzero().tolist()
        ]
        self._largest = nsmallest(most, [*self._largest, *found])

    @property
    def reach(self) -> tuple[int, ...]:
        """How many prompts reach each position."""
        count = self._reach.count
        return () if count is None else tuple(map(int, count.tolist()))

    @property
    def calibration(self) -> tuple[SinkToken, ...]:
        """The largest calibration sinks."""
        return tuple(
            SinkToken(prompt, place, token, self.heads[head], -minus)
            for minus, prompt, head, place, token in self._largest
        )

    @property
    def _parts(self) -> dict[str, RunningMean | RunningSum | Commonest]:
        return {
            "first": self.first,
            "first_all": self.first_all,
            "rate": self.rate,
            "alpha": self.alpha,
            "share": self.share,
            "sunk": self.sunk,
            "row_mass": self.row_mass,
            "reach": self._reach,
            "commonest": self.commonest,
        }

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is kept."""
        tensors = {
            f"{name}.{key}": tensor
            for name, part in self._parts.items()
            for key, tensor in part.tensors().items()
        }
        heads = [str(head) for head in self.heads]
        return tensors, {"heads": heads, "over": self.over, "largest": self._largest}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        for name, part in self._parts.items():
            start = f"{name}."
            own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            part.restore(own)
        self.heads = heads_named(self._lens, values["heads"])
        self.over = values["over"]
        self._largest = [tuple(entry) for entry in values["largest"]]


def calibration_threshold(rule: Rule, keys: Tensor) -> Tensor:
    """Share over which a key is a calibration sink: `5 / S` (paper) or .1 (its code)."""
    return 5 / keys.double() if rule == "paper" else torch.full_like(keys, 0.1, dtype=torch.float64)


def keys_are_text(head: Head) -> bool:
    """Whether a head's keys are tokens of the text (or the whole input, where there is but one)."""
    return head.stack in ("", "enc", "cross")


def _token(measured: Statistics, head: Head, prompt: int, position: int) -> str:
    """Token text of a key; "" where the keys are no tokens of the text (a decoder, an image)."""
    own = measured.tokens[prompt] if keys_are_text(head) and measured.tokens else ()
    return own[position] if position < len(own) else ""


@dataclass(frozen=True)
class ColumnShare(ColumnMass):
    """Mean weight that each key gets from all real rows, those that cannot see it counted as 0."""

    name: str = "share"
    reads: ClassVar[tuple[str, ...]] = ("column_sums",)

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
    reads: ClassVar[tuple[str, ...]] = ("row_sums",)

    def update(self, state: Mean, block: Block) -> None:
        """Add the sum of each row."""
        state.add(block, block.row_sums)
