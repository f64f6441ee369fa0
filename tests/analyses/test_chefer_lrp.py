"""Chefer's rollout of gradients and relevance, against the rule written out and known circuits."""

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import attnlens as al
from attnlens.analyses.attribute import attribute
from attnlens.analyses.chefer import relevance_rollout
from attnlens.errors import BudgetError, InputError
from attnlens.hooks.backward import ALPHA_ONE, relevances
from attnlens.hooks.backward.mode import Rules
from attnlens.hooks.backward.positive import positive_linear
from attnlens.hooks.backward.tally import Tally
from attnlens.lens import Lens
from tests.analyses.conftest import architecture
from tests.architectures import ARCHITECTURES

IDS = [0, 5, 9, 13, 7, 5, 9, 13]


def test_positive_linear_hands_down_by_positive_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 5), (4, 5), (3, 4))
    )
    x.requires_grad_()
    y = positive_linear(x, weight, None)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    found = (x * gradient).detach()
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for row in range(3):
        for out in range(4):
            products = [float(x[row, i].detach() * weight[out, i]) for i in range(5)]
            total = sum(p for p in products if p > 0)
            handed = float(y[row, out].detach() * upstream[row, out])
            for i, p in enumerate(products):
                expected[row, i] += max(p, 0) / total * handed
    assert torch.allclose(found, expected, atol=1e-13)
    assert torch.allclose(found.sum(), (y * upstream).sum(), atol=1e-12)  # all of it arrives


def test_positive_linear_takes_a_map_a_block() -> None:
    """Recurrent Gemma's gates: blocks of channels, each with its own map."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((2, 3, 5), (2, 4, 5), (2, 1, 4))
    )
    x.requires_grad_()
    y = positive_linear(x, weight, bias)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    for block in range(2):
        alone = positive_linear(x[block], weight[block], bias[block, 0])
        assert torch.allclose(y[block], alone)
        (expected,) = torch.autograd.grad(alone.square().sum(), x)
        assert torch.allclose(gradient[block], expected[block])


def test_a_model_of_such_maps_is_explained() -> None:
    lens = architecture("recurrent_gemma")
    found = attribute(lens, [[5, 9, 13, 7]], al.Target(5, 6), method="chefer_lrp")
    with torch.no_grad():
        logits = lens.model(torch.tensor([[5, 9, 13, 7]])).logits[:, -1]
    assert torch.allclose(found.value.double(), logits[:, 5] - logits[:, 6])
    assert found.scores.isfinite().all()


def test_every_form_of_a_linear_map_follows_the_rule() -> None:
    torch.manual_seed(0)
    layer = Conv1D(4, 5)  # GPT-2's, which adds and multiplies in one call
    x, upstream = torch.randn(3, 5, requires_grad=True), torch.randn(3, 4)
    with Rules(ALPHA_ONE, Tally(1, frozenset())):
        found = layer(x)
    expected = positive_linear(x, layer.weight.detach().T, layer.bias.detach())
    own, whole = (torch.autograd.grad(y, x, upstream)[0] for y in (found, expected))
    assert torch.equal(found, expected)
    assert torch.allclose(own, whole, atol=1e-6)  # the same products in another layout


def test_an_output_without_positive_products_hands_nothing_down() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    y = positive_linear(x, torch.tensor([[-1.0, -1.0]]), torch.tensor([5.0]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [[0.0, 0.0]]


def dense(lens: Lens, ids: Tensor, token: int) -> tuple[list[Tensor], list[Tensor]]:
    """dM/dA by autograd through the module's own eager weights, and R_A, layer by layer."""
    kept: list[Tensor] = []
    model = lens.model

    def keep(_: object, __: object, output: tuple[Tensor, Tensor]) -> None:
        output[1].retain_grad()
        kept.append(output[1])

    handles = [
        model.get_submodule(site.module).register_forward_hook(keep) for site in lens.anatomy.sites
    ]
    model.set_attn_implementation("eager")
    try:
        model(ids, use_cache=False).logits[:, -1, token].sum().backward()
    finally:
        model.set_attn_implementation("sdpa")
        model.zero_grad()
        for handle in handles:
            handle.remove()
    batch = lens.encode(ids)
    names = [site.name for site in lens.anatomy.sites]

    def metric(output: object) -> Tensor:
        return output.logits[:, -1, token]  # type: ignore[attr-defined]

    maps = relevances(model, lens.anatomy, batch.inputs, metric, ALPHA_ONE, (), names).maps
    gradients = [weights.grad for weights in kept]
    assert all(gradient is not None for gradient in gradients)
    return [g for g in gradients if g is not None], [maps[name] for name in names]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # starcoder2 takes its softmax in float32, whatever its weights are
    [("gpt2", 1e-9), ("bert_decoder", 1e-9), ("starcoder2", 1e-5)],
)
def test_the_row_is_that_of_the_dense_product(name: str, tolerance: float) -> None:
    lens = architecture(name)
    ids = torch.tensor([[3, 8, 5, 11, 7, 2], [9, 4, 4, 6, 1, 12]])
    found = al.chefer_lrp(lens, ids, 7)
    whole = relevance_rollout(*dense(lens, ids, 7))
    expected = whole[:, -1].double()
    assert torch.allclose(found.scores.double(), expected, rtol=tolerance, atol=1e-12)


