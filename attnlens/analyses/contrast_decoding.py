"""Decoding by contrast with masked heads: what retrieval heads add to a prediction, turned up.

The model writes with all its heads; beside it runs the same model with some heads masked, and what
the two disagree about is taken further in the direction of the first. Gema et al. 2024, DeCoRe:
decoding by contrasting retrieval heads to mitigate hallucinations.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.edits import Edit, Uniform
from attnlens.hooks.probe import evaluating
from attnlens.lens import Inputs, Lens
from attnlens.lens.decode import Decoder, at_the_right, end_ids, until
from attnlens.lens.inputs import first_position, split

Scores = Float[Tensor, "batch vocab"]


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

    The masked run has a cache of its own and reads one token a step. Nothing is shared with
    generate's run, whose forward never sees the edit: masked heads change keys and values of all
    layers above them, and generate's cache is not touched. So the prompt is read twice, and
    each step costs two.

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
        Decoder(lens.model, lens.anatomy).check_model()
        self.edit = edit(self.heads)
        self._lens, self.alpha, self.cap = lens, alpha, cap
        self._given = None if attention_mask is None else attention_mask.bool()
        self._forget()

    def __call__(self, input_ids: Int[Tensor, "batch position"], scores: Scores) -> Scores:
        """Scores of the next token, contrasted."""
        return contrast(scores, self.masked(input_ids), self.alpha, self.cap)[0]

    def masked(self, ids: Int[Tensor, "batch position"]) -> Scores:
        """Logits of the next token with the heads masked, in float32 at least."""
        try:
            logits = self._advance(ids)
        except BaseException:
            self._forget()  # the cache may hold part of the step
            raise
        if bool(logits.isnan().any()):
            raise InputError(
                f"{self._lens.anatomy.model} gives NaN with these heads masked. Some models' own "
                "attention makes NaN of padding: decode one prompt at a time."
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _forget(self) -> None:
        self._seen: Tensor | None = None
        self._real: Tensor | None = None
        self._cache: Any = None

    def _advance(self, ids: Int[Tensor, "batch position"]) -> Scores:
        order = self._continued(ids)
        if order is None:
            self._check_padding(ids)
            config: Any = self._lens.model.config
            self._cache = DynamicCache(config=config)
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
        self._seen = ids.clone()
        return logits

    def _continued(self, ids: Int[Tensor, "batch position"]) -> list[int] | None:
        """Which row each row goes on from, by one token; None where some row goes on from none."""
        seen = self._seen
        if seen is None or ids.shape[1] != seen.shape[1] + 1:
            return None
        if torch.equal(ids[:, :-1], seen):
            return list(range(len(ids)))
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

    def _check_padding(self, ids: Tensor) -> None:
        """Raise where a row among others begins with what may be padding, and no mask says so."""
        model, tokenizer = self._lens.model, self._lens.tokenizer
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

    @torch.no_grad()
    def _forward(self, ids: Tensor, real: Bool[Tensor, "batch key"]) -> Scores:
        """Logits of the last row, the heads masked for as long as the forward runs."""
        model = self._lens.model
        accepted = inspect.signature(model.forward).parameters
        image = getattr(model.config, "image_token_id", None)
        if image is not None and bool((ids == image).any()):
            raise InputError(
                "The prompt holds images, which a processor of scores is not given; decode text."
            )
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": self._cache}
        inputs["use_cache"] = True
        if not bool(real.all()):
            inputs["attention_mask"] = real.long()
            if "position_ids" in accepted:
                positions = (real.long().cumsum(-1) - 1).clamp_min(0) + first_position(model)
                inputs["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        with evaluating(model), self._lens.edit(self.edit):
            return model(**inputs).logits[:, -1]


@dataclass(frozen=True)
class Contrast:
    """Greedy answers under contrast, and what base and masked run made of each token of them.

    Attributes:
        heads, edit: the heads that were masked, and what was done to them.
        alpha: the strength; None where it was the entropy of the base distribution.
        cap: the most that the entropy counts for.
        prompts: number of prompts.
        answers: ids written after each prompt, without the one that ended the answer.
        texts: the same as text.
        tokens: each token of an answer as text.
        strength: a at each token, in nats; NaN behind an answer's end, as in what follows.
        base, masked, contrast: log-probability of each token in nats: with all heads, with the
            heads masked, and as contrasted and normalised.
        likeliest: the token that the base run alone would have written in its place; -1 behind
            the end.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    edit: str
    alpha: float | None
    cap: float | None
    prompts: int
    answers: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    strength: Float[Tensor, "prompt step"]
    base: Float[Tensor, "prompt step"]
    masked: Float[Tensor, "prompt step"]
    contrast: Float[Tensor, "prompt step"]
    likeliest: Int[Tensor, "prompt step"]
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a written token: its log-probabilities, a, and whether base would differ."""
        rows = [(p, s) for p, answer in enumerate(self.answers) for s in range(len(answer))]
        found: dict[str, list[Any]] = {
            "prompt": [prompt for prompt, _ in rows],
            "step": [step for _, step in rows],
            "token": [self.tokens[prompt][step] for prompt, step in rows],
        }
        for name in ("strength", "base", "masked", "contrast"):
            found[name] = [float(getattr(self, name)[place]) for place in rows]
        found["changed"] = [int(self.likeliest[p, s]) != self.answers[p][s] for p, s in rows]
        return pd.DataFrame(found)


def contrast_decode(
    lens: Lens,
    prompts: Inputs,
    heads: HeadSpec,
    steps: int = 50,
    alpha: float | None = None,
    cap: float | None = None,
    edit: Callable[[HeadSpec], Edit] = Uniform,
    batch_size: int = 8,
) -> Contrast:
    """Write greedily by `(1 + a) log p(base) - a log p(heads masked)`, a the entropy of base.

    `model.generate` with `ContrastiveHeads`, which says how it is computed and at what cost;
    `cap` bounds a, `alpha` is a constant in its place, and 0 gives plain greedy answers. The
    model's own generation settings hold, but nothing is sampled. Gema et al. 2024, DeCoRe.

    Raises:
        HeadError, InputError, UnsupportedModelError: as for `ContrastiveHeads`; a prompt and
            answer over the context, steps below 1.

    """
    generate = getattr(lens.model, "generate", None)
    if generate is None:
        raise UnsupportedModelError(f"{lens.anatomy.model} has no generate; load it with its head.")
    ContrastiveHeads(lens, heads, alpha, cap, edit)  # refuses before anything runs
    batch = lens.encode(prompts)
    decoder, ends = Decoder(lens.model, lens.anatomy), end_ids(lens.model, lens.tokenizer)
    parts, order = split(batch, batch_size)
    noted: list[_Notes] = []
    for part in parts:
        ids, real = at_the_right(decoder.prompts(part, steps), part.ids)
        noted.append(_Notes(ContrastiveHeads(lens, heads, alpha, cap, edit, real)))
        with evaluating(lens.model):
            generate(
                input_ids=ids,
                attention_mask=real.long(),
                max_new_tokens=steps,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                pad_token_id=min(ends, default=0),
                logits_processor=LogitsProcessorList([noted[-1]]),
            )
    back = torch.tensor(order).argsort()
    values = torch.cat([_widened(part.values, steps) for part in noted])[back]
    return _result(lens, noted[0].heads, values, ends)


class _Notes(LogitsProcessor):
    """The contrast, and what is kept of it for the token that it makes the likeliest."""

    def __init__(self, heads: ContrastiveHeads) -> None:
        self.heads = heads
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Int[Tensor, "batch position"], scores: Scores) -> Scores:
        """Contrast the scores and take note."""
        masked = self.heads.masked(input_ids)
        mixed, strength = contrast(scores, masked, self.heads.alpha, self.heads.cap)
        token = mixed.argmax(-1, keepdim=True)
        kept = [log.log_softmax(-1).gather(1, token)[:, 0] for log in (scores, masked, mixed)]
        found = [token[:, 0], scores.argmax(-1), strength, *kept]
        self._steps.append(torch.stack([value.double().cpu() for value in found], dim=1))
        return mixed

    @property
    def values(self) -> Float[Tensor, "prompt step 6"]:
        """Token, the base run's token, a, and three log-probabilities."""
        return torch.stack(self._steps, dim=1)


