"""Docstrings: a function's arguments are described one by one; the next one is due."""

from __future__ import annotations

import random

from attnlens.tasks import words
from attnlens.tasks.pairs import Pair, task_of_pairs
from attnlens.tasks.prompts import check_prompts, choose_words
from attnlens.tasks.task import Task, TaskModel

NAME = "docstring"
ARGUMENTS = (
    "size", "name", "file", "path", "key", "value", "index", "mode", "level", "count", "text",
    "line", "page", "node", "port", "user", "date", "time", "list", "state", "width", "order",
    "group", "field", "length", "result", "table", "word", "total", "base", "first", "last",
)  # fmt: skip
FUNCTIONS = ("load", "send", "read", "find", "make", "show", "move", "keep")
NAMED = 4


def docstring_arguments(model: TaskModel, prompts: int = 16, seed: int = 0) -> Task:
    """Python such as `def load(self, size, name, file, path):` and a docstring begun (file).

    The docstring describes the first two arguments and ends in the `:param` of the third. In the
    corrupt prompt the third and the fourth argument of the definition have changed places,
    so that the fourth is due; it is `wrong`. `spans` is the third argument in the definition.
    Default metric: logit difference of the two arguments. Heimersheim and Janiak 2023.

    Raises:
        TaskError: no tokenizer, fewer than four names that it keeps apart, or a prompt over the
            context.

    """
    check_prompts(prompts, NAME)
    names = choose_words(model, ARGUMENTS, NAMED, NAME)
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for _ in range(prompts):
        first, second, due, other = draw.sample(names, NAMED)
        function = draw.choice(FUNCTIONS)
        opening = f"def {function}(self, {first}, {second}, "
        about = _described(first, second, draw)
        pairs.append(
            Pair(
                f"{opening}{due}, {other}):\n{about}",
                f"{opening}{other}, {due}):\n{about}",
                due,
                other,
                (len(opening), len(opening) + len(due)),
            )
        )
    return task_of_pairs(model, NAME, pairs)


def _described(first: str, second: str, draw: random.Random) -> str:
    """The docstring up to the third argument; what it says of the others means nothing."""
    said = [f"{draw.choice(words.VALUES)} {draw.choice(words.KEYS)}" for _ in range(3)]
    return (
        f'    """{said[0]}\n\n'
        f"    :param {first}: {said[1]}\n"
        f"    :param {second}: {said[2]}\n"
        "    :param"
    )