def test_a_start_layer_leaves_lower_layers_out() -> None:
    lens = architecture("gpt2")
    ids = torch.tensor([[3, 8, 5, 11, 7, 2]])
    found = al.chefer_lrp(lens, ids, 7, layers="L1:")
    gradients, maps = dense(lens, ids, 7)
    whole = relevance_rollout(gradients, maps, start=1)
    assert torch.allclose(found.scores.double(), whole[:, -1].double(), rtol=1e-9, atol=1e-12)


def test_the_source_of_an_induction_has_the_highest_score(induction_lens: Lens) -> None:
    found = attribute(induction_lens, IDS, 7, "chefer_lrp")
    scores = found.of(0)[:-1]  # the row itself keeps its 1
    assert int(scores.argmax()) == 4
    best = found.heads_frame().sort_values("score").iloc[-1]
    assert best["head"] == "L1H2"


def test_padding_changes_nothing(induction_lens: Lens) -> None:
    alone = al.chefer_lrp(induction_lens, IDS, 7).of(0)
    ids = torch.tensor([IDS + [3] * 2, [0, 6, 4, 8, 3, 6, 4, 8, 3, 6]])
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    padded = al.chefer_lrp(induction_lens, {"input_ids": ids, "attention_mask": mask}, 7)
    assert torch.allclose(padded.of(0), alone, atol=1e-5)  # float32 sums in another order


def test_refusals() -> None:
    lens = architecture("t5")
    with pytest.raises(InputError, match="cross-attention"):
        al.chefer_lrp(lens, torch.tensor([[3, 4, 5]]), 7)
    with pytest.raises(BudgetError, match="relevance of every weight"):
        al.chefer_lrp(architecture("gpt2"), torch.tensor([[3, 4, 5]]), 7, budget=10)


def test_chosen_heads_have_the_sums_that_they_have_among_all(random_lens: Lens) -> None:
    ids = torch.tensor([[3, 8, 5, 11, 2]])
    every = al.chefer_lrp(random_lens, ids, 7)
    some = al.chefer_lrp(random_lens, ids, 7, heads="L1H2,L1H0")
    assert [str(head) for head in some.head_names] == ["L1H2", "L1H0"]
    assert every.heads is not None
    assert some.heads is not None
    assert torch.allclose(some.heads, every.heads[:, [6, 4]], atol=1e-12)


def test_projections_that_are_clamped_in_place_are_taken() -> None:
    found = al.chefer_lrp(al.load(ARCHITECTURES["olmo"].build()), [[3, 8, 5, 11]], 7, strict=False)
    assert found.scores.isfinite().all()


def test_a_model_that_mixes_the_rows_of_prompts_takes_one_at_a_time() -> None:
    lens = architecture("gpt_oss")
    ids = torch.tensor([[3, 8, 5, 11, 7, 2], [9, 4, 4, 6, 1, 12]])
    with pytest.raises(InputError, match="one at a time"):
        al.chefer_lrp(lens, ids, 7)
    assert al.chefer_lrp(lens, ids[:1], 7).scores.isfinite().all()
