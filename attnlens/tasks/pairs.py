"""Pairs of texts, clean and corrupt, that become a task: graded at their end, with a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnlens.errors import TaskError
from attnlens.tasks.needle import token_span
from attnlens.tasks.prompts import check_context, encode, next_id
from attnlens.tasks.task import Task, TaskModel


@dataclass(frozen=True)
class Pair:
    """A clean text and its corrupt twin.

    Attributes:
        clean: the text up to the answer.
        corrupt: the same with another word or other words of equal length in tokens.
        answer: the word that comes next in the clean text, without the space before it.
        wrong: the word that comes next in the corrupt text.
        source: first and one past the last character of the clean text that the answer hangs on.

    """

    clean: str
    corrupt: str
    answer: str
    wrong: str
    source: tuple[int, int]


def task_of_pairs(model: TaskModel, name: str, pairs: Sequence[Pair]) -> Task:
    """A task of pairs, graded on the first token of the word that comes next.

    `spans` are the tokens of the sources; none where the tokenizer gives no offsets.

    Raises:
        TaskError: twins of unequal length in tokens, answers that begin with the same token, or a
            prompt over the context.

    """
    clean = [encode(model, pair.clean, name) for pair in pairs]
    corrupt = [encode(model, pair.corrupt, name) for pair in pairs]
    check_context(model, clean + corrupt, name)
    answers = [[next_id(model, pair.clean, pair.answer, name)] for pair in pairs]
    wrong = [[next_id(model, pair.corrupt, pair.wrong, name)] for pair in pairs]
    for pair, right, other in zip(pairs, answers, wrong, strict=True):
        if right == other:
            raise TaskError(
                f"task {name!r}: {pair.answer!r} and {pair.wrong!r} begin with the same token "
                "where they answer, so that the two cannot be told apart"
            )
    spans = None
    if getattr(model.tokenizer, "is_fast", False):
        spans = [token_span(model, pair.clean, *pair.source, name) for pair in pairs]
    return Task.from_prompts(
        name,
        clean,
        corrupt,
        reads=[[len(ids) - 1] for ids in clean],
        answers=answers,
        wrong=wrong,
        texts=[pair.clean for pair in pairs],
        spans=spans,
    )
