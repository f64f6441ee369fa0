import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.ranks import effective_rank, head_ranks, product_singular_values
from attnlens.errors import BudgetError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES
from tests.oracles import statistics as oracle


def rank_of(matrix: Tensor) -> float:
    """From the singular values of the whole matrix, one at a time."""
    values = [value for value in torch.linalg.svdvals(matrix.double()).tolist() if value > 0]
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))


def orthonormal(seed: int, columns: int = 8) -> Tensor:
    noise = torch.randn(32, columns, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(noise).Q


def test_equal_singular_values_are_counted_exactly() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0]).double()) == pytest.approx(3)
    assert effective_rank(torch.tensor([2.0, 0.0]).double()) == 1
    assert effective_rank(torch.zeros(4)) == 0
    halves = torch.tensor([2.0, 1.0, 1.0]).double()  # shares 1/2, 1/4, 1/4: entropy 3/2 ln 2
    assert effective_rank(halves) == pytest.approx(2**1.5)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_the_small_product_has_the_singular_values_of_the_large(
    a: int, b: int, d: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, size, d, generator=generator).double() for size in (a, b))
    small = product_singular_values(left, right)
    whole = torch.linalg.svdvals(left @ right.mT)
    both = min(small.shape[-1], whole.shape[-1])
    assert torch.allclose(small[..., :both], whole[..., :both], atol=1e-10)
    for rest in (small[..., both:], whole[..., both:]):
        assert torch.allclose(rest, torch.zeros_like(rest), atol=1e-10)


def planted() -> Lens:
    """Heads of layer 0 whose W_Q W_K^T have rank 1, 2, 5, 8, and W_V W_O rank 8, 3, 1, 0."""
    model = tiny_gpt2(layers=1)
    attention = model.transformer.h[0].attn
    with torch.no_grad():
        for head, (qk, ov) in enumerate([(1, 8), (2, 3), (5, 1), (8, 0)]):
            own = slice(8 * head, 8 * head + 8)
            keep_qk, keep_ov = (torch.arange(8) < rank for rank in (qk, ov))
            for part, seed, keep in ((0, 1, keep_qk), (32, 2, keep_qk), (64, 3, keep_ov)):
                columns = slice(part + own.start, part + own.stop)
                attention.c_attn.weight[:, columns] = orthonormal(seed + head) * keep
            attention.c_proj.weight[own] = orthonormal(9 + head).T
    return al.load(model)


def test_planted_ranks_are_found_exactly() -> None:
    found = head_ranks(planted())
    assert found.names == ("qk_rank", "ov_rank")
    assert found["qk_rank"].mean.tolist() == pytest.approx([1, 2, 5, 8], abs=1e-10)
    assert found["ov_rank"].mean.tolist() == pytest.approx([8, 3, 1, 0], abs=1e-10)
    assert found["qk_rank"].low.isnan().all()
    frame = found.to_frame()
    assert frame["d_qk"].tolist() == [8] * 4
    assert frame["qk_random"].between(4, 8).all()
    assert (found.prompts, found.lengths, found.notes) == (0, (), ())


@pytest.mark.parametrize("name", ["llama", "gpt_bigcode", "qwen3", "gemma2", "bert", "t5"])
def test_weights_of_every_kind_of_model(name: str) -> None:
    """Grouped keys (by the group of each head), one key head, a head width of its own."""
    lens = architecture(name)
    found = head_ranks(lens)
    for site in lens.anatomy.sites:
        weights = lens.weights(site.name)
        query, key, value, output = (
            part.detach() for part in (weights.query, weights.key, weights.value, weights.output)
        )
        for head in range(site.heads):
            group = head // (site.heads // site.groups)
            row = found.heads.index(site.head(head))
            wanted = rank_of(query[head] @ key[group].T), rank_of(value[group] @ output[head])
            assert found.mean[row].tolist() == pytest.approx(wanted, abs=1e-9)


def test_even_and_single_maps_have_known_ranks(even_lens: Lens) -> None:
    found = head_ranks(even_lens, [[1, 2, 3, 4, 5, 6]])
    even = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    assert found["pattern_rank"].mean.tolist() == pytest.approx([rank_of(even)] * 12)
    encoder = architecture("bert")
    with torch.no_grad():  # every key alike for every row: a map of rank 1
        for name, weight in encoder.model.named_parameters():
            if ".query." in name or ".key." in name:
                weight.zero_()
    found = head_ranks(encoder, [[7, 8, 9, 10, 11]])
    assert found["pattern_rank"].mean.tolist() == pytest.approx([1] * 8)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ranks_of_maps_are_dense_ones(name: str, side: str) -> None:
    lens = architecture(name)
    padded = ARCHITECTURES[name].padded
    assert padded is not None
    inputs = padded(lens.model, side)
    found = head_ranks(lens, inputs, batch_size=2)
    real = inputs["attention_mask"].bool()
    maps = torch.cat([*lens.run(inputs, keep="pattern").pattern.values()], dim=1)
    each = [[rank_of(head) for head in own] for own in oracle.prompts(maps, real, real)]
    wanted = torch.tensor(each, dtype=torch.float64)
    interval = found["pattern_rank"]
    assert torch.allclose(interval.mean, wanted.mean(0), atol=1e-10)
    # Where the model takes its softmax in float32, scores of batches that differ in their last bit
    # may be rounded to two neighbours, 6e-8 of a weight apart; a rank sums some hundred of them.
    atol = 1e-6 if any(site.upcast for site in lens.anatomy.sites) else 1e-10
    assert (interval.low >= wanted.amin(0) - atol).all()
    assert (interval.high <= wanted.amax(0) + atol).all()
    assert (found.prompts, found.lengths) == (2, (16, 10))
    assert any("10 to 16 rows" in note for note in found.notes)


def test_stacks_stay_in_their_order() -> None:
    lens = architecture("t5")
    inputs = {"input_ids": torch.arange(5, 29).view(2, 12)}
    inputs["decoder_input_ids"] = torch.arange(3, 9).view(2, 3)
    found = head_ranks(lens, inputs)
    pattern = lens.run(inputs, keep="pattern").pattern
    for row, head in enumerate(found.heads):
        wanted = [rank_of(own) for own in pattern[head.site][:, head.head]]
        assert float(found["pattern_rank"].mean[row]) == pytest.approx(sum(wanted) / 2)


def test_weights_that_are_no_matrix_a_head_are_nan_with_a_note() -> None:
    lens = architecture("minicpm3")
    found = head_ranks(lens, [[5, 6, 7, 8, 9]])
    assert found["qk_rank"].mean.isnan().all()
    assert found.random[:, 0].isnan().all()
    assert any("W_Q W_K^T has no rank at L0, L1. " in note for note in found.notes)
    assert not found["pattern_rank"].mean.isnan().any()


def test_a_map_over_the_budget_is_refused_with_what_fits(random_lens: Lens, ids: Tensor) -> None:
    with pytest.raises(BudgetError, match="texts to 6 tokens"):
        head_ranks(random_lens, ids, budget=24 * 36)
    head_ranks(random_lens, ids[:, :6], budget=24 * 36)


def test_nan_has_no_rank() -> None:
    assert effective_rank(product_singular_values(*2 * [torch.full((3, 2), torch.nan)])).isnan()
