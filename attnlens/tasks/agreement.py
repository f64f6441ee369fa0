"""Agreement: a verb takes the number of its subject, not that of the noun before it."""

from __future__ import annotations

import random

from attnlens.errors import TaskError
from attnlens.tasks.pairs import Pair, task_of_pairs
from attnlens.tasks.prompts import check_prompts, word_ids
from attnlens.tasks.task import Task, TaskModel

NAME = "agreement"
Forms = tuple[str, str]
"""Singular and plural."""
SUBJECTS: tuple[Forms, ...] = (
    ("key", "keys"), ("boy", "boys"), ("girl", "girls"), ("dog", "dogs"), ("horse", "horses"),
    ("book", "books"), ("ship", "ships"), ("letter", "letters"), ("friend", "friends"),
    ("king", "kings"), ("bird", "birds"), ("flower", "flowers"), ("man", "men"),
    ("woman", "women"), ("foot", "feet"), ("tooth", "teeth"), ("goose", "geese"),
    ("mouse", "mice"), ("child", "children"), ("person", "people"), ("knife", "knives"),
    ("lady", "ladies"),
)  # fmt: skip
ATTRACTORS: tuple[Forms, ...] = (
    ("house", "houses"), ("river", "rivers"), ("table", "tables"), ("garden", "gardens"),
    ("wall", "walls"), ("tower", "towers"), ("road", "roads"), ("tree", "trees"),
    ("window", "windows"), ("door", "doors"),
)  # fmt: skip
VERBS: tuple[Forms, ...] = (("is", "are"), ("was", "were"), ("has", "have"))
BETWEEN = ("near", "behind", "beside", "by")
LEAST = 2


def agreement(model: TaskModel, prompts: int = 16, seed: int = 0) -> Task:
    """Beginnings such as "The keys near the house" (are).

    The noun before the verb, the attractor, always has the number that the subject has not. The
    corrupt prompt has the subject in its other number and the same attractor, `wrong` the verb's
    other form; `spans` is the subject. Half of the subjects are plurals, at random; only subjects
    whose two forms have equally many tokens are used. Default metric: logit difference of the two
    forms. Linzen et al. 2016; Finlayson et al. 2021.

    Raises:
        TaskError: no tokenizer, under two such subjects, no verb whose forms begin with different
            tokens, or a prompt over the context.

    """
    check_prompts(prompts, NAME)
    subjects, verbs = _subjects(model), _verbs(model)
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for _ in range(prompts):
        number = draw.randrange(2)
        noun, verb = draw.choice(subjects), draw.choice(verbs)
        rest = f"{draw.choice(BETWEEN)} the {draw.choice(ATTRACTORS)[1 - number]}"
        pairs.append(
            Pair(
                f"The {noun[number]} {rest}",
                f"The {noun[1 - number]} {rest}",
                verb[number],
                verb[1 - number],
                (len("The "), len("The ") + len(noun[number])),
            )
        )
    return task_of_pairs(model, NAME, pairs)


def _subjects(model: TaskModel) -> list[Forms]:
    found = []
    for forms in SUBJECTS:
        one, many = (word_ids(model, word, NAME) for word in forms)
        if one and len(one) == len(many) and one != many:
            found.append(forms)
    if len(found) < LEAST:
        raise TaskError(
            f"task {NAME!r} needs {LEAST} nouns whose singular and plural have as many tokens as "
            f"each other; of {_named(SUBJECTS)} this tokenizer has {len(found)}. Give words of "
            "your own with read_task, or take another task"
        )
    return found


def _verbs(model: TaskModel) -> list[Forms]:
    found = []
    for forms in VERBS:
        one, many = (word_ids(model, word, NAME)[:1] for word in forms)
        if one and many and one != many:
            found.append(forms)
    if not found:
        raise TaskError(
            f"task {NAME!r} needs a verb whose two forms begin with different tokens; of "
            f"{_named(VERBS)} this tokenizer has none. Give words of your own with read_task, or "
            "take another task"
        )
    return found


def _named(pool: tuple[Forms, ...]) -> str:
    return ", ".join("/".join(forms) for forms in pool)
