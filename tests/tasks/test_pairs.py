"""What all tasks of clean and corrupt pairs have in common, under tokenizers of every kind."""

import pytest
import torch

from attnlens.errors import TaskError
from attnlens.tasks import (
    agreement,
    capitals,
    coloured_objects,
    docstring_arguments,
    greater_than,
)
from attnlens.tasks.pairs import Pair, task_of_pairs
from tests.tasks import models

BUILDERS = {
    "agreement": agreement,
    "capitals": capitals,
    "coloured_objects": coloured_objects,
    "docstring": docstring_arguments,
    "greater_than": greater_than,
}
builders = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def built(build, model, **asked):
    """The task, unless the tokenizer writes years in pieces that the task has no use for."""
    try:
        return build(model, **asked)
    except TaskError as error:
        if build is greater_than and "needs years such as 1743" in str(error):
            pytest.skip("this tokenizer does not part years")
        raise


@builders
def test_twins_are_of_one_length_and_end_alike(any_model, build):
    task = built(build, any_model, prompts=40, seed=3)
    assert len(task) == 40
    assert task.name in BUILDERS
    assert task.metric == "logit_difference"
    for i, text in enumerate(task.texts):
        own = task.mask[i]
        clean, corrupt = task.clean[i][own].tolist(), task.corrupt[i][own].tolist()
        assert clean == models.ids_of(any_model, text)
        assert clean != corrupt
        assert clean[-1] == corrupt[-1]
        assert set(task.reads[i].tolist()) == {len(clean) - 1}
        assert not set(task.answers[i].tolist()) & set(task.wrong[i].tolist())
        assert not any_model.special_ids & {*task.answers[i].tolist(), *task.wrong[i].tolist()}


@pytest.mark.parametrize("build", [agreement, capitals, greater_than])
def test_only_the_source_differs(any_model, build):
    task = built(build, any_model, prompts=40, seed=1)
    positions = torch.arange(task.clean.shape[1])
    for i in range(40):
        first, last = task.spans[i].tolist()
        differ = task.clean[i] != task.corrupt[i]
        assert not differ[(positions < first) | (positions >= last)].any()
        assert differ[first:last].any()


@builders
def test_the_answer_continues_the_prompt(any_model, build):
    task = built(build, any_model, prompts=10)
    for i in range(10):
        ids = task.clean[i][task.mask[i]].tolist()
        joined = any_model.tokenizer.decode([*ids, int(task.answers[i, 0])])
        assert joined.startswith(any_model.tokenizer.decode(ids))
        assert any_model.tokenizer.decode([int(task.answers[i, 0])]).strip()


@builders
def test_the_seed_decides(any_model, build):
    first, again, other = (built(build, any_model, prompts=8, seed=s) for s in (0, 0, 1))
    assert first.texts == again.texts
    for name in ("clean", "corrupt", "answers", "wrong", "spans"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.texts != other.texts


@builders
def test_it_refuses(build):
    with pytest.raises(TaskError, match="this model has no tokenizer"):
        build(models.Model())
    with pytest.raises(TaskError, match="read_task"):
        build(models.one_token())
    with pytest.raises(TaskError, match="context is 5"):
        build(models.of(models.two_digits().tokenizer, context=5))
    with pytest.raises(TaskError, match="prompts=0"):
        build(models.gpt2_like(), prompts=0)


@pytest.mark.parametrize(
    ("build", "named"),
    [(agreement, "man/men"), (capitals, "France"), (coloured_objects, "red, blue"),
     (docstring_arguments, "size, name")],
)  # fmt: skip
def test_characters_are_no_words(build, named):
    with pytest.raises(TaskError, match="read_task") as error:
        build(models.characters())
    assert named in str(error.value)


def test_answers_that_begin_alike_and_unequal_twins_are_refused():
    model = models.gpt2_like()
    alike = Pair("the king is", "the horse is", "gold", "gold", (4, 8))
    with pytest.raises(TaskError, match="'gold' and 'gold' begin with the same token"):
        task_of_pairs(model, "toy", [alike])
    uneven = Pair("the king is", "the horse and king is", "gold", "red", (4, 8))
    with pytest.raises(TaskError, match="same number of tokens"):
        task_of_pairs(model, "toy", [uneven])


def test_a_tokenizer_without_offsets_gives_no_spans():
    fast = models.gpt2_like()

    class Slow:
        is_fast = False
        decode = staticmethod(fast.tokenizer.decode)

        def __call__(self, text):
            return {"input_ids": fast.tokenizer(text)["input_ids"]}

    task = agreement(models.Model(Slow(), fast.vocab_size, 512, fast.special_ids, None))
    assert task.spans is None
    assert task.texts == agreement(fast).texts
