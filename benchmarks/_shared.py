"""What the benchmarks share: models, the eight statistics, claims, fair timing, peak memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

THREADS = 2
Runs = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Claim:
    """One measured figure beside its target: at most that, or `at_least`."""

    name: str
    value: float
    target: float
    at_least: bool = False

    @property
    def ok(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


def print_claims(claims: Sequence[Claim], as_json: bool) -> None:
    """The claims as a table, and as the last line in JSON where asked."""
    for claim in claims:
        verdict = "ok" if claim.ok else "under" if claim.at_least else "over"
        print(f"{claim.name:62s}{claim.value:10.3f}  target {claim.target:<8g}{verdict}")
    if as_json:
        print(json.dumps({"claims": [asdict(claim) | {"ok": claim.ok} for claim in claims]}))


def gpt2_small(layers: int, positions: int = 2048) -> Any:
    """GPT-2 small's shape, with weights large enough that attention is not uniform."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_positions=positions, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name:
                parameter.mul_(3)
    return model


def random_ids(shape: tuple[int, int], vocab: int = 50000) -> Any:
    """The same random tokens each time."""
    import torch

    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))


def eight_statistics() -> list[Any]:
    """The statistics that are measured together."""
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


def plain(model: Any, ids: Any) -> Any:
    """The forward as the model is, logits of the last position."""
    import torch

    with torch.no_grad():
        return model(ids, logits_to_keep=1, use_cache=False).logits


def alternate(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the ways alternate, so a slow spell hits all of them."""
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            start = time.perf_counter()
            kept = run()
            seconds[way].append(time.perf_counter() - start)
            del kept
    return seconds


def ratio(seconds: Mapping[str, list[float]], way: str, base: str) -> float:
    """Median over rounds of the time of one way over another's in the same round."""
    pairs = zip(seconds[way], seconds[base], strict=True)
    return statistics.median(own / other for own, other in pairs)


def peak_of(run: Callable[[], Any]) -> float:
    """Peak resident memory in MB of one run above what is there before, watched from a thread."""
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


def in_own_process(module: str, *arguments: object) -> float:
    """The number that `python -m module --peak ...` prints last: no way profits from another's
    memory."""
    command = [sys.executable, "-m", module, "--peak", *map(str, arguments)]
    # A fixed threshold makes the allocator give blocks back, so that the peak is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    output = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if output.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output.stderr}")
    return float(output.stdout.strip().splitlines()[-1])


def statistics_of_map(maps: Any, ids: Any) -> dict[str, Any]:
    """The eight statistics of one layer's dense causal maps [batch, head, query, key], as a user
    of maps writes them."""
    import torch

    length = maps.shape[-1]
    back = torch.arange(length)[:, None] - torch.arange(length)
    same = ids[:, :, None] == ids[:, None, :]
    copies = {"duplicate": same & (back > 0)}
    copies["induction"] = torch.nn.functional.pad(same, (1, 0))[..., :-1] & (back > 0)
    seen = torch.arange(length, 0, -1)
    found = {
        "first_token": maps[..., 0].mean(-1),
        "columns": maps.sum(-2) / seen,
        "entropy": torch.special.entr(maps).sum(-1).mean(-1),
        "distance": (maps * back.clamp_min(0)).sum(-1).mean(-1),
        "offset": torch.stack(
            [maps.diagonal(-offset, -2, -1).mean(-1) for offset in (0, 1)], dim=-1
        ),
        "argmax": maps.argmax(-1),
    }
    for name, pairs in copies.items():
        mass = (maps * pairs[:, None]).sum(-1)
        rows = pairs.any(-1)[:, None]
        found[name] = (mass * rows).sum(-1) / rows.sum(-1)
    return found
