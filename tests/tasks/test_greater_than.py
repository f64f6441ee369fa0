"""Greater-than: later years against years that are not, under tokenizers that part years."""

import re

import pytest
import torch

import attnlens as al
from attnlens.errors import TaskError
from attnlens.tasks import greater_than
from attnlens.zoo import small_path
from tests.tasks import models

SHAPE = re.compile(r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)")


def read(text):
    century, start, again = (int(part) for part in SHAPE.fullmatch(text).groups())
    assert century == again
    return century, start


@pytest.fixture(scope="module")
def pairs_of_digits():
    return models.two_digits()


@pytest.mark.parametrize("pairs", [1, 4, 10, 40])
def test_two_digits_the_nearest_years_on_both_sides(pairs_of_digits, pairs):
    model = pairs_of_digits
    task = greater_than(model, prompts=200, pairs=pairs)
    starts = set()
    for i, text in enumerate(task.texts):
        century, start = read(text)
        # neither 1776 nor 1401 is parted into 17 and 76, or 14 and 01
        years = [y for y in range(100) if (century, y) not in {(17, 76), (14, 1)}]
        later = [y for y in years if y > start][:pairs]
        others = [y for y in years if 1 < y <= start][::-1][:pairs]
        assert decoded(model, task.answers[i]) == later
        assert decoded(model, task.wrong[i]) == others
        assert len(set(task.reads[i].tolist())) == 1
        assert (century, start) != (17, 76)
        assert century != 14  # it has no corrupt twin
        begin, end = task.spans[i].tolist()
        assert decoded(model, task.clean[i, begin:end]) == [start]
        assert decoded(model, task.corrupt[i, begin:end]) == [1]
        starts.add(start)
    assert min(starts) > 1
    assert max(starts) < 99


def decoded(model, ids):
    return [int(model.tokenizer.decode([token])) for token in ids.tolist()]


def test_ten_pairs_of_years_or_three_of_digits(pairs_of_digits):
    assert greater_than(pairs_of_digits).reads.shape == (16, 10)
    assert greater_than(models.gpt2_like()).reads.shape == (16, 3)


@pytest.mark.parametrize("pairs", [1, 2, 3, 4])
def test_a_digit_is_graded_where_it_decides(pairs):
    model = models.gpt2_like()
    for i, text in enumerate((task := greater_than(model, prompts=100, pairs=pairs)).texts):
        _, start = read(text)
        later = decoded(model, task.answers[i])
        others = decoded(model, task.wrong[i])
        assert later == list(range(start // 10 + 1, start // 10 + 1 + pairs))
        nearest = start // 10 if start % 10 == 9 else start // 10 - 1
        assert others == list(range(nearest, nearest - pairs, -1))
        # whichever second digit follows, the year is later, or not later and later than 01
        assert min(later) * 10 > start >= max(others) * 10 + 9
        assert min(others) * 10 > 1
        begin, end = task.spans[i].tolist()
        assert decoded(model, task.clean[i, begin:end]) == [start // 10, start % 10]
        assert decoded(model, task.corrupt[i, begin:end]) == [0, 1]


def test_the_score_is_the_mean_logit_of_later_years_less_that_of_others(pairs_of_digits):
    task = greater_than(pairs_of_digits, prompts=6)
    logits = torch.randn(6, len(task.mask[0]), pairs_of_digits.vocab_size, dtype=torch.float64)
    last = logits[torch.arange(6), task.mask.sum(1) - 1]
    wanted = torch.stack(
        [
            row[later].mean() - row[others].mean()
            for row, later, others in zip(last, task.answers, task.wrong, strict=True)
        ]
    )
    assert torch.allclose(task.score(task.at_reads(logits)), wanted)


def test_a_model_is_graded_at_one_position_by_all_pairs():
    """One forward on the shipped model: reads that repeat are the same row of logits."""
    lens = al.load(small_path())
    task = greater_than(lens, prompts=4)
    with torch.no_grad():
        logits = lens.logits_at(lens.encode(task.clean_inputs()), task.reads)
    assert torch.equal(logits[:, 0], logits[:, -1])
    assert task.score(logits).shape == (4,)


@pytest.mark.parametrize(
    ("pairs", "message"), [(0, "pairs=0; at least 1"), (60, "pairs=60; no year")]
)
def test_it_refuses(pairs_of_digits, pairs, message):
    with pytest.raises(TaskError, match=message):
        greater_than(pairs_of_digits, pairs=pairs)


def test_years_of_one_piece_are_refused():
    model = models.of_words(
        [f" {century}{year:02d}" for century in range(11, 18) for year in range(100)]
    )
    with pytest.raises(TaskError, match="needs years such as 1743 written as 17 and 43"):
        greater_than(model)
