import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlens.errors import TaskError
from attnlens.tasks import Task


def ragged() -> Task:
    return Task.from_prompts(
        "toy",
        clean=[[1, 2, 3], [4, 5]],
        corrupt=[[1, 9, 3], [4, 6]],
        reads=[[2], [1]],
        answers=[[2], [5]],
        wrong=[[9], [6]],
        pad_id=0,
    )


def test_prompts_are_padded_on_the_right():
    task = ragged()
    assert len(task) == 2
    assert task.clean.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert task.corrupt.tolist() == [[1, 9, 3], [4, 6, 0]]
    assert task.mask.tolist() == [[True, True, True], [True, True, False]]
    assert task.texts == ("", "")
    assert task.spans is None


def test_inputs_are_what_a_model_takes():
    task = ragged()
    assert task.clean_inputs()["input_ids"] is task.clean
    assert task.corrupt_inputs()["input_ids"] is task.corrupt
    for inputs in (task.clean_inputs(), task.corrupt_inputs()):
        assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_unequal_lengths_name_the_prompt_and_both_lengths():
    with pytest.raises(TaskError, match=r"prompt 1 has 2 clean and 3 corrupt"):
        Task.from_prompts("toy", [[1], [1, 2]], [[1], [1, 2, 3]], [[0], [1]], [[1]] * 2, [[2]] * 2)


@pytest.mark.parametrize("count", [0, 2])
def test_clean_and_corrupt_must_be_as_many(count):
    with pytest.raises(TaskError, match=f"{count} clean and 1 corrupt"):
        Task.from_prompts("toy", [[1]] * count, [[1]], [[0]], [[1]], [[2]])


def test_uneven_reads_are_refused():
    with pytest.raises(TaskError, match="reads must be as many"):
        Task.from_prompts("toy", [[1, 2]] * 2, [[1, 2]] * 2, [[0], [0, 1]], [[1]] * 2, [[2]] * 2)


def changed(**changes) -> dict[str, object]:
    task = ragged()
    return {f.name: getattr(task, f.name) for f in dataclasses.fields(task)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupt": torch.zeros(2, 2, dtype=torch.long)}, r"corrupt has shape \(2, 2\)"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask has shape \(1, 3\)"),
        ({"mask": torch.ones(2, 3)}, "mask is torch.float32"),
        ({"mask": torch.tensor([[True] * 3, [False, True, True]])}, "prompt 1 is not padded on"),
        ({"mask": torch.tensor([[True] * 3, [False] * 3])}, "prompt 1 has no token"),
        ({"reads": torch.tensor([[2], [2]])}, "prompt 1 has a read outside"),
        ({"reads": torch.tensor([[-1], [1]])}, "prompt 0 has a read outside"),
        ({"reads": torch.zeros(2, 0, dtype=torch.long)}, "answers has shape"),
        ({"answers": torch.tensor([[2]])}, r"answers has shape \(1, 1\)"),
        ({"wrong": torch.tensor([[2], [-4]])}, "prompt 1 has a negative token id"),
        ({"metric": "f1"}, "unknown metric 'f1'; there are logit_difference, loss, accuracy"),
        ({"texts": ("one",)}, "1 texts for 2 prompts"),
        ({"spans": torch.tensor([[0, 3], [1, 3]])}, "prompt 1 has a span outside"),
        ({"spans": torch.tensor([[2, 2], [0, 1]])}, "prompt 0 has a span outside"),
        ({"clean": torch.zeros(0, 3, dtype=torch.long)}, "clean has shape"),
    ],
)
def test_what_does_not_agree_is_refused(changes, message):
    with pytest.raises(TaskError, match=message):
        Task(**changed(**changes))


def test_score_averages_over_reads():
    task = Task.from_prompts("toy", [[1, 2, 0]], [[1, 2, 0]], [[0, 1]], [[2, 0]], [[1, 1]])
    logits = torch.tensor([[[0.0, 1.0, 5.0], [3.0, 1.0, 0.0]]])
    assert task.score(logits).tolist() == [3.0]
    assert task.score(logits, "accuracy").tolist() == [1.0]
    with pytest.raises(TaskError, match="unknown metric"):
        task.score(logits, "f1")
    with pytest.raises(TaskError, match=r"expected \(1, 2, 'vocab'\)"):
        task.score(logits[:, :1])


def test_at_reads_takes_the_graded_positions():
    task = ragged()
    logits = torch.arange(2 * 3 * 4).reshape(2, 3, 4).float()
    assert task.at_reads(logits).tolist() == [[[8, 9, 10, 11]], [[16, 17, 18, 19]]]
    with pytest.raises(TaskError, match="logits of shape"):
        task.at_reads(logits[:, :2])


def test_subset_by_slice_and_by_numbers():
    task = dataclasses.replace(ragged(), spans=torch.tensor([[0, 1], [1, 2]]), texts=("a", "b"))
    last = task.subset(slice(1, None))
    assert last.texts == ("b",)
    assert last.clean.tolist() == [[4, 5, 0]]
    assert last.spans is not None
    assert last.spans.tolist() == [[1, 2]]
    assert task.subset([1, 0]).answers.tolist() == [[5], [2]]
    assert task.subset([-1]).texts == ("b",)
    with pytest.raises(TaskError, match="no number 2"):
        task.subset([2])
    with pytest.raises(TaskError, match="at least one prompt"):
        task.subset([])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_padding_never_touches_real_tokens(lengths, pad_id):
    clean = [list(range(100, 100 + n)) for n in lengths]
    reads = [[n - 1] for n in lengths]
    some = [[1]] * len(lengths)
    task = Task.from_prompts("toy", clean, clean, reads, some, some, pad_id=pad_id)
    for row, keep, ids in zip(task.clean, task.mask, clean, strict=True):
        assert row[keep].tolist() == ids
        assert set(row[~keep].tolist()) <= {pad_id}
