"""Gradient rollout against products of dense maps from eager attention, and its limits."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.attribute import attribute
from attnlens.analyses.chefer import chefer
from attnlens.analyses.gradient_rollout import gradient_rollout
from attnlens.errors import BudgetError, InputError
from attnlens.lens import Lens
from tests.analyses.conftest import tiny_gpt2
from tests.analyses.test_attention_gradient import NAMES, opened, padded, tolerance
from tests.analyses.test_chefer import prompts_of
from tests.oracles import chefer as oracle


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_is_a_row_of_the_product_of_dense_maps(name: str, side: str) -> None:
    lens = opened(name)
    inputs = padded(lens, name, side)
    found = gradient_rollout(lens, inputs, 5)
    for prompt, own in enumerate(prompts_of(lens, inputs)):
        wanted = oracle.gradient_rollout(own)[-1]
        assert np.allclose(found.of(prompt).numpy(), wanted, atol=10 * tolerance(name), rtol=1e-4)


@given(seed=st.integers(0, 1000), length=st.integers(1, 10), prompts=st.integers(1, 3))
def test_scores_are_shares(random_lens: Lens, seed: int, length: int, prompts: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (prompts, length), generator=draw)
    found = gradient_rollout(random_lens, ids)
    assert found.layers is not None
    assert torch.allclose(found.layers.sum(-1), torch.ones(prompts, 4).double(), atol=1e-12)
    assert (found.layers >= 0).all()
    assert torch.equal(found.layers[:, 0], found.scores)
    assert found.layer_names == ("L0", "L1", "L2", "final")
    assert (found.layers[:, 3, -1] == 1).all()


def test_the_size_of_the_gradient_weighs_attention_against_the_residual(
    random_lens: Lens, ids: Tensor
) -> None:
    def scaled(factor: float) -> Tensor:
        def metric(output: Any) -> Tensor:
            return factor * output.logits[:, -1, 5]

        return gradient_rollout(random_lens, ids, metric).scores

    own = torch.zeros(2, 12, dtype=torch.float64)
    own[:, -1] = 1
    assert torch.allclose(scaled(1e-9), own, atol=1e-6)
    large, larger = scaled(1e9), scaled(1e12)
    assert torch.allclose(large, larger, atol=1e-6)
    assert (large[:, -1] < 0.99).all()


def test_the_attended_source_gets_the_share(induction_lens: Lens) -> None:
    ids = [0, 5, 9, 3, 7, 5, 9, 3]
    found = attribute(induction_lens, ids, 7, method="gradient_rollout")
    assert int(found.of(0).argmax()) == 4
    assert found.of(0)[4] > 0.7
    assert found.of(0)[[4, 7]].sum() > 0.99
    assert found.heads_frame().set_index("head")["score"].idxmax() == "L1H2"


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss", "t5"])
def test_padding_and_batches_change_nothing(name: str) -> None:
    lens = opened(name)
    for side in ("left", "right"):
        inputs = padded(lens, name, side)
        alone = {"input_ids": inputs["input_ids"][1:, inputs["attention_mask"][1].bool()]}
        if "decoder_input_ids" in inputs:
            real = inputs["decoder_attention_mask"][1].bool()
            alone["decoder_input_ids"] = inputs["decoder_input_ids"][1:, real]
        both, one = gradient_rollout(lens, inputs, 5), gradient_rollout(lens, alone, 5)
        assert both.tokens[1] == one.tokens[0]
        assert torch.allclose(both.of(1), one.of(0), atol=10 * tolerance(name))
        assert (both.scores[1, len(one.tokens[0]) :] == 0).all()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "t5"])
def test_blocks_of_one_row(name: str, request: pytest.FixtureRequest) -> None:
    lens = opened(name)
    inputs = padded(lens, name, "left")
    whole = gradient_rollout(lens, inputs, 5), chefer(lens, inputs, 5)
    request.getfixturevalue("small_blocks")
    rows = gradient_rollout(lens, inputs, 5), chefer(lens, inputs, 5)
    for one, other in zip(whole, rows, strict=True):
        assert torch.allclose(one.scores, other.scores, atol=1e-6)


def test_layers_heads_rows_and_maps(random_lens: Lens, ids: Tensor) -> None:
    found = gradient_rollout(random_lens, ids, 5, layers="L1:", heads="L1H0,L1H3,L2H2", maps=True)
    assert found.maps is not None
    eye = torch.eye(12, dtype=torch.float64)
    steps = [own.mean(1) + eye for own in found.maps.values()]
    steps = [step / step.sum(-1, keepdim=True) for step in steps]
    assert torch.allclose(found.scores, (steps[1] @ steps[0])[:, -1], atol=1e-12)
    assert list(found.maps) == ["L1", "L2"]
    earlier = gradient_rollout(random_lens, ids, 5, row=3)
    assert (earlier.scores[:, 4:] == 0).all()
    assert earlier.settings == {"row": 3}
    with pytest.raises(InputError, match="row=12"):
        gradient_rollout(random_lens, ids, 5, row=12)
    with pytest.raises(BudgetError, match="map of every head"):
        gradient_rollout(random_lens, ids, 5, maps=True, budget=100)


def test_other_weights_give_other_scores(random_lens: Lens, ids: Tensor) -> None:
    other = al.load(tiny_gpt2(sharp=1.0))
    for method in (gradient_rollout, chefer, al.attention_gradient, al.attention_saliency):
        one, another = method(random_lens, ids, 5).scores, method(other, ids, 5).scores
        assert (one - another).abs().max() > 1e-3
