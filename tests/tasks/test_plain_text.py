"""Ordinary text as a task, under tokenizers of several kinds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnlens.errors import TaskError
from attnlens.tasks import plain_text, words
from attnlens.zoo import small_path
from tests.tasks import models

TEXT = " ".join(words.FILLER)
GPT2_LIKE = models.gpt2_like()


@pytest.fixture(scope="module", params=["gpt2-like", "metaspace", "shipped", "stories260K"])
def model(request):
    if request.param == "gpt2-like":
        return GPT2_LIKE
    if request.param == "metaspace":
        return models.metaspace()
    if request.param == "shipped":
        folder = small_path()
    else:
        folder = request.getfixturevalue("shared_data") / "stories260K"
    return models.of(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def plain_ids(model, text):
    """The text's ids, without what the tokenizer puts around them."""
    return [i for i in model.tokenizer(text)["input_ids"] if i not in model.special_ids]


def test_all_windows_together_are_the_text(model):
    ids, start = plain_ids(model, TEXT), [model.bos_id] if model.bos_id is not None else []
    size = 20 - len(start)
    whole = len(ids) // size
    task = plain_text(model, TEXT, prompts=whole, max_tokens=20)
    assert task.mask.all()
    assert task.clean[:, : len(start)].tolist() == [start] * whole
    assert task.clean[:, len(start) :].flatten().tolist() == ids[: whole * size]
    assert task.reads.tolist() == [list(range(19))] * whole
    assert torch.equal(task.answers, task.clean[:, 1:])
    assert torch.equal(task.wrong, task.corrupt[:, 1:])
    texts = [model.tokenizer.decode(row[len(start) :]) for row in task.clean.tolist()]
    assert list(task.texts) == texts
    for clean, corrupt in zip(task.clean.tolist(), task.corrupt.tolist(), strict=True):
        assert clean != corrupt
        assert sorted(clean) == sorted(corrupt)
        assert clean[: len(start)] == corrupt[: len(start)]


@given(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 9))
def test_the_last_reads_of_windows_of_any_length(reads, lengths, seed):
    """Texts of given numbers of tokens: each window that is long enough, padded on the right."""
    said = plain_ids(GPT2_LIKE, TEXT)
    texts = [GPT2_LIKE.tokenizer.decode(said[:length]) for length in lengths]
    long = [plain_ids(GPT2_LIKE, text) for text in texts]
    pieces = [ids[i : i + 31] for ids in long for i in range(0, len(ids), 31)]
    kept = [piece for piece in pieces if len(piece) > reads]
    if not kept:
        with pytest.raises(TaskError, match=r"the texts have 0 windows"):
            plain_text(GPT2_LIKE, texts, 1, 31, reads, seed)
        return
    task = plain_text(GPT2_LIKE, texts, len(kept), 31, reads, seed)
    for piece, ids, mask, where, answers in zip(
        kept, task.clean, task.mask, task.reads.tolist(), task.answers.tolist(), strict=True
    ):
        assert ids[mask].tolist() == piece
        assert mask[: len(piece)].all()
        assert answers == piece[-reads:]
        assert where == list(range(len(piece) - 1 - reads, len(piece) - 1))


def test_the_seed_draws_windows_and_orders():
    first, again, other = (plain_text(GPT2_LIKE, TEXT, 4, 8, seed=s) for s in (0, 0, 1))
    assert first.texts == again.texts
    assert torch.equal(first.corrupt, again.corrupt)
    assert first.texts != other.texts
    places = [TEXT.index(text) for text in first.texts]
    assert places == sorted(places)


@torch.no_grad()
def test_the_loss_is_the_models_own():
    tokenizer = AutoTokenizer.from_pretrained(small_path(), local_files_only=True)
    network = AutoModelForCausalLM.from_pretrained(small_path(), local_files_only=True).eval()
    task = plain_text(models.of(tokenizer), TEXT, 3, 24)
    graded = task.score(task.at_reads(network(**task.clean_inputs()).logits))
    own = [network(input_ids=ids[None], labels=ids[None]).loss for ids in task.clean]
    assert torch.allclose(graded, torch.stack(own), atol=1e-5)  # float32 means of 23 losses


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompts": 0}, "prompts=0"),
        ({"max_tokens": 1}, "max_tokens=1; at least 2"),
        ({"max_tokens": 513}, "513 tokens and the model's context is 512"),
        ({"reads": 0}, "reads=0; between 1 and 63"),
        ({"reads": 64}, "reads=64; between 1 and 63"),
        ({"prompts": 999}, "windows of 64 tokens or more, not 999"),
        ({"texts": "one two"}, "have 0 windows"),
        ({"texts": []}, "have 0 windows"),
    ],
)
def test_what_cannot_be_built_is_refused(asked, message):
    with pytest.raises(TaskError, match=message):
        plain_text(GPT2_LIKE, **({"texts": TEXT} | asked))


def test_it_needs_a_tokenizer():
    with pytest.raises(TaskError, match="this model has no tokenizer"):
        plain_text(models.Model(), TEXT)


def test_a_text_of_one_token_has_one_order():
    task = plain_text(GPT2_LIKE, "a" + " a" * 9, 1, 8)
    assert sorted(task.corrupt[0].tolist()) == sorted(task.clean[0].tolist())
    same = plain_text(GPT2_LIKE, " a" * 9, 1, 8)
    assert torch.equal(same.clean, same.corrupt)
