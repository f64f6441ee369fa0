"""Query-focused heads against loops over dense maps, and on a model whose heads are known."""

import math
import random

import pytest
import torch

import attnlens as al
from attnlens.analyses.basin import DocumentPrompt
from attnlens.analyses.query_focused import (
    QueryExample,
    query_example,
    query_focused_heads,
)
from attnlens.errors import InputError, TaskError
from attnlens.lens import Lens
from attnlens.tasks import words
from attnlens.zoo import retrieval_model, small_path
from attnlens.zoo.retrieval import RETRIEVAL_HEAD
from tests.analyses.conftest import architecture

NULL = 31


@pytest.fixture(scope="module")
def small() -> Lens:
    return al.load(small_path(), check=False)


def wired_example(seed: int, documents: int = 3) -> QueryExample:
    """START, documents of three tokens, and one token that stands in one of them."""
    draw = random.Random(seed)
    ids = draw.sample(range(1, NULL), 3 * documents)
    gold = draw.randrange(documents)
    slots = tuple((1 + 3 * number, 4 + 3 * number) for number in range(documents))
    query = (1 + 3 * documents, 2 + 3 * documents)
    prompts = (DocumentPrompt((0, *ids, last), slots, query) for last in (ids[3 * gold], NULL))
    return QueryExample(*prompts, (gold,))


def test_the_wired_head_goes_from_the_query_to_its_document() -> None:
    lens = al.load(retrieval_model(), check=False)
    examples = [wired_example(seed, 2 + seed % 3) for seed in range(9)]
    found = query_focused_heads(lens, examples, top=1)
    score = dict(zip(map(str, found.heads), found["score"].mean.tolist(), strict=True))
    assert score.pop(RETRIEVAL_HEAD) == pytest.approx(1, abs=1e-3)
    assert score.pop("L1H1") == pytest.approx(0.5, abs=1e-3)  # half on itself, half on its copy
    previous = [score.pop(f"L0H{head}") for head in (1, 2, 3)]
    assert previous == pytest.approx([0] * 3, abs=1e-3)  # the token before, whatever the query
    assert list(score.values()) == pytest.approx([0] * 3, abs=1e-3)
    assert [str(head) for head in found.best()] == [RETRIEVAL_HEAD]
    assert float(found.accuracy.mean) == 1
    assert found.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert found.documents.shape == (9, 8, 4)
    assert found.documents[0, :, 2:].isnan().all()  # two documents there
    assert not found.documents[2].isnan().any()


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss", "qwen3", "bert"])
def test_scores_are_those_of_dense_maps(name: str) -> None:
    lens = architecture(name)
    draw = random.Random(5)
    examples: list[QueryExample] = []
    for length in (3, 1):
        ids = [draw.randrange(4, 90) for _ in range(10)]
        slots = ((0, 2), (3, 6), (6, 9))
        prompts = [
            DocumentPrompt(
                (*ids, *(draw.randrange(4, 90) for _ in range(size))), slots, (10, 10 + size)
            )
            for size in (length, 2)
        ]
        examples.append(QueryExample(*prompts, (0, 2) if length == 1 else (1,)))
    found = query_focused_heads(lens, examples, top=3)

    def mass(prompt: DocumentPrompt, document: int) -> list[float]:
        dense = lens.run([list(prompt.ids)], keep=("pattern",)).pattern
        rows = range(*prompt.query)
        return [
            sum(float(dense[site.name][0, head, row, key]) for row in rows
                for key in range(*prompt.slots[document])) / len(rows)
            for site in lens.anatomy.sites for head in range(site.heads)
        ]  # fmt: skip

    gold = torch.zeros(len(found.heads), dtype=torch.float64)
    null = torch.zeros_like(gold)
    for number, example in enumerate(examples):
        for document in range(3):
            own = torch.tensor(mass(example.prompt, document), dtype=torch.float64)
            none = torch.tensor(mass(example.null, document), dtype=torch.float64)
            assert found.documents[number, :, document].allclose(own - none, atol=1e-6)
            if document in example.gold:
                gold += own / 2
                null += none / 2
    assert found["gold"].mean.allclose(gold, atol=1e-6)
    assert found["null"].mean.allclose(null, atol=1e-6)
    assert found["score"].mean.allclose(gold - null, atol=1e-6)


def test_heads_that_rank_an_example_are_chosen_by_the_others() -> None:
    lens = al.load(retrieval_model(), check=False)
    # Two examples whose best heads differ: each is ranked by the head that is best on the other,
    # which is the worst on it; ranked by their own best, one of them would be right.
    good = wired_example(1)
    twisted = QueryExample(good.null, good.prompt, good.gold)
    found = query_focused_heads(lens, [good, twisted], top=1)
    assert good.gold != (0,)
    assert float(found.accuracy.mean) == 0
    alone = query_focused_heads(lens, [good], top=1)
    assert math.isnan(float(alone.accuracy.mean))
    assert float(alone.accuracy_all.mean) == 1
    assert "One example" in alone.notes[0]


def test_texts_are_packed_and_the_shipped_model_finds_the_document(small: Lens) -> None:
    draw = random.Random(0)
    examples = []
    for _ in range(8):
        keys, values = draw.sample(words.KEYS, 4), draw.sample(words.VALUES, 4)
        gold = draw.randrange(4)
        texts = [f"The {key} is {value}." for key, value in zip(keys, values, strict=True)]
        examples.append((texts, f"The {keys[gold]} is", gold))
    found = query_focused_heads(small, examples, top=4, joint=" ")
    assert found.prompts == 8
    assert found.chance == 0.25
    assert float(found.accuracy.mean) > 0.5
    frame = found.to_frame()
    assert (frame["score"] - (frame["gold"] - frame["null"])).abs().max() < 1e-12
    assert len(found.best(2)) == 2


def test_what_is_no_example_is_refused(small: Lens) -> None:
    example = wired_example(0)
    with pytest.raises(InputError, match="from 0 to 2"):
        QueryExample(example.prompt, example.null, (3,))
    with pytest.raises(InputError, match="3 documents and the null query's 2"):
        QueryExample(example.prompt, wired_example(0, 2).null, (0,))
    with pytest.raises(InputError, match="each document once"):
        QueryExample(example.prompt, example.null, (0, 0))
    documents = ["Tom had a red ball.", "Sam ran."]
    for wrong in ((documents, "what"), ("Tom had a ball.", "what", 0), 7, documents):
        with pytest.raises(InputError, match="documents, query, gold"):
            query_focused_heads(small, [wrong])  # type: ignore[list-item]
    for none in ([], iter(())):
        with pytest.raises(InputError, match="0 examples"):
            query_focused_heads(small, none)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty"):
        query_example(small, ["a text", " "], "where?", 0)
    with pytest.raises(TaskError, match="no tokenizer"):
        query_focused_heads(al.load(retrieval_model(), check=False), [(["a"], "b", 0)])
