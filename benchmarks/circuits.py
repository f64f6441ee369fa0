"""What circuits cost: scores of all edges, runs with edges cut, paths from heads to the logits.

GPT-2 small's shape, random weights, 16 prompts of 16 tokens and their corrupt twins: 32,491 edges.

- EAP of all edges, in one process with AutoCircuit's mask gradients, which are the same scores. It
  needs older packages than the project: `--peer PYTHON` names an interpreter that has auto-circuit,
  a process of which answers in turn. Without one, the naive form at two layers stands for it: a
  gradient for every input of every head, and a product an edge.
- EAP-IG with five steps beside five plain forwards and backwards. AutoCircuit averages over masks,
  not over inputs, which is another method: it is not compared.
- Peak memory of EAP beside a tenth of [batch, position, edge, d_model], in a process of its own.
- A forward with a random half of the edges cut, beside a plain one, and beside AutoCircuit's.
- Path patching from every head to the logits: all heads on the sweep engine, beside one full
  forward a head in `lens.edit` (12 heads run, scaled to all 144).

The floor of EAP is two plain forwards and a backward, and the product of all senders with all
receivers, 2 x U x V x B x T x d, at the speed of one large product here.

    python -m benchmarks.circuits [--peer PYTHON] [--json] [--rounds 5] [--small]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._shared import (
    THREADS,
    Claim,
    alternate,
    gpt2_small,
    in_own_process,
    peak_of,
    print_claims,
    random_ids,
    ratio,
)

MODULE = "benchmarks.circuits"
PROMPTS, LENGTH, STEPS = 16, 16, 5
SOME_HEADS = 12
PATH_TARGET = 5.0


def prompts() -> dict[str, Any]:
    """Clean and corrupt ids, and an answer and a wrong one of each."""
    import torch

    ids = random_ids((2 * PROMPTS, LENGTH))
    graded = torch.randint(0, 50000, (PROMPTS, 2), generator=torch.Generator().manual_seed(2))
    parts = {"clean": ids[:PROMPTS], "corrupt": ids[PROMPTS:]}
    parts |= {"answers": graded[:, :1], "wrong": graded[:, 1:]}
    return {name: part.contiguous() for name, part in parts.items()}


def opened(layers: int) -> tuple[Any, Any]:
    """A lens on the model, wired, and the task."""
    import torch

    import attnlens as al
    from attnlens.tasks import Task

    given = prompts()
    reads = torch.full((PROMPTS, 1), LENGTH - 1)
    task = Task(
        "random", given["clean"], given["corrupt"], torch.ones(PROMPTS, LENGTH, dtype=torch.bool),
        reads, given["answers"], given["wrong"], "logit_difference", ("",) * PROMPTS,
    )  # fmt: skip
    lens = al.load(gpt2_small(layers, 64), check=False)
    _ = lens.wiring  # once a model, whoever asks first
    return lens, task


def ways(lens: Any, task: Any) -> dict[str, Callable[[], Any]]:
    """The ways of attnlens, and plain passes."""
    import torch

    import attnlens as al
    from attnlens.analyses.edge_runs import EdgeRuns

    model, ids = lens.model, task.clean
    answers, wrong = task.answers[:, 0], task.wrong[:, 0]
    rows = torch.arange(PROMPTS)

    def forward() -> Any:
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False).logits

    def both() -> Any:
        model.requires_grad_(False)
        try:
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits
            metric = logits[rows, -1, answers] - logits[rows, -1, wrong]
            return torch.autograd.grad(metric.sum(), embeddings)
        finally:
            model.requires_grad_(True)

    def scored(method: str) -> Any:
        return al.edges(lens, task, method, steps=STEPS, batch_size=PROMPTS, resamples=1)

    runs = EdgeRuns(lens, task)
    kept = [half(lens, seed) for seed in range(8)]
    return {
        "forward": forward,
        "both": both,
        "eap": lambda: scored("eap"),
        "ig": lambda: scored("eap-ig"),
        "cut": lambda: runs.run(kept[:1]),
        "cut 8": lambda: runs.run(kept),
        "path": lambda: al.path_patch(lens, task, resamples=1),
        "path loop": lambda: one_by_one(lens, task),
    }


def half(lens: Any, seed: int = 0) -> Any:
    """A random half of the edges."""
    import torch

    exists = lens.wiring.network.exists
    draw = torch.Generator().manual_seed(seed)
    return exists & (torch.rand(exists.shape, generator=draw) < 0.5)


def one_by_one(lens: Any, task: Any) -> Any:
    """Paths from some heads to the logits, a full forward each: the head as in the corrupt run,
    all others as in the clean one."""
    import torch

    import attnlens as al

    clean = lens.run(task.clean_inputs(), keep="z").z
    corrupt = lens.run(task.corrupt_inputs(), keep="z").z
    heads = lens.anatomy.heads
    found: list[Any] = []
    for head in heads[:: len(heads) // SOME_HEADS][:SOME_HEADS]:
        held = al.Patch([other for other in heads if other != head], "z", clean)
        with lens.edit(held, al.Patch([head], "z", corrupt)):
            found.append(task.score(lens.logits(task.clean_inputs(), task.reads)))
    return torch.stack(found)


class Peer:
    """AutoCircuit in its own process, with the same weights and prompts."""

    def __init__(self, python: str, lens: Any, folder: Path) -> None:
        from safetensors.torch import save_file

        self.folder = folder
        self._network = lens.wiring.network
        weights = {name: t.clone().contiguous() for name, t in lens.model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        save_file(prompts(), folder / "prompts.safetensors")
        config = lens.model.config
        sizes = {"n_layer": config.n_layer, "n_positions": config.n_positions}
        (folder / "config.json").write_text(json.dumps(sizes | {"bos_token_id": 0}))
        ablated = (~half(lens)).float()
        masks = {name: ablated[:rows, columns].T for name, rows, columns in self._modules()}
        masks = {n: (m if m.shape[0] > 1 else m[0]).contiguous() for n, m in masks.items()}
        save_file(masks, folder / "mask.safetensors")
        script = Path(__file__).with_name("_autocircuit.py")
        self._process = subprocess.Popen(
            [python, str(script), str(folder), str(THREADS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._answer()

    def ask(self, command: str) -> float:
        """Give a command; what is measured of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Its progress bars go to standard output.
            if line.strip() == "ready" or line.strip().replace(".", "").replace("e-", "").isdigit():
                return line.strip()
        raise SystemExit("the peer's process ended: run benchmarks/_autocircuit.py by hand")

    def found(self) -> tuple[Any, Any]:
        """Scores `sender receiver` of the latest `eap`, and the metric of the latest `run`."""
        import torch
        from safetensors.torch import load_file

        self.ask("save")
        tensors = load_file(self.folder / "found.safetensors")
        scores = torch.zeros(self._network.exists.shape, dtype=torch.float64)
        for name, rows, columns in self._modules():
            own = tensors[name].reshape(len(columns), rows)
            # Its loss is the metric's negative, a mean over prompts.
            scores[:rows, columns] = -own.T.double()
        return scores, tensors["metric"]

    def _modules(self) -> list[tuple[str, int, list[int]]]:
        """Its modules that read, how many senders each sees, and the receivers that it is."""
        inputs = {"q": "q_input", "k": "k_input", "v": "v_input", "mlp": "mlp_in"}
        found: dict[str, list[int]] = {}
        for number, receiver in enumerate(self._network.receivers):
            name = f"blocks.{receiver.layer}.hook_{inputs.get(receiver.kind)}"
            if receiver.kind == "logits":
                name = f"blocks.{receiver.layer - 1}.hook_resid_post"
            found.setdefault(name, []).append(number)
        exists = self._network.exists
        return [(name, int(exists[:, own[0]].sum()), own) for name, own in found.items()]


