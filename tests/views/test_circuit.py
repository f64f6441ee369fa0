"""Drawings of circuits hold each edge once, in the style of its input, sign and score."""

from collections import Counter
from typing import Any

import networkx as nx
import plotly.graph_objects as go
import pytest
import torch

from attnlens.errors import InputError
from attnlens.graphs.circuit import circuit_graph
from attnlens.views.circuit import COLOURS, DASHES, WHOLE, circuit_figure
from attnlens.views.circuit_layout import BAR, PORT, PORTS, lay_out
from tests.networks import naming, network, random_mask


def drawn(figure: go.Figure) -> Counter[tuple[str, str]]:
    """How many edges of each dash and colour."""
    found: Counter[tuple[str, str]] = Counter()
    for trace in figure.data:
        if trace.mode == "lines" and trace.fill is None and trace.x[0] is not None:
            found[trace.line.dash, trace.line.color] += list(trace.x).count(None)
    return found


def hovers(figure: go.Figure) -> list[str]:
    return list(figure.data[-1].customdata)


def texts(figure: go.Figure) -> list[str]:
    return [text for trace in figure.data if trace.mode == "text" for text in trace.text]


def named(*names: str) -> tuple[Any, torch.Tensor]:
    own = network(2, 2)
    return own, own.mask(own.find(names))


def test_dash_says_input_and_colour_says_sign() -> None:
    names = ["embed->L0H0<q>", "L0H0->L1H1<k>", "L0H0->L1H1<v>", "L0.mlp->L1.mlp", "L1H1->logits"]
    own, kept = named(*names)
    for sign in (1, -1):
        figure = circuit_figure(circuit_graph(own, kept, sign * kept.float()), "t")
        inputs = ["q", "k", "v", WHOLE, WHOLE]
        assert drawn(figure) == Counter((DASHES[kind], COLOURS[sign][kind]) for kind in inputs)
        told = [trace.name for trace in figure.data if trace.name]
        assert told == ["q", "k", "v", WHOLE]
    colours = [colour for own in COLOURS.values() for colour in own.values()]
    assert len(set(colours)) == 8
    assert len({DASHES[kind] for kind in PORTS}) == 3


def test_edges_end_at_the_ports_of_their_inputs() -> None:
    own, kept = named("embed->L0H0<q>", "L0H0->L1H1<q>", "L0H0->L1H1<v>", "L1H1->logits")
    graph = circuit_graph(own, kept)
    edges: Any = list(graph.edges(keys=True, data=True))
    places = lay_out(graph, edges)
    boxes, levels = places.boxes, ["embed", "L0H0", "L1H1", "logits"]
    assert sorted(levels, key=lambda node: boxes[node].y) == levels
    for (source, target, _, data), curve in zip(edges, places.curves, strict=True):
        assert curve[0, 1] == pytest.approx(boxes[source].y + boxes[source].height / 2)
        assert curve[-1, 1] == pytest.approx(boxes[target].y - boxes[target].height / 2)
        if data["input"] in PORTS:
            port = boxes[target].x + PORT * PORTS[data["input"]]
            assert curve[-1, 0] == pytest.approx(port)
    shown = texts(circuit_figure(graph, "t"))
    assert sorted(shown) == ["L0H0", "L1H1", "embed", "logits", "q", "q", "v"]


def test_an_mlp_is_above_its_heads_and_nodes_do_not_overlap() -> None:
    own = network(3, 6)
    graph = circuit_graph(own, random_mask(own, 120))
    boxes = lay_out(graph, list(graph.edges(keys=True, data=True))).boxes
    inner = [(name, box) for name, box in boxes.items() if box.height != BAR]
    for number, (name, box) in enumerate(inner):
        for other, beside in inner[:number]:
            apart = abs(box.x - beside.x) >= box.width, abs(box.y - beside.y) >= box.height
            assert any(apart), (name, other)
    for layer in range(3):
        assert boxes[f"L{layer}.mlp"].y > boxes[f"L{layer}H0"].y + boxes[f"L{layer}H0"].height
        assert boxes[f"L{layer}.mlp"].x > max(boxes[f"L{layer}H{h}"].x for h in range(6))


