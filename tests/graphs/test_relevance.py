"""Graphs of the scores of attention edges, and pruning where weights have signs."""

from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlens.errors import InputError
from attnlens.graphs import export_graph, load_graph, prune_graph, relevance_graph
from attnlens.graphs.export import SUFFIXES


def random_maps(layers: int, heads: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shape = (2, heads, length, length)
    return {
        f"L{layer}": torch.randn(shape, generator=draw, dtype=torch.float64).tril()
        for layer in range(layers)
    }


def edges(graph: nx.MultiDiGraph, kind: str) -> dict[tuple[str, str, str], float]:
    return {
        (s, t, key): data["weight"]
        for s, t, key, data in graph.edges(keys=True, data=True)
        if data["kind"] == kind
    }


def test_edges_say_head_and_sign_and_residual_edges_join_what_is_kept() -> None:
    lower, upper = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    lower[0, 1, 2, 0] = -4.0  # L0H1 from position 0 to 2
    upper[0, 0, 2, 2] = 3.0
    upper[0, 1, 2, 1] = 0.5
    streams = torch.arange(9.0).view(3, 3)
    graph = relevance_graph(
        {"L0": lower, "L1": upper}, "abc", top=2, streams=streams, attributes={"model": "m"}
    )
    assert edges(graph, "attention") == {
        ("L0P0", "L1P2", "L0H1"): -4.0,
        ("L1P2", "L2P2", "L1H0"): 3.0,
    }
    assert edges(graph, "residual") == {("L1P2", "L2P2", "residual"): 5.0}
    assert graph.edges["L0P0", "L1P2", "L0H1"] == {
        "weight": -4.0, "kind": "attention", "head": "L0H1", "sign": -1
    }  # fmt: skip
    assert dict(graph.nodes(data=True)) == {
        "L0P0": {"layer": 0, "position": 0, "token": "a", "score": 0.0},
        "L1P2": {"layer": 1, "position": 2, "token": "c", "score": 5.0},
        "L2P2": {"layer": 2, "position": 2, "token": "c", "score": 8.0},
    }
    assert graph.graph == {"model": "m", "layers": [0, 1], "threshold": 0.0, "top": 2}


def test_what_leaves_the_last_layer_may_have_no_score() -> None:
    graph = relevance_graph({"L0": torch.ones(1, 1, 2, 2)}, "ab", streams=torch.ones(1, 2))
    assert graph.nodes["L0P1"]["score"] == 1.0
    assert "score" not in graph.nodes["L1P1"]
    assert edges(graph, "residual") == {
        ("L0P0", "L1P0", "residual"): 1.0,
        ("L0P1", "L1P1", "residual"): 1.0,
    }


@given(st.integers(0, 99), st.none() | st.integers(1, 30), st.floats(0, 2))
def test_the_largest_by_size_are_kept(seed: int, top: int | None, threshold: float) -> None:
    maps = random_maps(2, 2, 4, seed)
    found = sorted(
        map(abs, edges(relevance_graph(maps, "abcd", 1, top, threshold), "attention").values())
    )
    every = torch.cat([scores[1].flatten() for scores in maps.values()]).abs()
    every = every[(every >= threshold) & (every > 0)].sort().values
    assert found == (every if top is None else every[-top:]).tolist()


def test_layers_that_are_left_out_are_bridged_and_padding_is_left_out() -> None:
    maps = {name: scores[:1] for name, scores in random_maps(2, 1, 3).items()}
    padded = {}
    for name, scores in maps.items():
        padded[name] = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
        padded[name][:, :, 2:, 2:] = scores
    plain = relevance_graph({"L1": maps["L0"], "L4": maps["L1"]}, "abc")
    left = relevance_graph({"L4": padded["L1"], "L1": padded["L0"]}, "abc", positions=[2, 3, 4])
    assert {data["layer"] for _, data in plain.nodes(data=True)} == {1, 4, 5}
    assert list(left.edges(keys=True, data=True)) == list(plain.edges(keys=True, data=True))
    with pytest.raises(InputError, match="padded on the left"):
        relevance_graph(padded, "abc")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_relevance_graph_reads_back(suffix: str, tmp_path: Any) -> None:
    graph = relevance_graph(random_maps(2, 2, 3), ["", '"🙂\x07', ""], streams=torch.randn(3, 3))
    back = load_graph(export_graph(graph, tmp_path / f"g{suffix}"))
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert nx.to_dict_of_dicts(back) == nx.to_dict_of_dicts(graph)
    assert back.graph == graph.graph


def test_pruning_goes_by_size_whatever_the_sign() -> None:
    graph = relevance_graph(
        {"L0": torch.tensor([[[[0.0, 0, 0], [0, 0, 0], [-5, 1, 2]]]])}, "abc", top=None
    )
    kept = prune_graph(graph, "L1P2", top=1)
    assert edges(kept, "attention") == {("L0P0", "L1P2", "L0H0"): -5.0}
    kept = prune_graph(graph, "L1P2", threshold=1.5)
    assert set(edges(kept, "attention").values()) == {-5.0, 2.0}


MAP = torch.ones(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"maps": {}}, "the maps are of none"),
        ({"maps": {"enc.L0": MAP, "dec.L0": MAP}}, "the maps are of enc.L0, dec.L0"),
        ({"maps": {"cross.L0": MAP}}, "one self-attention stack"),
        ({"maps": {"L0": MAP[0]}}, "needed is batch head query key"),
        ({"prompt": 1}, "with a prompt 1"),
        ({"maps": {"L0": MAP * torch.nan}}, "not finite"),
        ({"tokens": "abc"}, "has 2 positions"),
        ({"positions": [0]}, "1 positions are given for 2 tokens"),
        ({"top": 0}, "top=0"),
        ({"threshold": -1.0}, "threshold=-1"),
        ({"streams": torch.ones(3, 2)}, "needed are 1 rows of 2"),
        ({"streams": torch.ones(1, 1)}, "needed are 1 rows of 2"),
        ({"streams": torch.full((2, 2), torch.inf)}, "streams hold scores that are not finite"),
    ],
)
def test_what_is_no_relevance_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        relevance_graph(**({"maps": {"L0": MAP}, "tokens": "ab"} | given))
