"""`show` of circuits and what is found of them, on the hand-wired model, whose edges are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import plotly.graph_objects as go
import pytest

import attnlens as al
from attnlens.analyses.circuit import Circuit
from attnlens.analyses.edge_scores import EdgeScores
from attnlens.tasks import repeated_tokens
from attnlens.tasks.other_name import other_name
from attnlens.views.circuit_results import circuit_title
from attnlens.zoo import name_model
from tests.views.models import hand_wired

EVIL = "<b>evil</b>"


@cache
def task():
    return repeated_tokens(hand_wired(), prompts=3, period=5)


@cache
def scores() -> EdgeScores:
    return al.edges(hand_wired(), task(), "exact")


@cache
def circuit() -> Circuit:
    return scores().circuit(threshold=1.0)


def title(figure: go.Figure) -> str:
    return figure.layout.title.text


def test_scores_of_edges_stand_at_sender_and_receiver():
    figure = al.show(scores())
    grid = next(trace for trace in figure.data if trace.type == "heatmap")
    values = np.array(grid.z, dtype=float)
    network = scores().network
    assert np.isnan(values).sum() == values.size - len(network)
    matrix = scores().matrix.numpy()
    assert np.nanmin(values) == pytest.approx(matrix.min())
    assert np.nanmax(values) == pytest.approx(matrix.max())
    assert "Scores of edges by exact cuts on repeated tokens" in title(figure)


def test_scores_of_nodes_stand_by_layer_with_mlps_beside():
    lens = al.load(al.zoo.small_path())
    found = al.nodes(lens, repeated_tokens(lens, prompts=2, period=5), steps=1)
    figure = al.show(found)
    (trace,) = figure.data
    assert list(trace.y) == ["L0", "L1", "L2", "L3"]
    assert list(trace.x) == ["embed", *(f"H{head}" for head in range(8)), "MLP"]
    values = np.array(trace.z, dtype=float)
    assert np.isfinite(values).sum() == len(found.network.senders)
    at = {sender.name: number for number, sender in enumerate(found.network.senders)}
    row, columns = list(trace.y).index("L2"), list(trace.x)
    assert values[row, columns.index("H3")] == pytest.approx(float(found.score[at["L2H3"]]))
    assert values[row, columns.index("MLP")] == pytest.approx(float(found.score[at["L2.mlp"]]))
    assert "Scores of nodes by EAP-IG on repeated tokens, 2 prompts" in title(figure)


def test_a_circuit_is_its_graph():
    figure = al.show(circuit())
    assert title(figure).startswith("Repeated tokens: at least 1 by exact cuts")
    words = str(figure.to_dict())
    assert all(node in words for node in circuit().nodes)
    assert "L0H1" in circuit().nodes
    assert "L1H2" in circuit().nodes
    assert title(al.show(circuit(), "Mine")).startswith("Mine")


@pytest.mark.parametrize(
    ("about", "wanted"),
    [
        ({}, "A circuit"),
        ({"task": "ioi_b", "method": "eap"}, "Ioi b: by EAP"),
        (
            {"task": "t", "method": "eap-ig", "granularity": "nodes", "selection": "top 9"},
            "T: the largest 9 nodes by EAP-IG",
        ),
        (
            {"granularity": "edges", "selection": "top 9, greedily from the logits"},
            "A circuit: the largest 9 edges, greedily from the logits",
        ),
    ],
)
def test_the_title_says_what_is_known(about, wanted):
    assert circuit_title(about) == wanted


def test_an_evaluation_shows_each_run_and_each_node():
    found = circuit().evaluate(hand_wired(), task(), draws=3, resamples=50)
    figure = al.show(found)
    runs, nodes = (trace for trace in figure.data if trace.type == "bar")
    # Left to right: the whole model, the circuit, random ones, the rest, nothing.
    heights = [float(height) for height in runs.y]
    wanted = [float(values.mean()) for values in (found.full, found.inside)]
    assert heights[:2] == pytest.approx(wanted)
    assert heights[-1] == pytest.approx(float(found.empty.mean()))
    assert len(heights) == 5
    losses = dict(zip(found.nodes, found.minimality.mean.tolist(), strict=True))
    assert dict(zip(nodes.y, nodes.x, strict=True)) == pytest.approx(losses)
    alone = al.show(circuit().evaluate(hand_wired(), task(), draws=0, resamples=50))
    assert len(alone.data[0].y) == 4


def test_a_curve_ends_at_the_whole_model():
    found = al.faithfulness_curve(hand_wired(), task(), scores(), (0.1, 1.0), draws=2, resamples=50)
    figure = al.show(found)
    ends = [trace.y[-1] for trace in figure.data if trace.name == "circuit" and len(trace.y) == 2]
    assert ends == pytest.approx([1.0] * len(ends))
    assert ends
    assert f"CPR {float(found.cpr.mean):.2f}" in str(figure.to_dict())
    without = al.show(replace(found, random=found.random[:0]))
    assert "random circuits" not in {trace.name for trace in without.data}


def test_an_overlap_stands_beside_chance():
    smaller = circuit().without("L0H1")
    found = circuit().compare(smaller)
    figure = al.show(found)
    shared, chance = figure.data
    assert list(shared.y) == ["nodes", "edges"]
    assert list(shared.x) == [len(found.nodes.names), len(found.edges.names)]
    assert list(chance.x) == pytest.approx([found.nodes.expected, found.edges.expected])
    assert "Jaccard index" in shared.customdata[0]


def test_text_from_outside_stays_text():
    evil = replace(circuit(), about={**circuit().about, "task": EVIL})
    told = replace(task(), name=EVIL)
    found = evil.evaluate(hand_wired(), told, draws=0, resamples=10)
    own = replace(scores(), scoring=replace(scores().scoring, task=EVIL))
    lens = al.load(name_model())
    nodes = al.nodes(lens, replace(other_name(lens, prompts=2), name=EVIL), "eap")
    for result in (evil, found, own, nodes, evil.compare(evil)):
        words = str(al.show(result).to_dict())
        assert "evil" in words
        assert EVIL not in words
