"""Figures of syntax, probe and alignment on the hand-wired model, whose heads are known."""

from functools import cache

import numpy as np
import pytest
import torch

import attnlens as al
from attnlens.analyses.alignment import property_alignment
from attnlens.analyses.attention_probe import ProbeSettings, attention_probe
from attnlens.analyses.syntax import SyntaxSettings, syntax_heads
from attnlens.lens import Lens
from attnlens.tasks import Sentence
from attnlens.views import show
from attnlens.zoo import induction_model
from tests.analyses.sentences import chain, word_tokenizer
from tests.analyses.test_syntax import repeated

FEW = SyntaxSettings(least=1, resamples=50)


@cache
def wired() -> Lens:
    return al.load(induction_model(), tokenizer=word_tokenizer())


def treebank() -> list[Sentence]:
    return [repeated(length, seed) for seed, length in enumerate((5, 7, 9, 11))]


def test_relations_have_their_best_head_beside_the_best_offset():
    found = syntax_heads(wired(), treebank(), settings=FEW)
    offset, head = show(found).data
    assert (offset.name, head.name) == ("best fixed offset", "best head")
    assert list(head.y) == ["again", "before"]
    assert list(head.x) == [1, 1]
    assert list(head.text) == ["L1H2", "L0H1"]
    assert list(offset.x) == pytest.approx([11 / 32, 1])
    assert list(offset.text) == ["−10", "−1"]
    assert "32 arcs" in head.customdata[0]
    assert "over the offset 0.66" in head.customdata[0]
    assert np.array(head.error_x.array).tolist() == [0, 0]
    assert np.array(offset.error_x.array)[0] > 0


def test_relations_with_most_arcs_come_first_and_only_so_many():
    figure = show(syntax_heads(wired(), treebank(), settings=FEW), relations=1)
    assert list(figure.data[0].y) == ["again"]


def test_directions_are_panels_side_by_side():
    both = Sentence(("w1", "w2", "w3"), (1, -1, 1), ("det", "root", "obj"))
    figure = show(syntax_heads(wired(), [both, both], settings=FEW))
    assert [note.text for note in figure.layout.annotations] == [
        "from a word to its head",
        "from a head to its dependent",
    ]
    assert [list(trace.y) for trace in figure.data] == [["obj"], ["obj"], ["det"], ["det"]]
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    assert list(figure.layout.yaxis.categoryarray) == ["obj", "det"]


def test_a_relation_is_no_markup():
    words = [f"w{i}" for i in range(1, 6)]
    found = syntax_heads(wired(), [chain(words, "<b>x"), chain(words, "<b>x")], settings=FEW)
    assert set(show(found).data[0].y) == {"&lt;b&gt;x"}


def test_the_probe_stands_over_simpler_methods():
    found = attention_probe(wired(), treebank(), ProbeSettings(resamples=50))
    (bars,) = show(found).data
    assert bars.y[0] == "attention probe"
    assert bars.y[1] == "best head (L1H2, from a word to its head)"
    assert bars.y[3] == "previous word"
    assert bars.x[0] == 1
    assert list(bars.x) == found.accuracy.mean.tolist()
    assert "probe over it" in bars.customdata[1]
    assert "probe over it" not in bars.customdata[0]


def test_alignment_is_a_grid_of_heads():
    def previous(ids: tuple[int, ...], tokens: tuple[str, ...]) -> torch.Tensor:
        place = torch.arange(len(ids))
        return place[:, None] == place + 1

    texts = [[0, *range(1, 12)], [0, *range(3, 14)]]
    figure = show(property_alignment(wired(), texts, previous, least=20))
    aligned = np.array(figure.data[0].z, dtype=float)
    assert np.unravel_index(np.nanargmax(aligned), aligned.shape) == (0, 1)
    assert np.isnan(aligned[0, 0])
    assert "fewer than 20" in figure.layout.title.text
    counts = np.array(figure.data[2].z, dtype=float)
    assert counts[0, 1] == 2 * 10  # the start token is special, arcs to it are left out
    none = show(property_alignment(wired(), texts, previous, threshold=1.0, least=100))
    assert len(none.data) == 1  # the number of arcs alone
