"""Figures of masked heads on the trained model."""

import pytest

import attnlens as al
from attnlens.analyses.attention_influence import AttentionInfluence, attention_influence
from attnlens.analyses.contrast_decoding import Contrast, contrast_decode
from attnlens.errors import InputError
from attnlens.views import show
from attnlens.zoo import small_path

TEXTS = ["<b>It is</b> the east, and Juliet is the sun. It is the east, and", "Speak & go", "Hm."]


@pytest.fixture(scope="module")
def influence() -> AttentionInfluence:
    return attention_influence(al.load(small_path()), TEXTS, "L2H2,L2H5")


@pytest.fixture(scope="module")
def decoded() -> Contrast:
    return contrast_decode(al.load(small_path()), TEXTS[:2], "L2H2,L2H5", steps=6)


def test_each_text_is_a_point_of_its_two_losses(influence: AttentionInfluence) -> None:
    figure = show(influence)
    line, points = figure.data
    order = influence.ranking
    assert list(points.x) == pytest.approx(influence.base[order].tolist())
    assert list(points.y) == pytest.approx(influence.masked[order].tolist())
    assert list(line.x) == list(line.y)
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert "3 texts" in figure.layout.title.text


def test_the_start_of_a_text_is_no_markup(influence: AttentionInfluence) -> None:
    told = [one[1] for one in show(influence).data[1].customdata]
    assert any("&lt;b&gt;It" in text for text in told)
    assert not any("<b>" in text for text in told)


def test_contrast_is_drawn_token_by_token(decoded: Contrast) -> None:
    for prompt in (0, 1):
        figure = show(decoded, prompt=prompt)
        count = len(decoded.answers[prompt])
        assert [trace.name for trace in figure.data] == ["all heads", "heads masked", "contrasted"]
        assert list(figure.data[2].y) == pytest.approx(
            decoded.contrast[prompt, :count].exp().tolist()
        )
        frame = decoded.to_frame()
        changed = int(frame[frame["prompt"] == prompt]["changed"].sum())
        assert len(figure.layout.shapes) == changed
        assert f"{changed} tokens changed" in figure.layout.title.text
    with pytest.raises(InputError, match="no prompt 2"):
        show(decoded, prompt=2)
