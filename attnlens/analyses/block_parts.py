"""The parts of the sums of one block of a run, and what each contributes, at some rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.analyses.contributions import Shares, proximity, weighted_proximity
from attnlens.anatomy.placed import weight_of
from attnlens.anatomy.weights import output_weight
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.sublayers import BlockRun, Frozen, Sum

ROW_BYTES = 32 << 20
"""Weights of all heads that are held at a time."""
_GAP = {torch.float16: 3e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class _Linear:
    """What the steps after a sum, or before it, make of each part: fixed maps and a row's rate."""

    maps: tuple[Frozen, ...]
    factor: float
    rows: int

    @property
    def rate(self) -> Float[Tensor, " row"] | float:
        """The factor of each row."""
        rate: Tensor | float = self.factor
        for one in self.maps:
            rate = rate * one.rate
        return rate

    def fixed(self, part: Tensor) -> Tensor:
        """A part through the fixed maps, without the rate."""
        for one in self.maps:
            part = one.fixed(part)
        return part

    def __call__(self, part: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """A part through the maps; their shifts are left to `shift`."""
        rate = self.rate
        scaled = rate[:, None] if isinstance(rate, Tensor) else rate
        return scaled * self.fixed(part)

    def shift(self, like: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the maps add whatever they are given."""
        made = torch.zeros_like(like)
        for one in self.maps:
            made = one.rate[:, None] * one.fixed(made) + one.shift
        return made * self.factor


class BlockParts:
    """One prompt's run of one block, taken apart at the rows that are asked for."""

    def __init__(self, model: nn.Module, run: BlockRun, prompt: int) -> None:
        self.run = run
        self.empty = 0
        """Sums so far without a part that brings them nearer to 0."""
        self._model = model
        self._prompt = prompt
        stream = run.entering[prompt]
        dtype = torch.float64 if stream.dtype == torch.float64 else torch.float32
        self._like = stream.new_empty(0, dtype=dtype)
        self._entering = stream.to(self._like)
        self._rows = run.rows.prompt(prompt)
        self._value = run.value[prompt].to(self._like)
        self._output = output_weight(model, run.site).detach().to(self._like)
        self._group = run.site.heads // self._value.shape[0]

    def blocks(self, rows: Int[Tensor, " row"]) -> Iterator[Int[Tensor, " row"]]:
        """Rows in blocks whose weights take about `ROW_BYTES`."""
        _, heads, _, keys = self._rows.shape
        size = max(ROW_BYTES // (heads * keys * self._like.element_size()), 1)
        yield from rows.split(size)

    def importances(self, rows: Int[Tensor, " row"]) -> list[Shares]:
        """Importances of the parts of each of the block's sums, in the order of the forward."""
        found: list[Shares] = []
        stream = self._entering[rows]
        for one in self.run.sums:
            stream, shares = self._sum(one, stream, rows)
            self.empty += int((shares.total == 0).sum())
            found.append(shares.importance())
        self._check(stream, rows)
        return found

    def _sum(
        self, one: Sum, stream: Float[Tensor, "row d_model"], rows: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Shares]:
        """A sum and the proximity of its parts; the sum is that of the parts themselves."""
        pattern = self._like.new_zeros(0, len(rows), 0)
        before = _Linear((), 1.0, len(rows))
        written = constant = mlp = torch.zeros_like(stream)
        if one.attention:
            pattern = self._rows.dense(rows.tolist())[0].to(self._like)
            projected = self._projected(pattern)
            before = self._linear(one.steps, projected + self._bias(), one.attention)
            written = before(projected)
            constant = before(self._bias().expand_as(stream)) + before.shift(stream)
        if one.mlp and self.run.mlp is not None:
            mlp = one.mlp * self.run.mlp[self._prompt, rows].to(self._like)
        residual = one.kept * stream
        whole = residual + written + constant + mlp
        after = self._linear(() if one.norm is None else (one.norm,), whole, 1.0)
        whole = after(whole) + after.shift(whole)
        return whole, Shares(
            proximity(whole, after(residual)),
            proximity(whole, after(mlp)),
            proximity(whole, after(constant) + after.shift(whole)),
            self._attention(whole, pattern, before, after),
        )

    def _attention(
        self,
        whole: Float[Tensor, "row d_model"],
        pattern: Float[Tensor, "head row key"],
        before: _Linear,
        after: _Linear,
    ) -> Float[Tensor, "head row key"]:
        """Proximity of `A[h, t, s] v_s W_O^h`: rates go with A, fixed maps with W_O."""
        if not len(pattern):
            return pattern
        output = after.fixed(before.fixed(self._output))
        for linear in (before, after):
            rate = linear.rate
            pattern = pattern * (rate[:, None] if isinstance(rate, Tensor) else rate)
        # A key that no row weighs (padding) may hold anything, NaN too.
        keys = pattern.amax((0, 1)) != 0
        reach = slice(0, int(keys.nonzero().max()) + 1 if bool(keys.any()) else 0)
        vectors = (self._value[head // self._group, reach] @ own for head, own in enumerate(output))
        found = torch.zeros_like(pattern)
        found[..., reach] = weighted_proximity(whole, pattern[..., reach].contiguous(), vectors)
        return found

    def _projected(self, pattern: Float[Tensor, "head row key"]) -> Float[Tensor, "row d_model"]:
        value = self._value.repeat_interleave(self._group, dim=0)
        return torch.einsum("hrv,hvd->rd", pattern @ value, self._output)

    def _bias(self) -> Float[Tensor, " d_model"]:
        module = self._model.get_submodule(self.run.site.output or "")
        if getattr(module, "bias", None) is None:
            return self._output.new_zeros(self._output.shape[-1])
        return weight_of(self._model, f"{self.run.site.output}.bias").detach().to(self._like)

    def _linear(self, names: tuple[str, ...], given: Tensor, factor: float) -> _Linear:
        """The maps of some modules, one after the other, at the rows `given`."""
        maps: list[Frozen] = []
        for name in names:
            one = Frozen.of(self._model, name, given)
            given = one.rate[:, None] * one.fixed(given) + one.shift
            maps.append(one)
        return _Linear(tuple(maps), factor, len(given))

    def _check(self, stream: Float[Tensor, "row d_model"], rows: Int[Tensor, " row"]) -> None:
        """Raise unless the parts sum to what the model's own block returned."""
        wanted = self.run.leaving[self._prompt, rows].to(self._like)
        gap = (stream - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)
        allowed = _GAP.get(self.run.leaving.dtype, 1e-3)
        if bool((gap > allowed).any()):
            raise UnsupportedModelError(
                f"The parts of {self.run.site.name} do not sum to the stream that leaves it: "
                f"{float(gap.max()):.1e} of it is missing. Something else writes to the stream, "
                "or its weights are rounded; load the model in float32."
            )
