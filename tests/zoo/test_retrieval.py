"""The hand-wired retrieval circuit: one head copies the needle, and no other head is missed."""

from collections.abc import Sequence

import pytest
import torch

import attnlens as al
from attnlens.analyses.retrieval import RetrievalSettings, retrieval_heads
from attnlens.tasks import hidden_tokens
from attnlens.zoo import induction_model, retrieval_model
from attnlens.zoo.retrieval import RETRIEVAL_HEAD

PLACES = {"lengths": (12, 24), "depths": (0.0, 0.5, 1.0), "prompts": 1}
SETTINGS = RetrievalSettings(steps=8)
OTHERS = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
OTHERS.remove(RETRIEVAL_HEAD)


@pytest.fixture(scope="module")
def lens() -> al.Lens:
    return al.load(retrieval_model())


def recall(lens: al.Lens, edits: Sequence[object] = ()) -> float:
    if not edits:
        return float(retrieval_heads(lens, None, **PLACES, settings=SETTINGS).recall.mean())
    with lens.edit(*edits):
        return float(retrieval_heads(lens, None, **PLACES, settings=SETTINGS).recall.mean())


def test_answers_are_the_needle(lens: al.Lens) -> None:
    prompts = hidden_tokens(lens, (14, 24), (0, 0.4, 1), prompts=8, seed=3)
    for prompt in prompts:
        (answer,) = lens.decode(list(prompt.ids), steps=4).answers
        assert answer == prompt.ids[slice(*prompt.span)]


def test_one_head_retrieves_with_score_1_and_the_others_score_0(lens: al.Lens) -> None:
    found = retrieval_heads(lens, None, **PLACES, settings=SETTINGS)
    assert found.recall.eq(1).all()
    expected = torch.tensor([float(str(head) == RETRIEVAL_HEAD) for head in found.heads])
    assert found["score"].mean.tolist() == expected.tolist()
    assert found["score"].low.tolist() == expected.tolist()
    assert [str(head) for head in found.strong] == [RETRIEVAL_HEAD]


@pytest.mark.parametrize("edit", [al.Zero, al.Uniform])
def test_without_the_retrieval_head_recall_is_chance_and_without_any_other_it_stays(
    lens: al.Lens, edit: type
) -> None:
    assert recall(lens, [edit(RETRIEVAL_HEAD)]) <= 1 / 31
    for other in OTHERS:
        assert recall(lens, [edit(other)]) == 1, other
    assert recall(lens, [edit("L0H0,L1H0,L1H1,L1H3,L0H2")]) == 1


def test_idle_heads_look_sharply_elsewhere(lens: al.Lens) -> None:
    prompt = hidden_tokens(lens, (20,), (0.5,), prompts=1)[0]
    first, second = lens.run(list(prompt.ids), keep=("pattern",)).pattern.values()
    assert first[0, 0].diagonal().min() > 0.999
    for head in (1, 2, 3):
        assert first[0, head].diagonal(-1).min() > 0.999
    assert second[0, 0, :, 0].min() > 0.999
    cue = [i for i, token in enumerate(prompt.ids) if token == prompt.ids[-1]]
    assert second[0, 1, -1, cue].tolist() == pytest.approx([0.5, 0.5], abs=1e-4)
    assert second[0, 2, -1, prompt.span[0]] > 0.9999
    assert second[0, 3].diagonal().min() > 0.999


def test_it_answers_as_the_induction_model_does(lens: al.Lens) -> None:
    ids = torch.tensor([prompt.ids for prompt in hidden_tokens(lens, (24,), (0, 0.5), prompts=8)])
    with torch.no_grad():
        logits, expected = lens.model(ids).logits, induction_model()(ids).logits
    assert logits.allclose(expected, atol=1e-3)
    assert not lens.model.training
