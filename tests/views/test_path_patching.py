"""Figures of path patching, on the hand-wired name-copying model, whose edges are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import attnlens as al
from attnlens.analyses.path_patching import PathEffects
from attnlens.errors import InputError
from attnlens.tasks import repeated_tokens
from attnlens.tasks.other_name import other_name
from attnlens.zoo import name_model
from tests.views.models import hand_wired


@pytest.fixture(scope="module")
def result() -> PathEffects:
    lens = al.load(name_model())
    return al.path_patch(lens, other_name(lens, prompts=3), "L2H1<k>", ["embed", "all"])


def cells(figure: go.Figure) -> tuple[np.ndarray, list[str], list[str]]:
    (trace,) = figure.data
    return np.array(trace.z), list(trace.y), list(trace.x)


def test_layers_down_and_heads_across(result: PathEffects) -> None:
    figure = al.show(result)
    values, rows, columns = cells(figure)
    assert rows == ["L0", "L1", "L2", "L3"]
    assert columns == ["embed", "H0", "H1", "H2", "H3"]
    found = {
        (rows[i], columns[j])
        for i in range(4)
        for j in range(5)
        if abs(np.nan_to_num(values[i, j])) > 1
    }
    assert found == {("L0", "H1"), ("L1", "H0")}
    assert np.isnan(values[1:, 0]).all()
    assert "Paths to L2H1&lt;k&gt; (frozen, noise)" in figure.layout.title.text
    assert "<b>L0H1</b>" in figure.data[0].customdata[0][2]


def test_mlps_stand_beside() -> None:
    lens = al.load(al.zoo.small_path())
    task = repeated_tokens(lens, prompts=2, period=5)
    found = al.path_patch(lens, task, "logits", ["L0.mlp", "L1H0", "L1.mlp"])
    values, rows, columns = cells(al.show(found))
    assert rows == ["L0", "L1"]
    assert columns == ["H0", "MLP"]
    wanted = [[np.nan, found.effect[0]], [found.effect[1], found.effect[2]]]
    np.testing.assert_allclose(values, np.array(wanted), rtol=1e-6)


def test_embeddings_alone() -> None:
    task = repeated_tokens(hand_wired(), prompts=2, period=5)
    found = al.path_patch(hand_wired(), task, "L1H2<k>,L1H0,L1H1,L1H3,L0H0", "embed")
    figure = al.show(found)
    assert cells(figure)[1:] == (["embed"], ["embed"])
    assert "and 1 more" in figure.layout.title.text


def test_nothing_known_is_refused(result: PathEffects) -> None:
    empty = replace(result, effect=torch.full_like(result.effect, torch.nan))
    with pytest.raises(InputError, match="nothing to draw"):
        al.show(empty)
