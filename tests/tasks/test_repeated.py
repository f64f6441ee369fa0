import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlens.errors import TaskError
from attnlens.tasks import repeated_tokens
from tests.tasks.models import Model


@given(
    st.integers(3, 38),
    st.integers(2, 4),
    st.integers(0, 9),
    st.sampled_from([None, 1]),
)
def test_answers_are_what_followed_the_last_time(period, repeats, seed, bos):
    task = repeated_tokens(Model(bos_id=bos), 3, period, repeats, seed)
    start = 0 if bos is None else 1
    for clean, corrupt, reads, answers, wrong in zip(
        task.clean, task.corrupt, task.reads, task.answers, task.wrong, strict=True
    ):
        assert bos is None or clean[0] == corrupt[0] == bos
        copies = clean[start:].reshape(repeats, period)
        assert (copies == copies[0]).all()
        assert len(set(copies[0].tolist())) == period
        last = start + period * (repeats - 1)
        assert torch.equal(clean[last:], corrupt[last:])
        assert torch.equal(clean[reads[:-1] + 1], answers[:-1])
        # by search, as an induction head would: what followed the same token the last time
        for read, answer, other in zip(reads.tolist(), answers, wrong, strict=True):
            assert clean[latest(clean, read) + 1] == answer
            assert corrupt[latest(corrupt, read) + 1] == other
            assert answer != other


def latest(ids, read):
    return max(i for i in range(read) if ids[i] == ids[read])


def test_no_special_token_is_drawn_and_the_seed_decides():
    model = Model(vocab_size=60, special_ids=frozenset(range(10)))
    first, again, other = (repeated_tokens(model, seed=s) for s in (0, 0, 1))
    assert first.clean[:, 1:].min() >= 10
    assert torch.equal(first.clean, again.clean)
    assert torch.equal(first.corrupt, again.corrupt)
    assert not torch.equal(first.clean, other.clean)


def test_the_defaults_fit_a_model_of_32_tokens_and_32_positions():
    task = repeated_tokens(Model(vocab_size=32, context=32))
    assert task.clean.shape == (16, 25)
    assert task.metric == "loss"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"period": 2}, "period=2; it must lie between 3 and 38"),
        ({"period": 39}, "between 3 and 38"),
        ({"repeats": 1}, "repeats=1; at least 2"),
        ({"period": 30, "repeats": 20}, "601 tokens and the model's context is 512"),
        ({"prompts": 0}, "prompts=0"),
    ],
)
def test_what_cannot_be_built_is_refused(asked, message):
    with pytest.raises(TaskError, match=message):
        repeated_tokens(Model(), **asked)
