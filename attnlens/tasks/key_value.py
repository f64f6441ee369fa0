"""Key-value recall: pairs are listed, then one key is said again."""

from __future__ import annotations

import random

from attnlens.errors import TaskError
from attnlens.tasks import templates, words
from attnlens.tasks.prompts import check_context, check_prompts, choose_words, encode, next_id
from attnlens.tasks.task import Task, TaskModel

NAME = "key_value"


def key_value(model: TaskModel, prompts: int = 16, pairs: int = 4, seed: int = 0) -> Task:
    """Prompts such as "Pairs: fox is gold, oak is red. Again: oak is" (red).

    The corrupt prompt asks for another key of the list; `wrong` is that key's value. Default
    metric: logit difference of the two values.

    Raises:
        TaskError: no tokenizer, fewer words than `pairs` that it keeps apart, pairs under 2, or a
            prompt over the context.

    """
    check_prompts(prompts, NAME)
    if pairs < 2:
        raise TaskError(f"task {NAME!r}: pairs={pairs}; at least 2")
    keys = choose_words(model, words.KEYS, pairs, NAME, distinct=False)
    values = choose_words(model, words.VALUES, pairs, NAME)
    draw = random.Random(seed)
    texts: list[str] = []
    corrupt: list[list[int]] = []
    answers: list[list[int]] = []
    wrong: list[list[int]] = []
    for _ in range(prompts):
        some_keys, some_values = draw.sample(keys, pairs), draw.sample(values, pairs)
        asked, instead = draw.sample(range(pairs), 2)
        text, other = (
            templates.key_value_text(some_keys, some_values, some_keys[i]) for i in (asked, instead)
        )
        texts.append(text)
        corrupt.append(encode(model, other, NAME))
        answers.append([next_id(model, text, some_values[asked], NAME)])
        wrong.append([next_id(model, other, some_values[instead], NAME)])
    clean = [encode(model, text, NAME) for text in texts]
    check_context(model, clean + corrupt, NAME)
    reads = [[len(ids) - 1] for ids in clean]
    return Task.from_prompts(NAME, clean, corrupt, reads, answers, wrong, texts=texts)
