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
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

THREADS = 2
SHAPES = {"T512": (4, 512), "T2048": (1, 2048)}
WAYS = ("plain", "eager", "idle", "measure")
TARGETS = {"idle": {"T512": 1.02, "T2048": 1.02}, "measure": {"T512": 1.25, "T2048": 1.8}}
MEMORY_TARGET_MB = 60.0


@dataclass(frozen=True)
class Claim:
    """One measured figure beside its target; `value` at most `target` is ok."""

    name: str
    value: float
    target: float
    ok: bool


def build(layers: int) -> Any:
    """GPT-2 small's shape, with weights large enough that attention is not uniform."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_positions=2048, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name:
                parameter.mul_(3)
    return model


def reducers() -> list[Any]:
    """The eight statistics that are measured together."""
    import attnlens as al

    return [
        al.FirstTokenMass(),
        al.ColumnMass(),
        al.Entropy(),
        al.MeanDistance(),
        al.OffsetMass((0, 1)),
        al.InductionMass(),
        al.DuplicateMass(),
        al.ArgMax(),
    ]


def ways(model: Any, ids: Any) -> dict[str, Callable[[], Any]]:
    """The ways through one input."""
    import torch

    import attnlens as al
    from attnlens.hooks.session import Session

    lens = al.load(model, check=False)

    def plain() -> Any:
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False).logits

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
            return plain()

    return {
        "plain": plain,
        "eager": eager,
        "idle": idle,
        "measure": lambda: lens.measure(ids, reducers()),
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
    ids = torch.randint(0, 50000, shape, generator=torch.Generator().manual_seed(1))
    runs = ways(build(layers), ids)
    check_agreement(runs)
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: list[float] = []
    for _ in range(rounds):
        took: dict[str, float] = {}
        for way in WAYS:
            start = time.perf_counter()
            runs[way]()
            took[way] = time.perf_counter() - start
        seconds.append(took["plain"])
        for way in WAYS:
            ratios[way].append(took[way] / took["plain"])
    found = {way: statistics.median(values) for way, values in ratios.items()}
    return found | {"plain seconds": statistics.median(seconds)}


def peak_memory(way: str, shape: tuple[int, int], layers: int) -> float:
    """Peak resident memory in MB of one way above the model itself, watched from a thread."""
    import torch

    torch.set_num_threads(THREADS)
    ids = torch.randint(0, 50000, shape, generator=torch.Generator().manual_seed(1))
    run = ways(build(layers), ids)[way]
    run_small = ways(build(1), ids[:1, :8])[way]
    run_small()
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = resident()
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = run()
    done.set()
    watcher.join()
    del kept
    return (peak - before) / 1e6


def peak_in_own_process(way: str, shape: str, layers: int) -> float:
    """`peak_memory` in a fresh process, so that no way profits from another's memory."""
    command = [sys.executable, "-m", "benchmarks.capture", "--peak", way, shape, str(layers)]
    # A fixed threshold makes the allocator give blocks back, so that the peak is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(output.stdout.strip().splitlines()[-1])


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
        print(peak_memory(way, SHAPES[shape], int(layers)))
        return
    layers = 2 if arguments.small else 12
    claims: list[Claim] = []
    for name, shape in SHAPES.items():
        ratios = time_ratios(shape, layers, arguments.rounds)
        peaks = {way: peak_in_own_process(way, name, layers) for way in WAYS}
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
            claims.append(
                Claim(f"{way} / plain time, {name}", value, targets[name], value <= targets[name])
            )
        if name == "T2048":
            extra = round(peaks["measure"] - peaks["plain"], 1)
            claims.append(
                Claim(
                    "measure extra peak MB, T2048",
                    extra,
                    MEMORY_TARGET_MB,
                    extra <= MEMORY_TARGET_MB,
                )
            )
    if arguments.json:
        print(json.dumps({"claims": [asdict(claim) for claim in claims]}))


if __name__ == "__main__":
    main()
