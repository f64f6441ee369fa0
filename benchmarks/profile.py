"""Eight statistics of every attention row: what they cost, beside the tools that keep maps.

GPT-2 small's shape with random weights; 512 tokens (batch 4), 2,048, 8,192. The ways: the plain
forward (sdpa, logits of the last position); attnlens streaming the statistics; transformers' eager
attention with output_attentions and the same statistics of its maps; TransformerLens' cache run
of the patterns, and nnsight saving them, each with the same statistics. Ways alternate in one
process and the ratio is taken within a round; peak memory is measured in a process of its own each.
At 8,192 tokens dense maps of 12 layers would take 38 GB, so only attnlens goes there.

The floor on a CPU: one more q k^T over the visible half, its softmax, and one pass over the weights
(held near the cache) for each of the statistics that is a sum over a row. `--floor` prints how far
a layer of the code is from it.

With CUDA a Llama-8B shape in bf16 at 32,768 tokens is measured as well (`--llama-layers 32`).

    python -m benchmarks.profile [--json] [--rounds 5] [--small] [--floor]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks._shared import (
    THREADS,
    Claim,
    Runs,
    alternate,
    eight_statistics,
    gpt2_small,
    in_own_process,
    plain,
    print_claims,
    random_ids,
    ratio,
    statistics_of_map,
)
from benchmarks._shared import peak_of as peak_of_run

MODULE = "benchmarks.profile"
SHAPES = {"T512": (4, 512), "T2048": (1, 2048), "T8192": (1, 8192)}
TARGETS = {"T512": 1.2, "T2048": 1.5, "T8192": 1.8}
DENSE = ("T512", "T2048")
"""Lengths at which the peers' maps fit."""


def attnlens_way(model: Any, ids: Any) -> Callable[[], dict[str, Any]]:
    import attnlens as al

    lens = al.load(model, check=False)
    reducers = eight_statistics()

    def run() -> dict[str, Any]:
        measured = lens.measure(ids, reducers)
        return {name: measured[name].stack() for name in measured.values}

    return run


def eager_way(model: Any, ids: Any) -> Callable[[], dict[str, Any]]:
    import torch

    def run() -> dict[str, Any]:
        kernel = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                maps = model(
                    ids, logits_to_keep=1, use_cache=False, output_attentions=True
                ).attentions
            return _of_all(maps, ids)
        finally:
            model.set_attn_implementation(kernel)

    return run


def transformer_lens_way(model: Any, ids: Any) -> Callable[[], dict[str, Any]]:
    """Its bridge changes a model in place, so it gets a copy of its own."""
    import copy
    import tempfile

    import torch
    from transformer_lens.model_bridge import TransformerBridge

    own = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:  # the bridge reads a config from somewhere
        own.config.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=own, device="cpu")
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.config.n_layer)]

    def run() -> dict[str, Any]:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names)
        return _of_all([cache[name] for name in names], ids)

    return run


def nnsight_way(model: Any, ids: Any) -> Callable[[], dict[str, Any]]:
    import copy

    import torch
    from nnsight import NNsight

    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    wrapped = NNsight(own)
    layers = range(model.config.n_layer)

    def run() -> dict[str, Any]:
        saved: list[Any] = []
        with torch.no_grad(), wrapped.trace(ids, logits_to_keep=1, use_cache=False):
            for layer in layers:
                saved.append(wrapped.transformer.h[layer].attn.output[1].save())
        return _of_all(saved, ids)

    return run


def _of_all(maps: Any, ids: Any) -> dict[str, Any]:
    import torch

    found = [statistics_of_map(layer, ids) for layer in maps]
    return {name: torch.stack([own[name] for own in found], dim=1) for name in found[0]}


PEERS: dict[str, tuple[str, Callable[[Any, Any], Callable[[], dict[str, Any]]]]] = {
    "eager": ("transformers", eager_way),
    "transformer-lens": ("transformer_lens", transformer_lens_way),
    "nnsight": ("nnsight", nnsight_way),
}


def ways(model: Any, ids: Any, length: str) -> Runs:
    """The ways through one input, those peers only that are installed."""
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(model, ids),
        "attnlens": attnlens_way(model, ids),
    }
    if length in DENSE:
        for name, (module, make) in PEERS.items():
            if importlib.util.find_spec(module) is None:
                print(f"{name} is not installed and is left out")
                continue
            runs[name] = make(model, ids)
    return runs


def disagreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference of each statistic; of arg-max the share of rows that differ."""
    found: dict[str, float] = {}
    for name, own in ours.items():
        other = theirs[name]
        different = (own != other).float().mean() if name == "argmax" else (own - other).abs().max()
        found[name] = float(different)
    return found


def measure_length(length: str, layers: int, rounds: int) -> list[Claim]:
    """Times, peaks and agreement at one length, printed, and the claims."""
    import torch

    torch.set_num_threads(THREADS)
    shape = SHAPES[length]
    ids = random_ids(shape)
    model = gpt2_small(layers, 8192)
    runs = ways(model, ids, length)
    ours = runs["attnlens"]()
    seconds = alternate(runs, rounds)
    peaks = {way: in_own_process(MODULE, way, length, layers) for way in runs}
    print(
        f"\nbatch {shape[0]}, {shape[1]} tokens, {layers} layers; plain forward "
        f"{statistics.median(seconds['plain']):.2f} s"
    )
    print(f"{'way':18s}{'time / plain':>14s}{'peak MB':>10s}{'over plain':>12s}  differs by")
    for way, run in runs.items():
        differs = ""
        if way not in ("plain", "attnlens"):
            worst = disagreement(ours, run())
            differs = ", ".join(f"{name} {value:.1g}" for name, value in worst.items())
        extra = peaks[way] - peaks["plain"]
        line = f"{way:18s}{ratio(seconds, way, 'plain'):14.3f}{peaks[way]:10.0f}{extra:12.0f}"
        print(f"{line}  {differs}")
    own = f"attnlens / plain time, {length}"
    claims = [Claim(own, round(ratio(seconds, "attnlens", "plain"), 3), TARGETS[length])]
    extra = {way: peaks[way] - peaks["plain"] for way in runs}
    if length == "T8192":
        claims.append(Claim("extra peak MB, T8192", round(extra["attnlens"], 1), 150.0))
    if length == "T2048":
        against = round(ratio(seconds, "attnlens", "eager"), 3)
        claims.append(Claim("attnlens / eager with maps, time, T2048", against, 0.6))
        share = round(max(extra["attnlens"], 0) / extra["eager"], 4)
        claims.append(Claim("attnlens / eager with maps, extra memory, T2048", share, 0.05))
    return claims


def peak(way: str, length: str, layers: int) -> float:
    """Peak memory in MB of one way, its libraries loaded and warmed before."""
    import torch

    torch.set_num_threads(THREADS)
    make = {name: way for name, (_, way) in PEERS.items()} | {"attnlens": attnlens_way}
    make["plain"] = lambda model, ids: lambda: plain(model, ids)  # type: ignore[dict-item]
    make[way](gpt2_small(1), random_ids((1, 8)))()
    return peak_of_run(make[way](gpt2_small(layers, 8192), random_ids(SHAPES[length])))


def print_floor(length: str) -> None:
    """One layer: products, with softmax (the floor), and with the statistics, in ms."""
    import torch

    from attnlens.anatomy import Site
    from attnlens.hooks.measure import Measure
    from attnlens.hooks.rows import Rows
    from attnlens.hooks.seam import Call
    from attnlens.hooks.tokens import Sides

    torch.set_num_threads(THREADS)
    batch, tokens = SHAPES[length]
    q, k, v = (torch.randn(batch, 12, tokens, 64) for _ in range(3))
    call = Call(
        torch.nn.Module(), "sdpa", q, k, v, None, {"is_causal": True}, v.transpose(1, 2), None
    )
    site = Site(
        "", 0, "", 0, "self", 12, 12, 64, 64,
        causal=True, window=None, sinks=False, upcast=False, block=None, output=None,
    )  # fmt: skip
    rows = Rows.of(call, sinks=False)
    sides = Sides.of({"input_ids": random_ids((batch, tokens))})

    def products() -> None:
        for part, heads in rows.tiles():
            for own in heads:
                rows.part(own).scores(part, rows.keys_seen(part))

    def floor() -> None:
        for part, heads in rows.tiles():
            for own in heads:
                rows.block(own, part)

    def whole() -> None:
        Measure([site], eight_statistics(), sides).see(site, call)

    took: dict[str, float] = {}
    for name, run in {"products": products, "floor": floor, "statistics": whole}.items():
        run()
        times: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        took[name] = statistics.median(times) * 1e3
    print(
        f"{length}, one layer: q k^T {took['products']:.0f} ms; with softmax (the floor) "
        f"{took['floor']:.0f} ms; with eight statistics {took['statistics']:.0f} ms, "
        f"{took['statistics'] / took['floor']:.2f} x the floor"
    )


def measure_llama(layers: int, rounds: int, tokens: int = 32768) -> list[Claim]:
    """Llama-8B's shape in bf16 on a GPU, random weights: the plain forward against statistics."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = random_ids((1, tokens), 128000).cuda()
    measure = attnlens_way(model, ids)
    peaks: dict[str, float] = {}

    def timed(way: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def whole() -> None:
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peaks[way] = torch.cuda.max_memory_allocated() / 1e6

        return whole

    runs = {
        "plain": timed("plain", lambda: plain(model, ids)),
        "attnlens": timed("attnlens", measure),
    }
    alternate(runs, 1)  # warm up, compile
    seconds = alternate(runs, rounds)
    name = f"Llama-8B shape, {layers} layers, T {tokens}, {torch.cuda.get_device_name()}"
    print(f"\n{name}: plain {statistics.median(seconds['plain']):.2f} s")
    extra = peaks["attnlens"] - peaks["plain"]
    return [
        Claim(f"attnlens / plain time, {name}", round(ratio(seconds, "attnlens", "plain"), 3), 1.3),
        Claim(f"extra peak MB, {name}", round(extra, 1), 1000.0),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="last line is JSON with the claims")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="two layers, to try the script")
    parser.add_argument("--lengths", default=",".join(SHAPES), help="of T512,T2048,T8192")
    parser.add_argument("--floor", action="store_true", help="one layer beside its floor, no peers")
    parser.add_argument("--llama-layers", type=int, default=32)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        way, length, layers = arguments.peak
        print(peak(way, length, int(layers)))
        return
    lengths = arguments.lengths.split(",")
    if arguments.floor:
        for length in lengths:
            print_floor(length)
        return
    import torch

    claims: list[Claim] = []
    for length in lengths:
        rounds = min(arguments.rounds, 3) if length == "T8192" else arguments.rounds
        claims += measure_length(length, 2 if arguments.small else 12, rounds)
    if torch.cuda.is_available():
        claims += measure_llama(arguments.llama_layers, arguments.rounds)
    else:
        print("\nNo CUDA device: the Llama-8B shape at 32,768 tokens is left out.")
    print_claims(claims, arguments.json)


if __name__ == "__main__":
    main()
