"""Drawings of graphs hold the edges that they say they hold, wider where weights are larger."""

from typing import Any

import networkx as nx
import plotly.graph_objects as go
import pytest
import torch

from attnlens.errors import InputError
from attnlens.graphs import attention_graph, relevance_graph
from attnlens.views import show
from attnlens.views.graph_figure import draw_graph


def causal(layers: int, length: int) -> torch.Tensor:
    scores = torch.randn(layers, length, length, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.double().masked_fill(hidden, -torch.inf).softmax(-1)


def lines(figure: go.Figure, name: str | None = None) -> list[go.Scatter]:
    return [t for t in figure.data if t.mode == "lines" and name in (None, t.name)]


def drawn(figure: go.Figure, name: str | None = None) -> int:
    """How many edges the lines are."""
    return sum(list(trace.x).count(None) for trace in lines(figure, name))


def ends(trace: go.Scatter) -> list[tuple[float, ...]]:
    """Start and end of each line of a trace."""
    found, own = [], []
    for x, y in zip(trace.x, trace.y, strict=True):
        if x is None:
            found.append((*own[0], *own[-1]))
            own = []
        else:
            own.append((x, y))
    return found


def test_layers_go_up_and_positions_across() -> None:
    maps = torch.tensor([[[1.0, 0.0], [0.04, 0.96]]])
    figure = show(attention_graph(maps, ["<s>", "the "], layers=[3]), "A <graph>")
    assert drawn(figure) == 5
    by_width = {trace.line.width: ends(trace) for trace in lines(figure, "attention")}
    assert by_width[min(by_width)] == [(0, 0, 1, 1)]  # 0.02, from position 0 to 1
    assert sorted(by_width[max(by_width)]) == [(0, 0, 0, 1), (1, 0, 1, 1)]  # 0.5 and 0.48
    assert sorted(ends(lines(figure, "residual")[0])) == [(0, 0, 0, 1), (1, 0, 1, 1)]
    assert list(figure.layout.yaxis.ticktext) == ["L3", "L4"]
    assert list(figure.layout.xaxis.ticktext) == ["&lt;s&gt;<sub> 0</sub>", "the·<sub> 1</sub>"]
    assert figure.layout.title.text.startswith("A &lt;graph&gt;<br><sup>All 5 edges")
    texts = list(next(t for t in figure.data if len(t.customdata or ()) == 5).customdata)
    assert "<b>L3P0</b> &lt;s&gt; → <b>L4P1</b> the·<br>weight 0.02<br>kind attention" in texts


def test_of_many_edges_the_strongest_are_drawn_and_it_is_said() -> None:
    graph = attention_graph(causal(6, 20), ["x"] * 20)
    figure = draw_graph(graph, "t", most=30)
    assert drawn(figure, "attention") == 30
    strongest = sorted(d["weight"] for *_, d in graph.edges(data=True) if d["kind"] == "attention")
    shown = next(t for t in figure.data if t.marker.opacity == 0).customdata
    assert sum("attention" in text for text in shown) == 30
    assert all(f"weight {weight:.3g}" in "".join(shown) for weight in strongest[-30:])
    residual = drawn(figure, "residual")
    assert f"the 30 largest of 1,260 edges, and {residual} residual" in figure.layout.title.text
    touched = {ends(trace)[i][::2] for trace in lines(figure, "attention")
               for i in range(len(ends(trace)))}  # fmt: skip
    assert residual == 6 * len({x for pair in touched for x in pair})


def test_positions_that_nothing_touches_have_no_column() -> None:
    maps = torch.zeros(1, 2, 50, 50)
    maps[0, 1, 40, 7] = -2.0
    maps[0, 0, 40, 7] = 1.0
    figure = show(relevance_graph({"L0": maps}, ["x"] * 50, streams=torch.ones(2, 50)))
    assert list(figure.layout.xaxis.tickvals) == [0, 1]
    assert list(figure.layout.xaxis.ticktext) == ["x<sub> 7</sub>", "x<sub> 40</sub>"]
    positive, negative = lines(figure, "attention, positive"), lines(figure, "attention, negative")
    assert [len(positive), len(negative)] == [1, 1]
    assert positive[0].line.color != negative[0].line.color
    assert negative[0].line.width > positive[0].line.width
    middle = len(positive[0].x) // 2  # two heads between the same nodes bow apart
    assert positive[0].x[middle] != negative[0].x[middle]
    nodes = figure.data[-1]
    assert list(nodes.marker.color) == [1.0, 1.0]
    assert nodes.marker.cmin == -nodes.marker.cmax


def test_nodes_within_a_layer_stand_above_one_another() -> None:
    graph: Any = nx.MultiDiGraph()
    for name, layer in (("in", 0), ("mid", 0), ("out", 1)):
        graph.add_node(name, layer=layer, position=4, token="a")
    graph.add_edge("in", "mid", weight=0.5, kind="attention")
    graph.add_edge("mid", "out", weight=0.5, kind="mlp")
    graph.add_edge("in", "out", weight=0.5, kind="<own>")
    graph.graph.update(method="routes", target=4)
    figure = show(graph)
    assert figure.layout.title.text.startswith("Graph of routes to 4<br>")
    nodes = figure.data[-1]
    assert dict(zip([text[3:6] for text in nodes.customdata], nodes.y, strict=True)) == {
        "in<": 0, "mid": 1, "out": 2
    }  # fmt: skip
    assert list(figure.layout.yaxis.ticktext) == ["L0", "", "L1"]
    own = lines(figure, "&lt;own&gt;")[0]
    assert max(own.x[:-1]) > 0.1  # past the node between
    graph.add_edge("mid", "in", weight=0.5)
    show(graph)


def test_attention_of_a_position_to_itself_bows_around_its_residual_edge() -> None:
    figure = show(attention_graph(torch.ones(1, 1, 1), ["a"]))
    (attention,), (residual,) = lines(figure, "attention"), lines(figure, "residual")
    assert max(attention.x[:-1]) > 0
    assert set(residual.x[:-1]) == {0}


def test_of_a_flow_the_width_is_what_is_carried() -> None:
    graph = attention_graph(torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), ["a", "b"])
    for number, (*_, data) in enumerate(graph.edges(data=True)):
        data["flow"] = 0.1 if number else 0.9
    widths = [trace.line.width for trace in lines(show(graph), "attention")]
    assert len(widths) == 2
    assert max(widths) > 3 * min(widths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.add_edge("a", "b"), "has no weight"),
        (lambda g: g.add_edge("a", "b", weight=float("nan")), "has no weight"),
        (lambda g: g.add_edge("a", "c", weight=1.0), "Node 'c' has no layer and position"),
        (lambda g: None, "no edges to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: Any, message: str) -> None:
    graph: Any = nx.MultiDiGraph()
    graph.add_node("a", layer=0, position=0)
    graph.add_node("b", layer=1, position=0)
    change(graph)
    with pytest.raises(InputError, match=message):
        show(graph)
    graph.add_edge("a", "b", weight=1.0)
    with pytest.raises(InputError, match="most=0"):
        draw_graph(graph, "t", most=0)
