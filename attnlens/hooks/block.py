"""A block of attention rows, and the quantities that statistics read from it.

A block holds some rows of some heads of one site. Reducers ask it for quantities (entropy, the
weight of one key a row, column sums) rather than for its weights, so that each is computed once for
all who ask, by the cheapest way there is: `TorchBlock` from the weights, while they are in the
cache; `hooks.fused.FusedRows` by kernels that hold no weights at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.hooks.rows import Rows
from attnlens.hooks.tokens import Layout

PAIRS = 1 << 18
"""Pairs of `mass_at` gathered at a time."""


class Block(Protocol):
    """Some rows of some heads of a site, as a reducer sees them.

    `pattern`, `scores` and `visible` are there for reducers that do not say what they read.
    """

    @property
    def layout(self) -> Layout:
        """What is known of the site."""
        ...

    @property
    def heads(self) -> slice:
        """Which of the site's heads; blocks of the same rows follow one another, head 0 first."""
        ...

    @property
    def rows(self) -> slice:
        """Which of the site's rows."""
        ...

    @property
    def keys(self) -> slice:
        """The keys outside which none of the rows sees anything."""
        ...

    @property
    def real(self) -> Bool[Tensor, "batch row"] | None:
        """Which rows are real and not padding; None where all are."""
        ...

    @property
    def positions(self) -> Int[Tensor, " row"]:
        """Key position of each row's own token."""
        ...

    @property
    def partners(self) -> Int[Tensor, "#batch row"]:
        """Key at the same distance from the first real key as each row from the first real row."""
        ...

    @property
    def sinks(self) -> Float[Tensor, " head"] | None:
        """Learned sink logits of these heads."""
        ...

    @property
    def pattern(self) -> Float[Tensor, "batch head row key"]:
        """The weights, float32 at least."""
        ...

    @property
    def scores(self) -> Float[Tensor, "batch head row key"]:
        """The scores; hidden keys have a large negative finite one."""
        ...

    @property
    def visible(self) -> Bool[Tensor, "#batch #head row key"] | None:
        """Which keys each row sees; None where it sees all."""
        ...

    @property
    def entropy(self) -> Float[Tensor, "batch head row"]:
        """`-sum_s A[t, s] ln A[t, s]` in nats."""
        ...

    @property
    def distance(self) -> Float[Tensor, "batch head row"]:
        """`sum_s A[t, s] |t - s|` in tokens."""
        ...

    @property
    def row_sums(self) -> Float[Tensor, "batch head row"]:
        """Sum of each row: 1, or less where learned sinks take a share."""
        ...

    @property
    def peak(self) -> Float[Tensor, "batch head row"]:
        """Largest weight of each row."""
        ...

    @property
    def largest(self) -> Int[Tensor, "batch head row"]:
        """The key with the largest weight of each row, the first of several."""
        ...

    def at(self, keys: Int[Tensor, "#batch row"]) -> Float[Tensor, "batch head row"]:
        """Weight of one key a row; 0 where there is no such key or the row does not see it."""
        ...

    def mass_on(self, values: Float[Tensor, "#batch key"]) -> Float[Tensor, "batch head row"]:
        """`sum_s A[t, s] values[s]`, over all keys of the site; 1 and 0 make the mass on a set."""
        ...

    def mass_at(
        self, prompt: Int[Tensor, " pair"], row: Int[Tensor, " pair"], key: Int[Tensor, " pair"]
    ) -> Float[Tensor, "batch head row"]:
        """Weight of each row on its own few keys; rows count from the block's first."""
        ...

    def column_sums(self) -> Float[Tensor, "batch head key"]:
        """`sum_t A[t, s]` over the real rows, for the keys of the block."""
        ...

    def rows_seeing(self) -> Float[Tensor, "#batch key"]:
        """How many real rows see each key of the block (by the first of its heads)."""
        ...

    def band_sums(self, low: int, high: int) -> Float[Tensor, "batch head key"]:
        """`sum_t A[t, s]` over real rows with `low <= t - s <= high`, for all keys of the site."""
        ...


