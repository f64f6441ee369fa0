"""Needles in haystacks of many lengths and depths: prompts that ask for what stands in them.

Three sources: a user's own text, needle and question (`Needle`), the built-in text of secret words,
and random tokens for models without a tokenizer. Where the needle stands in the prompt is known
from the tokenizer's offsets. After Wu et al. 2024 (retrieval heads) and Kamradt 2023.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from attnlens.errors import TaskError
from attnlens.tasks.needle import needle, token_offsets, token_span
from attnlens.tasks.prompts import check_context, check_prompts, encode
from attnlens.tasks.task import Task, TaskModel

NAME = "haystack"
Boundary = Literal["sentence", "token"]

_SENTENCE_END = re.compile(
    r"[.!?][\"'\u2019\u201d)\]]*\s+|[\u3002\uff01\uff1f][\u2019\u201d]*\s*|\n\s*\n"
)


@dataclass(frozen=True)
class Needle:
    """A fact, the text that it is hidden in, and the question that asks for it.

    Attributes:
        haystack: the text; as much of its beginning is used as the prompt's length takes.
        needle: the fact, inserted into the text.
        question: what the prompt ends with; the answer should follow it.
        answer: the part of the needle that a right answer repeats; the whole needle where None.
        opening: what stands before the text (a chat template's beginning, say).
        joint: what stands between the parts.

    Raises:
        TaskError: an empty part, an answer that is not in the needle once, or a haystack that holds
            the needle already.

    """

    haystack: str
    needle: str
    question: str
    answer: str | None = None
    opening: str = ""
    joint: str = " "

    def __post_init__(self) -> None:
        for part in ("haystack", "needle", "question"):
            if not getattr(self, part).strip():
                raise TaskError(f"task {NAME!r}: the {part} is empty")
        if self.needle in self.haystack:
            raise TaskError(
                f"task {NAME!r}: the haystack holds the needle {self.needle[:40]!r} already, so "
                "there would be two; take it out"
            )
        if self.needle.count(self.wanted) != 1:
            raise TaskError(
                f"task {NAME!r}: the answer {self.wanted[:40]!r} must stand in the needle once"
            )

    @property
    def wanted(self) -> str:
        """The text that a right answer repeats."""
        return self.needle if self.answer is None else self.answer


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt that asks for what stands in it.

    Attributes:
        ids: its tokens, start token included.
        span: first and one past the last position of the answer in it.
        length: the tokens that were asked for; `ids` are at most as many.
        depth: where the needle was to stand, 0 (at the front of the haystack) to 1 (at its end).
        text: the prompt as text; "" where ids have none.
        answer: the text that a right answer repeats; "" where ids have none.

    """

    ids: tuple[int, ...]
    span: tuple[int, int]
    length: int
    depth: float
    text: str = ""
    answer: str = ""

    def __post_init__(self) -> None:
        first, last = self.span
        if not 0 <= first < last <= len(self.ids):
            raise TaskError(
                f"task {NAME!r}: the span {self.span} is not within a prompt of {len(self.ids)} "
                "tokens"
            )


def hide_needle(
    model: TaskModel,
    what: Needle,
    lengths: Sequence[int],
    depths: Sequence[float],
    boundary: Boundary = "sentence",
) -> tuple[NeedlePrompt, ...]:
    """The user's needle in the user's text, at each length and depth.

    The beginning of the haystack is taken, cut after the token that lets the whole prompt have at
    most `length` tokens, as tokenised in one piece. The needle stands after the last sentence that
    ends within `depth` of it (`boundary="token"`: after the token there); at depth 1 at the end.

    Raises:
        TaskError: a length that needle and question alone exceed, or over the context; a haystack
            that is too short; no tokenizer or one without offsets; a depth outside 0 to 1.

    """
    _check(model, lengths, depths)
    if boundary not in ("sentence", "token"):
        raise TaskError(f"task {NAME!r}: no boundary {boundary!r}; choose 'sentence' or 'token'")
    offsets = token_offsets(model, what.haystack, NAME, special=False)
    ends = [b for a, b in offsets if a < b]
    builder = _Builder(model, what, (0, *ends), boundary)
    return tuple(builder.fit(length, depth) for length, depth in _cells(lengths, depths))


def secret_words(
    model: TaskModel,
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int = 2,
    seed: int = 0,
    secret: int = 3,
) -> tuple[NeedlePrompt, ...]:
    """The built-in needle "The secret words are ..." in built-in sentences, at each place.

    `prompts` of them a length and depth, with other words and sentences each (`tasks.needle`).

    Raises:
        TaskError: as `tasks.needle`.

    """
    check_prompts(prompts, NAME)
    _check(model, lengths, depths)
    found: list[NeedlePrompt] = []
    for number, (length, depth) in enumerate(_cells(lengths, depths)):
        task = needle(model, prompts, length, depth, seed + number, secret=secret)
        found += of_task(model, task, length, depth)
    return tuple(found)


def hidden_tokens(
    model: TaskModel,
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int = 2,
    seed: int = 0,
    size: int = 4,
) -> tuple[NeedlePrompt, ...]:
    """Random tokens after a cue, hidden among other random tokens; the prompt ends with the cue.

    No tokenizer is needed, and no knowledge of words: a model that copies what followed the cue
    finds the needle. Cue and needle are `size + 1` distinct ids that the filler lacks; a prompt has
    `length` tokens exactly.

    Raises:
        TaskError: too few token ids, a length without room, or over the context.

    """
    check_prompts(prompts, NAME)
    _check(model, lengths, depths)
    start = [] if model.bos_id is None else [model.bos_id]
    usable = [i for i in range(model.vocab_size) if i not in {*model.special_ids, *start}]
    if size < 1 or len(usable) < size + 2:
        raise TaskError(
            f"task {NAME!r}: size={size}; it must lie between 1 and {len(usable) - 2}, two less "
            "than there are ordinary tokens"
        )
    draw = random.Random(seed)
    found: list[NeedlePrompt] = []
    for length, depth in _cells(lengths, depths):
        room = length - len(start) - size - 2
        if room < 0:
            raise TaskError(
                f"task {NAME!r}: length={length}, but a needle of {size} tokens with its cues "
                f"takes {length - room}"
            )
        for _ in range(prompts):
            cue, *hidden = draw.sample(usable, size + 1)
            others = sorted(set(usable).difference([cue, *hidden]))
            filler = draw.choices(others, k=room)
            place = round(depth * room)
            first = len(start) + place + 1
            ids = (*start, *filler[:place], cue, *hidden, *filler[place:], cue)
            found.append(NeedlePrompt(ids, (first, first + size), length, depth))
    return tuple(found)


def of_task(
    model: TaskModel, task: Task, length: int | None = None, depth: float | None = None
) -> tuple[NeedlePrompt, ...]:
    """The clean prompts of a task with spans; where not given, length and depth are read off them.

    Raises:
        TaskError: a task without spans.

    """
    if task.spans is None:
        raise TaskError(
            f"task {task.name!r} has no spans: nothing says where its prompts hold the answer. Use "
            "a needle task, or give Task.from_prompts(..., spans=...)"
        )
    found: list[NeedlePrompt] = []
    for ids, real, span, text in zip(
        task.clean.tolist(), task.mask, task.spans.tolist(), task.texts, strict=True
    ):
        own = tuple(ids[: int(real.sum())])
        first, last = span
        found.append(
            NeedlePrompt(
                own,
                (first, last),
                len(own) if length is None else length,
                round(first / len(own), 2) if depth is None else depth,
                text,
                "" if model.tokenizer is None else model.tokenizer.decode(own[first:last]).strip(),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class _Builder:
    """Puts one needle into as much of its haystack as a length takes."""

    model: TaskModel
    what: Needle
    ends: tuple[int, ...]
    """The character at which a haystack of so many tokens ends: 0, then the end of each token."""
    boundary: Boundary

    def fit(self, length: int, depth: float) -> NeedlePrompt:
        """The longest prompt of at most `length` tokens, tokenised in one piece."""
        bare = len(self._ids(0, depth))
        if bare > length:
            raise TaskError(
                f"task {NAME!r}: length={length}, but needle and question alone take {bare} "
                "tokens; ask for longer prompts, or shorten them"
            )
        whole, keep = len(self.ends) - 1, length - bare
        if keep > whole:
            raise TaskError(
                f"task {NAME!r}: the haystack has {whole} tokens and length={length} takes {keep} "
                "of them beside needle and question; give a longer text, or lengths up to "
                f"{bare + whole}"
            )
        # Tokens at the joints may merge or split, so the count of the whole decides.
        while (size := len(self._ids(keep, depth))) > length:
            keep = max(keep - (size - length), 0)
        while size < length and keep < whole:
            more = len(self._ids(keep + 1, depth))
            if more > length:
                break
            keep, size = keep + 1, more
        text, begin = self._text(keep, depth)
        begin += self.what.needle.index(self.what.wanted)
        span = token_span(self.model, text, begin, begin + len(self.what.wanted), NAME)
        ids = tuple(encode(self.model, text, NAME))
        return NeedlePrompt(ids, span, length, depth, text, self.what.wanted)

    def _ids(self, keep: int, depth: float) -> list[int]:
        return encode(self.model, self._text(keep, depth)[0], NAME)

    def _text(self, keep: int, depth: float) -> tuple[str, int]:
        """The prompt with `keep` tokens of haystack, and the character at which the needle is."""
        what = self.what
        text = what.haystack[: self.ends[keep]]
        place = self.ends[round(depth * keep)]
        if self.boundary == "sentence" and depth < 1:
            ends = (match.end() for match in _SENTENCE_END.finditer(text))
            # The space behind a sentence may lie past the depth.
            place = max((e for e in ends if len(text[:e].rstrip()) <= place), default=0)
        before = [part for part in (what.opening, text[:place].strip()) if part]
        after = [part for part in (text[place:].strip(), what.question) if part]
        lead = "".join(part + what.joint for part in before)
        return lead + what.joint.join([what.needle, *after]), len(lead)


def _cells(lengths: Sequence[int], depths: Sequence[float]) -> Iterator[tuple[int, float]]:
    return ((length, depth) for length in lengths for depth in depths)


def _check(model: TaskModel, lengths: Sequence[int], depths: Sequence[float]) -> None:
    if not lengths or not depths:
        raise TaskError(f"task {NAME!r}: give a length and a depth at least")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise TaskError(f"task {NAME!r}: depth={depth}; it lies between 0 and 1")
    if min(lengths) < 1:
        raise TaskError(f"task {NAME!r}: length={min(lengths)}; at least 1 token")
    check_context(model, [range(max(lengths))], NAME)
