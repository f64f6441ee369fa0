"""Figures of attributions hold the scores, in a text that can be read, and where the value went."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import networkx as nx
import plotly.graph_objects as go
import pytest
import torch

from attnlens.analyses.attribution import Attribution, Ledger
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.graphs import attention_graph
from attnlens.views import show
from attnlens.views.attribution import COLUMNS, LETTERS, ON_DARK

WORDS = ("<b>", " Ann", "\n", " and", "")


def attribution(**changes: Any) -> Attribution:
    ledger = Ledger(
        torch.tensor([2.5, 1.0]).double(),
        {"tokens": torch.tensor([1.5, 1.0]), "<biases>": torch.tensor([0.75, 0.0])},
    )
    made = Attribution(
        "attnlrp",
        (WORDS, ("x",)),
        torch.tensor([[0.5, -2.0, 0.25, 1.0, 0.0], [1.0, 0, 0, 0, 0]]),
        ("' <Ben>' - ' Ann'", "'y'"),
        torch.tensor([2.5, 1.0]),
        layers=torch.arange(30.0).view(2, 3, 5) - 3,
        layer_names=("L0", "L1", "final"),
        heads=torch.tensor([[1.0, -2.0, 3.0, 4.0]] * 2),
        head_names=tuple(Head("", layer, head) for layer in (0, 1) for head in (0, 1)),
        ledger=ledger,
        make_graph=lambda prompt: attention_graph(torch.eye(2)[None], ["a", "b"]),
    )
    return replace(made, **changes)


def test_text_bars_and_ledger_hold_the_scores_of_a_prompt() -> None:
    figure = show(attribution())
    text, bars, ledger = figure.data
    wanted = [0.5, -2.0, 0.25, 1.0, 0.0]
    assert list(text.marker.color) == list(bars.y) == list(bars.marker.color) == wanted
    pairs = zip(wanted, text.textfont.color, strict=True)
    assert {abs(score) > 1: colour for score, colour in pairs} == {True: ON_DARK, False: LETTERS}
    assert list(text.text) == ["&lt;b&gt;", "·Ann", "⏎", "·and", "∅"]
    assert list(text.y) == [0, 0, 0, 1, 1]  # after a line end comes a new line
    assert [base + x <= after for base, x, after in zip(text.base, text.x, text.base[1:3],
                                                       strict=False)] == [True, True]  # fmt: skip
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax == -2
    assert list(ledger.x) == [1.5, 0.75, 0.25]
    assert list(ledger.y) == ["tokens", "&lt;biases&gt;", "remainder"]
    assert bars.customdata[1] == "<b>·Ann<sub> 1</sub></b> −2"
    assert list(show(attribution(), 1).data[2].x) == [1.0, 0.0, 0.0]
    ones = Ledger(torch.ones(2).double(), {"tokens": torch.ones(2)})  # as routes have it
    titles = show(attribution(ledger=ones)).layout.annotations
    assert titles[2].text == "Where the whole 1.00 went"
    title = "Scores of tokens by attnlrp for &#x27;·&lt;Ben&gt;&#x27; − &#x27;·Ann&#x27;"
    assert figure.layout.title.text == title + " (value 2.50, prompt 0)"
    headings = [note.text for note in figure.layout.annotations]
    assert headings == ["Text", "Scores", "Where the value 2.50 went"]


def test_scores_without_a_sign_run_from_zero() -> None:
    figure = show(attribution(ledger=None), 1)
    assert len(figure.data) == 2
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1)
    assert "(value 1.00, prompt 1)" in figure.layout.title.text


@pytest.mark.parametrize("count", [5, 200, 1000])
def test_lines_are_full_and_no_token_is_lost(count: int) -> None:
    words = tuple(f" word{i % 7}" for i in range(count))
    scores = torch.linspace(-1, 1, count)[None]
    made = attribution(tokens=(words,), scores=scores, ledger=None)
    text, bars = show(made).data
    assert len(text.text) == len(bars.y) == count
    places = list(zip(text.y, text.base, text.x, strict=True))
    assert places == sorted(places)  # line by line, left to right
    for (line, start, width), (after, then, _) in pairwise(places):
        assert (after == line and then >= start + width) or (after == line + 1 and then == 0)
    figure: go.Figure = show(made)
    assert len(figure.layout.xaxis2.tickvals) <= 60
    assert max(start + width for _, start, width in places) <= max(56, COLUMNS[1])


def test_a_huge_score_leaves_the_others_their_colours() -> None:
    scores = torch.full((1, 100), 0.1)
    scores[0, 0], scores[0, 1] = 4.0, -0.1
    figure = show(attribution(tokens=(("a",) * 100,), scores=scores, ledger=None))
    assert figure.layout.coloraxis.cmax == 0.5  # an eighth of the largest
    assert figure.layout.annotations[0].text == "Text; colours end at ±0.5"
    assert max(figure.data[1].y) == 4
    even = attribution(tokens=(("a",) * 4,), scores=torch.tensor([[1.0, 0.6, 0.5, 0.2]]))
    assert show(replace(even, ledger=None)).layout.annotations[0].text == "Text"


def test_a_very_long_text_is_bars_alone() -> None:
    made = attribution(tokens=(("a",) * 3000,), scores=torch.ones(1, 3000), ledger=None)
    (bars,) = show(made).data
    assert len(bars.y) == 3000


def test_heads_layers_and_the_graph_have_figures_of_their_own() -> None:
    (heads,) = show(attribution(), of="heads").data
    assert heads.z.tolist() == [[1, -2], [3, 4]]
    figure = show(attribution(), 1, of="layers")
    (layers,) = figure.data
    assert layers.z.tolist() == [[12.0], [17.0], [22.0]]
    assert list(layers.y) == ["L0", "L1", "final"]
    assert figure.layout.coloraxis.cmin == 0
    graph = show(attribution(), of="graph")
    assert graph.layout.title.text.startswith("Graph by attnlrp for")


def test_scored_edges_are_a_graph() -> None:
    scores = torch.zeros(2, 1, 5, 5)
    scores[0, 0, 3, 1] = -2.0
    made = attribution(make_graph=None, maps={"L1": scores})
    figure = show(made, of="graph")
    assert any(trace.name == "attention, negative" for trace in figure.data)
    assert list(figure.data[-1].marker.color) == [3.0, 10.0]  # L1P1 and what leaves L1 at 3
    show(attribution(make_graph=None, maps={"L1": scores}, layers=None), of="graph")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 2}, "no prompt 2; there are 2"),
        ({"of": "edges"}, "no figure of 'edges'; choose tokens, heads, layers, graph"),
        ({"of": "heads"}, "attnlrp scores no heads"),
        ({"of": "layers"}, "attnlrp scores no layers"),
        ({"of": "graph"}, "attnlrp traces no graph"),
    ],
)
def test_what_is_not_there_is_said(options: dict[str, Any], message: str) -> None:
    bare = attribution(heads=None, layers=None, make_graph=None)
    with pytest.raises(InputError, match=message):
        show(bare, **options)


def test_all_scores_zero_can_be_drawn() -> None:
    show(attribution(scores=torch.zeros(2, 5), layers=torch.zeros(2, 3, 5)))
    show(attribution(layers=torch.zeros(2, 3, 5)), of="layers")
    assert isinstance(attribution().graph(), nx.MultiDiGraph)