@dataclass(frozen=True)
class TorchBlock:
    """A block computed by torch; the weights stand on the keys that a row of it sees.

    Passes over the weights are what measuring costs, and a product with a vector is the cheapest
    pass: masses and distances are products.
    """

    layout: Layout
    source: Rows
    """The rule of these heads alone."""
    heads: slice
    """Which of the site's heads."""
    rows: slice
    """Which of the site's rows."""
    keys: slice
    """The keys outside which none of the rows sees anything."""
    scores: Float[Tensor, "batch head row key"]
    pattern: Float[Tensor, "batch head row key"]
    """Float32 at least."""
    softmax_of_scores: bool
    """Whether the pattern is the plain softmax of `scores`, in full precision."""
    _found: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def real(self) -> Bool[Tensor, "batch row"] | None:
        """Which rows are real and not padding; None where all are."""
        return self.layout.real_rows(self.rows)

    @property
    def positions(self) -> Int[Tensor, " row"]:
        """Key position of each row's own token."""
        return self.layout.positions(self.rows)

    @property
    def partners(self) -> Int[Tensor, "#batch row"]:
        """Key at the same distance from the first real key as each row from the first real row."""
        return self.layout.partners(self.rows)

    @property
    def sinks(self) -> Float[Tensor, " head"] | None:
        """Learned sink logits of these heads."""
        return self.source.sinks

    @property
    def visible(self) -> Bool[Tensor, "#batch #head row key"] | None:
        """Which keys each row sees; None where it sees all."""
        return self.source.visible(self.rows, self.keys)

    @property
    def largest(self) -> Int[Tensor, "batch head row"]:
        """The key with the largest weight of each row, the first of several."""
        return self._once("largest", self._largest)

    @property
    def peak(self) -> Float[Tensor, "batch head row"]:
        """Largest weight of each row."""
        return self._at_largest(self.pattern)

    @property
    def row_sums(self) -> Float[Tensor, "batch head row"]:
        """Sum of each row: 1, or less where learned sinks take a share."""
        return self._once("row_sums", lambda: self.pattern.sum(-1))

    @property
    def entropy(self) -> Float[Tensor, "batch head row"]:
        """`-sum_s A[t, s] ln A[t, s]` in nats.

        From the scores, without a logarithm a weight: `ln A = score - lse`, and the lse of a row is
        known from any of its weights, most exactly from the largest.
        """
        return self._once("entropy", self._entropy)

    @property
    def distance(self) -> Float[Tensor, "batch head row"]:
        """`sum_s A[t, s] |t - s|` in tokens."""
        return self._once("distance", self._distance)

    def at(self, keys: Int[Tensor, "#batch row"]) -> Float[Tensor, "batch head row"]:
        """Weight of one key a row; 0 where the key is outside the block."""
        index = keys - self.keys.start
        inside = (index >= 0) & (index < self.pattern.shape[-1])
        index = index.clamp(0, self.pattern.shape[-1] - 1)
        wide = index[:, None, :, None].expand(*self.pattern.shape[:3], 1)
        return self.pattern.gather(-1, wide)[..., 0] * inside[:, None]

    def mass_on(self, values: Float[Tensor, "#batch key"]) -> Float[Tensor, "batch head row"]:
        """`sum_s A[t, s] values[s]`, over all keys of the site; 1 and 0 make the mass on a set."""
        column = values[:, None, self.keys, None].to(self.pattern.dtype)
        return (self.pattern @ column)[..., 0]

    def mass_at(
        self, prompt: Int[Tensor, " pair"], row: Int[Tensor, " pair"], key: Int[Tensor, " pair"]
    ) -> Float[Tensor, "batch head row"]:
        """Weight of each row on its own few keys; rows count from the block's first."""
        batch, heads, rows, width = self.pattern.shape
        key = key - self.keys.start
        inside = (key >= 0) & (key < width)
        if not bool(inside.all()):
            prompt, row, key = prompt[inside], row[inside], key[inside]
        mass = self.pattern.new_zeros(batch, rows, heads)
        for part in zip(prompt.split(PAIRS), row.split(PAIRS), key.split(PAIRS), strict=True):
            b, t, s = part
            mass.index_put_((b, t), self.pattern[b, :, t, s], accumulate=True)
        return mass.transpose(1, 2)

    def column_sums(self) -> Float[Tensor, "batch head key"]:
        """`sum_t A[t, s]` over the real rows, for the keys of the block."""
        real = self.real
        if real is None:
            weights = self.pattern.new_ones(1, self.pattern.shape[2])
        else:
            weights = real.to(self.pattern.dtype)
        return (weights[:, None, None, :] @ self.pattern)[..., 0, :]

    def rows_seeing(self) -> Float[Tensor, "#batch key"]:
        """How many real rows see each key of the block (counted at the first of the heads)."""
        real, visible = self.real, None
        ones = torch.ones(1, self.rows.stop - self.rows.start, device=self.layout.device)
        weights = ones if real is None else real.to(ones.dtype)
        if not self.source.causal:
            visible = self.visible
        if visible is not None:
            return (weights[:, None] @ visible[:, 0].to(ones.dtype))[:, 0]
        if not self.source.causal:
            return weights.sum(-1, keepdim=True).expand(-1, self.keys.stop - self.keys.start)
        # Key s is seen by the rows from s on.
        later = weights.flip(-1).cumsum(-1).flip(-1)
        keys = torch.arange(self.keys.start, self.keys.stop, device=self.layout.device)
        return later[:, (keys - self.rows.start).clamp_min(0)]

    def band_sums(self, low: int, high: int) -> Float[Tensor, "batch head key"]:
        """`sum_t A[t, s]` over the real rows with `low <= t - s <= high`, for all keys of the site.

        Only the diagonal band of the block is touched.
        """
        batch, heads, _, width = self.pattern.shape
        sums = self.pattern.new_zeros(batch, heads, self.layout.keys)
        positions = self.positions
        first = max(int(positions[0]) - high - self.keys.start, 0)
        last = min(int(positions[-1]) - low - self.keys.start + 1, width)
        if first >= last:
            return sums
        keys = torch.arange(first, last, device=sums.device) + self.keys.start
        back = positions[:, None] - keys
        inside = ((back >= low) & (back <= high)).to(self.pattern.dtype)[None]
        if self.real is not None:
            inside = inside * self.real[..., None].to(inside.dtype)
        found = (self.pattern[..., first:last] * inside[:, None]).sum(2)
        sums[..., first + self.keys.start : last + self.keys.start] = found
        return sums

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A quantity, computed for the first who asks."""
        if name not in self._found:
            self._found[name] = compute()
        return self._found[name]

    def _largest(self) -> Int[Tensor, "batch head row"]:
        if self.pattern.device.type == "cpu":  # numpy's search is several times faster than torch's
            found = torch.from_numpy(self.pattern.numpy().argmax(-1))
        else:
            found = self.pattern.argmax(-1)
        return found + self.keys.start

    def _entropy(self) -> Float[Tensor, "batch head row"]:
        if not self.softmax_of_scores:
            return torch.special.entr(self.pattern).sum(-1)
        lse = self._at_largest(self.scores) - self.peak.clamp_min(1e-30).log()
        mean_score = torch.linalg.vecdot(self.pattern, self.scores)
        return (lse * self.row_sums - mean_score).clamp_min(0)

    def _distance(self) -> Float[Tensor, "batch head row"]:
        keys = torch.arange(self.keys.start, self.keys.stop, device=self.pattern.device)
        if not self.layout.site.causal:
            far = (self.partners[:, None, :, None] - keys).abs().to(self.pattern.dtype)
            return torch.linalg.vecdot(self.pattern, far)
        # Taken from the block's first row on: all terms but a few have one sign, none cancels.
        start = int(self.positions[0])
        back = self.pattern @ (start - keys).to(self.pattern.dtype)
        return back + self.row_sums * (self.positions - start).to(self.pattern.dtype)

    def _at_largest(
        self, values: Float[Tensor, "batch head row key"]
    ) -> Float[Tensor, "batch head row"]:
        return values.gather(-1, (self.largest - self.keys.start)[..., None])[..., 0]
