"""A logits processor that contrasts each step with a run whose heads are masked.

Gema et al. 2024, DeCoRe: decoding by contrasting retrieval heads to mitigate hallucinations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from attnlens.analyses.read_once import check_states, new_cache, read_once
from attnlens.anatomy import HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit, Uniform
from attnlens.hooks.probe import evaluating
from attnlens.lens import Lens
from attnlens.lens.decode import Decoder, end_ids

Scores = Float[Tensor, "batch vocab"]

MaskFrom = Literal["prompt", "answer"]
"""Which positions are read with the heads masked: all, or from the prompt's last token on."""


def contrast(
    base: Scores, masked: Scores, alpha: float | None = None, cap: float | None = None
) -> tuple[Scores, Float[Tensor, " batch"]]:
    """`(1 + a) log p(base) - a log p(masked)` from logits, and a.

    a is the entropy of the base distribution in nats, at most `cap`; or the constant `alpha`. A
    token that base rules out (-inf) stays out. Not normalised: a sampler's softmax does that.
    """
    log_base, log_masked = base.log_softmax(-1), masked.to(base).log_softmax(-1)
    if alpha is None:
        strength = torch.special.entr(log_base.exp()).sum(-1)
        strength = strength if cap is None else strength.clamp(max=cap)
    else:
        strength = base.new_full(base.shape[:1], alpha)
    share = strength[:, None]
    mixed = (1 + share) * log_base - share * log_masked
    return mixed.masked_fill(log_base == -torch.inf, -torch.inf), strength


