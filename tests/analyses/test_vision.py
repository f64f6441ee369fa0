"""Visual sinks that were planted; vision-aware heads against runs with a mask over the image."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.uncertainty import bootstrap_mean
from attnlens.analyses.vision import image_positions, visual_sinks
from attnlens.analyses.vision_heads import vision_aware_heads
from attnlens.errors import HeadError, InputError, UnsupportedModelError
from attnlens.hooks.rows import Rows
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.architectures.multimodal import IMAGE

CHANNEL, TOKEN = 3, 40


def opened(name: str, side: str | None = None, kernel: str = "sdpa") -> tuple[Lens, dict[str, Any]]:
    architecture = ARCHITECTURES[name]
    model = architecture.build().double()
    model.set_attn_implementation(kernel)
    padded = architecture.padded
    assert padded is not None
    inputs = architecture.inputs(model) if side is None else padded(model, side)
    return al.load(model, example=architecture.inputs(model)), inputs


@pytest.fixture(scope="module")
def planted() -> tuple[Lens, dict[str, Any]]:
    """Every image token, and the text token 40, have a channel of 5,000 from the start."""
    lens, inputs = opened("llava")
    model: Any = lens.model
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[CHANNEL] = 5000
        model.model.language_model.embed_tokens.weight[TOKEN, CHANNEL] = 5000
    inputs["input_ids"][inputs["input_ids"] == TOKEN] += 1
    inputs["input_ids"][0, -2:] = TOKEN
    return lens, inputs


def test_planted_visual_sinks_are_found_in_two_passes(planted: Any) -> None:
    lens, inputs = planted
    found = visual_sinks(lens, inputs, threshold=5.0)
    assert found.channels == (CHANNEL,)
    assert found.streams == ("L0", "L1", "final")
    assert found.image_tokens == (4, 4)
    assert found.rate.mean.tolist() == [1.0, 1.0, 1.0]
    assert found.text_rate.mean.tolist() == [2 / 16 / 2] * 3
    places = {(one.prompt, one.position) for one in found.found if one.stream == "L0"}
    assert places == {(p, t) for p in (0, 1) for t in (4, 5, 6, 7)}
    # One channel that outweighs all others comes to the square root of the width.
    assert found.found[0].value == pytest.approx(math.sqrt(32), abs=1e-3)
    assert any("Two passes" in note for note in found.notes)
    assert list(found.to_frame()["sinks"]) == [8, 8, 8]
    tokens = found.by_token()
    assert list(tokens["streams"]) == [3] * 8
    given = visual_sinks(lens, inputs, channels=[CHANNEL], threshold=5.0)
    assert given.found == found.found
    assert not any("Two passes" in note for note in given.notes)


def test_another_channel_holds_no_sink(planted: Any) -> None:
    lens, inputs = planted
    found = visual_sinks(lens, inputs, channels=[CHANNEL + 1], threshold=5.0)
    assert found.found == ()
    assert found.rate.mean.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "mllama"])
def test_a_model_without_massive_activations_has_no_sinks(name: str) -> None:
    lens, inputs = opened(name)
    found = visual_sinks(lens, inputs, threshold=5.0)
    assert found.channels == ()
    assert found.rate.mean.eq(0).all()
    assert any("no token is a sink" in note for note in found.notes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_visual_sinks_equal_the_whole_streams(side: str) -> None:
    lens, inputs = opened("llava", side)
    channels, threshold = [0, 5, 9], 1.2
    found = visual_sinks(lens, inputs, channels=channels, threshold=threshold, batch_size=1)
    trace = lens.run(inputs, keep=("residual",))
    text = [name for name in trace.residual if not name.startswith("vision")]
    made = set()
    for name in text:
        for prompt, rows in enumerate(trace.residual[name]):
            real = inputs["attention_mask"][prompt].nonzero()[:, 0].tolist()
            for position, t in enumerate(real):
                x = rows[t].tolist()
                rms = math.sqrt(math.fsum(v * v for v in x) / len(x))
                if inputs["input_ids"][prompt, t] == IMAGE:
                    largest = max(abs(x[c]) / rms for c in channels)
                    if largest > threshold:
                        made.add((name, prompt, position, round(largest, 9)))
    own = {(one.stream, one.prompt, one.position, round(one.value, 9)) for one in found.found}
    assert own == made
    assert made
    number = found.streams.index("L1")
    count = sum(one.stream == "L1" for one in found.found)
    assert float(found.rate.mean[number]) == pytest.approx(count / sum(found.image_tokens))


def test_sinks_are_the_same_for_padding_on_either_side() -> None:
    """The two padded batches hold the same second prompt, so their last row is compared."""
    lens, inputs = opened("llava", "right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    short = int(mask[1].sum())
    left = dict(inputs)
    left["input_ids"], left["attention_mask"] = ids.clone(), mask.clone()
    left["input_ids"][1], left["attention_mask"][1] = ids[1].roll(-short), mask[1].roll(-short)
    for method, names in ((visual_sinks, ("rate", "text_rate")), (vision_aware_heads, ("mean",))):
        settings = {"channels": [0, 5], "threshold": 1.0} if method is visual_sinks else {}
        a, b = (method(lens, given, **settings) for given in (inputs, left))  # type: ignore[operator]
        for name in names:
            x, y = getattr(a, name), getattr(b, name)
            x, y = (x, y) if isinstance(x, Tensor) else (x.mean, y.mean)
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def masked(lens: Lens, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with the image tokens masked away and every position as it was."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids))
    hidden = dict(inputs) | {"attention_mask": real * (ids != IMAGE)}
    given = lens.encode(inputs).inputs.get("position_ids")
    if given is not None:  # padding on the left
        hidden["position_ids"] = given
    elif "image_grid_thw" in inputs:
        model: Any = lens.model
        positions, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=real,
        )
        hidden["position_ids"] = positions
    else:
        hidden["position_ids"] = (real.cumsum(-1) - 1).clamp_min(0)
    return hidden


def oracle(lens: Lens, inputs: dict[str, Any], sites: list[str]) -> dict[str, Tensor]:
    """Distances of z and image masses, `prompt head`, from two runs kept whole."""
    full = lens.run(inputs, keep=("z", "pattern"), layers=sites)
    bare = lens.run(masked(lens, inputs), keep=("z",), layers=sites)
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids))
    found: dict[str, list[Tensor]] = {"divergence": [], "relative": [], "image_mass": []}
    for site in sites:
        own: dict[str, list[Tensor]] = {name: [] for name in found}
        for prompt in range(len(ids)):
            first = int((ids[prompt] == IMAGE).nonzero()[0])
            rows = [
                t for t in range(first, ids.shape[1]) if ids[prompt, t] != IMAGE and real[prompt, t]
            ]
            z, without = full.z[site][prompt, :, rows], bare.z[site][prompt, :, rows]
            moved = ((z - without) ** 2).sum(-1).sqrt()
            own["divergence"].append(moved.mean(-1))
            own["relative"].append((moved / (z**2).sum(-1).sqrt()).mean(-1))
            mass = full.pattern[site][prompt][:, rows][:, :, ids[prompt] == IMAGE].sum(-1)
            own["image_mass"].append(mass.mean(-1))
        for name, values in own.items():
            found[name].append(torch.stack(values))
    return {name: torch.cat(values, 1) for name, values in found.items()}


@pytest.mark.parametrize(
    ("side", "kernel"),
    [(None, "eager"), (None, "sdpa"), ("left", "sdpa"), ("right", "sdpa")],
)
@pytest.mark.parametrize("name", ["llava", "idefics3", "internvl", "gemma3", "qwen2_vl"])
def test_vision_aware_heads_equal_two_runs_kept_whole(
    name: str, side: str | None, kernel: str
) -> None:
    lens, inputs = opened(name, side, kernel)
    # Eager attention takes its softmax in float32, as our rows do; the sdpa kernel in float64.
    close = 1e-10 if kernel == "eager" else 1e-6
    found = vision_aware_heads(lens, inputs, resamples=3)
    made = oracle(lens, inputs, ["L0", "L1"])
    assert [str(head) for head in found.heads][:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    for number in found.names:
        for a, b in zip(found[number], bootstrap_mean(made[number], 3), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=close)
    assert float(found["divergence"].mean.min()) > 1e-3
    assert found.image_tokens == (4, 4)


def test_rows_may_come_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, inputs = opened("gemma3", "left")
    whole = vision_aware_heads(lens, inputs)
    blocks = Rows.blocks
    monkeypatch.setattr(Rows, "blocks", lambda self, budget=0, rows=None: blocks(self, 1, rows))
    torch.testing.assert_close(
        vision_aware_heads(lens, inputs, batch_size=1).mean, whole.mean, rtol=0, atol=1e-6
    )


def test_a_head_that_cannot_see_the_image_does_not_move() -> None:
    """Values of group 0 are 0 at every token: its two heads write nothing, with or without."""
    lens, inputs = opened("llava")
    model: Any = lens.model
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.v_proj.weight[:8] = 0
    found = vision_aware_heads(lens, inputs)
    assert found["divergence"].mean[:2].tolist() == [0.0, 0.0]
    assert found["relative"].mean[:2].tolist() == [0.0, 0.0]
    assert float(found["divergence"].mean[2:].min()) > 1e-3


def test_the_last_row_alone() -> None:
    lens, inputs = opened("llava", "right")
    found = vision_aware_heads(lens, inputs, rows="last")
    trace = lens.run(inputs, keep=("pattern",), layers=["L0", "L1"], rows=-1)
    image = inputs["input_ids"] == IMAGE
    mass = torch.cat([(p[:, :, 0] * image[:, None]).sum(-1) for p in trace.pattern.values()], 1)
    torch.testing.assert_close(found["image_mass"].mean, mass.mean(0), rtol=0, atol=1e-10)


def test_cross_attention_to_images_is_all_image() -> None:
    lens, inputs = opened("mllama")
    found = vision_aware_heads(lens, inputs)
    cross = [number for number, head in enumerate(found.heads) if head.stack == "cross"]
    assert len(cross) == 4
    torch.testing.assert_close(found["relative"].mean[cross], torch.ones(4).double())
    assert float(found["image_mass"].mean[cross].min()) > 0.5


def test_a_mask_says_which_tokens_are_the_images() -> None:
    lens, inputs = opened("llava", "left")
    mask = inputs["input_ids"] == IMAGE
    told, given = (vision_aware_heads(lens, inputs, image_mask=m) for m in (None, mask))
    torch.testing.assert_close(told.mean, given.mean)
    batch = lens.encode(inputs)
    everything = torch.ones_like(mask)
    assert bool((image_positions(lens, batch, everything) == batch.real).all())


def test_layers_are_chosen_and_the_model_is_left_as_it_was() -> None:
    lens, inputs = opened("llava")
    before = lens.model(**inputs).logits
    found = vision_aware_heads(lens, inputs, layers="L1")
    whole = vision_aware_heads(lens, inputs)
    torch.testing.assert_close(found.mean, whole.mean[4:], rtol=0, atol=0)
    assert torch.equal(lens.model(**inputs).logits, before)
    assert set(found.to_frame()["site"]) == {"L1"}


def test_bfloat16_is_near() -> None:
    model = ARCHITECTURES["llava"].build()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        inputs = ARCHITECTURES["llava"].inputs(model)
        results.append(vision_aware_heads(al.load(model, example=inputs), inputs))
    torch.testing.assert_close(results[1].mean, results[0].mean, rtol=0.1, atol=0.05)


def test_what_cannot_be_done_is_refused(random_lens: Lens) -> None:
    lens, inputs = opened("llava")
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for method in (visual_sinks, vision_aware_heads):
        with pytest.raises(InputError, match="no image tokens in the inputs"):
            method(lens, text)
        with pytest.raises(InputError, match="names no image token"):
            method(random_lens, text)
        with pytest.raises(InputError, match="they must agree"):
            method(lens, inputs, image_mask=torch.ones(2, 3).bool())
        with pytest.raises(HeadError, match="work on images alone"):
            method(lens, inputs, layers="vision.L0")
    with pytest.raises(InputError, match=r"at most 5\.66"):
        visual_sinks(lens, inputs, channels=[0])
    with pytest.raises(InputError, match="no channel 32"):
        visual_sinks(lens, inputs, channels=[32], threshold=5.0)
    with pytest.raises(InputError, match="'text' or 'last'"):
        vision_aware_heads(lens, inputs, rows="first")  # type: ignore[arg-type]


def test_an_encoder_and_decoder_are_refused() -> None:
    lens = al.load(ARCHITECTURES["t5"].build())
    mask = torch.tensor([[True, False, False]])
    with pytest.raises(UnsupportedModelError, match="in an encoder"):
        vision_aware_heads(lens, [[5, 6, 7]], image_mask=mask)


def test_the_decoder_of_an_encoder_has_no_image_tokens() -> None:
    lens = al.load(ARCHITECTURES["bart"].build())
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids).bool()
    mask[:, 2] = True
    for length in (4, 7):
        inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :length]}
        found = visual_sinks(lens, inputs, channels=[1], threshold=2.0, image_mask=mask)
        assert found.streams == ("enc.L0", "enc.L1", "enc.final")
    with pytest.raises(HeadError, match="do not read the text"):
        visual_sinks(lens, inputs, channels=[1], image_mask=mask, layers="dec.L0:")


def test_masks_and_channels_of_another_kind_are_refused() -> None:
    lens, inputs = opened("llava")
    with pytest.raises(InputError, match="image_mask is a list"):
        visual_sinks(lens, inputs, image_mask=[[True]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"channels=\[1\.5\]"):
        visual_sinks(lens, inputs, channels=[1.5], threshold=2.0)  # type: ignore[list-item]
    with pytest.raises(InputError, match="channels=3 "):
        visual_sinks(lens, inputs, channels=3, threshold=2.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"channels=\[\]"):
        visual_sinks(lens, inputs, channels=[], threshold=2.0)
