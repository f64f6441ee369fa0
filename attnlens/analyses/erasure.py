"""Scores by erasure: what a target is worth once some tokens are taken out of a prompt.

Leave-one-out scores a token by the drop that its absence makes, `M(x) - M(x without token i)`:
what other attributions are held against. What "without" means is a choice that changes the answer,
and a setting of every result (`Replacement`).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analyses.attribution import Attribution, over_tokens
from attnlens.analyses.replacement import Kind, Replacement, Side, rule_for
from attnlens.analyses.target import Explained, TargetSpec, settle
from attnlens.errors import InputError
from attnlens.hooks.session import Observer
from attnlens.hooks.tokens import Sides
from attnlens.lens import Batch, Inputs, Lens

TOKENS = 4096
"""Positions that run in one forward at most, copies of prompts side by side."""


class Eraser:
    """Some prompts, and what a target is worth on them without some of their tokens.

    Positions are those of an `Attribution`: each prompt's own tokens from the left, without
    padding, a decoder's after those of the text.

    Attributes:
        words: texts of the tokens.
        erasable: which tokens may be erased.
        said: what stands in for an erased token, in words.
        forwards: forwards run so far.

    Raises:
        InputError: an input without token ids, and what `settle` and `Replacement` refuse.

    """

    def __init__(
        self,
        lens: Lens,
        inputs: Inputs,
        target: TargetSpec = None,
        replacement: Replacement | Kind = "padding",
        tokens: int = TOKENS,
    ) -> None:
        if tokens < 1:
            raise InputError(f"tokens={tokens}: give 1 or more.")
        self.lens = lens
        self.batch = lens.encode(inputs)
        self.replacement = Replacement.of(replacement)
        self._sides = Side.all_of(self.batch)
        self._rule = rule_for(lens, self.batch, self.replacement)
        self._tokens = tokens
        self.said = self._rule.said
        self.explained: Explained = settle(lens, self.batch, target)
        self.forwards = 0
        ids = torch.cat([self.batch.inputs[side.ids] for side in self._sides], dim=1).cpu()
        text, decoder = _split(torch.arange(ids.shape[1]).expand_as(ids), self._sides)
        self.words, self._places = over_tokens(lens, self.batch, text, decoder)
        lengths = torch.tensor([len(own) for own in self.words])
        self.real = torch.arange(self._places.shape[1]) < lengths[:, None]
        self._width = ids.shape[1]
        self.erasable = self.real & self._may_go(ids).gather(1, self._places)

    def _may_go(self, ids: Int[Tensor, "batch padded"]) -> Bool[Tensor, "batch padded"]:
        """All but special tokens; the read one where erasing hides, placeholders where not."""
        stay = set[int | None]()
        if not self.replacement.special:
            stay |= {*self.lens.special_ids, self.lens.bos_id}
        if self.replacement.kind != "padding":
            stay |= _placeholders(self.lens.model.config)
        known = torch.tensor([token for token in stay if token is not None], dtype=torch.long)
        may = ~torch.isin(ids, known)
        if self.replacement.kind == "padding" and self.explained.reads is not None:
            may.scatter_(1, self.explained.reads + self._sides[-1].columns.start, False)
        return may

    def values(
        self, prompts: Int[Tensor, " row"], erased: Bool[Tensor, "row position"]
    ) -> Float[Tensor, " row"]:
        """The target's value on each row, a prompt without some tokens; float64, on the CPU.

        Rows share forwards. A target that is a function of the output gets that of all prompts,
        in their order, each time.

        Raises:
            InputError: a target whose value is not one finite number a prompt, or a row that
                hides all tokens.

        """
        found = torch.zeros(len(prompts), dtype=torch.float64)
        rows, columns = (erased & self.real[prompts]).nonzero(as_tuple=True)
        gone = torch.zeros(len(prompts), self._width, dtype=torch.bool)
        gone[rows, self._places[prompts[rows], columns]] = True
        if self.explained.tokens is not None:
            for chunk in torch.arange(len(prompts)).split(max(self._tokens // self._width, 1)):
                found[chunk] = self._run(prompts[chunk], gone[chunk])
            return found
        every = torch.arange(self.batch.size)
        for chunk in _one_a_prompt(prompts):
            whole = torch.zeros(self.batch.size, self._width, dtype=torch.bool)
            whole[prompts[chunk]] = gone[chunk]
            found[chunk] = self._run(every, whole)[prompts[chunk]]
        return found

    def _run(
        self, prompts: Int[Tensor, " row"], gone: Bool[Tensor, "row padded"]
    ) -> Float[Tensor, " row"]:
        """One forward of copies of prompts, each without its own tokens."""
        inputs = {
            name: value[prompts.to(value.device)]
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.batch.size
            else value
            for name, value in self.batch.inputs.items()
        }
        gone = gone.to(self.lens.device)
        watching = self._rule.put(inputs, [(side, gone[:, side.columns]) for side in self._sides])
        rows = Batch(inputs, Sides.of(inputs), ())
        value = _value(self.lens, rows, self.explained.part(prompts), *watching)
        self._rule.check()
        self.forwards += 1
        return value


def _split(
    values: Tensor, sides: tuple[Side, ...]
) -> tuple[Int[Tensor, "batch position"], Int[Tensor, "batch position"] | None]:
    text, *decoder = (values[:, side.columns] for side in sides)
    return text, decoder[0] if decoder else None


def _placeholders(config: Any) -> set[int | None]:
    """Tokens in whose places a model puts an image, a video or a sound."""
    kinds = ("image", "video", "audio")
    names = [f"{kind}_token_{end}" for kind in kinds for end in ("id", "index")]
    return {getattr(config, name, None) for name in names}


def _one_a_prompt(prompts: Int[Tensor, " row"]) -> Iterator[Int[Tensor, " some"]]:
    """Rows in groups of which none names a prompt twice."""
    seen: Counter[int] = Counter()
    groups: list[list[int]] = []
    for row, prompt in enumerate(prompts.tolist()):
        if seen[prompt] == len(groups):
            groups.append([])
        groups[seen[prompt]].append(row)
        seen[prompt] += 1
    return map(torch.tensor, groups)


def leave_one_out(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    replacement: Replacement | Kind = "padding",
    tokens: int = TOKENS,
) -> Attribution:
    """Score each token by the drop without it: `s_i = M(x) - M(x without token i)`.

    Exact, at the price of a row of a forward for each token; `tokens` positions run at a time.
    Tokens that may not be erased (special ones, and the read one under "padding") score 0. Zeiler
    and Fergus 2014; Li, Monroe and Jurafsky 2016, Understanding neural networks through
    representation erasure.

    Raises:
        InputError: an input without token ids, a target or a replacement that the model has not.
        UnsupportedModelError: several tables of embeddings, for the replacement "mean".

    """
    return left_out(Eraser(lens, inputs, target, replacement, tokens))


def left_out(eraser: Eraser) -> Attribution:
    """Leave-one-out of the prompts of an eraser."""
    count, width = eraser.erasable.shape
    prompts, places = eraser.erasable.nonzero(as_tuple=True)
    whole = torch.zeros(count, width, dtype=torch.bool)
    without = torch.zeros(len(prompts), width, dtype=torch.bool)
    without[range(len(prompts)), places] = True
    values = eraser.values(torch.cat([torch.arange(count), prompts]), torch.cat([whole, without]))
    scores = torch.zeros(count, width, dtype=torch.float64)
    scores[prompts, places] = values[prompts] - values[count:]
    kept = int((eraser.real & ~eraser.erasable).sum())
    notes = [f"In place of an erased token: {eraser.said}."]
    if kept:
        notes.append(f"Special or read tokens are not erased and score 0: {kept} here.")
    settings: dict[str, Any] = {
        "replacement": asdict(eraser.replacement), "in place": eraser.said,
        "forwards": eraser.forwards,
    }  # fmt: skip
    return Attribution(
        "leave_one_out", eraser.words, scores, eraser.explained.names, values[:count], settings,
        notes=tuple(notes),
    )  # fmt: skip


def random_attribution(
    lens: Lens, inputs: Inputs, target: TargetSpec = None, seed: int = 0
) -> Attribution:
    """Scores that know nothing, `s_i ~ N(0, 1)`: the baseline of every other method.

    They depend on the seed and on the prompt's tokens alone, not on its batch or padding.

    Raises:
        InputError: an input without token ids, or a target that the model has not.

    """
    batch = lens.encode(inputs)
    sides = Side.all_of(batch)
    explained = settle(lens, batch, target)
    ids = torch.cat([batch.inputs[side.ids] for side in sides], dim=1)
    words, own = over_tokens(lens, batch, *_split(ids, sides))
    scores = torch.zeros(own.shape, dtype=torch.float64)
    for prompt, tokens in enumerate(words):
        told = repr((seed, own[prompt, : len(tokens)].tolist()))
        generator = torch.Generator().manual_seed(zlib.crc32(told.encode()))
        drawn = torch.randn(len(tokens), generator=generator, dtype=torch.float64)
        scores[prompt, : len(tokens)] = drawn
    value = _value(lens, batch, explained)
    return Attribution("random", words, scores, explained.names, value, {"seed": seed})


def _value(
    lens: Lens, batch: Batch, explained: Explained, *observers: Observer
) -> Float[Tensor, " batch"]:
    """The target's value on each prompt of a batch, which has to be finite."""
    value = explained.value(lens, batch, *observers)
    if not bool(value.isfinite().all()):
        raise InputError(
            f"The target is not finite ({value.tolist()}), so no drop of it is known. Take another "
            "one, or load the model in float32 (lens.logits shows its logits)."
        )
    return value
