"""Rollout and attention flow as attributions: a row chosen by the target, and what it says."""

import pytest
import torch

import attnlens as al
from attnlens.analyses.attention_flow import attention_flow
from attnlens.analyses.attribute import attribute
from attnlens.analyses.rollout import RolloutSettings, rollout
from attnlens.analyses.target import Target
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture
from tests.analyses.test_rollout import padded

SETTINGS = RolloutSettings(residual=0.4, heads="L0H1,L1,L2H0,L2H1")
both = pytest.mark.parametrize("method", ["rollout", "attention_flow"])


def whole(lens: Lens, inputs: object, method: str, settings: RolloutSettings) -> torch.Tensor:
    """Every row: what the scores are rows of."""
    trace = lens.run(inputs, keep="pattern")  # type: ignore[arg-type]
    if method == "rollout":
        return rollout(trace, settings).last
    return attention_flow(trace, settings=settings).flow


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_the_row_of_the_targets_logits(
    random_lens: Lens, method: str, side: str
) -> None:
    inputs = padded(side)
    found = attribute(random_lens, inputs, Target(7, 9, at=[-1, -2]), method, settings=SETTINGS)
    rows = whole(random_lens, inputs, method, SETTINGS)
    assert torch.allclose(found.scores[0], rows[0, 11], rtol=0, atol=1e-8)
    assert torch.allclose(found.scores[1], rows[1, 5], rtol=0, atol=1e-8)
    assert [len(words) for words in found.tokens] == [12, 7]
    assert (found.scores[1, 7:] == 0).all()
    assert found.settings["heads"] == SETTINGS.heads
    logits = random_lens.logits(inputs, torch.tensor([[11], [5 + 5 * (side == "left")]]))[:, 0]
    assert torch.allclose(found.value, logits[:, 7] - logits[:, 9])
    assert "any token that is read there" in found.notes[0]


@both
def test_any_token_at_a_position_has_the_same_scores(
    random_lens: Lens, ids: torch.Tensor, method: str
) -> None:
    found = [attribute(random_lens, ids, target, method).scores for target in (3, (5, 8))]
    assert torch.equal(*found)


def test_rollout_has_the_spread_of_each_layer(random_lens: Lens, ids: torch.Tensor) -> None:
    found = al.rollout_attribution(random_lens, ids, 3)
    assert found.layers is not None
    assert found.layer_names == ("L0", "L1", "L2", "final")
    assert torch.allclose(found.layers.sum(-1), torch.ones(2, 4).double())
    assert found.layers[:, -1].argmax(-1).tolist() == [11, 11]
    frame = found.layers_frame(1)
    assert frame[frame["layer"] == "L0"]["score"].tolist() == found.scores[1].tolist()


@both
def test_graphs_end_at_the_row(random_lens: Lens, method: str) -> None:
    found = attribute(random_lens, padded("left"), Target(3, at=-2), method)
    graph = found.graph(1)
    tops = [data["position"] for _, data in graph.nodes(data=True) if data["layer"] == 3]
    assert tops == [5]
    assert {data["token"] for _, data in graph.nodes(data=True)} <= set(found.tokens[1])
    if method == "attention_flow":
        assert graph.graph["flow"] == pytest.approx(float(found.scores[1].max()), abs=1e-8)


@both
def test_a_function_of_the_output_names_no_position(method: str) -> None:
    lens = architecture("bert")
    found = attribute(lens, padded("right"), lambda output: output.logits[:, 0, 5], method)
    rows = whole(lens, padded("right"), method, RolloutSettings())
    assert torch.allclose(found.scores, rows[:, 0], rtol=0, atol=1e-8)  # a class token's row
    last = attribute(lens, padded("right"), lambda output: output.logits[:, 0, 5], method, row=-1)
    assert torch.allclose(last.scores[1], rows[1, 6], rtol=0, atol=1e-8)
    with pytest.raises(InputError, match="12 is not in"):
        attribute(lens, padded("right"), lambda output: output.logits[:, 0, 5], method, row=12)


@both
def test_encoder_decoders_score_one_stack(method: str) -> None:
    lens = architecture("t5")
    inputs = padded("right") | {"decoder_input_ids": torch.arange(3, 9).view(2, 3)}
    with pytest.raises(InputError, match='stack="enc" or stack="dec"'):
        attribute(lens, inputs, 5, method)
    found = attribute(lens, inputs, 5, method, stack="dec")
    assert [len(words) for words in found.tokens] == [15, 10]
    assert (found.scores[1, :7] == 0).all()
    assert (found.scores[1, 7:10] > 0).all()
    assert "other stack" in found.notes[0]
    with pytest.raises(InputError, match="no row in enc"):
        attribute(lens, inputs, 5, method, stack="enc")
    text = attribute(lens, inputs, 5, method, stack="enc", row=0)
    assert (text.scores[1, :7] > 0).all()
    assert (text.scores[1, 7:] == 0).all()


@both
def test_the_wired_copy_is_found(induction_lens: Lens, method: str) -> None:
    first = [5, 9, 17, 3, 11, 21]
    settings = RolloutSettings(residual=0.0, heads="L0H1,L1H2")
    found = attribute(induction_lens, [[0, *first, *first[:4]]], None, method, settings=settings)
    # without a residual share the way leads through the answer (5) to the token before it (4)
    assert int(found.scores[0].argmax()) == 4
    assert float(found.scores[0, 4]) == pytest.approx(1, abs=1e-4)
