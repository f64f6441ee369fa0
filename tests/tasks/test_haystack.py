"""Needles stand where they were asked to, in prompts of the length that was asked for."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnlens as al
from attnlens.errors import TaskError
from attnlens.tasks import needle, repeated_tokens, words
from attnlens.tasks.haystack import (
    Needle,
    NeedlePrompt,
    hidden_tokens,
    hide_needle,
    of_task,
    secret_words,
)
from attnlens.zoo import small_path
from tests.tasks import models

HAYSTACK = " ".join(words.FILLER * 2)
FACT = Needle(
    HAYSTACK,
    "The secret words are gold red old.",
    "What are the secret words? The secret words are",
    "gold red old",
)
MODELS = {"bytes": models.gpt2_like(), "metaspace": models.metaspace()}


@pytest.fixture(scope="module")
def small() -> al.Lens:
    return al.load(small_path(), check=False)


@pytest.mark.parametrize("name", MODELS)
@given(length=st.integers(120, 330), depth=st.floats(0, 1), boundary=st.booleans())
def test_prompts_fill_their_length_and_spans_are_the_answer(
    name: str, length: int, depth: float, boundary: bool
) -> None:
    model = MODELS[name]
    (made,) = hide_needle(model, FACT, [length], [depth], "token" if boundary else "sentence")
    assert length - 3 <= len(made.ids) <= length
    assert list(made.ids) == model.tokenizer(made.text)["input_ids"]
    first, last = made.span
    assert model.tokenizer.decode(made.ids[first:last]).strip() == "gold red old"
    assert made.text.count(FACT.needle) == 1
    assert made.text.endswith(FACT.question)


def test_the_needle_stands_after_the_last_sentence_before_its_depth() -> None:
    model = MODELS["bytes"]
    front, middle, end = hide_needle(model, FACT, [200], [0, 0.5, 1])
    assert front.text.startswith(FACT.needle)
    assert end.text.endswith(f"{FACT.needle} {FACT.question}")
    before, after = middle.text.split(f" {FACT.needle} ")
    assert HAYSTACK.startswith(before)
    assert before.endswith(".")
    rest = after.removesuffix(f" {FACT.question}")
    assert HAYSTACK[len(before) + 1 :].startswith(rest)
    # The sentence that follows would end past the middle.
    half = len(model.tokenizer(f"{before} {rest}")["input_ids"]) / 2
    sentence = rest[: rest.index(".") + 1]
    assert len(model.tokenizer(before)["input_ids"]) <= half
    assert len(model.tokenizer(f"{before} {sentence}")["input_ids"]) > half


def test_a_sentence_that_ends_right_at_the_depth_is_before_the_needle() -> None:
    what = replace(FACT, haystack="Abcdefg. " * 60)
    model = MODELS["bytes"]
    for depth in (0.2, 0.35, 0.5, 0.65, 0.8):
        (made,) = hide_needle(model, what, [240], [depth])
        (token,) = hide_needle(model, what, [240], [depth], "token")
        front, exact = (one.text.index(FACT.needle) for one in (made, token))
        assert made.text[:front].count(".") == token.text[:exact].count(".")


def test_numbers_end_no_sentence_and_an_opening_comes_first() -> None:
    what = replace(FACT, haystack="It is 3.14 or so. " * 40, opening="<user>\n", joint="\n")
    (made,) = hide_needle(MODELS["bytes"], what, [150], [0.4])
    opening, _, rest = made.text.partition("\n\n")
    assert opening == "<user>"
    assert rest.split("\n")[0].endswith("so.")


def test_the_whole_needle_is_the_answer_unless_a_part_is_named() -> None:
    (made,) = hide_needle(MODELS["bytes"], replace(FACT, answer=None), [150], [0.5])
    found = MODELS["bytes"].tokenizer.decode(made.ids[slice(*made.span)])
    assert found.strip() == made.answer == FACT.needle


@pytest.mark.parametrize(
    ("lengths", "depths", "reason"),
    [
        ([10], [0.5], "needle and question alone take"),
        ([600], [0.5], "context is 512"),
        ([500], [0.5], "the haystack has .* lengths up to"),
        ([150], [1.5], "between 0 and 1"),
        ([], [0.5], "a length and a depth"),
        ([0], [0.5], "at least 1 token"),
    ],
)
def test_what_does_not_fit_is_refused(lengths: list[int], depths: list[float], reason: str) -> None:
    short = replace(FACT, haystack=" ".join(words.FILLER[:12]))
    with pytest.raises(TaskError, match=reason):
        hide_needle(MODELS["bytes"], short, lengths, depths)


def test_the_longest_length_named_by_the_error_fits() -> None:
    model = MODELS["bytes"]
    short = replace(FACT, haystack=" ".join(words.FILLER[:12]))
    with pytest.raises(TaskError) as caught:
        hide_needle(model, short, [500], [1])
    limit = int(str(caught.value).rpartition(" ")[2])
    (made,) = hide_needle(model, short, [limit], [1])
    assert short.haystack in made.text


def test_needles_that_are_none_are_refused() -> None:
    with pytest.raises(TaskError, match="the question is empty"):
        replace(FACT, question=" ")
    with pytest.raises(TaskError, match="in the needle once"):
        replace(FACT, answer="silver")
    with pytest.raises(TaskError, match="holds the needle"):
        replace(FACT, haystack=f"{HAYSTACK} {FACT.needle}")
    with pytest.raises(TaskError, match="span"):
        NeedlePrompt((1, 2, 3), (2, 4), 3, 0.5)


def test_a_tokenizer_is_needed_and_its_offsets() -> None:
    with pytest.raises(TaskError, match="no tokenizer"):
        hide_needle(models.Model(), FACT, [100], [0.5])

    class Slow:
        is_fast = False

    with pytest.raises(TaskError, match="offsets"):
        hide_needle(models.Model(Slow()), FACT, [100], [0.5])


def test_secret_words_are_found_in_each_prompt(small: al.Lens) -> None:
    made = secret_words(small, (64, 128), (0, 1), prompts=2)
    assert [(one.length, one.depth) for one in made] == [
        (64, 0), (64, 0), (64, 1), (64, 1), (128, 0), (128, 0), (128, 1), (128, 1),
    ]  # fmt: skip
    for one in made:
        assert len(one.ids) <= one.length
        assert one.answer in one.text
        assert len(one.answer.split()) == 3
        assert one.ids[0] == small.bos_id
    assert len({one.answer for one in made}) == len(made)


def test_hidden_tokens_follow_their_cue_and_fill_the_length_exactly() -> None:
    model = models.Model()
    for one in hidden_tokens(model, (12, 30), (0, 0.5, 1), prompts=3, size=4):
        first, last = one.span
        assert len(one.ids) == one.length
        assert last - first == 4
        cue = one.ids[-1]
        assert one.ids[first - 1] == cue
        assert one.ids.count(cue) == 2
        assert all(one.ids.count(token) == 1 for token in one.ids[first:last])
        assert one.ids[0] == model.bos_id
        assert not model.special_ids.intersection(one.ids[1:])
        assert round(one.depth * (one.length - 7)) == first - 2
    with pytest.raises(TaskError, match="takes 7"):
        hidden_tokens(model, (6,), (0,), size=4)
    with pytest.raises(TaskError, match="between 1 and 36"):
        hidden_tokens(model, (6,), (0,), size=37)


def test_prompts_of_a_task_know_their_place() -> None:
    model = MODELS["bytes"]
    task = needle(model, prompts=3, length=100, depth=0.5)
    assert task.spans is not None
    for number, one in enumerate(of_task(model, task)):
        assert one.ids == tuple(task.clean[number][task.mask[number]].tolist())
        assert one.span == tuple(task.spans[number].tolist())
        assert one.length == len(one.ids)
        assert one.depth == pytest.approx(one.span[0] / one.length, abs=0.01)
    with pytest.raises(TaskError, match="no spans"):
        of_task(model, repeated_tokens(models.Model(), 2))
