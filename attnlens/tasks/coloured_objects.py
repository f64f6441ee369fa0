"""Coloured objects: several are listed, each in its colour; the colour of one is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from attnlens.errors import TaskError
from attnlens.tasks import words
from attnlens.tasks.pairs import Pair, task_of_pairs
from attnlens.tasks.prompts import check_prompts, choose_words
from attnlens.tasks.task import Task, TaskModel

NAME = "coloured_objects"
COLOURS = (
    "red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "silver", "purple",
    "yellow", "violet", "tan",
)  # fmt: skip


def coloured_objects(model: TaskModel, prompts: int = 16, objects: int = 3, seed: int = 0) -> Task:
    """Prompts such as "On the table there is a red cup, ... The colour of the cup is" (red).

    The corrupt prompt asks for another object of the list; `wrong` is that object's colour.
    `spans` is where the answer stands in the list. Default metric: logit difference of the two
    colours. A task to hold beside `indirect_object`: both fetch a word of the prompt and leave
    another out. Merullo et al. 2024.

    Raises:
        TaskError: no tokenizer, fewer colours or objects than `objects` that it keeps apart,
            objects under 2, or a prompt over the context.

    """
    check_prompts(prompts, NAME)
    if objects < 2:
        raise TaskError(f"task {NAME!r}: objects={objects}; at least 2")
    colours = choose_words(model, COLOURS, objects, NAME)
    things = choose_words(model, words.OBJECTS, objects, NAME, distinct=False)
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for _ in range(prompts):
        some_colours, some_things = draw.sample(colours, objects), draw.sample(things, objects)
        asked, instead = draw.sample(range(objects), 2)
        listed = [
            f"{colour} {thing}" for colour, thing in zip(some_colours, some_things, strict=True)
        ]
        clean, corrupt = (_text(listed, some_things[i]) for i in (asked, instead))
        answer, wrong = some_colours[asked], some_colours[instead]
        begins = clean.index(f" {listed[asked]}") + 1
        pairs.append(Pair(clean, corrupt, answer, wrong, (begins, begins + len(answer))))
    return task_of_pairs(model, NAME, pairs)


def _text(listed: Sequence[str], asked: str) -> str:
    before = ", ".join(f"a {one}" for one in listed[:-1])
    return f"On the table there is {before} and a {listed[-1]}. The colour of the {asked} is"
