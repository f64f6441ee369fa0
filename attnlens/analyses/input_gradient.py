"""Gradients at the token embeddings: input x gradient, and integrated gradients.

Both score a token by a sum over the width of its embedding. Input x gradient takes the gradient at
the embedding itself; integrated gradients average it over the straight way from a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attribution import Attribution, Ledger, over_tokens
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.errors import InputError
from attnlens.hooks.embedded import token_tables
from attnlens.hooks.input_gradients import LookUp, embedding_gradients
from attnlens.lens import Batch, Inputs, Lens
from attnlens.lens.inputs import repeated

BASELINES = ("mean", "padding", "zero")
WIDE_GAP = 0.05
"""Share of the value's change that a quadrature may miss before a note says so."""


@torch.inference_mode(False)
def input_gradient(lens: Lens, inputs: Inputs, target: TargetSpec = None) -> Attribution:
    """Score every token by `sum over width of embedding x dM/d embedding`, signed.

    One forward and one backward. The scores are the metric's change to first order when a token's
    embedding goes to 0; they sum to the metric only where it is linear in the embeddings, and the
    ledger shows what is missing. Simonyan et al. 2014, Deep inside convolutional networks;
    Shrikumar et al. 2016, Not just a black box.

    Raises:
        InputError: no token ids, or a target without a finite gradient.
        UnsupportedModelError: a model that reads no tokens.

    """
    batch = lens.encode(inputs)
    explained = settle(lens, batch, target)
    value, found = embedding_gradients(
        lens.model,
        lens.anatomy_for(batch),
        batch.inputs,
        explained.metric,
        explained.observers(lens, batch),
    )
    shares = [_over_width(look.embeddings, look.gradient) for look in found]
    words, scores = _of_tokens(lens, batch, found, shares)
    value = value.double().cpu()
    return Attribution(
        method="input_gradient",
        tokens=words,
        scores=scores,
        target=explained.names,
        value=value,
        ledger=Ledger(value, {"tokens": scores.double().sum(-1)}),
        notes=(
            "The remainder is what a first-order step misses, and what positions and biases add.",
        ),
    )


@torch.inference_mode(False)
def integrated_gradients(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    steps: int = 32,
    baseline: str | int = "mean",
    batch_size: int = 16,
) -> Attribution:
    """Score every token by `sum over width of (e - b) x mean of dM/de on the way from b to e`.

    The mean is a Gauss-Legendre quadrature of `steps` points on the straight line from baseline
    embeddings b to the token embeddings e; points share forwards of up to `batch_size` prompts. A
    baseline is one embedding for all real tokens: the `mean` of the model's table, the `padding`
    token's, `zero`, or that of a token id. Zero suits models badly whose first step is a norm: all
    of the way but its beginning then looks alike. Positions and padding stay as they are. Scores
    sum to the metric at e minus that at b but for the quadrature's gap, the ledger's remainder.
    Sundararajan et al. 2017, Axiomatic attribution for deep networks.

    Raises:
        InputError: no such baseline, steps or batch_size below 1, no token ids, or a target
            without a finite gradient.
        UnsupportedModelError: a model that reads no tokens.

    """
    if steps < 1 or batch_size < 1:
        raise InputError(f"steps={steps}, batch_size={batch_size}: give 1 or more of each.")
    _check_baseline(lens, baseline)
    batch = lens.encode(inputs)
    run = _Line(lens, batch, settle(lens, batch, target), batch_size)
    value, ends = run.at(torch.ones(1), None)
    starts = [_start(lens, batch, side, look, baseline) for side, look in _sided(batch, ends)]
    before, _ = run.at(torch.zeros(1), starts)
    points, weights = _quadrature(steps)
    means = [torch.zeros_like(look.embeddings, dtype=_wide(look.embeddings)) for look in ends]
    for chunk in range(0, steps, run.together):
        own = slice(chunk, chunk + run.together)
        _, found = run.at(points[own], starts)
        for mean, look in zip(means, found, strict=True):
            gradient = look.gradient.to(mean.dtype).unflatten(0, (-1, batch.size))
            mean += torch.einsum("s,sbtd->btd", weights[own].to(mean), gradient)
    shares = [
        _over_width(look.embeddings - start, mean)
        for look, start, mean in zip(ends, starts, means, strict=True)
    ]
    words, scores = _of_tokens(lens, batch, ends, shares)
    entries = {"baseline": before, "tokens": scores.double().sum(-1)}
    ledger = Ledger(value, entries)
    return Attribution(
        method="integrated_gradients",
        tokens=words,
        scores=scores,
        target=run.explained.names,
        value=value,
        settings={"steps": steps, "baseline": baseline, "quadrature": "Gauss-Legendre"},
        ledger=ledger,
        notes=_gap_notes(ledger, steps),
    )


