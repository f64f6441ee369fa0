import dataclasses

import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.errors import InputError
from attnlens.views import show
from attnlens.views.similarity import _with_room
from tests.views.models import REPEATED, hand_wired, three_stacks

TEXTS = [REPEATED, [0, 4, 8, 6, 2, 4, 8, 6, 2]]


def test_points_stand_where_the_result_says_and_carry_their_names():
    found = al.head_similarity(hand_wired(), TEXTS, clusters=3)
    figure = show(found)
    points = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(points) == 3
    assert sum(len(trace.x) for trace in points) == 8
    placed = {
        text.partition("</b>")[0].removeprefix("<b>"): (x, y, trace.name)
        for trace in points
        for x, y, text in zip(trace.x, trace.y, trace.customdata, strict=True)
    }
    for row in found.to_frame().to_dict("records"):
        x, y, name = placed[row["head"]]
        assert (x, y) == pytest.approx((row["x"], row["y"]))
        assert name.startswith(f"cluster {row['cluster']} ")


def test_the_heat_map_is_in_the_order_of_the_tree():
    found = al.head_similarity(hand_wired(), TEXTS)
    heat = next(trace for trace in show(found, "layer").data if trace.type == "heatmap")
    names = [str(found.heads[head]) for head in found.order]
    assert list(heat.x) == list(heat.y) == names
    values = np.array(heat.z, dtype=float)
    first, second = found.order[0], found.order[-1]
    assert values[0, -1] == pytest.approx(float(found.divergence[first, second]), rel=1e-6)
    assert "interval" in heat.hovertemplate


def test_heads_at_one_place_share_a_name():
    found = al.head_similarity(hand_wired(), TEXTS)
    figure = show(dataclasses.replace(found, plane=torch.zeros_like(found.plane)))
    names = [text for trace in figure.data if trace.type == "scatter" for text in trace.text]
    assert sum(bool(name) for name in names) == 1


def test_layers_beside_each_other():
    found = al.layer_similarity(hand_wired(), TEXTS)
    figure = show(found, "head_mean")
    heat, *lines = figure.data
    assert np.allclose(np.array(heat.z, dtype=float), found.head_mean.mean)
    assert [len(line.x) for line in lines] == [1, 1, 1]
    assert list(lines[0].x) == ["L0–L1"]
    assert lines[0].y[0] == pytest.approx(float(found.matched.mean[0, 1]))
    assert lines[0].error_y.array[0] == pytest.approx(
        float(found.matched.high[0, 1] - found.matched.mean[0, 1])
    )


def test_names_cover_no_point_and_no_other_name():
    under, above, beside, apart = [0.01, 0.97], [0.0, 1.0], [0.06, 1.0], [1.0, 0.0]
    assert _with_room(np.array([under, above, beside, apart])) == [False, True, False, True]


def test_ranks_have_a_grid_each_and_no_bounds_where_nothing_is_sampled():
    figure = show(al.head_ranks(hand_wired(), TEXTS))
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [
        "rank of W_Q W_K^T, at most 32",
        "rank of W_V W_O, at most 32",
        "rank of the map, at most 9",
    ]
    texts = [trace.customdata[0][0] for trace in figure.data]
    assert ["interval" in text for text in texts] == [False, False, True]


def test_ranks_of_three_stacks():
    figure = show(al.head_ranks(three_stacks()))
    assert len(figure.data) == 6


def test_unknown_looks_are_refused():
    with pytest.raises(InputError, match="'cluster' or 'layer'"):
        show(al.head_similarity(hand_wired(), TEXTS), "rainbow")
    with pytest.raises(InputError, match="'head_mean'"):
        show(al.layer_similarity(hand_wired(), TEXTS), "rainbow")
