"""The tasks of words, under tokenizers of several kinds."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from attnlens.errors import TaskError
from attnlens.tasks import indirect_object, key_value, needle, words
from attnlens.tasks.templates import NEEDLE_QUESTION
from tests.tasks import models

BUILDERS = {"indirect_object": indirect_object, "key_value": key_value, "needle": needle}


@pytest.fixture(scope="module", params=["gpt2-like", "metaspace", "shipped", "stories260K"])
def model(request, repository):
    if request.param == "gpt2-like":
        return models.gpt2_like()
    if request.param == "metaspace":
        return models.metaspace()
    if request.param == "shipped":
        folder = repository / "attnlens" / "zoo" / "small"
    else:
        folder = request.getfixturevalue("shared_data") / "stories260K"
    return models.of(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def first_of(model, text, word):
    """The word's first token after the text, by encoding both together."""
    ids = model.tokenizer(f"{text} {word}")["input_ids"]
    return ids[len(model.tokenizer(text)["input_ids"])]


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_prompts_are_their_texts_and_differ_where_they_should(model, build):
    task = build(model, prompts=8, seed=3)
    assert len(task) == 8
    for i, text in enumerate(task.texts):
        ids = task.clean[i][task.mask[i]]
        assert ids.tolist() == model.tokenizer(text)["input_ids"]
        assert task.reads[i].tolist() == [len(ids) - 1]
        assert not torch.equal(task.clean[i], task.corrupt[i])
        assert task.answers[i] != task.wrong[i]
        assert not model.special_ids.intersection(task.answers[i].tolist())


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_the_seed_decides(model, build):
    first, again, other = (build(model, prompts=6, seed=s) for s in (0, 0, 1))
    assert first.texts == again.texts
    assert torch.equal(first.corrupt, again.corrupt)
    assert first.texts != other.texts


def test_the_answer_is_the_name_that_is_said_once(model):
    task = indirect_object(model, prompts=30)
    givers = []
    for i, text in enumerate(task.texts):
        said = [w for w in re.findall(r"\w+", text) if w in words.NAMES]
        (answer,) = [name for name in said if said.count(name) == 1]
        (giver,) = {name for name in said if said.count(name) == 2}
        assert task.answers[i, 0] == first_of(model, text, answer)
        assert task.wrong[i, 0] == first_of(model, text, giver)
        givers.append(said.index(giver))
    assert 5 < sum(givers) < 25  # either order of the names


def test_key_value_answers_the_value_of_the_key(model):
    task = key_value(model, prompts=10, pairs=5)
    for i, text in enumerate(task.texts):
        listed, asked = text.split(" Again: ")
        pairs = dict(re.findall(r"(\w+) is (\w+)", listed))
        assert len(pairs) == 5
        answer = pairs[asked.removesuffix(" is")]
        assert task.answers[i, 0] == first_of(model, text, answer)
        # corrupt: another key of the same list
        corrupt = task.corrupt[i][task.mask[i]].tolist()
        twins = {key: f"{listed} Again: {key} is" for key in pairs}
        (other,) = [k for k, twin in twins.items() if model.tokenizer(twin)["input_ids"] == corrupt]
        assert pairs[other] != answer
        assert task.wrong[i, 0] == first_of(model, text, pairs[other])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_is_where_its_span_says(model, depth):
    task = needle(model, prompts=5, length=150, depth=depth, secret=2)
    for i, text in enumerate(task.texts):
        first, last = task.spans[i].tolist()
        said = re.search(r"secret words are (.+?)\.", text)[1]
        assert model.tokenizer.decode(task.clean[i, first:last]).strip() == said
        assert task.clean[i, first] == task.answers[i, 0] == first_of(model, text, said.split()[0])
        assert task.corrupt[i, first] == task.wrong[i, 0]
        same = task.clean[i] == task.corrupt[i]
        assert same[:first].all()
        assert same[last:].all()
        assert text.endswith(NEEDLE_QUESTION)
        length = int(task.mask[i].sum())
        assert 110 < length <= 150
        assert abs(first / length - depth) < 0.35


def test_needle_in_a_text_of_ones_own(model):
    filler = "It was a day.\nThe boat was on the lake! Who saw it?"
    task = needle(
        model, 4, 100, filler=filler, needle_text="Ann likes {words}.", question="Ann likes",
        secret=1,
    )  # fmt: skip
    for text in task.texts:
        sentences = re.sub(r"Ann likes( \w+\.)?", "", text)
        found = set(re.findall(r"[A-Z][^.!?]+[.!?]", sentences))
        assert found <= {"It was a day.", "The boat was on the lake!", "Who saw it?"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"length": 10}, "length=10, but needle and question alone take"),
        ({"depth": 1.2}, "depth=1.2"),
        ({"secret": 0}, "secret=0"),
        ({"secret": 20}, "needs 40 words"),
        ({"filler": " \n"}, "filler text is empty"),
        ({"needle_text": "no place"}, "must hold '{words}' once"),
        ({"length": 900}, "context is 512"),
        ({"prompts": 0}, "prompts=0"),
    ],
)
def test_needle_refuses(asked, message):
    with pytest.raises(TaskError, match=message):
        needle(models.gpt2_like(), **asked)


def test_needle_needs_offsets():
    fast = models.gpt2_like()
    slow = SimpleNamespace(is_fast=False, decode=fast.tokenizer.decode)
    holder = type("Slow", (), {"__call__": lambda self, text: fast.tokenizer(text)})
    tokenizer = holder()
    tokenizer.__dict__.update(vars(slow))
    with pytest.raises(TaskError, match="token offsets"):
        needle(models.Model(tokenizer, fast.vocab_size, 512, fast.special_ids, None))


@pytest.mark.parametrize("pairs", [1, 25])
def test_key_value_refuses_pairs_it_has_no_words_for(pairs):
    with pytest.raises(TaskError, match=r"pairs=1; at least 2|needs 25 words"):
        key_value(models.gpt2_like(), pairs=pairs)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_without_a_tokenizer_or_words_or_room(build):
    with pytest.raises(TaskError, match="this model has no tokenizer"):
        build(models.Model())
    with pytest.raises(TaskError, match=r"this tokenizer has \d of them"):
        build(models.one_token())
    tight = models.of(models.gpt2_like().tokenizer, context=8)
    with pytest.raises(TaskError, match="model's context is 8"):
        build(tight)


def test_an_end_token_never_ends_a_prompt():
    """Tokenizers of encoder-decoder models close every text; a prompt must stay open."""
    open_model = models.gpt2_like()
    end = open_model.tokenizer.eos_token_id
    closed = type(
        "Closed",
        (),
        {
            "__call__": lambda self, text: {
                "input_ids": [*open_model.tokenizer(text)["input_ids"], end]
            },
            "decode": lambda self, ids: open_model.tokenizer.decode(ids),
        },
    )()
    model = models.Model(closed, open_model.vocab_size, 512, open_model.special_ids, None)
    assert indirect_object(model).texts == indirect_object(open_model).texts
    assert torch.equal(indirect_object(model).clean, indirect_object(open_model).clean)