class ContrastiveHeads(LogitsProcessor):
    """Logits processor for `model.generate`: contrasts each step with a run whose heads are masked.

    `model.generate(**inputs, logits_processor=[ContrastiveHeads(lens, heads)])`, greedy or
    sampling: scores become `(1 + a) log p(base) - a log p(masked)` before temperature and top-k.
    See `contrast` for a; `edit` makes the masking of the heads (`al.Uniform`: even attention).

    The masked run has a cache of its own and reads one token a step, so each step costs two.
    Generate's run never sees the edit. By itself this class reads the prompt a second time,
    since masked heads change the keys and values of all layers above them; `prefill` reads it
    once for both runs.

    Rows are recognised by their tokens. Where they were re-ordered (beam search) the cache is
    re-ordered too, and where they do not go on from those of the step before (another call of
    generate, candidates taken back) the masked run reads them anew, so it is always that of the
    tokens at hand.

    A processor is not told which tokens are padding: give generate's `attention_mask` with prompts
    that are padded (on the left).

    Raises:
        HeadError: a head that the model does not have.
        InputError: no head, alpha beside cap, a negative one; while decoding, rows that begin with
            padding and no mask, images in the prompt, or NaN.
        UnsupportedModelError: an encoder, or a cache of another kind.

    """

    mask_from: MaskFrom = "prompt"

    def __init__(
        self,
        lens: Lens,
        heads: HeadSpec,
        alpha: float | None = None,
        cap: float | None = None,
        edit: Callable[[HeadSpec], Edit] = Uniform,
        attention_mask: Int[Tensor, "prompt position"] | None = None,
    ) -> None:
        self.heads = lens.anatomy.find(heads)
        if not self.heads:
            raise InputError('No head was given to mask: name one, for example heads="L1H2".')
        _check_strength(alpha, cap)
        self._decoder = Decoder(lens.model, lens.anatomy)
        self._decoder.check_model()
        self.edit = edit(self.heads)
        self._lens, self.alpha, self.cap = lens, alpha, cap
        self._given = None if attention_mask is None else attention_mask.bool()
        self._forget()

    def __call__(self, input_ids: Int[Tensor, "batch position"], scores: Scores) -> Scores:
        """Scores of the next token, contrasted."""
        return contrast(scores, self.masked(input_ids), self.alpha, self.cap)[0]

    def prefill(
        self, input_ids: Int[Tensor, "batch position"], mask_from: MaskFrom = "prompt"
    ) -> DynamicCache:
        """Read the prompts but for their last token, once for both runs; returns generate's cache.

        `generate(..., past_key_values=processor.prefill(input_ids))`, with the same prompts, and
        before each call of generate; for beams with one row a beam.

        With `mask_from="prompt"` the numbers are those of the class without `prefill`: the heads
        are masked at every position, and what both runs have in common, the layers below the
        lowest masked head, is computed once. `mask_from="answer"` is another definition: the heads
        are masked from the prompt's last token on, in the rows that predict the answer, and read
        what all heads together made of the prompt. Then the masked run begins with a copy of
        the base run's cache, and no layer reads the prompt twice.

        Raises:
            InputError: as while decoding; an edit of some positions or of one phase, which would
                mean others here.
            UnsupportedModelError: a model that keeps state beside its cache.

        """
        if mask_from not in get_args(MaskFrom):
            raise InputError(f"There is no mask_from={mask_from!r}; choose prompt or answer.")
        if not acts_everywhere(self.edit):
            raise InputError(
                f"{self.edit} acts at some positions or in one phase, and prefill reads the prompt "
                "in two passes. Give an edit of all positions, or generate without prefill."
            )
        self._forget()
        self.mask_from = mask_from
        self._check_prompts(input_ids)
        ids, real = input_ids[:, :-1], self._real_of(input_ids)[:, :-1]
        edit = self.edit if mask_from == "prompt" else None
        base, self._cache = read_once(self._lens, ids, real, edit)
        self._seen, self._real, self._begun = ids.clone(), real, False
        return base

    def masked(self, ids: Int[Tensor, "batch position"]) -> Scores:
        """Logits of the next token with the heads masked, in float32 at least."""
        try:
            logits = self._advance(ids)
        except BaseException:
            self._forget()  # the cache may hold part of the step
            raise
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _forget(self) -> None:
        self._seen: Tensor | None = None
        self._real: Tensor | None = None
        self._cache: Any = None
        self._begun = True  # whether the last token of the prompts was read too

    def _advance(self, ids: Int[Tensor, "batch position"]) -> Scores:
        order = self._continued(ids)
        if order is None:
            if self.mask_from == "answer" or not self._begun:
                raise InputError(
                    "These rows do not go on from those that prefill read. Call it before each "
                    "generate, with the same prompts. Decoding that takes candidates back needs "
                    'mask_from="prompt".'
                )
            self._check_prompts(ids)
            self._cache = new_cache(self._lens)
            self._real = self._real_of(ids)
            new = ids
        else:
            assert self._real is not None
            if order != list(range(len(order))):
                places = torch.tensor(order, device=ids.device)
                self._cache.batch_select_indices(places)
                self._real = self._real[places]
            self._real = torch.cat([self._real, torch.ones_like(self._real[:, :1])], dim=1)
            new = ids[:, -1:]
        logits = self._forward(new, self._real)
        self._seen, self._begun = ids.clone(), True
        return logits

    def _continued(self, ids: Int[Tensor, "batch position"]) -> list[int] | None:
        """Which row each row goes on from, by one token; None where some row goes on from none."""
        seen = self._seen
        if seen is None or ids.shape[1] != seen.shape[1] + 1:
            return None
        if torch.equal(ids[:, :-1], seen):
            return list(range(len(ids)))
        if not self._begun:
            return None
        assert self._real is not None
        known = {row: number for number, row in enumerate(self._rows(seen))}
        found = [known.get(row, -1) for row in self._rows(ids[:, :-1])]
        return None if -1 in found else found

    def _rows(self, ids: Int[Tensor, "batch position"]) -> list[tuple[int, ...]]:
        """What tells rows apart: tokens, and which are real (rows of a prompt keep their place)."""
        real = self._real_of(ids)
        return [tuple(row) for row in torch.cat([ids, real.to(ids)], dim=1).tolist()]

    def _real_of(self, ids: Int[Tensor, "batch position"]) -> Bool[Tensor, "batch position"]:
        """Which positions are real: by the mask that was given; what was written is real."""
        rows, length = ids.shape
        real = torch.ones_like(ids, dtype=torch.bool)
        if self._given is None:
            return real
        prompts, width = self._given.shape
        if rows % prompts or width > length:
            raise InputError(
                f"The attention_mask has shape {[prompts, width]} and generate works on "
                f"{rows} rows of {length} tokens. Give the mask that generate was given."
            )
        real[:, :width] = self._given.to(ids.device).repeat_interleave(rows // prompts, dim=0)
        return real

    def _check_prompts(self, ids: Tensor) -> None:
        """Raise for images, and where a row begins with what may be padding and no mask says so."""
        model, tokenizer = self._lens.model, self._lens.tokenizer
        image = getattr(model.config, "image_token_id", None)
        if image is not None and bool((ids == image).any()):
            raise InputError(
                "The prompt holds images, which a processor of scores is not given; decode text."
            )
        given = [model.config, getattr(model, "generation_config", None)]
        pads = {getattr(one, "pad_token_id", None) for one in given}
        pads = (pads | {getattr(tokenizer, "pad_token_id", None)}) - {None}
        pads = pads or end_ids(model, tokenizer)  # what generate pads with then
        alone = bool((ids == ids[:1]).all())
        if self._given is None and not alone and pads & set(ids[:, 0].tolist()):
            raise InputError(
                "Some prompts begin with the padding token, and whether that is padding cannot be "
                "told. Give generate's mask: ContrastiveHeads(..., attention_mask=...)."
            )

    def _forward(self, ids: Tensor, real: Bool[Tensor, "batch key"]) -> Scores:
        """Logits of the last row, the heads masked for as long as the forward runs."""
        with evaluating(self._lens.model), self._lens.edit(self.edit):
            logits = self._decoder.last_logits(ids, real, self._cache)
        check_states(self._lens, self._cache)
        return logits


def acts_everywhere(edit: Edit) -> bool:
    """Whether an edit acts at all positions, in all phases."""
    chosen = edit.queries is not None or getattr(edit, "keys", None) is not None
    return not chosen and edit.phase == "all"


def _check_strength(alpha: float | None, cap: float | None) -> None:
    if alpha is not None and cap is not None:
        raise InputError("cap bounds the entropy and alpha takes its place: give one of them.")
    for name, value in (("alpha", alpha), ("cap", cap)):
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"{name}={value} is out of range: 0 or more.")
