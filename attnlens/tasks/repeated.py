"""Random tokens repeated: what comes next is what followed the last time (induction)."""

from __future__ import annotations

import random

from attnlens.errors import TaskError
from attnlens.tasks.prompts import check_context, check_prompts
from attnlens.tasks.task import Task, TaskModel

NAME = "repeated_tokens"


def repeated_tokens(
    model: TaskModel, prompts: int = 16, period: int = 12, repeats: int = 2, seed: int = 0
) -> Task:
    """Distinct random tokens said `repeats` times after the start token; graded on the last copy.

    Every token of the last copy is graded but the first, which nothing announces. In the corrupt
    prompt the copies before the last are in another order, in which no token has the same
    successor; `wrong` is its last successor there. Needs no tokenizer. Olsson et al. 2022.

    Raises:
        TaskError: period under 3, repeats under 2, too few token ids, or a prompt over the context.

    """
    check_prompts(prompts, NAME)
    kept_out = model.special_ids | {model.bos_id}
    usable = [i for i in range(model.vocab_size) if i not in kept_out]
    if not 3 <= period <= len(usable):
        raise TaskError(
            f"task {NAME!r}: period={period}; it must lie between 3 and {len(usable)}, the number "
            "of ordinary tokens"
        )
    if repeats < 2:
        raise TaskError(f"task {NAME!r}: repeats={repeats}; at least 2")
    draw = random.Random(seed)
    start = [] if model.bos_id is None else [model.bos_id]
    check_context(model, [range(len(start) + period * repeats)], NAME)
    first_read = len(start) + period * (repeats - 1)
    clean: list[list[int]] = []
    corrupt: list[list[int]] = []
    wrong: list[list[int]] = []
    for _ in range(prompts):
        block = draw.sample(usable, period)
        other = _reordered(block, draw)
        clean.append(start + block * repeats)
        corrupt.append(start + other * (repeats - 1) + block)
        # its last token was followed, the last time, by the first token of the graded copy
        follows = dict(zip(other, [*other[1:], block[0]], strict=True))
        wrong.append([follows[token] for token in block[:-1]])
    return Task.from_prompts(
        NAME,
        clean,
        corrupt,
        reads=[list(range(first_read, first_read + period - 1))] * prompts,
        answers=[ids[-period + 1 :] for ids in clean],
        wrong=wrong,
        metric="loss",
    )


def _reordered(block: list[int], draw: random.Random) -> list[int]:
    """A random order in which no token has the successor that it has in `block` (cyclically)."""
    follows = dict(zip(block, block[1:] + block[:1], strict=True))
    while True:  # about a third of all orders will do; for 3 tokens the reverse always does
        other = draw.sample(block, len(block))
        if all(follows[a] != b for a, b in zip(other, other[1:] + other[:1], strict=True)):
            return other
