"""From words to prompts under any tokenizer: choosing words, encoding, finding the graded token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from attnlens.errors import TaskError
from attnlens.tasks.task import TaskModel


def need_tokenizer(model: TaskModel, task: str) -> Any:
    """The model's tokenizer; TaskError where it has none."""
    if model.tokenizer is None:
        raise TaskError(
            f"task {task!r} is written in words and this model has no tokenizer; load one with "
            "tokenizer=..., or use repeated_tokens, which needs none"
        )
    return model.tokenizer


def encode(model: TaskModel, text: str, task: str) -> list[int]:
    """Ids of a prompt to be continued: with the tokenizer's start token, without an end token."""
    ids = [int(i) for i in need_tokenizer(model, task)(text)["input_ids"]]
    while ids and ids[-1] in model.special_ids:
        ids.pop()
    return ids


def next_id(model: TaskModel, text: str, word: str, task: str) -> int:
    """The token that follows `text` when `word` does: the word's first token, with its space.

    Raises:
        TaskError: the tokenizer splits the text otherwise when the word follows.

    """
    added = following(model, text, f" {word}", task)
    if not added:
        raise TaskError(
            f"task {task!r}: this tokenizer does not keep {text[-20:]!r} apart from {word!r}, so "
            "the answer has no token of its own"
        )
    return added[0]


def following(model: TaskModel, text: str, more: str, task: str) -> list[int]:
    """The tokens that `more` adds to `text`; none where they split the text otherwise."""
    before, after = encode(model, text, task), encode(model, text + more, task)
    return after[len(before) :] if after[: len(before)] == before else []


def word_ids(model: TaskModel, word: str, task: str) -> tuple[int, ...]:
    """The tokens of a word after a space; none where the first of them does not tell of it."""
    start = len(encode(model, "a", task))
    ids = tuple(encode(model, f"a {word}", task)[start:])
    known = ids and _readable(model, ids[0]) and not model.special_ids.intersection(ids)
    return ids if known else ()


def choose_words(
    model: TaskModel, pool: Iterable[str], count: int, task: str, *, distinct: bool = True
) -> list[str]:
    """Words of the pool that are one token each after a space, or else all of one same length.

    With `distinct`, no two of them start with the same token, so that the first tells them apart.

    Raises:
        TaskError: fewer than `count` such words.

    """
    words = list(pool)
    groups: dict[int, dict[tuple[int, ...], str]] = {}
    for word in words:
        ids = word_ids(model, word, task)
        if ids:
            groups.setdefault(len(ids), {}).setdefault(ids[:1] if distinct else ids, word)
    found = {length: list(group.values()) for length, group in groups.items()}
    if len(found.get(1, ())) >= count:
        return found[1]
    most = max(found.values(), key=len, default=[])
    if len(most) < count:
        raise TaskError(
            f"task {task!r} needs {count} words of equal length in tokens"
            f"{', each with its own first token' if distinct else ''}; this tokenizer has "
            f"{len(most)} of them among its {len(words)} ({', '.join(words[:4])}, ...): ask for "
            "fewer, or give prompts of your own with read_task"
        )
    return most


def check_prompts(count: int, task: str) -> None:
    """TaskError unless at least one prompt is asked for."""
    if count < 1:
        raise TaskError(f"task {task!r}: prompts={count}; ask for at least one")


def check_context(model: TaskModel, prompts: Sequence[Sequence[int]], task: str) -> None:
    """TaskError if a prompt is longer than the model's context."""
    longest = max(len(ids) for ids in prompts)
    if model.context is not None and longest > model.context:
        raise TaskError(
            f"task {task!r}: a prompt has {longest} tokens and the model's context is "
            f"{model.context}; ask for a shorter one"
        )


def _readable(model: TaskModel, token: int) -> bool:
    """False for a token that is the space before a word and no more."""
    return bool(need_tokenizer(model, "").decode([token]).strip())
