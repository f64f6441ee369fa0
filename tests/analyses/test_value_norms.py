"""Norms of value-weighted attention against every vector written out, and a known circuit."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.target import Target
from attnlens.analyses.value_norms import head_products, summed_norms, value_norms
from attnlens.errors import BudgetError, InputError, UnsupportedModelError
from attnlens.lens import Lens
from attnlens.tasks import repeated_tokens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES


def written_out(lens: Lens, inputs: Any, site: str) -> Tensor:
    """`A_h[t, s] v_s W_O^h`, batch head query key d_model: what the method never makes."""
    trace = lens.run(inputs, keep=("pattern", "v"))
    own = lens.anatomy[site]
    values = trace.v[site].repeat_interleave(own.heads // own.groups, 1)
    moved = torch.einsum("bhsv,hvd->bhsd", values, lens.weights(site).output)
    return trace.pattern[site][..., None] * moved[:, :, None]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "gpt_oss"])
def test_norms_of_the_row_that_is_read(name: str) -> None:
    lens = architecture(name)
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    found = value_norms(lens, ids, Target(5, at=6), maps=True)
    assert found.layers is not None
    assert found.heads is not None
    assert found.maps is not None
    rows: list[Tensor] = []
    heads: list[Tensor] = []
    for site in lens.anatomy.sites:
        vectors = written_out(lens, ids, site.name)
        rows.append(vectors[:, :, 6].sum(1).norm(dim=-1))
        heads.append(vectors[:, :, 6].norm(dim=-1).sum(-1))
        # patterns and norms of some models are computed in float32
        assert torch.allclose(found.maps[site.name], vectors.norm(dim=-1), atol=1e-6)
    expected = torch.stack(rows, 1)
    assert torch.allclose(found.layers, expected, atol=1e-6)
    assert torch.allclose(found.heads, torch.cat(heads, 1), atol=1e-6)
    shares = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(found.scores, shares.mean(1), atol=1e-6)
    assert torch.allclose(found.scores.sum(-1), torch.ones(2).double(), atol=1e-12)
    assert (found.scores[:, 7:] == 0).all()


def test_all_rows_where_the_target_names_none(random_lens: Lens, small_blocks: None) -> None:
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = value_norms(random_lens, inputs, lambda output: output.logits[:, -1, 3])
    assert found.layers is not None
    assert found.heads is not None
    for layer, site in enumerate(random_lens.anatomy.sites):
        vectors = written_out(random_lens, inputs, site.name)
        for prompt, real in enumerate([slice(2, 7), slice(0, 7)]):
            own = vectors[prompt, :, real, real]
            row = own.sum(0).norm(dim=-1).mean(0)
            assert torch.allclose(found.layers[prompt, layer, : len(row)], row, atol=1e-10)
            each = own.norm(dim=-1).sum(-1).mean(-1)
            heads = found.heads[prompt, 4 * layer : 4 * layer + 4]
            assert torch.allclose(heads, each, atol=1e-10)
    assert "means over all rows" in found.notes[-1]


def test_rows_of_a_window_are_of_their_own_keys(small_blocks: None) -> None:
    """Blocks that begin after the first key."""
    lens = al.load(ARCHITECTURES["mistral"].build())  # its softmax is in float32 always
    assert lens.anatomy["L0"].window is not None
    ids = torch.randint(4, 90, (1, 14), generator=torch.Generator().manual_seed(2))
    found = value_norms(lens, ids, lambda output: output.logits[:, -1, 3])
    assert found.layers is not None
    for layer, site in enumerate(lens.anatomy.sites):
        vectors = written_out(lens, ids, site.name)
        row = vectors.sum(1).norm(dim=-1).mean(1)
        assert torch.allclose(found.layers[:, layer], row.double(), atol=1e-5)


def test_a_sink_that_scales_z_takes_its_share_of_the_rows() -> None:
    """GraniteSWA: what is taken from all tokens together is what the heads write."""
    lens = architecture("granite_swa")
    ids = torch.randint(4, 90, (1, 9), generator=torch.Generator().manual_seed(2))
    trace = lens.run(ids, keep=("pattern", "v", "z"))
    found = value_norms(lens, ids, Target(5, at=6))
    assert found.layers is not None
    for layer, site in enumerate(lens.anatomy.sites):
        vectors = written_out(lens, ids, site.name)[:, :, 6]
        values = trace.v[site.name].repeat_interleave(site.heads // site.groups, 1)
        unscaled = trace.pattern[site.name][:, :, 6, None] @ values
        share = (trace.z[site.name][:, :, 6, :1] / unscaled[..., 0, :1])[..., None]
        assert share.max() < 1  # the sink takes something
        row = (vectors * share).sum(1).norm(dim=-1)
        assert torch.allclose(found.layers[:, layer], row, atol=1e-5)  # softmax in float32


def test_a_model_without_logits_needs_no_target() -> None:
    lens = architecture("vit")
    size = lens.model.config.image_size
    pixels = torch.randn(1, 3, size, size, dtype=torch.float64)
    found = value_norms(lens, {"pixel_values": pixels})
    assert found.target == ("no target",)
    assert found.value.isnan().all()
    assert torch.allclose(found.scores.sum(-1), torch.ones(1).double(), atol=1e-12)


def test_a_token_without_value_takes_attention_and_gives_nothing(induction_lens: Lens) -> None:
    task = repeated_tokens(induction_lens, prompts=1, period=8)
    found = value_norms(induction_lens, task.clean, Target.of_task(task))
    own = task.clean[0].tolist()
    earlier = own.index(own[int(task.reads[0, -1])])
    assert found.layers is not None
    assert int(found.layers[0, 1].argmax()) == earlier + 1
    model = copy.deepcopy(induction_lens.model)
    with torch.no_grad():  # L1H2 goes on looking, at values that are nothing
        model.transformer.h[1].attn.c_proj.weight.zero_()
    # no other head of the layer writes
    silent = value_norms(Lens(model), task.clean, Target.of_task(task))
    assert silent.layers is not None
    assert silent.layers[0, 1].abs().max() == 0
    assert silent.scores.isfinite().all()


@settings(max_examples=15)
@given(
    heads=st.integers(1, 4),
    keys=st.integers(1, 6),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_products_of_heads_give_the_norm_of_any_sum(
    heads: int, keys: int, rows: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    value = torch.randn(2, heads, keys, 3, generator=draw, dtype=torch.float64)
    weight = torch.randn(heads, 3, 5, generator=draw, dtype=torch.float64)
    pattern = torch.rand(2, heads, rows, keys, generator=draw, dtype=torch.float64)
    vectors = torch.einsum("bhts,bhsv,hvd->btsd", pattern, value, weight)
    found = summed_norms(pattern, head_products(value, weight))
    assert torch.allclose(found, vectors.norm(dim=-1), atol=1e-7)


def test_heads_that_cancel_have_norms_and_their_layer_has_none() -> None:
    value = torch.randn(1, 1, 4, 3, dtype=torch.float64).repeat(1, 2, 1, 1)
    weight = torch.randn(1, 3, 5, dtype=torch.float64) * torch.tensor([1.0, -1.0])[:, None, None]
    products = head_products(value, weight)
    pattern = torch.full((1, 2, 2, 4), 0.25, dtype=torch.float64)
    assert products.diagonal(dim1=-2, dim2=-1).min() > 0
    # the square root of a sum that cancels to rounding
    assert summed_norms(pattern, products).max() < 1e-7


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(random_lens: Lens, side: str) -> None:
    draw = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, 40, (length,), generator=draw).tolist() for length in (3, 8)]

    def put(row: list[int]) -> list[int]:
        fill = [0] * (8 - len(row))
        return fill + row if side == "left" else row + fill

    ids = torch.tensor([put(row) for row in rows])
    mask = torch.tensor([put([1] * len(row)) for row in rows])
    found = value_norms(random_lens, {"input_ids": ids, "attention_mask": mask}, Target(3))
    for prompt, row in enumerate(rows):
        alone = value_norms(random_lens, [row], Target(3))
        assert torch.allclose(found.of(prompt), alone.of(0), atol=1e-12)
        assert found.heads is not None
        assert alone.heads is not None
        assert torch.allclose(found.heads[prompt], alone.heads[0], atol=1e-12)


def test_decoder_rows_reach_text_and_decoder() -> None:
    lens = architecture("t5")
    draw = torch.Generator().manual_seed(1)
    text, own = (torch.randint(4, 90, (2, size), generator=draw) for size in (7, 5))
    found = value_norms(lens, {"input_ids": text, "decoder_input_ids": own}, Target(11))
    assert [len(words) for words in found.tokens] == [12, 12]
    assert set(found.layer_names) == {"dec.L0", "dec.L1", "cross.L0", "cross.L1"}
    # as many layers read the text as the decoder's own tokens
    assert torch.allclose(found.scores[:, :7].sum(1), torch.full((2,), 0.5).double(), atol=1e-12)


def test_chosen_heads_and_layers(random_lens: Lens, ids: Tensor) -> None:
    found = value_norms(random_lens, ids, Target(3), heads="L1H2,L1H0")
    vectors = written_out(random_lens, ids, "L1")[:, [0, 2], -1]
    assert found.layers is not None
    assert torch.allclose(found.layers[:, 0], vectors.sum(1).norm(dim=-1), atol=1e-10)
    assert [str(head) for head in found.head_names] == ["L1H2", "L1H0"]


def test_what_cannot_be_had_is_refused(random_lens: Lens, ids: Tensor) -> None:
    with pytest.raises(BudgetError):
        value_norms(random_lens, ids, Target(3), maps=True, budget="1kB")
    with pytest.raises(UnsupportedModelError, match="no output projection"):
        value_norms(architecture("bitnet"), ids, Target(5))


def test_the_model_is_left_as_it_was(ids: Tensor) -> None:
    model = tiny_gpt2().train()
    with torch.inference_mode():
        value_norms(al.load(model), ids.clone(), Target(5))
    assert model.training
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_an_edit_that_is_on_is_refused(induction_lens: Lens) -> None:
    with induction_lens.edit(al.Zero("L1H2")):
        induction_lens.run([0, 5, 9, 5])  # an edit that never acts is an error of its own
        with pytest.raises(InputError, match="edit is on"):
            value_norms(induction_lens, [0, 5, 9, 5], 9)
