"""Figures of importance and pruning hold the numbers of their results."""

from dataclasses import replace
from functools import cache

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from attnlens.analyses.importance import GradientImportance, gradient_importance
from attnlens.analyses.pruning import Pruning, prune_heads
from attnlens.tasks import Task, repeated_tokens
from attnlens.views import show
from tests.views.models import hand_wired, three_stacks


@cache
def task(prompts: int = 3) -> Task:
    return repeated_tokens(hand_wired(), prompts=prompts, period=6)


@cache
def importance() -> GradientImportance:
    return gradient_importance(hand_wired(), task(), "logit_difference")


@cache
def pruning() -> Pruning:
    return prune_heads(hand_wired(), task(), 2, metric="accuracy", controls=3)


def texts(figure: go.Figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_the_grid_and_the_ranking_show_the_same_heads():
    figure = show(importance())
    grid, bars = figure.data
    wanted = importance().importance.view(2, 4).numpy()
    assert np.allclose(np.array(grid.z), wanted, atol=1e-6)
    assert bars.y[-1] == "L1H2"  # the largest on top
    assert bars.x[-1] == pytest.approx(float(wanted[1, 2]))
    assert list(bars.x) == sorted(bars.x)
    assert "to first order: −" in bars.customdata[-1]
    assert texts(figure) == ["Importance (logits)", "Ranked"]
    assert "logit difference on repeated tokens" in figure.layout.title.text
    normalised = show(replace(importance(), normalised=True))
    assert texts(normalised)[0] == "Importance (share of the layer&#x27;s norm)"


def test_three_stacks_have_a_grid_each_beside_one_ranking():
    ids = torch.randint(2, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    asked = Task.from_prompts(
        "start", ids.tolist(), ids.tolist(), reads=[[0]] * 2, answers=[[5]] * 2, wrong=[[6]] * 2
    )
    found = gradient_importance(three_stacks(), asked)
    figure = show(found)
    titles = ["Importance (logits) · enc", "The 16 most important"]
    assert texts(figure) == [*titles, "Importance (logits) · dec", "Importance (logits) · cross"]
    assert [trace.type for trace in figure.data] == ["heatmap"] * 3 + ["bar"]
    places = [figure.data[i].yaxis for i in range(4)]
    assert len(set(places)) == 4
    assert len(figure.data[3].x) == 16


def test_one_prompt_has_no_bars_of_uncertainty():
    figure = show(gradient_importance(hand_wired(), task(1)))
    assert set(figure.data[1].error_x.array) == {0}


def test_pruning_runs_from_all_heads_to_none_beside_chance():
    found = pruning()
    figure = show(found)
    chance_band, chance, band, curve = figure.data
    assert list(curve.x) == [1, 0.75, 0.5, 0.25, 0]
    assert list(curve.y) == pytest.approx(found.mean.tolist())
    assert list(chance.y) == pytest.approx(found.random_mean.tolist())
    assert figure.layout.xaxis.range[0] > figure.layout.xaxis.range[1]
    orders = found.random.mean(-1)
    assert list(chance_band.y[:5]) == pytest.approx(orders.amax(0).tolist())
    assert list(chance_band.y[5:]) == pytest.approx(orders.amin(0).flip(0).tolist())
    assert list(band.y[:5]) == pytest.approx(found.high.tolist())
    assert curve.customdata[0].startswith("8 heads, interval")
    assert "gone since: L0H0, L0H2" in curve.customdata[1]
    assert "gradient of the loss, anew at each step" in curve.name
    assert figure.layout.yaxis.title.text == "accuracy"


def test_without_random_orders_or_intervals_there_is_the_curve_alone():
    found = prune_heads(hand_wired(), task(1), 4, metric="loss", controls=0)
    figure = show(found)
    (curve,) = figure.data
    assert len(curve.x) == 3
    assert figure.layout.yaxis.title.text == "loss (nats)"
