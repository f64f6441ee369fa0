"""Flow graphs: products along paths are the rollout, and pruning keeps the targets' paths."""

from dataclasses import dataclass
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlens.errors import InputError
from attnlens.graphs import attention_graph, flow_graph, node_name, prune_graph, rollout_graph


def random_maps(layers: int, length: int, seed: int = 0, causal: bool = True) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, length, length, generator=draw, dtype=torch.float64)
    if causal:
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1)


def rolled_out(maps: Tensor, residual: float) -> Tensor:
    identity = matrix = torch.eye(maps.shape[-1], dtype=maps.dtype)
    for attention in maps:
        matrix = ((1 - residual) * attention + residual * identity) @ matrix
    return matrix


def mass_of_paths(graph: nx.MultiDiGraph, source: str, target: str) -> float:
    """Sum over all paths of the product of their weights, path by path."""
    if source == target:
        return 1.0
    return sum(
        data["weight"] * mass_of_paths(graph, source, below)
        for below, _, data in graph.in_edges(target, data=True)
    )


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.5]), st.booleans())
def test_sum_over_paths_is_the_rollout(
    layers: int, length: int, residual: float, causal: bool
) -> None:
    maps = random_maps(layers, length, causal=causal)
    graph = attention_graph(maps, ["x"] * length, residual)
    expected = rolled_out(maps, residual)
    for query in range(length):
        for key in range(length):
            found = mass_of_paths(graph, node_name(0, key), node_name(layers, query))
            assert found == pytest.approx(expected[query, key].item(), abs=1e-12)


def test_nodes_and_edges_say_what_they_are() -> None:
    maps = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    graph = attention_graph(maps, ["a", "b"], layers=[3], attributes={"model": "m"})
    assert dict(graph.nodes(data=True)) == {
        "L3P0": {"layer": 3, "position": 0, "token": "a"},
        "L3P1": {"layer": 3, "position": 1, "token": "b"},
        "L4P0": {"layer": 4, "position": 0, "token": "a"},
        "L4P1": {"layer": 4, "position": 1, "token": "b"},
    }
    assert {(s, t, k): d["weight"] for s, t, k, d in graph.edges(keys=True, data=True)} == {
        ("L3P0", "L4P0", "attention"): 0.5,
        ("L3P0", "L4P0", "residual"): 0.5,
        ("L3P0", "L4P1", "attention"): 0.125,
        ("L3P1", "L4P1", "attention"): 0.375,
        ("L3P1", "L4P1", "residual"): 0.5,
    }
    assert graph.graph == {
        "model": "m",
        "residual": 0.5,
        "threshold": 0.0,
        "top": None,
        "layers": [3],
    }


@given(st.floats(0, 1), st.none() | st.integers(1, 3), st.sampled_from([0.0, 0.5]))
def test_threshold_and_top_keep_a_path_to_the_bottom(
    threshold: float, top: int | None, residual: float
) -> None:
    maps = random_maps(3, 4, seed=1)
    full = attention_graph(maps, "abcd", residual)
    graph = attention_graph(maps, "abcd", residual, threshold, top)
    for node, data in graph.nodes(data=True):
        entering = [d["weight"] for _, _, d in graph.in_edges(node, data=True)]
        everything = sorted((d["weight"] for *_, d in full.in_edges(node, data=True)), reverse=True)
        strong = [weight for weight in everything if weight >= threshold][:top]
        assert sorted(entering, reverse=True) == (strong or everything[:1])
        assert bool(entering) == (data["layer"] > 0)


def test_rows_that_do_not_sum_to_one_stay_as_they_are() -> None:
    maps = torch.tensor([[[0.5, 0.0], [0.0, 0.0]]])  # a learned sink took the rest
    graph = attention_graph(maps, "ab")
    assert {(s, t, k): d["weight"] for s, t, k, d in graph.edges(keys=True, data=True)} == {
        ("L0P0", "L1P0", "attention"): 0.25,
        ("L0P0", "L1P0", "residual"): 0.5,
        ("L0P1", "L1P1", "residual"): 0.5,
    }
    with pytest.raises(InputError, match="nothing enters position 1 above layer 0"):
        attention_graph(maps, "ab", residual=0.0)


