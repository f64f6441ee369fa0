"""Figures of how good circuits are show the numbers that they are given."""

import numpy as np
import pytest
import torch

from attnlens.errors import InputError
from attnlens.views.circuit_curves import curve_figure, evaluation_figure
from attnlens.views.edge_scores import edge_scores_figure
from tests.networks import naming, network


def test_a_curve_is_drawn_on_its_band_beside_chance() -> None:
    f, random = [0.0, 0.2, 0.9, 1.0], torch.tensor([0.0, 0.0, 0.1, 1.0])
    figure = curve_figure(
        [0.0, 0.01, 0.1, 1.0], f, [-0.1, 0.1, 0.8, 1.0], [0.1, 0.3, 1.2, 1.0],
        random, random - 0.1, random + 0.1, cpr=0.874, cmd=0.25, title="a <b>",
    )  # fmt: skip
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines["circuit"].x) == [0.01, 0.1, 1.0]  # none at 0 on a log axis
    assert list(lines["circuit"].y) == [0.2, 0.9, 1.0]
    assert lines["circuit"].customdata[1] == "<br>interval 0.80 to 1.20"
    assert np.allclose(lines["random circuits"].y, random[1:])
    band = next(t for t in figure.data if t.fill and t.legendgroup == "circuit")
    assert list(band.y) == [0.3, 1.2, 1.0, 1.0, 0.8, 0.1]
    assert [shape.y0 for shape in figure.layout.shapes] == [0.0, 1.0]
    assert figure.layout.annotations[0].text == "CPR 0.87<br>CMD 0.25"
    assert figure.layout.xaxis.type == "log"
    low, high = figure.layout.yaxis.range
    assert low < -0.1
    assert high > 1.2
    assert figure.layout.title.text == "a &lt;b&gt;"


def test_a_curve_alone_has_no_chance_and_no_note() -> None:
    figure = curve_figure([1.0, 0.5], [1.0, 0.4])
    assert [trace.name for trace in figure.data if trace.name] == ["circuit"]
    assert list(figure.data[-1].x) == [0.5, 1.0]
    assert not figure.layout.annotations
    assert curve_figure([], [])
    with pytest.raises(InputError, match=r"random_low has shape \(1,\); needed are 2 numbers"):
        curve_figure([0.5, 1.0], [1, 1], random_low=[0])


def test_runs_are_bars_and_nodes_are_sorted() -> None:
    names = ["full model", "random <circuits>"]
    figure = evaluation_figure(
        names, [3.0, 0.5], [2.0, np.nan], [3.5, np.nan],
        ["L0H0", "L1H1", "<b>"], [0.1, 2.0, -0.5], [-0.1, 1.0, -0.9], [0.3, 3.0, -0.1],
        metric="logit difference",
    )  # fmt: skip
    runs, nodes = figure.data
    assert list(runs.y) == [3.0, 0.5]
    assert list(runs.x) == ["full<br>model", "random<br>&lt;circuits&gt;"]
    assert list(runs.error_y.arrayminus) == [1.0, 0.0]
    assert list(runs.error_y.array) == [0.5, 0.0]
    assert runs.customdata[0] == "<b>full model</b> 3.00<br>interval 2.00 to 3.50"
    assert list(nodes.y) == ["&lt;b&gt;", "L0H0", "L1H1"]  # the largest on top
    assert list(nodes.x) == [-0.5, 0.1, 2.0]
    colours = nodes.marker.color
    assert colours[0] == colours[2] != colours[1]  # only the second's interval holds 0
    assert figure.layout.yaxis.title.text == "logit difference"


def test_runs_alone_have_one_panel_and_of_many_nodes_the_largest_are_drawn() -> None:
    assert len(evaluation_figure(["circuit"], [1.0]).data) == 1
    values = np.arange(100.0)
    figure = evaluation_figure(["circuit"], [1.0], nodes=list(map(str, values)), minimality=values)
    assert list(figure.data[1].x) == list(values[60:])
    assert "the 40 largest of 100" in figure.layout.annotations[0].text
    with pytest.raises(InputError, match="values has shape"):
        evaluation_figure(["circuit"], [1.0, 2.0])
    with pytest.raises(InputError, match="node_lows has shape"):
        evaluation_figure(["circuit"], [1.0], nodes=["a"], minimality=[1.0], node_lows=[])


def test_edge_scores_are_a_grid_of_senders_and_receivers() -> None:
    own, kept = naming()
    scores = torch.where(kept, -2.0, 0.5)
    figure = edge_scores_figure(own, scores, "t")
    (grid,) = figure.data
    assert np.array_equal(np.isnan(grid.z), ~own.exists.numpy())
    assert np.nanmin(grid.z) == -2.0
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax == -2.0
    assert grid.customdata[0][0] == "embed-&gt;L0H0&lt;q&gt;"
    assert list(figure.layout.yaxis.ticktext) == [sender.name for sender in own.senders]
    assert "Drawn" not in figure.layout.title.text


def test_of_many_edges_those_of_the_strongest_are_drawn_by_layer() -> None:
    own = network(6, 4)
    scores = torch.zeros(own.exists.shape)
    scores[own.mask(own.find(["L0H1->L3H2<k>", "L1.mlp->logits"]))] = torch.tensor([3.0, -4.0])
    figure = edge_scores_figure(own, scores, "t", most=2)
    (grid,) = figure.data
    assert grid.z.tolist() == [[3.0, 0.0], [0.0, -4.0]]
    assert list(figure.layout.xaxis.ticktext) == ["L3H2&lt;k&gt;", "logits"]
    assert "Drawn: 2 of 31 senders and 2 of 79 receivers" in figure.layout.title.text
    whole = edge_scores_figure(own, scores, "t")
    assert list(whole.layout.xaxis.ticktext) == [*(f"L{n}" for n in range(6)), "logits"]
    assert edge_scores_figure(own, torch.zeros_like(scores), "t").layout.coloraxis.cmax == 1.0
    with pytest.raises(InputError, match=r"shape \(2,\) and most=120"):
        edge_scores_figure(own, torch.ones(2), "t")
