import pytest
import torch
from torch import Tensor

from attnlens.analyses.head_types import copying_score, copying_scores, head_types, repeated_ids
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture


def test_the_hand_wired_heads_are_found(induction_lens: Lens) -> None:
    found = head_types(induction_lens, prompts=4)
    assert [str(head) for head in found.of_type("previous_token")] == ["L0H1"]
    assert [str(head) for head in found.of_type("induction")] == ["L1H2"]
    assert found.of_type("duplicate") == ()
    frame = found.to_frame().set_index("head")
    assert frame.loc["L0H1", "previous_token"] == pytest.approx(1, abs=1e-6)
    assert frame.loc["L1H2", "induction"] == pytest.approx(1, abs=1e-4)
    assert found.period == 7  # START and 4 times 7 tokens fit into 32 positions


def test_scores_against_the_patterns(random_lens: Lens) -> None:
    found = head_types(random_lens, prompts=3, period=5, seed=2)
    ids = repeated_ids(random_lens, 3, 5, 2)
    pattern = random_lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    after = (ids[:, :, None] == ids[:, None, :].roll(1, dims=2)).tril(-1)
    after[:, :, 0] = False
    for name, where in (("duplicate", same), ("induction", after)):
        rows = where.any(-1)
        mass = (pattern * where[:, None]).sum(-1)
        wanted = (mass * rows[:, None]).sum(-1) / rows.sum(-1)[:, None]
        assert torch.allclose(found[name].mean, wanted.mean(0), atol=1e-6)


def test_random_tokens_are_distinct_ordinary_and_seeded(random_lens: Lens) -> None:
    ids = repeated_ids(random_lens, 2, 6, 0)
    assert ids.shape == (2, 25)
    assert (ids[:, 0] == 0).all()
    assert ids[:, 1:].min() > 0
    blocks = ids[:, 1:].view(2, 4, 6)
    assert (blocks == blocks[:, :1]).all()
    assert len(blocks[0, 0].unique()) == 6
    assert torch.equal(ids, repeated_ids(random_lens, 2, 6, 0))
    assert not torch.equal(ids, repeated_ids(random_lens, 2, 6, 1))
    with pytest.raises(InputError, match="2 to 11 tokens"):
        repeated_ids(random_lens, 2, 12, 0)


def test_previous_token_is_measured_on_texts_where_given(random_lens: Lens, ids: Tensor) -> None:
    found = head_types(random_lens, texts=ids, prompts=2)
    pattern = random_lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    before = pattern.diagonal(-1, -2, -1).mean((0, 2))
    assert torch.allclose(found["previous_token"].mean, before, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_copying_equals_the_eigenvalues_over_the_vocabulary(name: str) -> None:
    lens = architecture(name)
    heads = lens.anatomy.heads
    scores, _ = copying_scores(lens, heads)
    embed = lens.model.get_input_embeddings().weight.detach()
    unembed = lens.model.get_submodule(lens.anatomy.unembedding).weight.detach().T
    for score, head in zip(scores, heads, strict=True):
        site, weights = lens.anatomy[head.site], lens.weights(head.site)
        value = weights.value[head.head // (site.heads // site.groups)]
        full = embed @ value @ weights.output[head.head] @ unembed
        assert float(score) == pytest.approx(float(copying_score(full.detach())), abs=1e-8)


def test_a_head_that_copies_scores_one() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    copies = basis @ torch.diag(torch.arange(1.0, 7).double()) @ basis.T
    rotated = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert float(copying_score(copies)) == pytest.approx(1)
    assert float(copying_score(-copies)) == pytest.approx(-1)
    assert float(copying_score(rotated)) == pytest.approx(0, abs=1e-6)


def test_what_is_not_defined_is_nan_with_the_reason() -> None:
    latent = head_types(architecture("deepseek_v3"), prompts=2, period=3)
    assert latent["copying"].mean.isnan().all()
    assert any("No copying scores for L0" in note for note in latent.notes)
    assert latent["induction"].mean.isfinite().all()
    encoder = head_types(architecture("bert"), prompts=2, period=3)
    assert encoder["induction"].mean.isnan().all()
    assert encoder["copying"].mean.isnan().all()
    assert encoder["previous_token"].mean.isfinite().all()
    assert any("both sides" in note for note in encoder.notes)


def test_both_sides_of_an_encoder_decoder_are_scored() -> None:
    frame = head_types(architecture("t5"), prompts=2, period=3).to_frame().set_index("site")
    assert frame.loc["dec.L0", "induction"].notna().all()
    assert frame.loc["cross.L0", ["previous_token", "duplicate", "induction"]].isna().all(axis=None)
    assert frame.loc["enc.L0", "duplicate"].notna().all()
