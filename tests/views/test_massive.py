"""Figures of massive values show what the results hold, where it is."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.analyses.massive_activations import massive_activations
from attnlens.analyses.massive_qk import massive_qk
from attnlens.analyses.vision import visual_sinks
from attnlens.analyses.vision_heads import vision_aware_heads
from attnlens.errors import HeadError
from attnlens.lens import Lens
from attnlens.views import show
from tests.architectures import ARCHITECTURES
from tests.views.models import hand_wired, three_stacks

TEXTS = [[0, 5, 9, 7], [0, 8, 4, 6]]


@cache
def planted() -> Lens:
    model = ARCHITECTURES["llama"].build()
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = 5000
        model.model.layers[1].self_attn.k_proj.weight[8 + 2] *= 300
    return al.load(model)


@cache
def seen() -> tuple[Lens, dict[str, Any]]:
    model = ARCHITECTURES["llava"].build()
    inputs = ARCHITECTURES["llava"].inputs(model)
    return al.load(model, example=inputs), inputs


def drawn(trace: Any) -> dict[str, float]:
    """The points of a line by stream, without the breaks between stacks."""
    pairs = zip(trace.x, trace.y, strict=True)
    return {x: float(y) for x, y in pairs if not np.isnan(y)}


def test_massive_activations_show_magnitudes_and_channels():
    result = massive_activations(planted(), TEXTS)
    figure = show(result)
    lines = {trace.name: drawn(trace) for trace in figure.data if trace.type == "scatter"}
    for rank, name in enumerate(("largest", "second", "third")):
        wanted = dict(zip(result.streams, result.top.mean[:, rank].tolist(), strict=True))
        assert lines[name] == pytest.approx(wanted)
    medians = dict(zip(result.streams, result.median.mean.tolist(), strict=True))
    assert lines["median"] == pytest.approx(medians)
    assert figure.layout.yaxis.type == "log"
    (heat,) = (trace for trace in figure.data if trace.type == "heatmap")
    assert list(heat.y) == ["c3"]
    assert list(np.array(heat.z)[0]) == pytest.approx([np.log10(5000)] * 3, abs=1e-2)
    assert "channel 3" in heat.customdata[0][0]
    assert "position 3 7" in heat.customdata[0][0]
    assert "1 of 2 texts" in heat.customdata[0][0]


def test_without_massive_activations_there_are_magnitudes_alone():
    figure = show(massive_activations(hand_wired(), TEXTS))
    assert {trace.type for trace in figure.data} == {"scatter"}
    assert any("nothing is massive" in note.text for note in figure.layout.annotations)


def test_stacks_are_not_joined():
    figure = show(massive_activations(three_stacks(), TEXTS, 0.01, 1.0))
    line = figure.data[0]
    breaks = [x for x, y in zip(line.x, line.y, strict=True) if np.isnan(y)]
    assert breaks == ["dec.L0"]
    (heat,) = (trace for trace in figure.data if trace.type == "heatmap")
    stacks = [name.partition(".")[0] for name in heat.y]
    assert stacks == sorted(stacks, key=["enc", "dec"].index)


def test_token_text_is_escaped():
    result = massive_activations(planted(), TEXTS)
    found = tuple(replace(one, token="<b>x</b>") for one in result.found)
    figure = show(replace(result, found=found))
    (heat,) = (trace for trace in figure.data if trace.type == "heatmap")
    assert "&lt;b&gt;x&lt;/b&gt;" in heat.customdata[0][0]


def test_massive_qk_shows_the_layer_of_the_largest_ratio():
    result = massive_qk(planted(), TEXTS)
    figure = show(result)
    assert figure.layout.title.text == "Channels of q and k at L1, over 2 texts"
    queries, keys, waves = figure.data
    assert list(queries.y) == ["H0", "H1", "H2", "H3"]
    assert list(keys.y) == ["G0", "G1"]
    ratios = result.key["L1"].ratio.numpy()
    assert np.array(keys.z) == pytest.approx(np.clip(np.log2(ratios), -4, 4), abs=1e-6)
    assert np.unravel_index(np.array(keys.z).argmax(), keys.z.shape) == (1, 2)
    assert "0.01 radians a token with channel 6" in keys.customdata[1][2]
    assert "wavelength 628 tokens" in keys.customdata[1][2]
    assert list(waves.y) == pytest.approx(result.rotary["L1"].wavelengths.tolist())
    assert figure.layout.yaxis3.type == "log"


def test_massive_qk_of_a_chosen_layer():
    result = massive_qk(planted(), TEXTS)
    for layer in (0, "L0"):
        keys = show(result, layer=layer).data[1]
        ratios = result.key["L0"].ratio.numpy()
        assert np.array(keys.z) == pytest.approx(np.clip(np.log2(ratios), -4, 4), abs=1e-6)
    with pytest.raises(HeadError, match="no layer 'L7'"):
        show(result, layer=7)


def test_without_rotary_there_is_no_wavelength():
    figure = show(massive_qk(hand_wired(), TEXTS))
    assert [trace.type for trace in figure.data] == ["heatmap", "heatmap"]
    assert "does not turn" in figure.data[0].customdata[0][0]


def test_visual_sinks_show_image_and_text():
    lens, inputs = seen()
    result = visual_sinks(lens, inputs, channels=[0, 5], threshold=1.5)
    figure = show(result)
    lines = {trace.name: drawn(trace) for trace in figure.data}
    wanted = dict(zip(result.streams, result.rate.mean.tolist(), strict=True))
    assert lines["image tokens"] == pytest.approx(wanted)
    wanted = dict(zip(result.streams, result.text_rate.mean.tolist(), strict=True))
    assert lines["other tokens"] == pytest.approx(wanted)


def test_vision_aware_heads_show_three_grids():
    lens, inputs = seen()
    result = vision_aware_heads(lens, inputs)
    figure = show(result)
    for trace, name in zip(figure.data, result.names, strict=True):
        assert np.array(trace.z) == pytest.approx(result[name].mean.view(2, 4).numpy(), abs=1e-6)