def test_edges_go_around_nodes() -> None:
    own = network(3, 1, mlps=False)
    way = ["L0H0->L1H0<q>", "L1H0->L2H0<q>", "L0H0->L2H0<v>", "embed->L2H0<k>"]
    graph = circuit_graph(own, own.mask(own.find(way)))
    edges: Any = list(graph.edges(keys=True, data=True))
    places = lay_out(graph, edges)
    box = places.boxes["L1H0"]
    for (*ends, _, _), curve in zip(edges, places.curves, strict=True):
        if "L1H0" not in ends:
            inside = abs(curve - [box.x, box.y]) < [box.width / 2, box.height / 2]
            assert not inside.all(1).any(), ends


def test_width_says_size_and_opacity_says_how_often() -> None:
    own, kept = named("embed->L0H0<q>", "L0H0->L1H1<k>")
    scores = torch.where(own.exists, 0.1, 0.0)
    scores[0], chosen = -4.0, torch.where(kept, 1.0, 0.0)
    chosen[0] = 0.1
    figure = circuit_figure(circuit_graph(own, kept, scores, chosen), "t")
    q, k = (next(t for t in figure.data if t.line.dash == DASHES[kind]) for kind in "qk")
    assert q.line.width > 3 * k.line.width
    assert q.opacity < 0.5 < k.opacity
    assert "wider: larger score; fainter: chosen less often" in figure.layout.title.text
    assert sorted(hovers(figure)) == [
        "<b>L0H0 → L1H1&lt;k&gt;</b><br>score 0.10<br>chosen in 100% of resamples",
        "<b>embed → L0H0&lt;q&gt;</b><br>score \u22124.00<br>chosen in 10% of resamples",
    ]
    plain = circuit_figure(circuit_graph(own, kept), "t").layout.title.text
    assert plain == "t<br><sup>2 edges between 3 nodes.</sup>"


def test_of_many_edges_the_strongest_are_drawn_and_it_is_said() -> None:
    own = network(4, 4)
    kept = random_mask(own, 200)
    scores = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
    graph = circuit_graph(own, kept, scores)
    figure = circuit_figure(graph, "t", most=50)
    assert drawn(figure).total() == len(hovers(figure)) == 50
    assert "The 50 strongest of 200 edges" in figure.layout.title.text
    least = scores[kept].abs().sort().values[-50]
    strong = {d["name"] for *_, d in graph.edges(data=True) if abs(d["weight"]) >= least}
    shown = {text.partition("</b>")[0][3:] for text in hovers(figure)}
    assert shown == {
        name.replace("->", " → ").replace("<", "&lt;").replace(">", "&gt;") for name in strong
    }
    assert len(figure.data) < 2 * 4 * 5 + 20


def test_shared_keys_say_that_they_are_read_together() -> None:
    own = network(1, 4, groups=2)
    kept = own.mask(own.find(["embed->L0G0<k>", "L0H1->logits"]))
    figure = circuit_figure(circuit_graph(own, kept), "t")
    assert drawn(figure).total() == 2
    both = own.mask(own.find(["embed->L0G0<k>", "L0H0->logits", "L0H1->logits"]))
    together = circuit_figure(circuit_graph(own, both), "t")
    assert drawn(together).total() == 4
    said = "3 edges between 4 nodes, some read by several heads together."
    assert said in together.layout.title.text
    text = next(text for text in hovers(figure) if "L0G0" in text)
    assert text.endswith("score 1.00<br>read by 2 heads together, L0H1 among them")


def test_names_and_titles_are_escaped() -> None:
    graph: Any = nx.MultiDiGraph()
    graph.add_node("<b>", layer=0, kind="head")
    graph.add_node("logits", layer=1, kind="logits")
    graph.add_edge("<b>", "logits", weight=1.0, input="logits")
    figure = circuit_figure(graph, "a <script>")
    assert figure.layout.title.text.startswith("a &lt;script&gt;<br>")
    assert "&lt;b&gt;" in texts(figure)
    assert hovers(figure) == ["<b>&lt;b&gt; → logits</b><br>score 1.00"]


def test_the_known_circuit_and_one_without_edges_are_drawn() -> None:
    own, kept = naming()
    assert drawn(circuit_figure(circuit_graph(own, kept), "t")).total() == 25
    empty = circuit_figure(circuit_graph(own, kept & False), "t")
    assert drawn(empty).total() == 0
    assert "No edge is kept." in empty.layout.title.text


def test_what_is_no_circuit_is_refused() -> None:
    graph: Any = nx.MultiDiGraph()
    graph.add_edge("a", "b", weight=1.0, input="q")
    with pytest.raises(InputError, match="circuit_graph makes one"):
        circuit_figure(graph, "t")
    with pytest.raises(InputError, match="most=0"):
        circuit_figure(graph, "t", most=0)
