"""Figures of retrieval on the hand-wired model, whose one retrieval head is known."""

from functools import cache

import numpy as np
import pytest

from attnlens.analyses.query_focused import query_focused_heads
from attnlens.analyses.retrieval import RetrievalHeads, RetrievalSettings, retrieval_heads
from attnlens.lens import Lens, load
from attnlens.tasks import hidden_tokens
from attnlens.views import show
from attnlens.zoo import retrieval_model
from tests.analyses.test_query_focused import wired_example


@cache
def wired() -> Lens:
    return load(retrieval_model(), check=False)


@cache
def found(repeat: bool = False) -> RetrievalHeads:
    settings = RetrievalSettings(steps=12, repeat=repeat)
    return retrieval_heads(wired(), None, (14, 18), (0.0, 0.5, 1.0), 1, settings)


def test_the_retrieval_head_is_the_dark_cell():
    grid, _ = show(found()).data
    values = np.array(grid.z, dtype=float)
    assert np.unravel_index(values.argmax(), values.shape) == (1, 2)
    assert values.sum() == pytest.approx(1)


def test_recall_has_lengths_across_and_depths_down():
    figure = show(found())
    recall = figure.data[1]
    assert list(recall.x) == ["14", "18"]
    assert list(recall.y) == ["0", "0.5", "1"]
    assert np.array(recall.z).shape == (3, 2)
    assert np.array(recall.z).min() == 1
    assert recall.customdata[2][1].startswith("length 18, depth 1<br>recall 1.00<br>1 of 1")
    assert figure.layout.yaxis2.autorange == "reversed"
    assert "6 of 6 runs" in figure.layout.title.text


def test_scores_over_1_stay_on_the_scale():
    figure = show(found(repeat=True))
    assert figure.layout.coloraxis.cmax == pytest.approx(np.array(figure.data[0].z).max())
    assert figure.layout.coloraxis.cmax > 1
    assert figure.layout.coloraxis2.cmax == 1


def test_a_place_that_no_prompt_has_is_empty():
    prompts = [
        *hidden_tokens(wired(), (14,), (0.0,), prompts=1),
        *hidden_tokens(wired(), (18,), (1.0,), prompts=1),
    ]
    result = retrieval_heads(wired(), prompts, settings=RetrievalSettings(steps=4))
    recall = show(result).data[1]
    assert np.isnan(np.array(recall.z, dtype=float)).tolist() == [[False, True], [True, False]]
    assert recall.customdata[0][1] == ""


def test_query_focused_heads_have_a_grid_of_the_difference():
    result = query_focused_heads(wired(), [wired_example(seed) for seed in range(4)], top=1)
    figure = show(result)
    values = np.array(figure.data[0].z, dtype=float)
    assert np.unravel_index(values.argmax(), values.shape) == (1, 2)
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert figure.layout.coloraxis2.cmax == figure.layout.coloraxis3.cmax == 1
    assert "100%" in figure.layout.title.text
    assert "chance 33%" in figure.layout.title.text
    alone = show(query_focused_heads(wired(), [wired_example(1)], top=1))
    assert "chance" not in alone.layout.title.text
