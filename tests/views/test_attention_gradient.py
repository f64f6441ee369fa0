"""The figure of saliency flows holds the numbers of its result."""

from dataclasses import replace

import pytest
import torch

from attnlens.analyses.saliency_flows import SaliencyFlows, saliency_flows
from attnlens.analyses.target import Target
from attnlens.views import show
from tests.views.models import hand_wired

COPIES = [[0, 5, 9, 3, 7, 5, 9, 3], [0, 6, 2, 4, 8, 6, 2, 4]]


@pytest.fixture(scope="module")
def flows() -> SaliencyFlows:
    return saliency_flows(hand_wired(), COPIES, Target([7, 8]), {"labels": 4})


def test_each_flow_is_a_line_over_its_band(flows: SaliencyFlows) -> None:
    figure = show(flows)
    bands, lines = figure.data[::2], figure.data[1::2]
    assert [line.name for line in lines] == [
        "text to labels",
        "labels to target",
        "everything else",
    ]
    for number, (band, line) in enumerate(zip(bands, lines, strict=True)):
        assert list(line.x) == ["L0", "L1"]
        assert list(line.y) == flows.mean[number].tolist()
        assert list(band.y) == [*flows.high[number].tolist(), *flows.low[number].tolist()[::-1]]
        assert not band.showlegend
        assert band.fillcolor == line.line.color
    assert lines[2].line.dash == "dot"
    assert "2 prompts, 95% interval" in figure.layout.title.text
    assert "12" in lines[1].customdata[1]


def test_one_prompt_has_no_band_and_names_its_target() -> None:
    found = saliency_flows(hand_wired(), COPIES[:1], 7, {"<b>x</b>": 4}, [("<b>x</b>", "target")])
    figure = show(found)
    assert [trace.mode for trace in figure.data] == ["lines+markers"] * 2
    assert figure.data[0].name == "&lt;b&gt;x&lt;/b&gt; to target"
    assert figure.layout.title.text.endswith("for &#x27;7&#x27;, 1 prompt")
    assert "interval" not in figure.data[0].customdata[0]


def test_layers_without_edges_have_a_gap(flows: SaliencyFlows) -> None:
    blind = replace(
        flows, **{name: _blind(getattr(flows, name)) for name in ("mean", "low", "high")}
    )
    figure = show(blind)
    assert list(figure.data[0].x) == ["L1", "L1"]
    assert figure.data[1].customdata[0] == "no edges"


def _blind(values: torch.Tensor) -> torch.Tensor:
    values = values.clone()
    values[0, 0] = torch.nan
    return values
