"""Massive activations against planted coordinates and against the residual stream kept whole."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.massive_activations import MassiveActivations, massive_activations
from attnlens.analyses.uncertainty import bootstrap_mean
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.residual import streams_of
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES

TOKEN, CHANNEL, SIZE = 7, 3, 5000.0
TEXTS = [[1, 2, TOKEN, 4, 5, 6], [8, TOKEN, 9, 10, TOKEN, 11], [12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module")
def planted() -> Lens:
    """One coordinate of one token's embedding is 5,000: its stream has it from L0 to the end."""
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[TOKEN, CHANNEL] = SIZE
    return al.load(model)


@pytest.fixture(scope="module")
def between() -> Lens:
    """The MLP of layer 0 writes 5,000 to a channel of every position and that of 1 takes it off."""
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias[CHANNEL] = -SIZE
        model.transformer.h[1].mlp.c_proj.bias[CHANNEL] = SIZE
    return al.load(model)


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.ones(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[place, where], mask[place, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_a_planted_coordinate_is_found_there_and_nowhere_else(planted: Lens) -> None:
    found = massive_activations(planted, TEXTS)
    streams = ("L0", "L1", "L2", "final")
    assert found.streams == streams
    places = {(one.stream, one.prompt, one.position, one.channel) for one in found.found}
    assert places == {(s, p, t, CHANNEL) for s in streams for p, t in ((0, 2), (1, 1), (1, 4))}
    assert {one.token for one in found.found} == {str(TOKEN)}
    assert found.counts.tolist() == [[1] * 4, [2] * 4, [0] * 4]
    assert found.channels() == (CHANNEL,)
    frame = found.to_frame()
    assert list(frame["massive"]) == [1.0] * 4
    assert list(frame["prompts"]) == [2] * 4
    assert list(frame["channels"]) == [str(CHANNEL)] * 4
    # 5,000 in two of three prompts and the embeddings' own size in the third.
    plain = found.top.mean[0, 0] * 3 - 2 * SIZE
    assert 0 < plain < 1
    (channel,) = found.by_channel().to_dict("records")
    assert (channel["first"], channel["last"], channel["prompts"]) == ("L0", "final", 2)
    assert abs(channel["largest"] - SIZE) < 5
    positions = found.by_position()
    assert set(positions["position"]) == {1, 2, 4}
    assert set(positions["token"]) == {str(TOKEN)}


def test_a_coordinate_that_comes_and_goes_is_found_in_its_layers(between: Lens) -> None:
    found = massive_activations(between, TEXTS)
    places = {(one.stream, one.prompt, one.position, one.channel) for one in found.found}
    assert places == {("L1", p, t, CHANNEL) for p in range(3) for t in range(6)}
    assert all(one.value < 0 for one in found.found)
    assert found.counts[:, found.streams.index("L1")].tolist() == [6, 6, 6]


def oracle(lens: Lens, inputs: Any, threshold: float, ratio: float) -> dict[str, Any]:
    """Top, median and massive coordinates from the streams kept whole, one prompt at a time."""
    trace = lens.run(inputs, keep=("residual",), dtype=torch.float64)
    real = trace.sides.text.real
    made: dict[str, Any] = {"top": {}, "median": {}, "found": {}}
    for stream, kept in trace.residual.items():
        for prompt, rows in enumerate(kept):
            own = rows if real is None else rows[real[prompt]]
            values = sorted(abs(float(v)) for v in own.flatten())
            median = values[(len(values) - 1) // 2]
            made["top"][stream, prompt] = values[::-1][:3]
            made["median"][stream, prompt] = median
            for t, row in enumerate(own):
                for c, value in enumerate(row.tolist()):
                    if abs(value) > threshold and abs(value) >= ratio * median:
                        made["found"][stream, prompt, t, c] = value
    return made


def agrees(found: MassiveActivations, made: dict[str, Any]) -> None:
    prompts = range(found.prompts)
    for number, stream in enumerate(found.streams):
        top = torch.tensor([made["top"][stream, p] for p in prompts], dtype=torch.float64)
        median = torch.tensor([made["median"][stream, p] for p in prompts], dtype=torch.float64)
        for own, wanted in ((found.top, top), (found.median, median)):
            for a, b in zip(own, bootstrap_mean(wanted), strict=True):
                torch.testing.assert_close(a[number], b, rtol=0, atol=1e-10, equal_nan=True)
    own = {(o.stream, o.prompt, o.position, o.channel): o.value for o in found.found}
    assert own.keys() == made["found"].keys()
    assert all(abs(own[place] - value) < 1e-10 for place, value in made["found"].items())


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    batch_size=st.integers(1, 3),
)
def test_equals_the_whole_streams(
    random_lens: Lens, lengths: list[int], side: str, batch_size: int
) -> None:
    rows = [[(7 * p + 3 * t) % 38 + 1 for t in range(n)] for p, n in enumerate(lengths)]
    inputs = padded(rows, side)
    found = massive_activations(random_lens, inputs, 0.5, 3.0, batch_size=batch_size)
    agrees(found, oracle(random_lens, inputs, 0.5, 3.0))
    assert found.found


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "albert", "bert"])
def test_padding_on_either_side_gives_the_same(name: str) -> None:
    lens = architecture(name)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
    sides = [massive_activations(lens, padded(rows, side), 1.0, 2.0) for side in ("left", "right")]
    agrees(sides[1], oracle(lens, padded(rows, "right"), 1.0, 2.0))
    if name in ("albert", "bert"):  # positions of theirs count the padding on the left
        return
    for a, b in zip(*(side.top for side in sides), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    keys = [{(o.stream, o.prompt, o.position, o.channel) for o in side.found} for side in sides]
    assert keys[0] == keys[1]


def test_padding_is_not_counted(planted: Lens) -> None:
    """A padded position holds the planted token, and nothing of it is found."""
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, TOKEN, TOKEN]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    }
    assert massive_activations(planted, inputs).found == ()


