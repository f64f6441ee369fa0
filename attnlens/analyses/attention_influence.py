"""Attention influence: which texts need a set of heads, told by what masking them costs.

Hua et al. 2025, AttentionInfluence: adopting attention head influence for weak-to-strong
pretraining data selection.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analyses.reading import Progress, Reading, Texts, Window, as_texts, windows
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit, Uniform
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch
from attnlens.lens.losses import next_token_loss

SHOWN = 24
"""Tokens of a text that are kept to know it by."""


@dataclass(frozen=True)
class AttentionInfluence:
    """Score of each text, `(masked - base) / base`, in the order in which the texts came.

    Attributes:
        heads: the heads that were masked together.
        edit: what was done to them.
        score: share by which masking raises the loss; NaN for a text of one token, or of loss 0.
        base, masked: mean next-token loss in nats, over the text's tokens from the second on.
        tokens: how many tokens a text's loss is over.
        starts: the first words of each text, as plain text.
        mean: of the scores over texts, with the bounds of its bootstrap interval.
        prompts: number of texts.
        max_tokens: texts were cut to so many tokens; None where they were not.
        seed: of the bootstrap.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    edit: str
    score: Float[Tensor, " text"]
    base: Float[Tensor, " text"]
    masked: Float[Tensor, " text"]
    tokens: Int[Tensor, " text"]
    starts: tuple[str, ...]
    mean: Interval
    prompts: int
    max_tokens: int | None
    seed: int
    notes: tuple[str, ...]

    @property
    def ranking(self) -> Int[Tensor, " text"]:
        """Numbers of the texts, the highest score first; those without a score last."""
        return self.score.nan_to_num(-torch.inf).argsort(descending=True, stable=True)

    def to_frame(self) -> pd.DataFrame:
        """One row a text, in the order of the ranking."""
        columns = ("score", "base", "masked", "tokens")
        frame = pd.DataFrame({name: getattr(self, name).numpy() for name in columns})
        frame.insert(0, "text", range(self.prompts))
        frame["start"] = list(self.starts)
        return frame.iloc[self.ranking.tolist()].reset_index(drop=True)


def attention_influence(
    lens: Lens,
    texts: Texts,
    heads: HeadSpec,
    edit: Callable[[HeadSpec], Edit] = Uniform,
    batch_size: int = 8,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> AttentionInfluence:
    """Score texts by the loss that masking heads adds: `(L_masked - L_base) / L_base`.

    L is the mean next-token loss of a text, and masked heads attend evenly to the keys that each
    row sees (`al.Uniform`); `edit` makes another edit of the heads (`al.Zero`, say). Heads named
    for retrieval score texts by how much they rely on what was said before (Hua et al. 2025).

    Texts may come one after another without end in sight: a batch is in memory at a time, logits
    of a few rows at a time, and of each text four numbers and its first words are kept. Texts over
    the context are refused, or cut to their first `max_tokens`.

    Raises:
        HeadError: a head that the model does not have.
        InputError: no head, no text or none of two tokens, or a model without logits.
        UnsupportedModelError: a model that does not read from left to right.

    """
    chosen = lens.anatomy.find(heads)
    if not chosen:
        raise InputError('No head was given to mask: name one at least, for example heads="L1H2".')
    check_bootstrap(resamples, confidence)
    reading = Reading(batch_size, max_tokens, progress=progress)
    given = as_texts(texts)
    total = len(given) if isinstance(given, Sized) else None
    masking = edit(chosen)
    parts: list[Tensor] = []
    starts: list[str] = []
    cut = 0
    for window in windows(lens, texts if given is None else given, reading):
        starts += [_start(lens, ids) for ids in window.ids]
        cut += window.cut
        parts.append(_of_window(lens, window, masking, sum(map(len, parts)), total, progress))
    base, masked, tokens = torch.cat(parts).unbind(1)
    score = (masked - base) / base.where(base != 0, torch.nan)
    if not bool((tokens > 0).any()):
        raise InputError("No text has two tokens, so there is no next token to predict.")
    return AttentionInfluence(
        chosen,
        str(masking),
        score,
        base,
        masked,
        tokens.long(),
        tuple(starts),
        bootstrap_mean(score, resamples, confidence, seed),
        len(score),
        max_tokens,
        seed,
        _notes(base, masked, tokens, cut, max_tokens),
    )


def _of_window(
    lens: Lens, window: Window, edit: Edit, done: int, total: int | None, progress: Progress | None
) -> Float[Tensor, "text 3"]:
    """Base loss, masked loss and number of tokens of a window's texts, in their order."""
    count = sum(len(own) for _, own in window.parts)
    found = torch.full((count, 3), torch.nan, dtype=torch.float64)
    seen = 0
    for inputs, own in window.parts:
        found[own - done] = torch.stack(_losses(lens, lens.encode(inputs), edit), dim=1)
        seen += len(own)
        if progress is not None:
            progress(done + seen, total)
    return found


def _losses(lens: Lens, batch: Batch, edit: Edit) -> tuple[Tensor, Tensor, Tensor]:
    base, tokens = next_token_loss(lens, batch)
    if not bool(tokens.any()):  # nothing ran, which an edit takes for a mistake
        return base, base, tokens.double()
    with lens.edit(edit):
        masked, _ = next_token_loss(lens, batch)
    return base, masked, tokens.double()


def _start(lens: Lens, ids: tuple[int, ...]) -> str:
    """The first words of a text on one line; its first ids where there is no tokenizer."""
    if lens.tokenizer is None:
        return " ".join(map(str, ids[:SHOWN]))
    text: str = lens.tokenizer.decode(ids[:SHOWN], skip_special_tokens=True)
    return " ".join(text.split()) + ("…" if len(ids) > SHOWN else "")


def _notes(
    base: Tensor, masked: Tensor, tokens: Tensor, cut: int, max_tokens: int | None
) -> tuple[str, ...]:
    count = len(base)
    short = int((tokens == 0).sum())
    unknown = int(((base.isnan() | masked.isnan()) & (tokens > 0)).sum())
    told = {
        f"{cut} of {count} texts were cut to their first {max_tokens} tokens.": cut,
        f"{short} of {count} texts have one token, so no loss and no score.": short,
        f"{unknown} of {count} texts gave NaN: the model overflows, or makes NaN of padding "
        "(batch_size=1).": unknown,
        "Texts that the model predicts surely (loss 0) have no score.": int((base == 0).sum()),
        "One text gives no interval over texts; give several.": count == 1,
    }
    return tuple(note for note, holds in told.items() if holds)
