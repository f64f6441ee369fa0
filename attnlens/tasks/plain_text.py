"""Ordinary text as a task: at every position the token that comes next."""

from __future__ import annotations

import random
from collections.abc import Iterable

from attnlens.errors import TaskError
from attnlens.tasks.prompts import check_context, check_prompts, encode, need_tokenizer
from attnlens.tasks.task import Task, TaskModel

NAME = "plain_text"


def plain_text(
    model: TaskModel,
    texts: str | Iterable[str],
    prompts: int = 16,
    max_tokens: int = 64,
    reads: int | None = None,
    seed: int = 0,
) -> Task:
    """Windows of ordinary text, graded by the next token: `loss = -log p(x_{t+1} | x_{<=t})`.

    Texts are cut into windows of `max_tokens`, the start token that comes first in each counted.
    The last `reads` positions that have a successor are graded, all where not given; windows with
    fewer are left out, shorter ones that have as many are padded on the right. Of more windows
    than `prompts` some are drawn, in their order. In the corrupt prompt the window's tokens stand
    in another order, and `wrong` is the token that comes next there (now and then it is the
    answer).

    Raises:
        TaskError: no tokenizer, a length or number out of range, or too few windows in the texts.

    """
    check_prompts(prompts, NAME)
    start = [] if model.bos_id is None else [model.bos_id]
    if max_tokens < len(start) + 2:
        raise TaskError(f"task {NAME!r}: max_tokens={max_tokens}; at least {len(start) + 2}")
    check_context(model, [range(max_tokens)], NAME)
    count = max_tokens - 1 if reads is None else reads
    if not 1 <= count < max_tokens:
        raise TaskError(f"task {NAME!r}: reads={reads}; between 1 and {max_tokens - 1}")
    size, least = max_tokens - len(start), max(count + 1 - len(start), 2)
    windows = [
        window
        for text in ([texts] if isinstance(texts, str) else texts)
        for window in _windows(_plain(model, text), size)
        if len(window) >= least
    ]
    if len(windows) < prompts:
        raise TaskError(
            f"task {NAME!r}: the texts have {len(windows)} windows of {least} tokens or more, not "
            f"{prompts}; give more text, or ask for fewer prompts, fewer reads or fewer max_tokens"
        )
    draw = random.Random(seed)
    chosen = [windows[i] for i in sorted(draw.sample(range(len(windows)), prompts))]
    clean = [start + window for window in chosen]
    corrupt = [start + _reordered(window, draw) for window in chosen]
    return Task.from_prompts(
        NAME,
        clean,
        corrupt,
        reads=[list(range(len(ids) - 1 - count, len(ids) - 1)) for ids in clean],
        answers=[ids[-count:] for ids in clean],
        wrong=[ids[-count:] for ids in corrupt],
        metric="loss",
        texts=[need_tokenizer(model, NAME).decode(window) for window in chosen],
    )


def _plain(model: TaskModel, text: str) -> list[int]:
    """A text's ids without the special tokens that the tokenizer puts around it."""
    ids = encode(model, text, NAME)
    first = next((i for i, token in enumerate(ids) if token not in model.special_ids), len(ids))
    return ids[first:]


def _windows(ids: list[int], size: int) -> list[list[int]]:
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _reordered(window: list[int], draw: random.Random) -> list[int]:
    """The tokens in another order, if they have one."""
    other = list(window)
    while other == window and len(set(window)) > 1:
        draw.shuffle(other)
    return other
