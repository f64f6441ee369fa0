"""What information-flow routes cost: memory and time, beside all parts held at once.

GPT-2 small's shape with random weights. `routes` traces with the default threshold, `all` with
threshold 0, so that every visible (head, query, source) of all layers but the last is taken apart,
and `naive` holds the parts of a layer as one tensor [head, query, source, d_model], as code that
follows the formula does; that fits for short texts only, so it is compared at 128 tokens. Peaks
are over the plain forward's, each way in a process of its own; agreement of the ways is asserted.

The floor of `all` is one pass over the parts, `T^2 / 2 * H * d` numbers a layer, at the rate at
which this machine takes absolute values and sums of what lies in its cache. Making each part is two
passes more (scale, subtract).

    python -m benchmarks.routes [--json] [--rounds 3] [--small]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks._shared import (
    THREADS,
    Claim,
    alternate,
    gpt2_small,
    in_own_process,
    plain,
    print_claims,
    random_ids,
    ratio,
)
from benchmarks._shared import peak_of as peak_of_run

MODULE = "benchmarks.routes"
SHORT, LONG = 128, 512
MEMORY_TARGET_MB = 500.0
HEADS, WIDTH = 12, 768


def naive(model: Any, ids: Any) -> list[Any]:
    """Importance of every part of the sums after attention, [head, query, source] a layer."""
    import torch

    found: list[Any] = []
    values: list[Any] = []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda *run: values.append(run[2]))
        for block in model.transformer.h
    ]
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            run = model(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
            for layer, block in enumerate(model.transformer.h):
                stream, weights = run.hidden_states[layer][0], run.attentions[layer][0]
                project = block.attn.c_proj.weight.view(HEADS, -1, WIDTH)
                value = values[layer][0, :, 2 * WIDTH :].view(len(stream), HEADS, -1)
                parts = torch.einsum("hts,shv,hvd->htsd", weights, value, project)
                bias = block.attn.c_proj.bias
                total = stream + parts.sum((0, 2)) + bias
                size = total.abs().sum(-1)

                def nearer(part: Any, total: Any = total, size: Any = size) -> Any:
                    return (size - (total - part).abs().sum(-1)).clamp_min(0)

                rest = size[:, None] - (total[:, None] - parts).abs().sum(-1)
                near = rest.clamp_min(0)
                whole = near.sum((0, 2)) + nearer(stream) + nearer(bias)
                found.append(near / whole[:, None])
    finally:
        model.set_attn_implementation(kernel)
        for hook in hooks:
            hook.remove()
    return found


def ways(model: Any, ids: Any) -> dict[str, Callable[[], Any]]:
    """The ways through one input."""
    import attnlens as al

    lens = al.load(model, check=False)
    return {
        "plain": lambda: plain(model, ids),
        "routes": lambda: al.routes(lens, ids),
        "all": lambda: al.routes(lens, ids, threshold=0.0),
        "naive": lambda: naive(model, ids),
    }


def check_agreement(runs: dict[str, Callable[[], Any]]) -> None:
    """The edges kept with threshold 0 have the importances of the naive tensor."""
    import torch

    expected = runs["naive"]()
    for edges, wanted in zip(runs["all"]().edges[0], expected, strict=True):
        own = edges.kind == 0
        at = (edges.head[own].long(), edges.query[own].long(), edges.source[own].long())
        # The eager run's own rounding moves its maps by about 1e-5 of a weight.
        assert torch.allclose(edges.importance[own], wanted[at], atol=1e-4), "importances disagree"


def rate() -> float:
    """Numbers a second of which the absolute value is taken and summed, in the cache."""
    import torch

    held = torch.randn(128, WIDTH)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            held.abs_().sum(-1)
        best = min(best, time.perf_counter() - start)
    return 200 * held.numel() / best


def peak(way: str, length: int, layers: int) -> float:
    """Peak memory in MB of one way, its libraries loaded and warmed before."""
    import torch

    torch.set_num_threads(THREADS)
    run = ways(gpt2_small(layers), random_ids((1, length)))[way]
    ways(gpt2_small(1), random_ids((1, 8)))[way]()
    return peak_of_run(run)


def measure(length: int, chosen: tuple[str, ...], layers: int, rounds: int) -> dict[str, float]:
    """Extra peak in MB of each way; prints it beside times."""
    runs = ways(gpt2_small(layers), random_ids((1, length)))
    if "naive" in chosen:
        check_agreement(runs)
    seconds = alternate({way: runs[way] for way in ("plain", *chosen)}, rounds)
    peaks = {way: in_own_process(MODULE, way, length, layers) for way in ("plain", *chosen)}
    print(f"\n{length} tokens, {layers} layers")
    print(f"{'way':10s}{'seconds':>10s}{'time / plain':>14s}{'over plain MB':>15s}")
    for way in chosen:
        extra = peaks[way] - peaks["plain"]
        median = statistics.median(seconds[way])
        print(f"{way:10s}{median:10.2f}{ratio(seconds, way, 'plain'):14.1f}{extra:15.0f}")
    parts = length * (length + 1) / 2 * HEADS * WIDTH * (layers - 1)
    print(f"floor of all: {parts / 1e9:.2f} G numbers, {parts / rate():.2f} s")
    return {way: peaks[way] - peaks["plain"] for way in chosen}


def main() -> None:
    """Measure and print."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="last line is JSON with the claims")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="two layers, to try the script")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        way, length, layers = arguments.peak
        print(peak(way, int(length), int(layers)))
        return
    torch.set_num_threads(THREADS)
    layers = 2 if arguments.small else 12
    measure(SHORT, ("routes", "all", "naive"), layers, arguments.rounds)
    extra = measure(LONG, ("routes", "all"), layers, arguments.rounds)
    print_claims(
        [
            Claim(f"{name} extra peak MB, T{LONG}", round(extra[way], 1), MEMORY_TARGET_MB)
            for way, name in (("routes", "routes"), ("all", "routes at threshold 0"))
        ],
        arguments.json,
    )


if __name__ == "__main__":
    main()
