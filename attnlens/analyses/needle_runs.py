"""Needles asked for: prompts answered greedily, and which heads copied which of their tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer
from attnlens.lens import Lens
from attnlens.tasks import NeedlePrompt

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Run:
    """One needle asked for: where it stood and what was answered."""

    prompt: NeedlePrompt
    answer: tuple[int, ...]
    text: str
    """The answer as text; "" without a tokenizer."""
    recall: float
    """ROUGE-1 recall: share of the needle's words (tokens, where there is no text) in it."""


def copied_tokens(
    largest: Int[Tensor, "row head"],
    written: Sequence[int],
    ids: Sequence[int],
    span: tuple[int, int],
) -> Bool[Tensor, "row head"]:
    """Where a head's largest key lies in the span and holds the token that the row writes.

    `largest` and `span` count from the first of the prompt's `ids`.
    """
    first, last = span
    inside = (largest >= first) & (largest < last)
    tokens = torch.tensor(list(ids))[largest.clamp(0, len(ids) - 1)]
    return inside & (tokens == torch.tensor(list(written), dtype=torch.long)[:, None])


def retrieval_score(
    copied: Bool[Tensor, "row head"],
    written: Sequence[int],
    needle: Sequence[int],
    repeat: bool = False,
) -> Float[Tensor, " head"]:
    """`|copied tokens as a set| / |needle as a set|`; with `repeat`, `copies / len(needle)`."""
    if repeat:
        return copied.sum(0).double() / len(needle)
    tokens = torch.tensor(list(written), dtype=torch.long)
    kinds = sorted(set(needle))
    hits = [(copied & (tokens == kind)[:, None]).any(0) for kind in kinds]
    return torch.stack(hits).double().mean(0)


def rouge_recall(wanted: Sequence[Hashable], answer: Sequence[Hashable]) -> float:
    """ROUGE-1 recall: share of the wanted words that the answer has, each as often as it has it."""
    return sum((Counter(wanted) & Counter(answer)).values()) / len(wanted)


class LargestKeys(Observer):
    """Observer that notes each head's largest key of each decoded row: `keys[site][row]`.

    Each is `batch head`, a position of the padded batch.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.keys: dict[str, list[Int[Tensor, "batch head"]]] = {site.name: [] for site in sites}

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Note the largest keys of one row."""
        row = Rows.at(site, call).dense()[:, :, -1]
        self.keys[site.name].append(row.argmax(-1).cpu())
        return call


def answered(
    lens: Lens,
    prompts: Sequence[NeedlePrompt],
    steps: int,
    stop: Collection[int] | None,
    batch_size: int,
) -> Iterator[tuple[int, Run, Bool[Tensor, "row head"]]]:
    """Each prompt's number, its run, and which heads copied which written token from the span.

    Prompts run `batch_size` at a time, those of similar length together, the longest first. Heads
    are those of the decoder's sites, side by side.
    """
    sites = decoding_sites(lens)
    # The longest first: what does not fit is told before anything ran.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        seen = LargestKeys(sites)
        inputs = padded([prompts[number].ids for number in part])
        decoded = lens.decode(inputs, steps, [seen], stop)
        largest = torch.cat([torch.stack(seen.keys[site.name]) for site in sites], dim=-1)
        for place, number in enumerate(part):
            prompt, answer = prompts[number], decoded.answers[place]
            own = largest[: len(answer), place] - decoded.padding[place]
            copied = copied_tokens(own, answer, prompt.ids, prompt.span)
            yield number, _graded(lens, prompt, answer), copied


def decoding_sites(lens: Lens) -> tuple[Site, ...]:
    """The sites at which a decoded token looks back at the text."""
    return tuple(site for site in lens.anatomy.sites if site.kind == "self")


def _graded(lens: Lens, prompt: NeedlePrompt, answer: tuple[int, ...]) -> Run:
    """A run with its recall: of words where the needle has text, else of tokens."""
    tokenizer: Any = lens.tokenizer
    text = "" if tokenizer is None else tokenizer.decode(list(answer), skip_special_tokens=True)
    wanted = words_of(prompt.answer)
    if wanted and tokenizer is not None:
        return Run(prompt, answer, text, rouge_recall(wanted, words_of(text)))
    return Run(prompt, answer, text, rouge_recall(prompt.ids[slice(*prompt.span)], answer))


def words_of(text: str) -> list[str]:
    """The words of a text; characters, where a script sets no spaces (Chinese, Japanese, Thai)."""
    return _WORD.findall(text.lower())


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Ids of several lengths as a model's input."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