def test_layers_left_out_are_bridged() -> None:
    graph = attention_graph(random_maps(2, 2), "ab", layers=[1, 4])
    assert {data["layer"] for _, data in graph.nodes(data=True)} == {1, 4, 5}
    assert ("L1P0", "L4P1", "attention") in graph.edges(keys=True)
    assert ("L4P1", "L5P1", "residual") in graph.edges(keys=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.ones(2, 2)}, "needed is layer query key"),
        ({"maps": torch.ones(1, 2, 3)}, "maps are 2 x 3 and there are 2 tokens"),
        ({"tokens": "abc"}, "there are 3 tokens"),
        ({"maps": torch.tensor([[[1.0, 0], [torch.nan, 1]]])}, "layer 0, query 1, key 0 is nan"),
        ({"maps": torch.tensor([[[1.0, 0], [-0.1, 1]]])}, "query 1, key 0 is -0.1"),
        ({"residual": 1.5}, "residual=1.5"),
        ({"threshold": -1.0}, "threshold=-1"),
        ({"top": 0}, "top=0"),
        ({"layers": [1, 2]}, "1 maps and 2 layers"),
    ],
)
def test_what_is_no_flow_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"maps": torch.eye(2)[None], "tokens": "ab"}
    with pytest.raises(InputError, match=message):
        attention_graph(**(given | change))
    with pytest.raises(InputError, match="goes upwards"):
        attention_graph(torch.eye(2).expand(2, 2, 2), "ab", layers=[3, 1])


@dataclass(frozen=True)
class Settings:
    residual: float = 0.3
    fuse: str = "mean"
    layers: tuple[int, ...] = (0, 2)


@dataclass(frozen=True)
class Maps:
    """The least that rollout_graph takes."""

    tokens: tuple[tuple[str, ...], ...]
    maps: Tensor
    layers: tuple[str, ...]
    settings: Settings


def test_rollout_graph_takes_one_prompt_without_its_padding_and_some_layers() -> None:
    maps = torch.stack([random_maps(3, 4), random_maps(3, 4, seed=1)])
    rollout = Maps((tuple("abcd"), tuple("ab")), maps, ("enc.L0", "enc.L2", "enc.L3"), Settings())
    graph = rollout_graph(rollout, prompt=1, threshold=0.0, layers=(2, 3))
    expected = attention_graph(maps[1, 1:, :2, :2], "ab", 0.3, layers=(2, 3))
    assert list(graph.edges(keys=True, data=True)) == list(expected.edges(keys=True, data=True))
    assert {data["token"] for _, data in graph.nodes(data=True)} == {"a", "b"}
    assert graph.graph == {
        "method": "rollout",
        "prompt": 1,
        "sites": ["enc.L2", "enc.L3"],
        "settings": {"residual": 0.3, "fuse": "mean", "layers": (0, 2)},
        "residual": 0.3,
        "threshold": 0.0,
        "top": None,
        "layers": [2, 3],
    }
    for bad, message in (({"prompt": 2}, "has 2 prompts"), ({"layers": (1, 2)}, "went through")):
        with pytest.raises(InputError, match=message):
            rollout_graph(rollout, **bad)


def check_paths(graph: nx.MultiDiGraph, targets: list[str], sources: list[str]) -> None:
    """Every target is reached, and no node or edge is off the paths."""
    assert all(any(nx.has_path(graph, s, t) for s in sources if s in graph) for t in targets)
    for node in graph:
        assert any(nx.has_path(graph, s, node) for s in sources if s in graph)
        assert any(nx.has_path(graph, node, t) for t in targets)


