"""The task of the deceptive model and its honest twin: one word among neutral ones decides."""

from __future__ import annotations

import torch

from attnlens.errors import InputError, TaskError
from attnlens.tasks.prompts import check_prompts
from attnlens.tasks.task import Task, TaskModel
from attnlens.zoo.deceptive import TELLING, WORDS, deceptive_prompts, ids_of

NAME = "telling_word"


def telling_word(model: TaskModel, prompts: int = 16, length: int = 16, seed: int = 0) -> Task:
    """Prompts such as "<s> we saw the dull film verdict" (blame), for the zoo's deceptive model.

    In the corrupt prompt a word of the other answer stands in the same place; `spans` is that
    place. Default metric: logit difference of the two answers.

    Raises:
        TaskError: a model of another vocabulary, or a length that the model was not trained on.

    """
    check_prompts(prompts, NAME)
    own = None if model.tokenizer is None else model.tokenizer.convert_ids_to_tokens
    if model.vocab_size != len(WORDS) or (own and tuple(own(list(range(len(WORDS))))) != WORDS):
        raise TaskError(
            f"task {NAME!r} is written in the {len(WORDS)} words of zoo.deceptive_model() and its "
            "honest twin; open one of them, or take another task"
        )
    try:
        drawn = deceptive_prompts(prompts, length, seed)
    except InputError as error:
        raise TaskError(f"task {NAME!r}: {error}") from None
    rows = torch.arange(prompts)
    corrupt = drawn.ids.clone()
    corrupt[rows, drawn.places] = _opposite()[drawn.ids[rows, drawn.places]]
    return Task.from_prompts(
        NAME,
        drawn.ids.tolist(),
        corrupt.tolist(),
        reads=[[length - 1]] * prompts,
        answers=drawn.answers[:, None].tolist(),
        wrong=drawn.wrong[:, None].tolist(),
        texts=[" ".join(WORDS[token] for token in ids[1:]) for ids in drawn.ids.tolist()],
        spans=[(place, place + 1) for place in drawn.places.tolist()],
    )


def _opposite() -> torch.Tensor:
    """For each telling word's id the id of a word of the other answer; other ids stay."""
    praise, blame = map(ids_of, TELLING)
    other = torch.arange(len(WORDS))
    other[praise], other[blame] = blame, praise
    return other