def by_hand(lens: Any, task: Any) -> Any:
    """EAP the naive way, MLPs held as senders and receivers too: a product an edge."""
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
    gradients = torch.autograd.grad(value, list(offsets.values()))
    asked = dict(zip(offsets, gradients, strict=True))
    found = torch.zeros(len(network), PROMPTS, dtype=torch.float64)
    for number, (a, b) in enumerate(network.edges.tolist()):
        name = own(network.senders[a].name)
        change = other[name] - written[name].detach()
        found[number] = (change * asked[end(network.receivers[b])]).sum((1, 2))
    return found.mean(1)


def peak(way: str, layers: int) -> float:
    """Peak memory in MB of one way, its libraries loaded and warmed before."""
    import torch

    torch.set_num_threads(THREADS)
    run = ways(*opened(layers))[way]
    ways(*opened(1))[way]()
    return peak_of(run)


def floor(lens: Any, both: float, forward: float) -> float:
    """Seconds that EAP cannot be done in: its passes, and the product of all pairs."""
    import torch

    network, width = lens.wiring.network, lens.anatomy.d_model
    senders, receivers = network.exists.shape
    flops = 2 * senders * receivers * PROMPTS * LENGTH * width
    a = torch.randn(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    speed = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    print(f"products of all pairs: {flops / 1e9:.0f} GFLOP at {speed / 1e9:.0f} GFLOP/s")
    return forward + both + flops / speed


def measure(lens: Any, task: Any, peer: Peer | None, rounds: int) -> list[Claim]:
    """Times of all ways, and the claims."""
    runs = ways(lens, task)
    shown = dict(runs)
    if peer is not None:
        timed: dict[str, list[float]] = {"peer eap": [], "peer run": []}
        peer.ask("prepare")
        for name, command in (("peer eap", "eap"), ("peer run", "run")):
            shown[name] = lambda name=name, command=command: timed[name].append(peer.ask(command))
    quick = {name: run for name, run in shown.items() if not name.startswith("path")}
    for name in ("eap", "both"):
        quick[name]()
    seconds = alternate(quick, rounds)
    loops = alternate({name: shown[name] for name in ("path", "path loop")}, max(1, rounds // 3))
    for name, own in (seconds | loops).items():
        print(f"{name:12s}{statistics.median(own):10.3f} s")
    least = floor(lens, statistics.median(seconds["both"]), statistics.median(seconds["forward"]))
    print(f"EAP / its floor: {statistics.median(seconds['eap']) / least:.2f}")
    print(
        f"EAP-IG / {STEPS} plain forwards and backwards: {ratio(seconds, 'ig', 'both') / STEPS:.2f}"
    )
    print(f"edges cut / plain forward: {ratio(seconds, 'cut', 'forward'):.2f}, "
          f"of 8 side by side {ratio(seconds, 'cut 8', 'forward') / 8:.2f} each")  # fmt: skip
    times = len(lens.anatomy.heads) / SOME_HEADS
    gain = times * ratio(loops, "path loop", "path")
    claims = [Claim("paths to logits: one at a time / stacked", round(gain, 2), PATH_TARGET, True)]
    if peer is not None:
        eap, run = ratio(seconds, "peer eap", "eap"), ratio(seconds, "peer run", "cut")
        claims.append(Claim("EAP: AutoCircuit / attnlens, time", round(eap, 2), 1.0, True))
        claims.append(Claim("a circuit's run: AutoCircuit / attnlens", round(run, 2), 1.0, True))
        print(f"AutoCircuit's process held up to {peer.ask('peak') / 1e6:.0f} MB in all")
    return claims


def agree(lens: Any, task: Any, peer: Peer | None) -> None:
    """All ways give the same numbers."""
    runs = ways(lens, task)
    paths = runs["path"]().patched
    some = runs["path loop"]()
    step = len(paths) // SOME_HEADS
    apart = float((paths[::step][:SOME_HEADS] - some).abs().max())
    assert apart < 1e-3, f"paths differ by {apart}"
    if peer is None:
        return
    peer.ask("eap")
    peer.ask("prepare")
    peer.ask("run")
    scores, metric = peer.found()
    own = runs["eap"]().matrix
    apart, size = float((own - scores).abs().max()), float(own.abs().max())
    print(f"AutoCircuit's scores differ by {apart:.1e} where the largest is {size:.2g}")
    assert apart < 1e-3 * size, "scores disagree with AutoCircuit"
    gap = float((runs["cut"]()[0] - metric).abs().max())
    print(f"the metric of a run with half of the edges cut differs by {gap:.1e}")
    assert gap < 1e-2, "runs disagree with AutoCircuit"


def naive() -> None:
    """The naive form at two layers: agreement and time."""
    import torch

    lens, task = opened(2)
    runs = {"naive": lambda: by_hand(lens, task), "eap": ways(lens, task)["eap"]}
    apart = (runs["naive"]() - runs["eap"]().score).abs().max()
    assert torch.allclose(runs["naive"](), runs["eap"]().score, atol=1e-5), f"differs by {apart}"
    seconds = alternate(runs, 3)
    print(f"two layers, {len(lens.wiring.network)} edges: naive / attnlens "
          f"{ratio(seconds, 'naive', 'eap'):.1f}, differ by {float(apart):.1e}")  # fmt: skip


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
        agree(lens, task, peer)
        claims = measure(lens, task, peer, arguments.rounds)
    edges, width = len(lens.wiring.network), lens.anatomy.d_model
    whole = PROMPTS * LENGTH * edges * width * 4 / 1e6
    held = in_own_process(MODULE, "eap", layers)
    print(
        f"EAP of {edges:,} edges: {held:.0f} MB; [batch, position, edge, d_model] {whole:,.0f} MB"
    )
    name = "EAP: peak memory / a tenth of [batch, position, edge, d_model]"
    claims.append(Claim(name, round(held / (whole / 10), 4), 1.0))
    print_claims(claims, arguments.json)


if __name__ == "__main__":
    main()
