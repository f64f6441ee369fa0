"""The task of the zoo's name-copying model: of two names the one that was said once."""

from __future__ import annotations

from attnlens.errors import InputError, TaskError
from attnlens.tasks.prompts import check_prompts
from attnlens.tasks.task import Task, TaskModel
from attnlens.zoo.naming import CODE, name_prompts

NAME = "other_name"


def other_name(model: TaskModel, prompts: int = 16, length: int = 14, seed: int = 0) -> Task:
    """Token ids such as `START . A . B . . A . ASK` (B), for `zoo.name_model()`.

    In the corrupt prompt a third name is said twice and A once, so that the answer is A; see
    `zoo.name_prompts`. The edges that matter are those of `zoo.name_circuit()`. Default metric:
    logit difference of the two names.

    Raises:
        TaskError: a model of another vocabulary, or a length outside 9 to 32.

    """
    check_prompts(prompts, NAME)
    if model.vocab_size != CODE or model.tokenizer is not None:
        raise TaskError(
            f"task {NAME!r} is written in the {CODE} token ids of zoo.name_model(); open that, or "
            "take indirect_object, which is written in words"
        )
    try:
        drawn = name_prompts(prompts, length, seed)
    except InputError as error:
        raise TaskError(f"task {NAME!r}: {error}") from None
    return Task.from_prompts(
        NAME,
        drawn.clean.tolist(),
        drawn.corrupt.tolist(),
        reads=[[length - 1]] * prompts,
        answers=drawn.answers[:, None].tolist(),
        wrong=drawn.wrong[:, None].tolist(),
    )
