"""Targets: ids from arrays, labels of classifiers, functions of the output, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import attnlens as al
from attnlens.analyses.target import Target, settle
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture

IDS = torch.tensor([[2, 5, 9, 4, 3], [2, 7, 3, 1, 1]])
MASK = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def _bert(kind: type) -> Lens:
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=3,
        id2label={0: "bad", 1: "fair", 2: "good"},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return al.load(kind(config).double().eval())


def test_a_classifiers_label_is_its_number() -> None:
    lens = _bert(BertForSequenceClassification)
    named = settle(lens, lens.encode(BATCH), ("good", "bad"))
    assert named.tokens.tolist() == [2, 2]  # type: ignore[union-attr]
    assert named.against.tolist() == [0, 0]  # type: ignore[union-attr]
    assert named.names == ("good - bad",) * 2
    logits = lens.model(**BATCH).logits
    value = named.value(lens, lens.encode(BATCH))
    assert torch.allclose(value, (logits[:, 2] - logits[:, 0]).detach(), atol=1e-12)
    with pytest.raises(InputError, match="whose labels are 'bad', 'fair', 'good'"):
        settle(lens, lens.encode(BATCH), "awful")
    with pytest.raises(InputError, match="which has 3"):
        settle(lens, lens.encode(BATCH), 3)


def test_logits_of_every_position_are_not_taken_for_one_row() -> None:
    """A classifier of tokens: its last position may be padding."""
    lens = _bert(BertForTokenClassification)
    for target in (None, 1):
        with pytest.raises(InputError, match=r"output\.logits\[:, 4, 1\]"):
            al.attention_gradient(lens, BATCH, target)
    found = al.input_gradient(lens, BATCH, lambda output: output.logits[:, 1, 2])
    assert torch.equal(found.value, lens.model(**BATCH).logits[:, 1, 2].detach())
    assert found.target == ("a function of the output",) * 2


@pytest.mark.parametrize(
    "target", [np.int64(7), np.array([7, 7]), torch.tensor(7), torch.tensor([7, 7])]
)
def test_ids_may_come_from_arrays(target: object) -> None:
    lens = architecture("gpt2")
    ids = torch.tensor([[3, 8, 5], [2, 4, 6]])
    settled = settle(lens, lens.encode(ids), target)  # type: ignore[arg-type]
    assert settled.tokens.tolist() == [7, 7]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda output: output.logits[:, -1, 5].sum(), r"gives \[\] for 2 prompts"),
        (lambda output: output.logits[:, -1], r"gives \[2, 96\] for 2 prompts"),
        (lambda output: 3.0, "gives float for 2 prompts"),
    ],
)
def test_a_function_gives_one_number_a_prompt(function: object, told: str) -> None:
    lens = architecture("gpt2")
    ids = torch.tensor([[3, 8, 5], [2, 4, 6]])
    for method in ("attention_gradient", "integrated_gradients", "value_norms", "rollout"):
        with pytest.raises(InputError, match=told):
            al.attribute(lens, ids, function, method)  # type: ignore[arg-type]


def test_a_number_that_is_no_id_is_told() -> None:
    lens = architecture("gpt2")
    with pytest.raises(InputError, match=r"5\.5 is no token"):
        settle(lens, lens.encode([3, 8]), Target(5.5))  # type: ignore[arg-type]


def test_logits_without_their_own_module_are_read_by_a_function() -> None:
    """MobileBERT multiplies by its tables itself, so no rows can be picked before."""
    lens = architecture("mobilebert")
    inputs = {"input_ids": torch.tensor([[3, 8, 5, 9]])}
    with pytest.raises(UnsupportedModelError, match="target=lambda output"):
        al.input_gradient(lens, inputs, 5)
    found = al.input_gradient(lens, inputs, lambda output: output.logits[:, 2, 5])
    assert float(found.scores.abs().max()) > 0
