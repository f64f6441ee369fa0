"""Figures of rhythm, long-context heads and attention basin."""

import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.analyses.basin import DocumentPrompt, attention_basin
from attnlens.analyses.long_context import long_context_heads
from attnlens.analyses.rhythm import Rhythm, rhythm
from attnlens.analyses.uncertainty import Interval
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.views.context import peaks
from tests.views.models import REPEATED, hand_wired

HOSTILE = "<b>x</b>"


def _rhythm(length: int, word: str = "w") -> Rhythm:
    """Two prompts with a peak of each curve at positions 5 and 9; the first token is a sink."""
    waad = torch.full((2, length), 0.5, dtype=torch.float64)
    fai = torch.full((2, length), 0.01, dtype=torch.float64)
    waad[:, 5], fai[:, 9], fai[:, 0] = 3.0, 0.1, 0.9
    fai[:, -4:] = torch.nan
    heads = (Head("", 0, 0), Head("", 0, 1))
    distance = Interval(*torch.tensor([[1.0, 9.0]] * 3).double())
    words = ((word,) * length,) * 2
    return Rhythm(
        heads, distance, heads[:1], heads[1:], waad, fai, words, 0.3, 10, (4, 50), 2, ("note",)
    )


def test_rhythm_draws_both_curves_and_names_their_peaks():
    result = rhythm(hand_wired(), [REPEATED], horizon=(1, 6))
    figure = al.show(result)
    waad, fai = (np.array(trace.y, dtype=float) for trace in figure.data)
    assert waad == pytest.approx(result.waad[0].numpy(), abs=1e-6)
    assert fai == pytest.approx(result.fai[0].numpy(), abs=1e-6, nan_ok=True)
    assert list(figure.layout.xaxis.ticktext) == [str(token) for token in REPEATED]


def test_token_text_is_escaped_everywhere():
    figure = al.show(_rhythm(20, HOSTILE), prompt=1)
    assert HOSTILE not in figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
    assert "&lt;b&gt;" in figure.layout.xaxis.ticktext[0]
    assert "&lt;b&gt;" in figure.data[0].customdata[3]


def test_a_first_token_far_above_the_rest_is_cut_off_and_says_so():
    figure = al.show(_rhythm(200))
    assert figure.layout.yaxis2.range[1] == pytest.approx(0.135)
    cut = [note.text for note in figure.layout.annotations if "\u2191" in note.text]
    assert cut == ["w 0.90 \u2191"]
    assert figure.layout.yaxis.range[1] == pytest.approx(1.35 * 3)
    assert figure.layout.xaxis.ticktext is None  # 200 labels would be a grey bar


def test_peaks_are_local_maxima_apart_from_each_other():
    values = np.array([0, 1, 0, 5, 4, 5.5, 0, np.nan, 3, np.nan] + [0.0] * 30)
    assert peaks(values) == [1, 3, 5, 8]
    values[5] = 0
    assert peaks(values) == [1, 3, 8]
    flat = np.zeros(80)
    flat[[10, 11, 30]] = 1, 2, 3
    assert peaks(flat)[:2] == [11, 30]


def test_long_context_heads_are_grids():
    result = long_context_heads(hand_wired(), [REPEATED], window=2, first=1)
    figure = al.show(result)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["local queries (share)", "weight on far keys", "estimate agrees (share)"]
    local = np.array(figure.data[0].z, dtype=float)
    assert local[0, 1] == 1  # the previous-token head
    assert local[1, 2] < 1  # the induction head looks four back
    assert "90%" in figure.layout.title.text


def test_basin_bars_are_the_slots_with_their_intervals():
    ids = tuple(REPEATED)
    examples = [DocumentPrompt(ids, ((1, 3), (3, 6)), (7, 9)) for _ in range(2)]
    examples[1] = DocumentPrompt(ids, ((1, 4), (4, 5)), (8, 9))
    result = attention_basin(hand_wired(), examples)
    total, per_token, layers = al.show(result).data
    assert list(total.y) == pytest.approx(result.mean.total.mean.tolist())
    assert list(per_token.y) == pytest.approx(result.mean.per_token.mean.tolist())
    low = result.mean.total.mean - result.mean.total.low
    assert list(total.error_y.arrayminus) == pytest.approx(low.tolist())
    assert np.array(layers.z).shape == (2, 2)
    one = al.show(result, "L1H2").data[0]
    number = [str(head) for head in result.heads].index("L1H2")
    assert list(one.y) == pytest.approx(result.per_head.total.mean[number].tolist())


def test_what_is_not_there_is_told():
    with pytest.raises(InputError, match="0 to 1"):
        al.show(_rhythm(20), prompt=2)
    example = DocumentPrompt(tuple(REPEATED), ((1, 3), (3, 6)), (7, 9))
    with pytest.raises(InputError, match="no head 'L7H0'"):
        al.show(attention_basin(hand_wired(), [example]), "L7H0")
