"""Decoding by contrast with masked heads: what retrieval heads add to a prediction, turned up.

The model writes with all its heads; beside it runs the same model with some heads masked, and what
the two disagree about is taken further in the direction of the first. Gema et al. 2024, DeCoRe:
decoding by contrasting retrieval heads to mitigate hallucinations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from attnlens.analyses.contrastive_heads import (
    ContrastiveHeads,
    MaskFrom,
    Scores,
    acts_everywhere,
    contrast,
)
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.edits import Edit, Uniform
from attnlens.hooks.probe import evaluating
from attnlens.lens import Inputs, Lens
from attnlens.lens.decode import Decoder, at_the_right, end_ids, until
from attnlens.lens.inputs import split


@dataclass(frozen=True)
class Contrast:
    """Greedy answers under contrast, and what base and masked run made of each token of them.

    Attributes:
        heads, edit: the heads that were masked, and what was done to them.
        alpha: the strength; None where it was the entropy of the base distribution.
        cap: the most that the entropy counts for.
        mask_from: where the masking begins, at the prompt or the answer; see
            `ContrastiveHeads.prefill`.
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
    mask_from: MaskFrom
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
    mask_from: MaskFrom = "prompt",
) -> Contrast:
    """Write greedily by `(1 + a) log p(base) - a log p(heads masked)`, a the entropy of base.

    `model.generate` with `ContrastiveHeads`, which says how it is computed and at what cost;
    `cap` bounds a, `alpha` is a constant in its place, and 0 gives plain greedy answers. The
    model's own generation settings hold, but nothing is sampled. Gema et al. 2024, DeCoRe.

    The layers below the lowest masked head read the prompt once, those above twice: the heads are
    masked at every position. `mask_from="answer"`, another definition, masks them from the prompt's
    last token on; all layers then read the prompt once (see `ContrastiveHeads.prefill`). An edit
    of some positions or of one phase is of the first kind only, and all layers read twice.

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
        run = ContrastiveHeads(lens, heads, alpha, cap, edit, real)
        shared = mask_from != "prompt" or acts_everywhere(run.edit)
        cached = {"past_key_values": run.prefill(ids, mask_from)} if shared else {}
        noted.append(_Notes(run))
        with evaluating(lens.model):
            generate(
                **cached,
                cache_implementation=None,
                use_cache=True,
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
        run.mask_from,
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
