"""Indirect object: two names are said, one acts; the other one receives."""

from __future__ import annotations

import random

from attnlens.tasks import templates, words
from attnlens.tasks.prompts import check_context, check_prompts, choose_words, encode, next_id
from attnlens.tasks.task import Task, TaskModel

NAME = "indirect_object"


def indirect_object(model: TaskModel, prompts: int = 16, seed: int = 0) -> Task:
    """Sentences such as "When Ann and Ben came to the park, Ben gave the book to" (Ann).

    Half of them name the giver first, at random. In the corrupt prompt the other name gives, so
    that the answer is the other one too. Default metric: logit difference of the two names.
    Wang et al. 2022.

    Raises:
        TaskError: no tokenizer, no two names of equal length in it, or a prompt over the context.

    """
    check_prompts(prompts, NAME)
    names = choose_words(model, words.NAMES, 2, NAME)
    draw = random.Random(seed)
    texts: list[str] = []
    corrupt: list[list[int]] = []
    answers: list[list[int]] = []
    wrong: list[list[int]] = []
    for _ in range(prompts):
        first, second = draw.sample(names, 2)
        giver, receiver = draw.choice([(first, second), (second, first)])
        template = draw.choice(templates.INDIRECT_OBJECT)
        place, item = draw.choice(words.PLACES), draw.choice(words.OBJECTS)
        text, other = (
            templates.indirect_object_text(template, first, second, who, place, item)
            for who in (giver, receiver)
        )
        texts.append(text)
        corrupt.append(encode(model, other, NAME))
        answers.append([next_id(model, text, receiver, NAME)])
        wrong.append([next_id(model, other, giver, NAME)])
    clean = [encode(model, text, NAME) for text in texts]
    check_context(model, clean + corrupt, NAME)
    reads = [[len(ids) - 1] for ids in clean]
    return Task.from_prompts(NAME, clean, corrupt, reads, answers, wrong, texts=texts)
