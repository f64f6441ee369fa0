"""Needle in filler text: a fact stands somewhere in a long text and is asked for at the end."""

from __future__ import annotations

import random
import re
from itertools import accumulate, cycle

from attnlens.errors import TaskError
from attnlens.tasks import templates, words
from attnlens.tasks.prompts import (
    check_context,
    check_prompts,
    choose_words,
    encode,
    need_tokenizer,
    next_id,
)
from attnlens.tasks.task import Task, TaskModel

NAME = "needle"


def needle(
    model: TaskModel,
    prompts: int = 16,
    length: int = 128,
    depth: float = 0.5,
    seed: int = 0,
    *,
    secret: int = 3,
    filler: str | None = None,
    needle_text: str = templates.NEEDLE_TEXT,
    question: str = templates.NEEDLE_QUESTION,
) -> Task:
    """Filler text of at most `length` tokens that holds "The secret words are ..." and asks for it.

    Graded at the end of the prompt on the first of the `secret` words. The corrupt prompt has other
    words at the same place. `spans` gives the words' positions, found by the tokenizer's offsets:
    the tokens that a full answer would copy. Default metric: logit difference of the first words.
    After Wu et al. 2024 (retrieval heads).

    Args:
        model: what the prompts are for.
        prompts: number of prompts.
        length: most tokens a prompt may have, the start token included.
        depth: where the needle stands, 0 (at the front of the filler) to 1 (at its end).
        seed: of the words and the filler.
        secret: number of words in the needle.
        filler: a text to hide the needle in, cut into sentences; the built-in one if None.
        needle_text: the fact, with "{words}" where the words go.
        question: what the prompt ends with; the needle's words should follow it.

    Raises:
        TaskError: no tokenizer or one without offsets, too few words, a `length` that the needle
            and the question alone exceed, or a prompt over the context.

    """
    check_prompts(prompts, NAME)
    _check_arguments(depth, secret, needle_text)
    pool = choose_words(model, words.VALUES, 2 * secret, NAME)
    draw = random.Random(seed)
    texts: list[str] = []
    corrupt: list[list[int]] = []
    answers: list[list[int]] = []
    wrong: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    for _ in range(prompts):
        picked = draw.sample(pool, 2 * secret)
        said, other = " ".join(picked[:secret]), " ".join(picked[secret:])
        alone, _ = templates.needle_text([], 0, said, needle_text, question)
        sentences, place = _hide(model, alone, length, depth, filler, draw)
        text, begins = templates.needle_text(sentences, place, said, needle_text, question)
        twin, _ = templates.needle_text(sentences, place, other, needle_text, question)
        texts.append(text)
        corrupt.append(encode(model, twin, NAME))
        answers.append([next_id(model, text, picked[0], NAME)])
        wrong.append([next_id(model, twin, picked[secret], NAME)])
        spans.append(token_span(model, text, begins, begins + len(said), NAME))
    clean = [encode(model, text, NAME) for text in texts]
    check_context(model, clean + corrupt, NAME)
    reads = [[len(ids) - 1] for ids in clean]
    return Task.from_prompts(NAME, clean, corrupt, reads, answers, wrong, texts=texts, spans=spans)


def _check_arguments(depth: float, secret: int, needle_text: str) -> None:
    if not 0 <= depth <= 1:
        raise TaskError(f"task {NAME!r}: depth={depth}; it lies between 0 and 1")
    if secret < 1:
        raise TaskError(f"task {NAME!r}: secret={secret}; at least 1 word")
    if needle_text.count("{words}") != 1:
        raise TaskError(f"task {NAME!r}: needle_text {needle_text!r} must hold '{{words}}' once")


def _hide(
    model: TaskModel, alone: str, length: int, depth: float, filler: str | None, draw: random.Random
) -> tuple[list[str], int]:
    """Sentences that fill `length` tokens beside the needle, and before which one it goes."""
    room = length - len(encode(model, alone, NAME))
    if room < 0:
        raise TaskError(
            f"task {NAME!r}: length={length}, but needle and question alone take {length - room} "
            "tokens"
        )
    start = len(encode(model, "a", NAME))
    source = _sentences(filler, draw)
    costs = {text: len(encode(model, f"a {text}", NAME)) - start for text in set(source)}
    chosen: list[str] = []
    for sentence in cycle(source):
        if costs[sentence] > room:
            break
        room -= max(1, costs[sentence])
        chosen.append(sentence)
    ends = [0, *accumulate(costs[sentence] for sentence in chosen)]
    place = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
    return chosen, place


def _sentences(filler: str | None, draw: random.Random) -> list[str]:
    """The built-in sentences in random order, or those of a text from a random one on."""
    if filler is None:
        return draw.sample(words.FILLER, len(words.FILLER))
    found = [s for s in (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", filler)) if s]
    if not found:
        raise TaskError(f"task {NAME!r}: the filler text is empty")
    first = draw.randrange(len(found))
    return found[first:] + found[:first]


def token_span(
    model: TaskModel, text: str, begin: int, end: int, task: str = NAME
) -> tuple[int, int]:
    """First and one past the last token that covers characters `begin` to `end` of a prompt.

    Raises:
        TaskError: a tokenizer without offsets, or one whose offsets leave the characters out.

    """
    inside = [
        number
        for number, (a, b) in enumerate(token_offsets(model, text, task))
        if a < b and a < end and b > begin
    ]
    if not inside:
        raise TaskError(
            f"task {task!r}: the tokenizer's offsets do not cover {text[begin:end][:40]!r}"
        )
    return inside[0], inside[-1] + 1


def token_offsets(
    model: TaskModel, text: str, task: str = NAME, special: bool = True
) -> list[tuple[int, int]]:
    """First and one past the last character of each token; TaskError where the tokenizer has none.

    Without `special` the tokens that the tokenizer adds around a text are left out.
    """
    tokenizer = need_tokenizer(model, task)
    if not getattr(tokenizer, "is_fast", False):
        raise TaskError(
            f"task {task!r}: places are found by token offsets and this tokenizer gives none; "
            "load a fast one"
        )
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
    return [(int(a), int(b)) for a, b in found["offset_mapping"]]
