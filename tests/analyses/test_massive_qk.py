"""Massive channels of q and k against planted ones and against q and k kept whole."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.massive_qk import massive_qk
from attnlens.analyses.uncertainty import bootstrap_mean
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.analyses.test_massive_activations import padded
from tests.architectures import ARCHITECTURES
from tests.architectures.base import builder
from tests.architectures.decoders import SIZES

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
MIXED = padded(ROWS, "right")


@pytest.fixture(scope="module")
def planted() -> Lens:
    """Channel 3 of the queries of L1H2 is 50 everywhere, channel 5 of the keys of L0H1 is -30."""
    model = tiny_gpt2()
    with torch.no_grad():
        for layer, part, head, channel, value in ((1, 0, 2, 3, 50.0), (0, 1, 1, 5, -30.0)):
            feature = 32 * part + 8 * head + channel
            model.transformer.h[layer].attn.c_attn.weight[:, feature] = 0
            model.transformer.h[layer].attn.c_attn.bias[feature] = value
    return al.load(model)


def test_planted_channels_are_found_and_no_others(planted: Lens) -> None:
    found = massive_qk(planted, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    frame = found.channels()
    assert set(zip(frame["head"], frame["side"], frame["channel"], strict=True)) == {
        ("L1H2", "query", 3),
        ("L0G1", "key", 5),
    }
    norms = dict(zip(frame["side"], frame["norm"], strict=True))
    assert norms["query"] == pytest.approx(50 * math.sqrt(5), abs=1e-9)
    assert norms["key"] == pytest.approx(30 * math.sqrt(5), abs=1e-9)
    assert list(frame["prompts"]) == [1.0, 1.0]
    assert frame["frequency"].eq(0).all()
    assert frame["wavelength"].map(math.isinf).all()
    heads = [str(head) for head in found.heads]
    massive = dict(zip(heads, found["query_massive"].mean.tolist(), strict=True))
    assert massive == {head: float(head == "L1H2") for head in heads}
    assert heads[int(found["key_peak"].mean.argmax())] == "L0H1"
    assert any("no table of rotary frequencies" in note for note in found.notes)


def test_a_channel_of_a_group_belongs_to_all_heads_that_read_it() -> None:
    """Llama: 4 heads read 2 groups; channel 3 turns with 7, slowly, so it keeps its size."""
    model = ARCHITECTURES["llama"].build().double()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[8 + 3] *= 300
    found = massive_qk(al.load(model), MIXED)
    frame = found.channels()
    assert set(zip(frame["head"], frame["channel"], strict=True)) == {("L1G1", 3)}
    (row,) = frame.to_dict("records")
    assert row["partner"] == 7
    assert row["frequency"] == pytest.approx(10000 ** (-6 / 8), rel=1e-6)
    assert row["wavelength"] == pytest.approx(2 * math.pi * 1000, rel=1e-6)
    peaks = found["key_massive"].mean
    assert peaks.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert set(found.rotary) == {"L0", "L1"}
    assert found.key["L1"].norm.shape == (2, 8)
    assert found.query["L1"].norm.shape == (4, 8)


def oracle(lens: Lens, inputs: Any, threshold: float) -> dict[str, dict[str, Tensor]]:
    """Norms, ratios and counts from q and k kept whole, one prompt and channel at a time."""
    trace = lens.run(inputs, keep=("q", "k"), dtype=torch.float64)
    real = trace.sides.text.real
    made: dict[str, dict[str, Tensor]] = {"norm": {}, "ratio": {}}
    for side, kind in (("query", trace.q), ("key", trace.k)):
        for site, x in kind.items():
            norm = torch.empty(*x.shape[:2], x.shape[-1], dtype=torch.float64)
            for prompt in range(len(x)):
                rows = range(x.shape[2]) if real is None else real[prompt].nonzero()[:, 0].tolist()
                for head in range(x.shape[1]):
                    for channel in range(x.shape[-1]):
                        values = [float(x[prompt, head, t, channel]) ** 2 for t in rows]
                        norm[prompt, head, channel] = math.sqrt(math.fsum(values))
            middle = norm.sort(-1).values[..., (x.shape[-1] - 1) // 2, None]
            made["norm"][f"{side} {site}"] = norm
            made["ratio"][f"{side} {site}"] = norm / middle
    return made


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    batch_size=st.integers(1, 3),
    name=st.sampled_from(["llama", "phi", "gpt_oss"]),
)
def test_equals_q_and_k_kept_whole(
    lengths: list[int], side: str, batch_size: int, name: str, lenses: dict[str, Lens]
) -> None:
    lens = lenses[name]
    rows = [[(7 * p + 3 * t) % 88 + 4 for t in range(n)] for p, n in enumerate(lengths)]
    inputs = padded(rows, side)
    found, made = massive_qk(lens, inputs, 2.0, batch_size=batch_size), oracle(lens, inputs, 2.0)
    for kind, own in (("query", found.query), ("key", found.key)):
        for site, norms in own.items():
            place = f"{kind} {site}"
            pairs = (
                (norms.norm, made["norm"][place].mean(0)),
                (norms.ratio, made["ratio"][place].mean(0)),
                (norms.massive, (made["ratio"][place] >= 2.0).double().mean(0)),
            )
            for value, wanted in pairs:
                torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)
    times = lens.anatomy.sites[0].heads // lens.anatomy.sites[0].groups
    peaks = torch.cat([made["ratio"][f"query {s.name}"] for s in lens.anatomy.sites], 1).amax(-1)
    for a, b in zip(found["query_peak"], bootstrap_mean(peaks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0, equal_nan=True)
    counts = torch.cat([made["ratio"][f"key {s.name}"] for s in lens.anatomy.sites], 1) >= 2.0
    counts = counts.sum(-1).double().mean(0).repeat_interleave(times)
    torch.testing.assert_close(found["key_massive"].mean, counts, rtol=1e-10, atol=0)


@pytest.fixture(scope="module")
def lenses() -> dict[str, Lens]:
    return {name: architecture(name) for name in ("llama", "phi", "gpt_oss")}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "cohere", "gpt2"])
def test_padding_on_either_side_gives_the_same(name: str) -> None:
    lens = architecture(name)
    left, right = (massive_qk(lens, padded(ROWS, side), 2.0) for side in ("left", "right"))
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-10, atol=1e-10)
    for site in left.query:
        for a, b in ((left.query, right.query), (left.key, right.key)):
            torch.testing.assert_close(a[site].norm, b[site].norm, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(left.rotary[site].frequencies, right.rotary[site].frequencies)


def test_bfloat16_is_near() -> None:
    model = ARCHITECTURES["llama"].build()
    exact = massive_qk(al.load(model), MIXED)
    half = massive_qk(al.load(model.bfloat16()), MIXED)
    for site, norms in exact.query.items():
        torch.testing.assert_close(half.query[site].norm, norms.norm, rtol=0.05, atol=0.05)
        assert half.rotary[site].layout == "half"


def test_a_head_without_queries_has_no_ratio() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :8] = 0
    found = massive_qk(al.load(model), [[1, 2, 3], [4, 5, 6]])
    assert found.query["L0"].ratio[0].isnan().all()
    assert math.isnan(float(found["query_peak"].mean[0]))
    assert math.isnan(float(found["query_massive"].mean[0]))
    assert not found["key_peak"].mean.isnan().any()
    assert not found["query_peak"].mean[1:].isnan().any()


def test_frames_and_layers() -> None:
    found = massive_qk(architecture("llama"), MIXED, 1.5, layers="L1")
    assert set(found.to_frame()["site"]) == {"L1"}
    assert set(found.channels()["site"]) == {"L1"}
    assert (found.channels()["ratio"].diff().dropna() <= 0).all()
    with pytest.raises(InputError, match="no side 'value'"):
        found.of("value")  # type: ignore[arg-type]


def test_unknown_frequencies_are_told() -> None:
    lens = architecture("dinov3_vit")
    found = massive_qk(lens, ARCHITECTURES["dinov3_vit"].inputs(lens.model), 1.5)  # type: ignore[arg-type]
    assert any("cannot be told" in note for note in found.notes)
    assert found.channels()["frequency"].isna().all()


def test_a_tower_that_counts_no_prompts_is_left_out() -> None:
    model = ARCHITECTURES["qwen2_vl"].build().double()
    inputs = ARCHITECTURES["qwen2_vl"].inputs(model)
    lens = al.load(model, example=inputs)
    found = massive_qk(lens, inputs)
    assert set(found.query) == {"L0", "L1"}
    assert any("Left out" in note for note in found.notes)
    with pytest.raises(UnsupportedModelError, match="not the prompt"):
        massive_qk(lens, inputs, layers="vision.L0")


def test_tables_that_change_with_the_length_are_told() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    build = builder("LlamaForCausalLM", "LlamaConfig", SIZES | {"rope_parameters": rope})
    found = massive_qk(al.load(build()), MIXED)
    assert any("length of the text" in note for note in found.notes)
    assert {rotary.layout for rotary in found.rotary.values()} == {"half"}


@pytest.mark.parametrize("threshold", [1.0, 0.0, -2.0, float("inf"), float("nan")])
def test_bad_thresholds_are_refused(random_lens: Lens, threshold: float) -> None:
    with pytest.raises(InputError, match="multiple of the median"):
        massive_qk(random_lens, [[1, 2, 3]], threshold)


def test_a_trained_model_has_its_massive_channels_in_the_slowest_pair(shared_data: Path) -> None:
    """As Jin et al. find of larger ones: massive values lie where rotary embedding turns least."""
    lens = al.load(shared_data / "stories260K")
    texts = ["Once upon a time there was a little girl named Lily.", "The dog ran to the park."]
    found = massive_qk(lens, texts).channels()
    assert len(found) >= 10
    slowest = found[found["frequency"] < 0.0011]
    assert set(slowest["channel"]) == {3, 7}
    assert len(slowest) > 0.8 * len(found)
    assert (found.head(5)["wavelength"].sub(2000 * math.pi).abs() < 1e-2).all()
