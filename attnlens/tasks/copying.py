"""Copy from a marked position: one token of many is marked, and asked for by its mark."""

from __future__ import annotations

import random

from attnlens.errors import TaskError
from attnlens.tasks.prompts import check_context, check_prompts
from attnlens.tasks.task import Task, TaskModel

NAME = "copy"
Ids = list[int]


def copy_task(
    model: TaskModel, prompts: int = 16, length: int = 16, mark: int = 2, seed: int = 0
) -> Task:
    """Distinct random tokens, a mark before one of them, and the mark again at the end.

    The answer is the token after the mark (`a M x b c M` -> x), the one that an induction head
    copies; `spans` is its position, the source that an attribution should point at. In the corrupt
    prompt the same tokens stand in the same order, but the mark stands before another one, which is
    `wrong`: the default metric, a logit difference, is what the mark alone decides. `length` counts
    all tokens and `mark` those of the mark. Needs no tokenizer.

    Raises:
        TaskError: no room for two tokens beside the marks, too few token ids, or a prompt over the
            context.

    """
    check_prompts(prompts, NAME)
    start = [] if model.bos_id is None else [model.bos_id]
    kept_out = model.special_ids.union(start)
    usable = [i for i in range(model.vocab_size) if i not in kept_out]
    if mark < 1:
        raise TaskError(f"task {NAME!r}: mark={mark}; a mark is one token at least")
    fixed = len(start) + 2 * mark
    if not 2 <= length - fixed <= len(usable) - mark:
        raise TaskError(
            f"task {NAME!r}: length={length}; it must lie between {fixed + 2} and "
            f"{fixed + len(usable) - mark}: start and marks, and tokens that are all distinct"
        )
    check_context(model, [range(length)], NAME)
    draw = random.Random(seed)
    clean: list[Ids] = []
    corrupt: list[Ids] = []
    answers: list[Ids] = []
    wrong: list[Ids] = []
    spans: list[tuple[int, int]] = []
    for _ in range(prompts):
        drawn = draw.sample(usable, length - fixed + mark)
        sign, tokens = drawn[:mark], drawn[mark:]
        asked, instead = draw.sample(range(len(tokens)), 2)
        clean.append([*start, *tokens[:asked], *sign, *tokens[asked:], *sign])
        corrupt.append([*start, *tokens[:instead], *sign, *tokens[instead:], *sign])
        answers.append([tokens[asked]])
        wrong.append([tokens[instead]])
        source = len(start) + asked + mark
        spans.append((source, source + 1))
    reads = [[length - 1]] * prompts
    return Task.from_prompts(NAME, clean, corrupt, reads, answers, wrong, spans=spans)