def test_an_encoder_and_a_decoder_have_an_end_each() -> None:
    lens = architecture("t5")
    architecture_inputs = ARCHITECTURES["t5"].inputs(lens.model)  # type: ignore[arg-type]
    found = massive_activations(lens, architecture_inputs)
    stacks = [stream.rpartition(".")[0] for stream in found.streams]
    assert set(stacks) == {"enc", "dec"}
    assert [s for s in found.streams if s.endswith("final")] == ["enc.final", "dec.final"]
    trace = lens.run(architecture_inputs, keep=("residual",))
    number = found.streams.index("dec.final")
    dense = trace.residual["final"].abs().flatten(1).amax(-1).mean()
    torch.testing.assert_close(found.top.mean[number, 0], dense, rtol=0, atol=1e-10)


def test_self_and_cross_attention_of_a_block_share_its_stream() -> None:
    lens = architecture("t5")
    inputs = ARCHITECTURES["t5"].inputs(lens.model)  # type: ignore[arg-type]
    for layers in ("cross.L0", "dec.L0", "dec.L0,cross.L0"):
        assert massive_activations(lens, inputs, layers=layers).streams == ("dec.L0",)
    assert massive_activations(lens, inputs, layers="cross.L1").streams == ("dec.L1", "dec.final")


def test_layers_that_share_a_block_have_a_stream_each() -> None:
    lens = architecture("albert")
    found = massive_activations(lens, [[5, 6, 7, 8]])
    assert len(found.streams) == len(lens.anatomy.sites) + 1
    medians = found.median.mean.tolist()
    assert len(set(medians)) == len(medians)


def test_a_block_that_attends_twice_has_one_stream() -> None:
    lens = architecture("diffllama")
    found = massive_activations(lens, [[5, 6, 7, 8]])
    assert found.streams == ("L0", "L2", "final")
    trace = lens.run([[5, 6, 7, 8]], keep=("residual",))
    for number, stream in enumerate(found.streams):
        largest = trace.residual[stream].abs().max()
        torch.testing.assert_close(found.top.mean[number, 0], largest, rtol=0, atol=1e-10)


def test_layers_can_be_chosen(planted: Lens) -> None:
    assert massive_activations(planted, TEXTS, layers="L1").streams == ("L1",)
    assert massive_activations(planted, TEXTS, layers="L2").streams == ("L2", "final")


def test_bfloat16_finds_the_same() -> None:
    model = tiny_gpt2().float()
    with torch.no_grad():
        model.transformer.wte.weight[TOKEN, CHANNEL] = SIZE
    exact = massive_activations(al.load(model), TEXTS)
    half = massive_activations(al.load(model.bfloat16()), TEXTS)
    keys = [{(o.stream, o.prompt, o.position, o.channel) for o in r.found} for r in (exact, half)]
    assert keys[0] == keys[1]
    torch.testing.assert_close(half.top.mean[:, 0], exact.top.mean[:, 0], rtol=0.01, atol=0)


def test_an_image_tower_has_streams_without_tokens() -> None:
    lens = architecture("vit")
    inputs = ARCHITECTURES["vit"].inputs(lens.model)  # type: ignore[arg-type]
    found = massive_activations(lens, inputs, 0.1, 1.0)
    assert found.found
    assert {one.token for one in found.found} == {""}
    assert len(found.to_frame()) == len(lens.anatomy.sites) + 1


def test_a_low_threshold_is_told(random_lens: Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlens.analyses.massive_activations.MOST", 5)
    found = massive_activations(random_lens, [[1, 2, 3]], 0.001, 1.0)
    assert len(found.found) == 5 * len(found.streams)
    assert int(found.counts.min()) > 5
    assert any("threshold is low" in note for note in found.notes)
    assert any("One prompt" in note for note in found.notes)


@pytest.mark.parametrize(
    ("threshold", "ratio"), [(0.0, 10.0), (-1.0, 10.0), (float("nan"), 10.0), (100.0, 0.5)]
)
def test_bad_thresholds_are_refused(random_lens: Lens, threshold: float, ratio: float) -> None:
    with pytest.raises(InputError, match="threshold is a magnitude"):
        massive_activations(random_lens, TEXTS, threshold, ratio)


def test_a_model_without_blocks_is_refused(random_lens: Lens) -> None:
    sites = tuple(replace(site, block=None) for site in random_lens.anatomy.sites)
    with pytest.raises(UnsupportedModelError, match="no residual stream"):
        streams_of(replace(random_lens.anatomy, sites=sites), sites)