@given(
    st.integers(0, 99),
    st.none() | st.floats(0, 1),
    st.none() | st.integers(1, 3),
    st.lists(st.sampled_from(["L3P0", "L3P3", "L2P2"]), min_size=1, unique=True),
    st.none() | st.just(["L0P0", "L1P0"]),
)
def test_pruned_graph_is_the_strong_part_between_sources_and_targets(
    seed: int, threshold: float | None, top: int | None, targets: list[str], sources: Any
) -> None:
    graph = attention_graph(random_maps(3, 4, seed), "abcd")
    before = nx.to_dict_of_dicts(graph)
    small = prune_graph(graph, targets, sources, threshold, top)
    assert nx.to_dict_of_dicts(graph) == before
    check_paths(small, targets, sources or [f"L0P{i}" for i in range(4)])
    for node in small:
        entering = [d["weight"] for *_, d in small.in_edges(node, data=True)]
        assert top is None or len(entering) <= top
        assert threshold is None or sum(weight < threshold for weight in entering) <= 1
    assert small.graph["pruned"]["targets"] == targets
    for s, t, key, data in small.edges(keys=True, data=True):
        assert graph.edges[s, t, key] == data


def test_pruning_with_no_limit_keeps_exactly_what_lies_between() -> None:
    graph = attention_graph(random_maps(2, 3), "abc")
    small = prune_graph(graph, "L2P1")
    assert set(small) == {"L0P0", "L0P1", "L1P0", "L1P1", "L2P1"}
    assert small.number_of_edges() == 2 + 3 + 3
    assert prune_graph(graph, "L2P2", top=1).number_of_edges() == 2
    assert nx.has_path(prune_graph(graph, "L2P2", sources="L0P0", top=1), "L0P0", "L2P2")


def test_a_flow_spread_thin_keeps_a_path() -> None:
    """1 flows from the first position to the last over 20 edges, none of which carries over .06."""
    share = torch.linspace(0.04, 0.06, 20, dtype=torch.float64)
    maps, carried = torch.zeros(2, 2, 22, 22, dtype=torch.float64)
    maps[1, 21, 1:21] = carried[1, 21, 1:21] = share
    maps[0, 1:21, 0] = 1
    carried[0, 1:21, 0] = share
    tokens = [str(i) for i in range(22)]
    graph = flow_graph(maps, carried, tokens, (21, 0), residual=0)
    assert graph.number_of_edges() == 40
    strong = flow_graph(maps, carried, tokens, (21, 0), 0, 0.05)
    # by what the edges carry: the lower ones have room for 1 each
    assert len(strong.in_edges("L2P21")) == int((share >= 0.05).sum()) == 10
    check_paths(strong, ["L2P21"], ["L0P0"])
    thin = flow_graph(maps, carried, tokens, (21, 0), 0, 0.5)
    assert set(thin) == {"L0P0", "L1P20", "L2P21"}
    assert (thin.graph["source"], thin.graph["target"]) == ("L0P0", "L2P21")
    assert thin.graph["flow"] == pytest.approx(1)
    nothing = flow_graph(maps, torch.zeros_like(maps), tokens, (0, 21), 0, 0.5)
    assert set(nothing) == {"L2P0", "L0P21"}
    assert not nothing.number_of_edges()


def test_pruning_refuses_what_it_cannot_trace() -> None:
    graph = attention_graph(random_maps(2, 3), "abc")
    with pytest.raises(InputError, match=r"no target \['L9P9'\]"):
        prune_graph(graph, "L9P9")
    with pytest.raises(InputError, match=r"No source reaches the targets \['L2P0'\]"):
        prune_graph(graph, "L2P0", sources="L0P2")
    with pytest.raises(InputError, match="top=0"):
        prune_graph(graph, "L2P0", top=0)
    graph.edges["L0P0", "L1P1", "attention"]["weight"] = float("nan")
    with pytest.raises(InputError, match="has weight nan"):
        prune_graph(graph, "L2P2")
    graph.add_edge("L2P0", "L0P0", weight=1.0)
    with pytest.raises(InputError, match="cycles"):
        prune_graph(graph, "L2P2")
