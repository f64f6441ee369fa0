"""What every attribution has: a ledger, tables, a graph; and targets of every kind."""

import pytest
import torch

import attnlens as al
from attnlens.analyses.attribute import METHODS, attribute, method_of
from attnlens.analyses.attribution import Ledger, joined
from attnlens.analyses.target import Target, settle
from attnlens.errors import HeadError, InputError
from attnlens.lens import Lens
from attnlens.tasks import repeated_tokens
from tests.analyses.conftest import architecture

IDS = [0, 5, 9, 13, 7, 5, 9, 13]


def test_a_ledger_sums_to_its_value_with_the_remainder() -> None:
    ledger = Ledger(
        torch.tensor([3.0, 0.0]),
        {"tokens": torch.tensor([2.0, 1.0]), "biases": torch.tensor([0.5, -1.0])},
    )
    assert ledger.remainder.tolist() == [0.5, 0.0]
    assert ledger.error.tolist() == pytest.approx([0.5 / 3, 0.0])
    assert list(ledger.to_frame()) == ["value", "tokens", "biases", "remainder", "error"]


def test_the_graph_of_edges_is_of_tokens_wherever_padding_is(induction_lens: Lens) -> None:
    alone = al.attnlrp(induction_lens, IDS, 7, maps="all").graph()
    ids = torch.tensor([[3] * 3 + IDS, [0, 6, 4, 8, 3, 6, 4, 8, 3, 6, 4]])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = al.attnlrp(
        induction_lens, {"input_ids": ids, "attention_mask": mask}, 7, maps="all"
    ).graph(0)
    strong = alone.edges["L1P4", "L2P7", "L1H2"]["weight"]
    assert strong == pytest.approx(7.94, abs=0.01)  # half of the head's 15.875
    assert padded.edges["L1P4", "L2P7", "L1H2"]["weight"] == pytest.approx(strong, abs=1e-4)


def test_without_maps_there_is_no_graph(induction_lens: Lens) -> None:
    with pytest.raises(InputError, match="maps"):
        al.attnlrp(induction_lens, IDS, 7).graph()


def test_batches_join_to_what_one_batch_gives(induction_lens: Lens) -> None:
    prompts = {
        "input_ids": torch.tensor([IDS, [0, 6, 4, 8, 6, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
    }
    whole = al.cp_lrp(induction_lens, prompts, 7)
    parts = al.cp_lrp(induction_lens, prompts, 7, batch_size=1)
    assert parts.tokens == whole.tokens
    assert torch.allclose(parts.scores, whole.scores, atol=1e-4)  # float32 in other sums
    assert parts.ledger is not None
    assert parts.heads is not None
    assert parts.ledger.value.shape == (2,)
    assert parts.heads.shape == whole.heads.shape  # type: ignore[union-attr]
    assert joined([whole]) is whole


def test_frames_have_a_row_a_token_a_head_and_a_layer(induction_lens: Lens) -> None:
    found = al.attnlrp(induction_lens, IDS, 7)
    assert list(found.to_frame()) == ["position", "token", "score"]
    assert len(found.to_frame()) == 8
    assert found.heads_frame().set_index("head")["score"].idxmax() == "L1H2"
    assert len(found.layers_frame()) == 8 * len(found.layer_names)
    scored = al.integrated_gradients(induction_lens, IDS, 7, steps=2)
    with pytest.raises(InputError, match="no heads"):
        scored.heads_frame()


def test_a_contrast_is_the_difference_of_its_tokens() -> None:
    lens = architecture("gpt2")
    ids = [3, 8, 5, 11]
    one, other = (al.cp_lrp(lens, ids, token).scores for token in (7, 9))
    both = al.cp_lrp(lens, ids, (7, 9)).scores
    assert torch.allclose(both, one - other, atol=1e-12)  # CP-LRP is linear in the target
    named = al.cp_lrp(lens, ids, Target([7], against=[9], at=[3]))
    assert torch.equal(named.scores, both)
    assert named.target == ("'7' - '9'",)


def test_a_function_of_the_output_is_a_target_too() -> None:
    lens = architecture("gpt2")
    by_name = al.cp_lrp(lens, [3, 8, 5, 11], 7)
    by_function = al.cp_lrp(lens, [3, 8, 5, 11], lambda output: output.logits[:, -1, 7])
    assert torch.allclose(by_name.scores, by_function.scores, atol=1e-12)


def test_the_likeliest_token_is_the_target_by_default() -> None:
    lens = architecture("gpt2")
    batch = lens.encode([3, 8, 5, 11])
    logits = lens.logits(batch.inputs, torch.tensor([[3]]))[0, 0]
    assert settle(lens, batch, None).tokens.tolist() == [int(logits.argmax())]  # type: ignore[union-attr]


def test_a_tasks_target_is_its_answer_against_the_wrong_one(induction_lens: Lens) -> None:
    task = repeated_tokens(induction_lens, 3)
    batch = induction_lens.encode(task.clean_inputs())
    explained = settle(induction_lens, batch, Target.of_task(task))
    assert explained.reads is not None
    assert explained.reads[:, 0].tolist() == task.reads[:, -1].tolist()
    assert explained.tokens.tolist() == task.answers[:, -1].tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (99, "no output"),
        ("the", "no tokenizer"),
        (Target(7, at=12), "position 12"),
        (Target([7, 8]), "2 tokens for 1"),
        (Target(7, at=[0, 1]), "2 positions for 1"),
    ],
)
def test_a_target_that_is_not_there_is_told(
    induction_lens: Lens, target: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        al.attnlrp(induction_lens, IDS, target)  # type: ignore[arg-type]


def test_an_unknown_method_or_setting_is_told(induction_lens: Lens) -> None:
    with pytest.raises(InputError, match="attnlrp, cp_lrp"):
        method_of("lrp")
    with pytest.raises(InputError, match="signature"):
        attribute(induction_lens, IDS, 7, "attnlrp", stepps=3)
    with pytest.raises(HeadError):
        attribute(induction_lens, IDS, 7, "attnlrp", maps="L9")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_scores_the_tokens_through_one_door(induction_lens: Lens, method: str) -> None:
    found = attribute(induction_lens, IDS, 7, method)
    assert found.tokens == (tuple(map(str, IDS)),)
    assert found.scores.shape == (1, 8)
    assert found.scores.isfinite().all()
    assert not found.scores.requires_grad
    assert found.value.tolist() == pytest.approx([15.9999], abs=1e-3)
