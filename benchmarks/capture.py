"""What it costs to have the instrument attached, and to measure every attention row.

GPT-2 small's shape with random weights. Four ways through the same inputs: the plain model (sdpa,
logits of the last position), eager with output_attentions, attnlens attached with nothing asked,
and attnlens measuring eight statistics of every row. The ways alternate in one process and the
ratio of each round is taken, so that a slow spell of the machine hits all of them; medians are
printed. Extra memory is the peak over the plain forward's, each way in a process of its own.

The floor of measuring is one more q k^T over the visible half and a handful of passes over it.

    python -m benchmarks.capture [--json] [--rounds 5] [--small]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks._shared import (
    THREADS,
    Claim,
    alternate,
    eight_statistics,
    gpt2_small,
    in_own_process,
    plain,
    print_claims,
    random_ids,
    ratio,
)
from benchmarks._shared import peak_of as peak_of_run

MODULE = "benchmarks.capture"
SHAPES = {"T512": (4, 512), "T2048": (1, 2048)}
WAYS = ("plain", "eager", "idle", "measure")
TARGETS = {"idle": {"T512": 1.02, "T2048": 1.02}, "measure": {"T512": 1.25, "T2048": 1.8}}
MEMORY_TARGET_MB = 60.0


def ways(model: Any, ids: Any) -> dict[str, Callable[[], Any]]:
    """The ways through one input."""
    import torch

    import attnlens as al
    from attnlens.hooks.session import Session

    lens = al.load(model, check=False)

    def eager() -> Any:
        kernel = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                return model(ids, logits_to_keep=1, use_cache=False, output_attentions=True)
        finally:
            model.set_attn_implementation(kernel)

    def idle() -> Any:
        with Session(model, lens.anatomy, []):
            return plain(model, ids)

    return {
        "plain": lambda: plain(model, ids),
        "eager": eager,
        "idle": idle,
        "measure": lambda: lens.measure(ids, eight_statistics()),
    }


def check_agreement(runs: dict[str, Callable[[], Any]]) -> None:
    """The idle output is the plain one bit for bit; statistics equal those of the eager maps."""
    import torch

    assert torch.equal(runs["plain"](), runs["idle"]()), "an idle seam changed the output"
    maps = torch.stack(runs["eager"]().attentions, 1)
    measured = runs["measure"]()
    first = measured["first_token"].stack()
    entropy = measured["entropy"].stack()
    # The eager run's own rounding moves its maps by about 1e-5 of a weight at this depth.
    assert torch.allclose(first, maps[..., 0].mean(-1), atol=1e-4), "first-token mass disagrees"
    expected = torch.special.entr(maps).sum(-1).mean(-1)
    assert torch.allclose(entropy, expected, atol=1e-3), "entropy disagrees"


def time_ratios(shape: tuple[int, int], layers: int, rounds: int) -> dict[str, float]:
    """Median over rounds of each way's time over the plain forward's."""
    import torch

    torch.set_num_threads(THREADS)
    runs = ways(gpt2_small(layers), random_ids(shape))
    check_agreement(runs)
    seconds = alternate(runs, rounds)
    found = {way: ratio(seconds, way, "plain") for way in WAYS}
    return found | {"plain seconds": statistics.median(seconds["plain"])}


def peak(way: str, shape: tuple[int, int], layers: int) -> float:
    """Peak memory in MB of one way, its libraries loaded and warmed before."""
    import torch

    torch.set_num_threads(THREADS)
    run = ways(gpt2_small(layers), random_ids(shape))[way]
    ways(gpt2_small(1), random_ids((1, 8)))[way]()
    return peak_of_run(run)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="last line is JSON with the claims")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="two layers, to try the script")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        way, shape, layers = arguments.peak
        print(peak(way, SHAPES[shape], int(layers)))
        return
    layers = 2 if arguments.small else 12
    claims: list[Claim] = []
    for name, shape in SHAPES.items():
        ratios = time_ratios(shape, layers, arguments.rounds)
        peaks = {way: in_own_process(MODULE, way, name, layers) for way in WAYS}
        print(
            f"\nbatch {shape[0]}, {shape[1]} tokens, {layers} layers; plain forward "
            f"{ratios['plain seconds']:.2f} s"
        )
        print(f"{'way':10s}{'time / plain':>14s}{'peak MB':>10s}{'over plain':>12s}")
        for way in WAYS:
            extra = peaks[way] - peaks["plain"]
            print(f"{way:10s}{ratios[way]:14.3f}{peaks[way]:10.0f}{extra:12.0f}")
        for way, targets in TARGETS.items():
            value = round(ratios[way], 3)
            claims.append(Claim(f"{way} / plain time, {name}", value, targets[name]))
        if name == "T2048":
            extra = round(peaks["measure"] - peaks["plain"], 1)
            claims.append(Claim("measure extra peak MB, T2048", extra, MEMORY_TARGET_MB))
    print_claims(claims, arguments.json)


if __name__ == "__main__":
    main()
