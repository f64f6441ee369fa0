"""What circuits cost: scores of all edges, runs with edges cut, paths from heads to the logits.

GPT-2 small's shape, random weights, 16 prompts of 16 tokens and their corrupt twins: 32,491 edges.
The ways alternate in one process (AutoCircuit's in turn, in its own), ratios are of the same round,
and the numbers of all ways are compared.

- EAP of all edges beside AutoCircuit's mask gradients, which are the same scores. It needs older
  packages than the project: `--peer PYTHON` names an interpreter that has auto-circuit. Its model
  makes the logits of all positions, attnlens' those that are read.
- EAP-IG with five steps beside plain forwards and backwards. AutoCircuit averages over masks of all
  edges from 0 to 1, not over a line of inputs: another method, timed and not compared in numbers.
- The naive form at two layers: [batch, position, edge, d_model] written out and summed.
- Peak memory of EAP beside a tenth of that form, which is computed; in a process of its own.
- A forward with a random half of the edges cut, of one circuit and of eight in one call, beside a
  plain one, and beside AutoCircuit's. How many of the eight share a forward is printed.
- Paths from every head to the logits with all other heads frozen: stacked on the sweep engine,
  beside a full forward a head with plain hooks. The loop runs 12 heads, scaled to all, and its two
  recordings are left out. Direct paths, which hold the MLPs too, are timed alone.

Floors are counted in `_circuit_floor.py`. Bootstraps are timed apart: all ways take one resample.

    python -m benchmarks.circuits [--peer PYTHON] [--json] [--rounds 5] [--small]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._circuit_floor import needs, print_floors
from benchmarks._circuit_peer import LENGTH, PROMPTS, Peer, half, prompts
from benchmarks._shared import (
    THREADS,
    Claim,
    alternate,
    gpt2_small,
    in_own_process,
    peak_of,
    print_claims,
    ratio,
)

MODULE = "benchmarks.circuits"
STEPS = 5
SOME_HEADS = 12
PATH_TARGET = 5.0
RESAMPLES = 1000
SLOW = ("path", "path loop", "peer ig")
Ways = dict[str, Callable[[], Any]]


def opened(layers: int) -> tuple[Any, Any]:
    """A lens on the model, wired, and the task."""
    import attnlens as al
    from attnlens.tasks import Task

    given = {name: tensor.tolist() for name, tensor in prompts().items()}
    task = Task.from_prompts(
        "random", given["clean"], given["corrupt"], [[LENGTH - 1]] * PROMPTS,
        given["answers"], given["wrong"],
    )  # fmt: skip
    lens = al.load(gpt2_small(layers, 64), check=False)
    _ = lens.wiring  # once a model, whoever asks first
    return lens, task


def plain_ways(lens: Any, task: Any) -> Ways:
    """A forward, and the cheapest forward and backward there is, by the inputs alone."""
    import torch

    model, ids = lens.model, task.clean
    rows = torch.arange(PROMPTS)

    def forward() -> Any:
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False).logits

    def both() -> Any:
        model.requires_grad_(False)
        try:
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits
            metric = logits[rows, -1, task.answers[:, 0]] - logits[rows, -1, task.wrong[:, 0]]
            return torch.autograd.grad(metric.sum(), embeddings)
        finally:
            model.requires_grad_(True)

    return {"forward": forward, "both": both}


def ways(lens: Any, task: Any) -> Ways:
    """The ways of attnlens, and plain passes."""
    import torch

    import attnlens as al
    from attnlens.analyses.edge_runs import EdgeRuns
    from attnlens.analyses.uncertainty import bootstrap_mean

    def scored(method: str) -> Any:
        return al.edges(lens, task, method, steps=STEPS, batch_size=PROMPTS, resamples=1)

    runs = EdgeRuns(lens, task)
    kept = torch.stack([half(lens, seed) for seed in range(8)])
    by_prompt = torch.randn(PROMPTS, len(lens.wiring.network), dtype=torch.float64)
    return plain_ways(lens, task) | {
        "eap": partial(scored, "eap"),
        "ig": partial(scored, "eap-ig"),
        "bootstrap": lambda: bootstrap_mean(by_prompt, RESAMPLES),
        "cut": lambda: runs.run(kept[:1]),
        "cut 8": lambda: runs.run(kept),
        "path": lambda: al.path_patch(lens, task, resamples=1),
        "path direct": lambda: al.path_patch(lens, task, form="direct", resamples=1),
        "path loop": one_by_one(lens, task),
    }


def one_by_one(lens: Any, task: Any) -> Callable[[], Any]:
    """Paths from some heads to the logits, a full forward each: the head as in the corrupt run,
    all others as in the clean one. The two runs are recorded before."""
    import torch

    clean = lens.run(task.clean_inputs(), keep="z").z
    corrupt = lens.run(task.corrupt_inputs(), keep="z").z
    model, heads = lens.model, lens.anatomy.heads

    def given(z: Any) -> Any:
        return z.transpose(1, 2).flatten(2)  # as the projection is given it

    inputs = {site.name: given(clean[site.name]) for site in lens.anatomy.sites}

    def patched(head: Any) -> Any:
        z = clean[head.site].clone()
        z[:, head.head] = corrupt[head.site][:, head.head]
        held = inputs | {head.site: given(z)}
        handles = [
            model.get_submodule(site.output).register_forward_pre_hook(
                lambda _, __, own=held[site.name]: (own,)
            )
            for site in lens.anatomy.sites
        ]
        try:
            with torch.no_grad():
                logits = model(task.clean, logits_to_keep=1, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return task.score(logits)

    return lambda: torch.stack([patched(head) for head in heads[:: len(heads) // SOME_HEADS]])


def by_hand(lens: Any, task: Any) -> Any:
    """EAP the naive way: [batch, position, edge, d_model] of products, then its sum."""
    import torch

    from tests.oracles import paths

    network = lens.wiring.network

    def own(name: str) -> str:
        return f"M{name[1:].removesuffix('.mlp')}" if name.endswith(".mlp") else name

    def end(receiver: Any) -> tuple[str, str]:
        kind = receiver.kind if receiver.kind in "qkv" else ""
        return own(receiver.nodes[0]), kind

    with torch.no_grad():
        _, other = paths.run(lens.model, task.corrupt)
    offsets = {
        end(r): torch.zeros_like(other["embed"], requires_grad=True) for r in network.receivers
    }
    logits, written = paths.run(lens.model, task.clean, offsets=offsets)
    value = task.score(task.at_reads(logits)).sum()
    asked = torch.stack(torch.autograd.grad(value, list(offsets.values())), dim=2)
    names = [own(sender.name) for sender in network.senders]
    sent = torch.stack([other[name] - written[name].detach() for name in names], dim=2)
    senders, receivers = network.edges.T
    return (sent[:, :, senders] * asked[:, :, receivers]).sum((1, 3)).double().mean(0)


def peak(way: str, layers: int) -> float:
    """Peak memory in MB of one way, its libraries loaded and warmed before."""
    import torch

    torch.set_num_threads(THREADS)

    def made(depth: int) -> Callable[[], Any]:
        lens, task = opened(depth)
        return partial(by_hand, lens, task) if way == "naive" else ways(lens, task)[way]

    run = made(layers)
    made(1)()
    return peak_of(run)


def naive() -> None:
    """The naive form at two layers: agreement, time and memory."""
    import torch

    lens, task = opened(2)
    runs = {"naive": partial(by_hand, lens, task), "eap": ways(lens, task)["eap"]}
    oracle, own = runs["naive"](), runs["eap"]().score
    apart, size = float((oracle - own).abs().max()), float(oracle.abs().max())
    assert torch.allclose(oracle, own, atol=1e-5), f"the naive form differs by {apart}"
    seconds = alternate(runs, 3)
    peaks = {way: in_own_process(MODULE, way, 2) for way in runs}
    print(f"two layers, {len(lens.wiring.network)} edges, naive / attnlens: time "
          f"{ratio(seconds, 'naive', 'eap'):.1f}, peak {peaks['naive']:.0f} / {peaks['eap']:.0f} "
          f"MB; they differ by {apart:.1e} where the largest is {size:.2g}")  # fmt: skip


def with_peer(runs: Ways, peer: Peer | None) -> tuple[Ways, dict[str, list[float]]]:
    """The ways with those of the peer, and the list that its own seconds go to."""
    timed: dict[str, list[float]] = {}
    if peer is None:
        return runs, timed
    peer.ask("prepare")

    def asked(command: str) -> None:
        timed.setdefault(f"peer {command}", []).append(peer.ask(command))

    return runs | {f"peer {own}": partial(asked, own) for own in ("eap", "ig", "run")}, timed


def agree(found: dict[str, Any], peer: Peer | None) -> None:
    """All ways gave the same numbers."""
    paths, some = found["path"].patched, found["path loop"]
    apart = float((paths[:: len(paths) // SOME_HEADS] - some).abs().max())
    print(f"paths, stacked and one at a time, differ by {apart:.1e}")
    assert apart < 1e-3, "paths disagree"
    apart = float((found["cut"][0] - found["cut 8"][0]).abs().max())
    print(f"a circuit alone and among eight differs by {apart:.1e}")
    assert apart < 1e-3, "runs side by side disagree"
    if peer is None:
        return
    scores, metric = peer.found()
    own = found["eap"].matrix
    apart, size = float((own - scores).abs().max()), float(own.abs().max())
    print(f"AutoCircuit's {len(found['eap'].score):,} scores differ by {apart:.1e} at most, where "
          f"the largest is {size:.2g}")  # fmt: skip
    assert apart < 1e-3 * size, "scores disagree with AutoCircuit"
    gap = float((found["cut"][0] - metric).abs().max())
    print(f"the metric with half of the edges cut differs from its by {gap:.1e}")
    assert gap < 1e-2, "runs disagree with AutoCircuit"


def measure(lens: Any, task: Any, peer: Peer | None, rounds: int) -> list[Claim]:
    """Times of all ways, their agreement, and the claims."""
    own = ways(lens, task)
    runs, timed = with_peer(own, peer)
    found: dict[str, Any] = {}

    def keeping(name: str) -> None:
        found[name] = runs[name]()

    for name in ("forward", "both", "eap", *(("peer eap",) if peer else ())):
        runs[name]()  # the first runs are slow
    timed.clear()
    quick = {name: partial(keeping, name) for name in runs if name not in SLOW}
    slow = {name: partial(keeping, name) for name in SLOW if name in runs}
    seconds = alternate(quick, rounds) | alternate(slow, max(1, rounds // 3)) | timed
    agree(found, peer)
    kept = int(half(lens).sum())
    print_floors(seconds, needs(lens, STEPS, kept, SOME_HEADS))
    print(f"EAP-IG / {STEPS} plain forwards and backwards: "
          f"{ratio(seconds, 'ig', 'both') / STEPS:.2f}")  # fmt: skip
    print(f"edges cut / plain forward: {ratio(seconds, 'cut', 'forward'):.2f}, "
          f"of eight in one call, {together(lens, task)} a forward: "
          f"{ratio(seconds, 'cut 8', 'forward') / 8:.2f} each")  # fmt: skip
    times = len(lens.anatomy.heads) / SOME_HEADS
    gain = times * ratio(seconds, "path loop", "path")
    claims = [Claim("paths to logits: one at a time / stacked", round(gain, 2), PATH_TARGET, True)]
    for name, other, base in (
        ("EAP: AutoCircuit / attnlens, time", "peer eap", "eap"),
        ("a circuit's run: AutoCircuit / attnlens", "peer run", "cut"),
    ):
        if peer is not None:
            claims.append(Claim(name, round(ratio(seconds, other, base), 2), 1.0, True))
    if peer is not None:
        masks = statistics.median(seconds["peer ig"]) / statistics.median(seconds["ig"])
        print(f"AutoCircuit over {STEPS} masks / EAP-IG of {STEPS} inputs, time, not in one round: "
              f"{masks:.2f}")  # fmt: skip
        print(f"AutoCircuit's EAP: {peer.ask('over') / 1e6:.0f} MB above what was there before, "
              f"{peer.ask('peak') / 1e6:.0f} MB the most its process held")  # fmt: skip
    return claims


def together(lens: Any, task: Any) -> int:
    """How many choices of edges attnlens runs in one forward here."""
    from attnlens.analyses.edge_runs import EdgeRuns

    return EdgeRuns(lens, task).side_by_side()


def memory(lens: Any, layers: int) -> Claim:
    """Peak memory of EAP beside the naive form's bytes."""
    edges, width = len(lens.wiring.network), lens.anatomy.d_model
    whole = PROMPTS * LENGTH * edges * width * 4 / 1e6
    held = in_own_process(MODULE, "eap", layers)
    print(f"EAP of {edges:,} edges: {held:.0f} MB at most; [batch, position, edge, d_model] would "
          f"be {whole:,.0f} MB")  # fmt: skip
    name = "EAP: peak memory / a tenth of [batch, position, edge, d_model]"
    return Claim(name, round(held / (whole / 10), 4), 1.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="last line is JSON with the claims")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="two layers, to try the script")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has auto-circuit")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak[0], int(arguments.peak[1])))
        return
    import torch

    torch.set_num_threads(THREADS)
    layers = 2 if arguments.small else 12
    naive()
    lens, task = opened(layers)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(arguments.peer, lens, Path(folder)) if arguments.peer else None
        if peer is None:
            print("AutoCircuit is left out: name an interpreter that has it, --peer PYTHON")
        claims = measure(lens, task, peer, arguments.rounds)
        if peer is not None:
            peer.close()
    claims.append(memory(lens, layers))
    print_claims(claims, arguments.json)


if __name__ == "__main__":
    main()
