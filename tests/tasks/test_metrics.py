import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlens.tasks import accuracy, logit_difference, loss

LOGITS = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]]])
ANSWERS = torch.tensor([[0, 1]])
WRONG = torch.tensor([[1, 2]])


def test_logit_difference_by_hand():
    assert logit_difference(LOGITS, ANSWERS, WRONG).tolist() == [[2.0, -2.0]]


def test_loss_by_hand():
    first = math.log(math.exp(2) + 2) - 2
    second = math.log(1 + math.e + math.exp(3)) - 1
    assert loss(LOGITS, ANSWERS)[0].tolist() == pytest.approx([first, second], abs=1e-6)


def test_accuracy_by_hand():
    assert accuracy(LOGITS, ANSWERS).tolist() == [[1.0, 0.0]]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.floats(-50, 50))
def test_shapes_and_a_constant_added_to_all_logits(prompts, reads, vocab, constant):
    generator = torch.Generator().manual_seed(prompts + 10 * reads + 100 * vocab)
    logits = torch.randn(prompts, reads, vocab, generator=generator, dtype=torch.float64)
    answers = torch.randint(vocab, (prompts, reads), generator=generator)
    wrong = (answers + 1) % vocab
    for moved in (logits, logits + constant):
        assert loss(moved, answers).shape == (prompts, reads)
        torch.testing.assert_close(loss(moved, answers), loss(logits, answers))
        torch.testing.assert_close(accuracy(moved, answers), accuracy(logits, answers))
        torch.testing.assert_close(
            logit_difference(moved, answers, wrong), logit_difference(logits, answers, wrong)
        )


def test_loss_equals_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 2, 7, generator=generator, dtype=torch.float64)
    answers = torch.randint(7, (5, 2), generator=generator)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), answers.flatten(), reduction="none"
    )
    torch.testing.assert_close(loss(logits, answers).flatten(), expected)
