import math

import numpy as np
import pandas as pd
import pytest

from attnlens.errors import InputError
from attnlens.hooks.reducers import FirstTokenMass, MeanDistance
from attnlens.views import show
from attnlens.views.panels import Quantity, head_grids, number_text
from tests.views.models import REPEATED, hand_wired, three_stacks

FRAME = pd.DataFrame(
    {
        "head": ["L0H0", "L0H1", "L2H0"],
        "site": ["L0", "L0", "L2"],
        "layer": [0, 0, 2],
        "index": [0, 1, 0],
        "effect": [1.0, -3.0, 0.5],
        "effect_low": [0.5, -3.5, 0.4],
        "effect_high": [1.5, -2.5, 0.6],
    }
)


def test_each_head_stands_at_its_layer_and_number():
    figure = head_grids(FRAME, [Quantity("effect", "Effect", signed=True)], "t")
    values = np.array(figure.data[0].z, dtype=float)
    assert values[0].tolist() == [1.0, -3.0]
    assert values[1, 0] == 0.5
    assert math.isnan(values[1, 1])  # L2 has one head
    assert list(figure.data[0].y) == ["L0", "L2"]


def test_signed_scales_are_centred_and_masses_begin_at_0():
    quantities = [
        Quantity("effect", "Effect", signed=True),
        Quantity("effect_high", "Mass", mass=True),
    ]
    figure = head_grids(FRAME, quantities, "t")
    first, second = figure.layout.coloraxis, figure.layout.coloraxis2
    assert (first.cmin, first.cmax) == (-3, 3)
    assert (second.cmin, second.cmax) == (0, 2.5)
    assert [trace.coloraxis for trace in figure.data] == ["coloraxis", "coloraxis2"]


def test_hover_names_head_value_and_interval():
    quantity = Quantity("effect", "Effect")
    figure = head_grids(FRAME, [quantity], "t")
    text = figure.data[0].customdata[0][1]
    assert "L0H1" in text
    assert "−3.00" in text
    assert "−3.50 to −2.50" in text


def test_statistics_of_three_stacks_have_a_grid_each():
    import torch

    ids = torch.randint(1, 40, (2, 7))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    statistics = three_stacks().measure(inputs, [FirstTokenMass()])
    figure = show(statistics)
    titles = [note.text for note in figure.layout.annotations]
    assert [title.rpartition(" ")[2] for title in titles] == ["enc", "dec", "cross"]


def test_statistics_show_the_hand_wired_sink():
    statistics = hand_wired().measure([REPEATED], [FirstTokenMass(), MeanDistance()])
    figure = show(statistics)
    values = np.array(figure.data[0].z, dtype=float)
    assert values.shape == (2, 4)
    expected = statistics["first_token"]["L1"][0, 2]
    assert values[1, 2] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.50"),
        (-0.0312, "−0.031"),
        (123.4, "123"),
        (float("nan"), "n/a"),
        (3.14159, "3.14"),
        (-1e-5, "0.000"),
    ],
)
def test_numbers_as_a_person_writes_them(value, text):
    assert number_text(value) == text


def test_a_stack_for_which_a_number_means_nothing_has_no_panel():
    frame = FRAME.assign(site=["enc.L0", "dec.L0", "dec.L2"], effect=[1.0, math.nan, math.nan])
    quantities = [Quantity("effect", "Effect"), Quantity("effect_high", "High")]
    figure = head_grids(frame, quantities, "t")
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["Effect · enc", "High · enc", "High · dec"]
    with pytest.raises(InputError, match="nothing to draw"):
        head_grids(frame.assign(effect=math.nan), quantities[:1], "t")
