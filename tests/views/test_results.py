"""Figures of the analyses' results on the hand-wired model, whose heads are known."""

import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from attnlens.analyses.ablation import ablate
from attnlens.analyses.head_types import head_types
from attnlens.analyses.profile import profile
from attnlens.analyses.rollout import rollout
from attnlens.analyses.sinks import sinks
from attnlens.errors import InputError
from attnlens.tasks import repeated_tokens
from attnlens.views import show
from attnlens.views.grids import show_sink_positions
from attnlens.views.ranking import show_ranking
from tests.views.models import REPEATED, hand_wired

INPUTS = [REPEATED, [0, 8, 4, 6, 2, 8, 4, 6, 2]]


@cache
def _ablation():
    lens = hand_wired()
    return ablate(lens, repeated_tokens(lens, 4))


def _panel(figure, title: str) -> np.ndarray:
    number = [note.text for note in figure.layout.annotations].index(title)
    return np.array(figure.data[number].z, dtype=float)


def test_head_types_show_the_two_heads_of_the_circuit():
    figure = show(head_types(hand_wired(), prompts=4))
    previous, induction = _panel(figure, "previous token"), _panel(figure, "induction")
    assert np.unravel_index(previous.argmax(), previous.shape) == (0, 1)
    assert np.unravel_index(induction.argmax(), induction.shape) == (1, 2)
    assert induction.max() == pytest.approx(1, abs=1e-3)


def test_profile_chooses_columns_and_names_those_it_has_not():
    result = profile(hand_wired(), INPUTS)
    figure = show(result, "offset_1, entropy")
    assert [note.text for note in figure.layout.annotations] == ["previous token", "entropy (nats)"]
    with pytest.raises(InputError, match="there is entropy"):
        show(result, "sharpness")


def test_sinks_show_the_induction_head_on_the_start_token():
    result = sinks(hand_wired(), INPUTS)
    values = _panel(show(result), "first token")
    assert np.unravel_index(values.argmax(), values.shape) == (1, 2)
    bars = show_sink_positions(result).data[0]
    assert list(bars.y) == pytest.approx(result.by_position()["column_mass"].tolist())


def test_ablation_is_red_where_the_loss_rises():
    result = _ablation()
    values = np.array(show(result).data[0].z, dtype=float)
    assert values[0, 1] > 1
    assert values[1, 2] > 1
    assert np.abs(np.delete(values.ravel(), [1, 6])).max() < 0.01
    axis = show(result).layout.coloraxis
    assert axis.cmin == -axis.cmax


def test_the_ranking_puts_the_largest_effect_on_top_beside_its_control():
    bars, controls, *_ = show_ranking(_ablation()).data
    assert list(bars.y[-2:]) == ["L1H2", "L0H1"]
    assert list(controls.x)[-2:] == pytest.approx([0, 0], abs=0.01)


def test_rollout_shows_rows_that_sum_to_1():
    result = rollout(hand_wired().run(INPUTS, keep=("pattern",)))
    values = np.array(show(result, prompt=1).data[0].z, dtype=float)
    assert np.nansum(values, axis=1) == pytest.approx(np.ones(9), abs=1e-5)
    first = np.array(show(result, layer=0).data[0].z, dtype=float)
    assert first[2, 1] == pytest.approx(0.5 * float(result.maps[0, 0, 2, 1]), abs=1e-6)
    with pytest.raises(InputError, match="no layer 2"):
        show(result, layer=2)


def test_importing_views_loads_neither_plotly_nor_torch():
    code = "import sys, attnlens.views; print({'plotly', 'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
