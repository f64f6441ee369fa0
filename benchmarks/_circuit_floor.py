"""What circuits cannot cost less than: products and bytes, at this machine's measured speeds.

Of each way the products that its numbers need, and the least that is read and written: the weights
once a pass; what senders wrote, once where written and once at each place that reads it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks._circuit_peer import LENGTH, PROMPTS

Need = tuple[float, float]
"""Operations (two a multiply-add) and bytes."""


def needs(lens: Any, steps: int, kept: int, loop: int) -> dict[str, Need]:
    """By way; `kept` edges are in the circuit that runs, `loop` heads in the loop of paths.

    A backward by activations alone has as many products as the forward. The gradients of the
    inputs of a layer's heads cost nothing: their sum is what the backward is made of.
    """
    network, config = lens.wiring.network, lens.model.config
    width, layers = config.n_embd, config.n_layer
    rows = PROMPTS * LENGTH
    logits = 2.0 * PROMPTS * config.vocab_size * width
    body = 2.0 * rows * layers * 12 * width**2 + 2.0 * PROMPTS * LENGTH**2 * width * layers
    forward, weights = body + logits, 4.0 * (12 * layers * width**2 + config.vocab_size * width)
    written, pair = 2.0 * rows * layers * width**2, 2.0 * rows * width
    held = 4.0 * rows * width
    seen: dict[str, int] = {}
    for reader, columns in lens.wiring.columns():
        seen[reader.place] = int(network.exists[:, columns.start].sum())
    moved = held * (len(network.senders) + sum(seen.values()) + 2 * len(network.receivers))
    # With all heads held no position depends on another: the position that is read is enough.
    each = [config.n_embd // config.n_head * width + 8 * width**2 * (layers - n) for n in
            range(layers)]  # fmt: skip
    heads = config.n_head * layers
    paths = 2.0 * PROMPTS * config.n_head * sum(each) + heads * logits
    cut = forward + written + pair * kept, weights + moved
    score = written + pair * len(network)
    return {
        "forward": (forward, weights),
        "both": (2 * forward, 2 * weights),
        "eap": (2 * forward + body + score, 3 * weights + moved),
        "ig": (2 * body + 2 * steps * forward + score, (2 + 2 * steps) * weights + moved),
        "cut": cut,
        "cut 8": (8 * cut[0], weights + 8 * moved),
        "path": (2 * body + paths, 2 * weights),
        "path loop": (loop * forward, loop * weights),
    }


def speeds() -> tuple[float, float]:
    """Operations a second of one large product, bytes a second of one large copy."""
    import torch

    a, b = torch.randn(1024, 768), torch.randn(768, 3072)
    source = torch.randn(2**25)
    target = torch.empty_like(source)
    product = _median(lambda: a @ b)
    copied = _median(lambda: target.copy_(source))
    return 2 * 1024 * 768 * 3072 / product, 2 * source.nbytes / copied


def _median(run: Callable[[], Any]) -> float:
    run()
    times: list[float] = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def print_floors(seconds: Mapping[str, list[float]], needed: Mapping[str, Need]) -> None:
    """Each way's time beside a plain forward's and its floor, the longer of products and bytes."""
    operations, bandwidth = speeds()
    print(f"one large product {operations / 1e9:.0f} GFLOP/s, one large copy "
          f"{bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    heads = ("seconds", "/ forward", "GFLOP", "GB", "floor s", "/ floor")
    print(f"{'way':16s}" + "".join(f"{head:>11s}" for head in heads))
    plain = statistics.median(seconds["forward"])
    for way, own in seconds.items():
        median = statistics.median(own)
        line = f"{way:16s}{median:11.3f}{median / plain:11.2f}"
        if way in needed:
            flops, moved = needed[way]
            floor = max(flops / operations, moved / bandwidth)
            line += f"{flops / 1e9:11.0f}{moved / 1e9:11.2f}{floor:11.3f}{median / floor:11.2f}"
        print(line)