def _widened(values: Float[Tensor, "prompt step 6"], steps: int) -> Float[Tensor, "prompt all 6"]:
    """As many steps as were asked for; NaN where all answers had ended."""
    missing = steps - values.shape[1]
    return torch.nn.functional.pad(values, (0, 0, 0, missing), value=torch.nan)


def _result(
    lens: Lens, run: ContrastiveHeads, values: Float[Tensor, "prompt step 6"], ends: frozenset[int]
) -> Contrast:
    written = [row[~row.isnan()].long().tolist() for row in values[..., 0]]
    answers = tuple(tuple(until(row, ends)) for row in written)
    steps = max(map(len, answers))
    values = values[:, :steps].clone()
    for prompt, answer in enumerate(answers):
        values[prompt, len(answer) :] = torch.nan
    tokens = tuple(lens.token_texts(answer) for answer in answers)
    decode = getattr(lens.tokenizer, "decode", None)
    same = bool((values[..., 0] == values[..., 1])[~values[..., 0].isnan()].all())
    notes = ("The base run alone would have written the same tokens.",) if same else ()
    return Contrast(
        run.heads,
        str(run.edit),
        run.alpha,
        run.cap,
        len(answers),
        answers,
        tuple(" ".join(own) for own in tokens) if decode is None else tuple(map(decode, answers)),
        tokens,
        strength=values[..., 2],
        base=values[..., 3],
        masked=values[..., 4],
        contrast=values[..., 5],
        likeliest=values[..., 1].nan_to_num(-1).long(),
        notes=notes,
    )


def _check_strength(alpha: float | None, cap: float | None) -> None:
    if alpha is not None and cap is not None:
        raise InputError("cap bounds the entropy and alpha takes its place: give one of them.")
    for name, value in (("alpha", alpha), ("cap", cap)):
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"{name}={value} is out of range: 0 or more.")