@dataclass(frozen=True)
class _Line:
    """Runs of a batch with its embeddings at points of the line from a baseline to themselves."""

    lens: Lens
    batch: Batch
    explained: Explained
    batch_size: int

    @property
    def together(self) -> int:
        """Points that share a forward; one where prompts cannot be copied or told apart."""
        rows = {
            value.shape[0]
            for value in self.batch.inputs.values()
            if isinstance(value, Tensor) and value.ndim
        }
        alone = self.explained.tokens is None or rows != {self.batch.size}
        return 1 if alone else max(self.batch_size // self.batch.size, 1)

    def at(
        self, points: Float[Tensor, " point"], starts: Sequence[Tensor] | None
    ) -> tuple[Float[Tensor, " batch"], tuple[LookUp, ...]]:
        """Metric of the last point, and gradients, copies of the batch one after another."""
        times = len(points)
        copies = repeated(self.batch, times)

        def put(number: int, embeddings: Tensor) -> Tensor:
            if starts is None:
                return embeddings
            start = starts[number].repeat(times, 1, 1)
            share = points.to(embeddings).repeat_interleave(self.batch.size)
            return start + share[:, None, None] * (embeddings - start)

        rows = torch.arange(self.batch.size).repeat(times)
        explained = self.explained if times == 1 else self.explained.part(rows)
        values, found = embedding_gradients(
            self.lens.model,
            self.lens.anatomy_for(self.batch),
            copies.inputs,
            explained.metric,
            explained.observers(self.lens, copies),
            put,
        )
        return values[-self.batch.size :].double().cpu(), found


def _quadrature(steps: int) -> tuple[Float[Tensor, " step"], Float[Tensor, " step"]]:
    """Points in (0, 1) and their weights, which sum to 1 (Gauss-Legendre)."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)


def _check_baseline(lens: Lens, baseline: str | int) -> None:
    if isinstance(baseline, str) and baseline not in BASELINES:
        raise InputError(
            f"There is no baseline {baseline!r}; choose {', '.join(BASELINES)}, or a token id."
        )
    if isinstance(baseline, int) and not 0 <= baseline < lens.vocab_size:
        raise InputError(f"The baseline {baseline} is no token id; there are {lens.vocab_size}.")


def _start(
    lens: Lens, batch: Batch, side: int, look: LookUp, baseline: str | int
) -> Float[Tensor, "batch position d_model"]:
    """The baseline of one look-up: the embeddings themselves where positions are padding."""
    vector = _vector(lens, look, baseline).to(look.embeddings)
    tokens = batch.sides.text if side == 0 else batch.sides.decoder
    start = vector.expand(look.embeddings.shape)
    if tokens is None or tokens.cut(start.shape[1]).real is None:
        return start
    assert tokens.real is not None
    return torch.where(tokens.real[..., None].to(start.device), start, look.embeddings)


@torch.no_grad()
def _vector(lens: Lens, look: LookUp, baseline: str | int) -> Float[Tensor, " d_model"]:
    if baseline == "zero":
        return torch.zeros_like(look.embeddings[0, 0])
    if baseline == "padding":
        baseline = _padding(lens)
    for table in token_tables(lens.model):
        # Of several tables the one that made this look-up; some scale what they hold.
        if table.weight.shape[-1] == look.embeddings.shape[-1] and torch.equal(
            table(look.ids), look.embeddings
        ):
            everything = torch.arange(table.num_embeddings, device=look.ids.device)
            chosen = everything if isinstance(baseline, str) else everything[[baseline]]
            return table(chosen[None])[0].mean(0)
    raise InputError(
        f"No table of token embeddings gives what the model looked up, so its {baseline} baseline "
        "is not known. Take baseline='zero'."
    )


def _padding(lens: Lens) -> int:
    config: Any = lens.model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for holder in (lens.tokenizer, text, config):
        found = getattr(holder, "pad_token_id", None)
        if isinstance(found, int) and 0 <= found < lens.vocab_size:
            return found
    raise InputError(
        "The model has no padding token. Take baseline='mean', or the id of a neutral token."
    )


def _gap_notes(ledger: Ledger, steps: int) -> tuple[str, ...]:
    """What the quadrature missed, where that is much of the change from the baseline."""
    change = (ledger.value - ledger.entries["baseline"]).abs()
    share = (ledger.remainder.abs() / change.clamp_min(1e-12)).tolist()
    wide = [prompt for prompt, own in enumerate(share) if own > WIDE_GAP]
    if not wide:
        return ()
    note = (
        f"The scores of {len(wide)} of {len(share)} prompts miss up to {max(share):.0%} of the "
        f"change from the baseline: {steps} steps are too few for it (steps={4 * steps}), or the "
        "baseline lies where the model is not smooth."
    )
    return (note,)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _over_width(values: Tensor, gradient: Tensor) -> Float[Tensor, "batch position"]:
    wide = _wide(values)
    return (values.to(wide) * gradient.to(wide)).sum(-1)


def _sided(batch: Batch, found: Sequence[LookUp]) -> list[tuple[int, LookUp]]:
    """Each look-up with its side: 0 for the text, 1 for a decoder's own tokens.

    Where both read the same ids, an encoder comes before its decoder.
    """
    own = [batch.sides.text, *([batch.sides.decoder] if batch.sides.decoder is not None else [])]
    seen: list[tuple[int, LookUp]] = []
    for look in found:
        fits = [
            side
            for side, tokens in enumerate(own)
            if tokens.ids is not None and torch.equal(tokens.ids.to(look.ids.device), look.ids)
        ]
        # Ids that the model changed first (those of images) are told by their shape.
        fits = fits or [
            side
            for side, tokens in enumerate(own)
            if tokens.ids is not None and tokens.ids.shape == look.ids.shape
        ]
        taken = {side for side, _ in seen}
        if fits:
            seen.append((next((side for side in fits if side not in taken), fits[0]), look))
    if len(seen) < len(found):
        raise InputError("The model looks up tokens that are not those of its input.")
    return seen


def _of_tokens(
    lens: Lens, batch: Batch, found: Sequence[LookUp], shares: Sequence[Tensor]
) -> tuple[tuple[tuple[str, ...], ...], Float[Tensor, "batch position"]]:
    """Scores of tokens; what is looked up more than once is summed."""
    sides: dict[int, Tensor] = {}
    for (side, _), share in zip(_sided(batch, found), shares, strict=True):
        sides[side] = sides[side] + share if side in sides else share
    # An encoder of sounds or images reads no tokens.
    text = sides[0] if 0 in sides else sides[1][:, :0]
    words, scores = over_tokens(lens, batch, text, sides.get(1))
    return words, scores.cpu()
