import dataclasses
import math

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses import layer_similarity as module
from attnlens.analyses.layer_similarity import LayerSimilarity, cosines, layer_similarity
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES
from tests.oracles import statistics as oracle

Kinds = tuple[Tensor, Tensor, Tensor]


def by_hand(maps: Tensor) -> Kinds:
    """Matched, head-mean and unmatched cosines of one prompt's maps `layer head query key`."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / math.sqrt(float((a * a).sum()) * float((b * b).sum())))

    layers, heads = maps.shape[:2]
    found = torch.zeros(3, layers, layers, dtype=torch.float64)
    for a in range(layers):
        for b in range(layers):
            each = [[cosine(maps[a, h], maps[b, g]) for g in range(heads)] for h in range(heads)]
            all_pairs = torch.tensor(each, dtype=torch.float64)
            found[0, a, b] = all_pairs.diagonal().mean()
            found[1, a, b] = cosine(maps[a].mean(0), maps[b].mean(0))
            off = all_pairs.sum() - all_pairs.diagonal().sum()
            found[2, a, b] = off / (heads * heads - heads)
    return found[0], found[1], found[2]


def close(found: LayerSimilarity, prompts: list[Tensor], atol: float = 1e-10) -> bool:
    wanted = [torch.stack(kind).mean(0) for kind in zip(*map(by_hand, prompts), strict=True)]
    kinds = (found.matched, found.head_mean, found.unmatched)
    return all(
        torch.allclose(kind.mean, own, atol=atol, rtol=0)
        for kind, own in zip(kinds, wanted, strict=True)
    )


def dense(lens: Lens, inputs: object, real: Tensor | None = None) -> list[Tensor]:
    """Each prompt's maps `layer head query key`, padding cut out."""
    pattern = lens.run(inputs, keep="pattern").pattern
    real = None if real is None else real.bool()
    each = [oracle.prompts(own, real, real) for own in pattern.values()]
    return [torch.stack(own) for own in zip(*each, strict=True)]


def test_streamed_is_dense(random_lens: Lens, ids: Tensor) -> None:
    found = layer_similarity(random_lens, ids)
    assert close(found, dense(random_lens, ids))
    assert (found.prompts, found.rows) == (2, 24)
    frame = found.neighbours()
    assert list(zip(frame["site"], frame["other"], strict=True)) == [("L0", "L1"), ("L1", "L2")]
    assert (frame["matched_low"] <= frame["matched"]).all()
    assert len(found.to_frame()) == 3


def test_a_layer_is_itself(random_lens: Lens, ids: Tensor) -> None:
    found = layer_similarity(random_lens, ids)
    one = torch.ones(3).double()
    for kind in (found.matched, found.head_mean):
        assert torch.allclose(kind.mean.diagonal(), one, atol=1e-14)
        assert torch.allclose(kind.low.diagonal(), one, atol=1e-14)
        assert torch.allclose(kind.mean, kind.mean.T, atol=1e-14)
    assert float(found.unmatched.mean.diagonal().max()) < 0.99


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "bert", "gpt_oss", "gpt_bigcode"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_kind_of_row_with_padding(name: str, side: str) -> None:
    """Grouped keys, windows, soft cap, both directions, learned sinks, one key head."""
    lens = architecture(name)
    padded = ARCHITECTURES[name].padded
    assert padded is not None
    inputs = padded(lens.model, side)
    # Where the model takes its softmax in float32, scores of blocks that differ in their last bit
    # may be rounded to two neighbours, 6e-8 of a weight apart.
    atol = 1e-7 if any(site.upcast for site in lens.anatomy.sites) else 1e-10
    maps = dense(lens, inputs, inputs["attention_mask"])
    assert close(layer_similarity(lens, inputs), maps, atol)


def test_small_blocks(random_lens: Lens, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    assert close(layer_similarity(random_lens, ids), dense(random_lens, ids))


def test_layers_that_are_copies_are_told_from_those_that_are_not() -> None:
    """Layer 1 has layer 0's queries and keys and the same input; layer 2 has its heads turned."""
    model = tiny_gpt2()
    with torch.no_grad():
        first = model.transformer.h[0]
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.attn.c_proj.bias.zero_()
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_proj.bias.zero_()
            block.attn.c_attn.weight.copy_(first.attn.c_attn.weight)
        weight = model.transformer.h[2].attn.c_attn.weight
        weight[:, :32] = weight[:, :32].roll(8, 1)
        weight[:, 32:64] = weight[:, 32:64].roll(8, 1)
    lens = al.load(model, check=False)  # attention changes nothing here, which the check refuses
    found = layer_similarity(lens, [[3, 9, 4, 17, 22, 5, 6, 30], [8, 1, 2, 9, 7, 5, 5, 3]])
    assert float(found.matched.mean[0, 1]) == pytest.approx(1)
    assert float(found.matched.mean[0, 2]) < 0.9
    assert float(found.head_mean.mean[0, 2]) == pytest.approx(1)
    same = found.unmatched.mean
    assert float(same[0, 1]) == pytest.approx(float(same[0, 0]))


def test_even_layers_are_equal_whatever_their_rows(even_lens: Lens, ids: Tensor) -> None:
    found = layer_similarity(even_lens, ids, rows=5)
    for kind in (found.matched, found.head_mean, found.unmatched):
        assert torch.allclose(kind.mean, torch.ones(3, 3).double(), atol=1e-14)
    assert found.rows == 10


def test_sites_with_other_numbers_of_heads() -> None:
    site = al.load(tiny_gpt2()).anatomy["L0"]
    sites = [dataclasses.replace(site, heads=2), dataclasses.replace(site, layer=1, heads=1)]
    maps = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)).double()
    matched, means, unmatched = cosines(maps @ maps.T, sites)
    assert matched.isnan().tolist() == [[False, True], [True, False]]
    mean = maps[:2].mean(0)
    wanted = torch.cosine_similarity(mean, maps[2], dim=0)
    assert float(means[0, 1]) == pytest.approx(float(wanted))
    both = torch.cosine_similarity(maps[:2], maps[2:], dim=1)
    assert float(unmatched[0, 1]) == pytest.approx(float(both[1]))
    assert unmatched[1, 1].isnan()


def test_bad_requests(random_lens: Lens, ids: Tensor) -> None:
    with pytest.raises(InputError, match="name two at least"):
        layer_similarity(random_lens, ids, layers="L1")
    with pytest.raises(InputError, match="rows=0"):
        layer_similarity(random_lens, ids, rows=0)
