"""Attention flow from all sources to one target: attnlens beside the published algorithm.

12 causal layers and 64 tokens: GPT-2 small's shape with random weights, heads fused by their mean,
residual share one half, from the last position to every token of the input. The published way (the
code of Abnar and Zuidema 2020) gives the whole network to networkx, which runs Edmonds-Karp on
floats once a pair. That takes seconds, so it is timed on a few sources, evenly spaced, and its time
for all of them is extrapolated: mean time a pair x pairs. Those pairs are also what the flows of
both ways are compared on. attnlens runs all sources each round. Both begin with kept patterns and
run on one thread.

The floor is scipy's Dinic alone, a run a pair, on networks that are made beforehand and hold
nothing but edges between source and target: what is above it is fusing, bounds and making networks.

    python -m benchmarks.flow [--json] [--rounds 5] [--pairs 4] [--layers 12] [--tokens 64]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks._shared import Claim, gpt2_small, print_claims, random_ids


def kept_run(layers: int, tokens: int) -> Any:
    """One prompt, all patterns kept."""
    import attnlens as al

    return al.Lens(gpt2_small(layers)).run(random_ids((1, tokens)), keep="pattern")


def fused_maps(trace: Any) -> Any:
    """What both ways solve: `(A + I) / 2`, heads fused by their mean, `layer query key`."""
    import torch

    maps = trace.pattern.stack()[0].mean(1).double()
    return (maps + torch.eye(maps.shape[-1], dtype=maps.dtype)) / 2


def published(maps: Any) -> Callable[[int, int], float]:
    """The flow of one pair by networkx; the graph is made once, as in the published code."""
    import networkx as nx

    graph = nx.DiGraph()
    for layer, query, key in maps.nonzero().tolist():
        graph.add_edge((layer + 1, query), (layer, key), capacity=float(maps[layer, query, key]))

    def flow(target: int, source: int) -> float:
        return nx.maximum_flow_value(
            graph,
            (len(maps), target),
            (0, source),
            flow_func=nx.algorithms.flow.edmonds_karp,
        )

    return flow


def floor_seconds(maps: Any) -> float:
    """Seconds that scipy's Dinic takes for all sources of the last position."""
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    layers, tokens = maps.shape[:2]
    total = 0.0
    for source in range(tokens):
        units = (maps[:, source:, source:] * 2**30).round().int().numpy()
        units[-1, :-1], units[0, :, 1:] = 0, 0
        width = tokens - source
        layer, query, key = units.nonzero()
        ends = ((layer + 1) * width + query, layer * width + key)
        nodes = (layers + 1) * width
        network = csr_array((units[layer, query, key], ends), shape=(nodes, nodes))
        network.indices, network.indptr = (
            part.astype(np.int32) for part in (network.indices, network.indptr)
        )
        start = time.perf_counter()
        maximum_flow(network, nodes - 1, 0, method="dinic")
        total += time.perf_counter() - start
    return total


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def measure(layers: int, tokens: int, pairs: int, rounds: int) -> list[Claim]:
    """Time all ways in turns and compare their flows."""
    import attnlens as al

    trace = kept_run(layers, tokens)
    maps = fused_maps(trace)
    solve = published(maps)
    sources = [i * (tokens - 1) // max(pairs - 1, 1) for i in range(pairs)]
    al.attention_flow(trace, targets=-1)  # warm up
    ours: list[float] = []
    floors: list[float] = []
    theirs: list[float] = []
    apart = 0.0
    for number in range(max(rounds, pairs)):
        own, found = seconds_of(lambda: al.attention_flow(trace, targets=-1))
        ours.append(own)
        floors.append(floor_seconds(maps))
        if number < pairs:
            source = sources[number]
            one, flow = seconds_of(lambda source=source: solve(tokens - 1, source))
            theirs.append(one)
            apart = max(apart, abs(flow - float(found.flow[0, 0, source])))
    extrapolated = statistics.mean(theirs) * tokens
    own, floor = statistics.median(ours), statistics.median(floors)
    name = f"L {layers}, T {tokens}, causal, all sources of one target"
    print(
        f"{name}\n  attnlens {own * 1e3:.1f} ms ({own / tokens * 1e3:.2f} ms a pair)\n"
        f"  floor: scipy's Dinic alone {floor * 1e3:.1f} ms; attnlens is {own / floor:.2f} x that\n"
        f"  published: {min(theirs):.2f} to {max(theirs):.2f} s a pair (sources {sources}); "
        f"extrapolated to {tokens} pairs {extrapolated:.0f} s\n"
    )
    return [
        Claim(
            f"published (extrapolated) / attnlens time, T {tokens}",
            extrapolated / own,
            1000.0,
            True,
        ),
        Claim("largest difference of the two flows, in 1e-8", apart / 1e-8, 1.0),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="last line is JSON with the claims")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=4, help="pairs that networkx solves")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # both solvers run on one
    claims = measure(arguments.layers, arguments.tokens, arguments.pairs, arguments.rounds)
    print_claims(claims, arguments.json)


if __name__ == "__main__":
    main()
