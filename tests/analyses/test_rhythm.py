import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.rhythm import Rhythm, choose, rhythm
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.hooks.rows import Rows
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES


def by_hand(
    maps: Tensor, near: list[int], far: list[int], window: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Both curves of one prompt from its maps `head query key`, one weight at a time."""
    length = maps.shape[-1]
    waad = [
        sum(float(maps[h, t, s]) * min(abs(t - s), window) for h in near for s in range(length))
        / len(near)
        for t in range(length)
    ]
    fai = []
    for s in range(length):
        rows = [t for t in range(length) if s + low <= t <= s + high]
        found = sum(float(maps[h, t, s]) for h in far for t in rows)
        fai.append(found / len(rows) / len(far) if rows else math.nan)
    return torch.tensor(waad, dtype=torch.float64), torch.tensor(fai, dtype=torch.float64)


def numbers(found: Rhythm, heads: tuple[Head, ...]) -> list[int]:
    return [found.heads.index(head) for head in heads]


def assert_is_dense(found: Rhythm, patterns: list[Tensor], tolerance: float) -> None:
    """The result of a run against the maps `head query key` of each prompt, padding cut out."""
    window, (low, high) = found.window, found.horizon
    near, far = numbers(found, found.local_heads), numbers(found, found.global_heads)
    assert found.lengths == tuple(maps.shape[-1] for maps in patterns)
    for prompt, maps in enumerate(patterns):
        length = maps.shape[-1]
        wanted = by_hand(maps.double(), near, far, window, low, high)
        for curve, own in zip((found.waad, found.fai), wanted, strict=True):
            torch.testing.assert_close(
                curve[prompt, :length], own, rtol=0, atol=tolerance, equal_nan=True
            )
            assert curve[prompt, length:].isnan().all()
    t = torch.arange(max(maps.shape[-1] for maps in patterns))
    back = (t[:, None] - t).abs()
    distance = torch.stack(
        [(maps * back[: maps.shape[1], : maps.shape[1]]).sum(-1).mean(-1) for maps in patterns]
    ).mean(0)
    assert torch.allclose(found.distance.mean, distance.double(), atol=1e-5)
    assert (near, far) == tuple(
        numbers(found, chosen) for chosen in choose(found.heads, found.distance.mean, found.share)
    )


def test_even_attention_has_a_closed_form(even_lens: Lens) -> None:
    ids = torch.randint(1, 40, (2, 30), generator=torch.Generator().manual_seed(1))
    found = rhythm(even_lens, ids, window=4, horizon=(5, 8))
    t = torch.arange(30).double()
    assert torch.allclose(found.distance.mean, (t / 2).mean().expand(12), atol=1e-5)
    # Row t has one key at each distance 0 .. t: those below 4 sum to 6, the others count 4 each.
    waad = [sum(min(d, 4) for d in range(n + 1)) / (n + 1) for n in range(30)]
    fai = [[1 / (n + 1) for n in range(s + 5, min(s + 8, 29) + 1)] for s in range(30)]
    assert torch.allclose(
        found.waad, torch.tensor(waad, dtype=torch.float64).expand(2, -1), atol=1e-10
    )
    known = torch.tensor([sum(own) / len(own) for own in fai if own], dtype=torch.float64)
    assert torch.allclose(found.fai[:, :25], known.expand(2, -1), atol=1e-10)
    assert found.fai[:, 25:].isnan().all()


def test_a_streamed_curve_is_the_dense_one(random_lens: Lens, ids: Tensor) -> None:
    found = rhythm(random_lens, ids, window=3, horizon=(2, 5))
    maps = random_lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    assert_is_dense(found, list(maps), 1e-10)
    assert len(found.local_heads) == len(found.global_heads) == 3
    assert not set(found.local_heads) & set(found.global_heads)
    assert found.distance.low[0] < found.distance.mean[0] < found.distance.high[0]


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "bert", "gemma2"])
def test_windows_learned_sinks_and_both_sides(name: str) -> None:
    lens = architecture(name)
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(2))
    found = rhythm(lens, ids, window=3, horizon=(1, 4))
    maps = lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    assert_is_dense(found, list(maps), 1e-10)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=2, max_size=4),
    side=st.sampled_from(["left", "right"]),
    window=st.integers(1, 6),
    low=st.integers(0, 6),
    reach=st.integers(0, 6),
    name=st.sampled_from(["llama", "mistral"]),
)
def test_padding_on_either_side_changes_nothing(
    lengths: list[int], side: str, window: int, low: int, reach: int, name: str
) -> None:
    lens = _cached(name)
    generator = torch.Generator().manual_seed(sum(lengths))
    texts = [torch.randint(20, 60, (length,), generator=generator) for length in lengths]
    width = max(lengths)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = rhythm(lens, inputs, window=window, horizon=(low, low + reach), batch_size=2)
    alone = [lens.run(text, keep="pattern").pattern.stack().flatten(1, 2)[0] for text in texts]
    assert_is_dense(found, alone, 2e-5)
    assert [len(own) for own in found.tokens] == lengths


def _cached(name: str, cache: dict[str, Lens] = {}) -> Lens:  # noqa: B006
    if name not in cache:
        cache[name] = al.load(ARCHITECTURES[name].build())
    return cache[name]


def test_blocks_of_one_row_change_nothing(
    random_lens: Lens, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Rows.tiles
    monkeypatch.setattr(Rows, "tiles", lambda self, budget: whole(self, 1))
    found = rhythm(random_lens, ids, window=3, horizon=(2, 5))
    maps = random_lens.run(ids, keep="pattern").pattern.stack().flatten(1, 2)
    assert_is_dense(found, list(maps), 1e-10)


def test_half_precision_is_near_float64() -> None:
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(2))
    model = ARCHITECTURES["llama"].build()
    # Half of the heads each, so that every head counts in a curve and none is at the border alone.
    exact, half = (
        rhythm(al.load(model.to(dtype)), ids, share=0.5, window=3, horizon=(1, 4))
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert torch.allclose(exact.distance.mean, half.distance.mean, atol=0.1)
    assert set(exact.local_heads) == set(half.local_heads)
    assert torch.allclose(exact.waad, half.waad, atol=0.05)
    assert torch.allclose(exact.fai, half.fai, atol=0.02, equal_nan=True)


def test_the_previous_token_head_is_the_local_one(induction_lens: Lens) -> None:
    half = torch.randperm(31, generator=torch.Generator().manual_seed(0))[:12] + 1
    prompt = torch.cat([torch.zeros(1, dtype=torch.long), half, half])[None]
    found = rhythm(induction_lens, prompt, share=0.13, horizon=(2, 20))
    assert [str(head) for head in found.local_heads] == ["L0H1"]
    # It attends one back and nowhere else; the first row has itself alone.
    assert found.waad[0, 0] == 0
    assert torch.allclose(found.waad[0, 1:], torch.ones(24).double(), atol=1e-3)
    frame = found.to_frame().set_index("head")
    assert frame.loc["L0H1", "kind"] == "local"
    assert frame["kind"].value_counts()["global"] == 1


def test_the_induction_head_anchors_what_is_repeated(induction_lens: Lens) -> None:
    half = torch.randperm(31, generator=torch.Generator().manual_seed(0))[:12] + 1
    prompt = torch.cat([torch.zeros(1, dtype=torch.long), half, half])[None]
    found = rhythm(induction_lens, prompt, share=0.13, layers="L1", horizon=(11, 11))
    assert [str(head) for head in found.global_heads] == ["L1H2"]
    # Row 12 + i holds the token of position i, and the head looks at i + 1, 11 back.
    assert torch.allclose(found.fai[0, 2:13], torch.ones(11).double(), atol=1e-2)


def test_a_planted_anchor_has_all_the_influence() -> None:
    """Token 7 stands at one place, and every later row of head 2 looks at it."""
    model = tiny_gpt2(sharp=0.0)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight[:, 5] = 0
        model.transformer.wte.weight[7, 5] = 50
        attention = model.transformer.h[0].attn
        attention.c_attn.bias[16] = 20.0
        attention.c_attn.weight[5, 48] = 20.0
    ids = torch.randint(8, 40, (1, 40), generator=torch.Generator().manual_seed(4))
    ids[0, 3] = 7
    found = rhythm(al.load(model), ids, share=0.25, layers="L0", window=5, horizon=(10, 20))
    assert found.global_heads == (found.heads[2],)
    assert found.fai[0, 3] == pytest.approx(1, abs=1e-6)
    assert found.fai[0, [2, 4, 20]].abs().max() < 1e-6
    assert found.by_token().loc[3].tolist()[:3] == [0, 3, "7"]


def test_the_decoder_of_an_encoder_decoder_has_the_curves() -> None:
    lens = architecture("t5")
    inputs = {"input_ids": torch.arange(5, 29).view(2, 12)}
    inputs["decoder_input_ids"] = torch.arange(3, 17).view(2, 7)
    found = rhythm(lens, inputs, horizon=(1, 3))
    assert {head.stack for head in found.heads} == {"dec"}
    assert found.tokens[0] == tuple(map(str, range(3, 10)))
    maps = lens.run(inputs, keep="pattern").pattern.stack("dec").flatten(1, 2)
    assert_is_dense(found, list(maps), 1e-10)
    encoder = rhythm(lens, inputs, layers="enc.L0:", horizon=(1, 3))
    assert encoder.lengths == (12, 12)
    with pytest.raises(InputError, match="cross-attention alone"):
        rhythm(lens, inputs, layers="cross.L0:")


def test_only_the_layers_of_chosen_heads_are_measured_again(
    random_lens: Lens, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    whole = Lens.measure

    def noting(self: Lens, inputs: object, reducers: object, layers: object, size: int) -> object:
        asked.append(layers)
        return whole(self, inputs, reducers, layers, size)  # type: ignore[arg-type]

    monkeypatch.setattr(Lens, "measure", noting)
    found = rhythm(random_lens, ids, share=0.05)
    assert asked == [found.heads, found.local_heads + found.global_heads]
    assert "Two passes" in found.notes[0]


def test_settings_out_of_range_are_refused(random_lens: Lens, ids: Tensor) -> None:
    for settings_, text in (
        ({"share": 0.6}, "share=0.6"),
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"horizon": (5, 2)}, "horizon"),
        ({"horizon": (5,)}, "horizon"),
        ({"horizon": 5}, "horizon"),
        ({"horizon": "59"}, "horizon"),
    ):
        with pytest.raises(InputError, match=text):
            rhythm(random_lens, ids, **settings_)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a single head"):
        choose([Head("", 0, 0)], torch.zeros(1), 0.3)


def test_heads_without_a_distance_are_neither_local_nor_global(ids: Tensor) -> None:
    lens = al.load(tiny_gpt2())
    with torch.no_grad():  # as after an overflow: L1H0 and all of the layers above are NaN
        lens.model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan  # type: ignore[union-attr,index]
    found = rhythm(lens, ids, share=0.5, horizon=(1, 4))
    assert {str(head) for head in found.local_heads + found.global_heads} < {
        "L0H0", "L0H1", "L0H2", "L0H3", "L1H1", "L1H2", "L1H3"
    }  # fmt: skip
    assert len(found.local_heads) == len(found.global_heads) == 3
    assert "5 of 12 heads have no distance (NaN)" in " ".join(found.notes)
    assert not found.waad.isnan().any()


def test_stacks_that_cannot_be_told_apart_are_named() -> None:
    model = ARCHITECTURES["gemma3"].build()
    inputs = ARCHITECTURES["gemma3"].inputs(model)
    with pytest.raises(InputError, match=r"layers='vision\.L0:', layers='L0:'"):
        rhythm(al.load(model, example=inputs), inputs)


def test_a_tower_of_images_is_not_measured() -> None:
    model = ARCHITECTURES["qwen2_vl"].build()
    inputs = ARCHITECTURES["qwen2_vl"].inputs(model)
    lens = al.load(model, example=inputs)
    found = rhythm(lens, inputs, horizon=(1, 3))
    text = rhythm(lens, inputs, horizon=(1, 3), layers="L0:")
    assert {head.stack for head in found.heads} == {""}
    assert torch.equal(found.waad, text.waad)
