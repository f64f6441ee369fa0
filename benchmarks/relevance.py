"""What relevance costs: AttnLRP of inputs, heads and layers beside a plain forward and backward.

GPT-2 small's shape and a Llama of its size with grouped keys, random weights, one prompt of 512
tokens. `plain` is the cheapest backward there is, by the inputs alone, every weight frozen; `train`
has the weights' gradients too. The ways alternate in one process, and the median of the ratios of
each round is printed. Peak memory is taken of each way in a process of its own.

Heads: the relevance of all heads' z (z x gradient) by attnlens in one backward, and by captum's
LayerGradientXActivation, a layer at a time; the numbers have to agree.

The floor of AttnLRP is the plain pass itself: the same products forwards and backwards. What comes
on top is a look-up a torch function and one pass over each tensor that relevance is read at.

    python -m benchmarks.relevance [--json] [--rounds 7] [--small]
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
    gpt2_small,
    in_own_process,
    peak_of,
    print_claims,
    random_ids,
    ratio,
)

MODULE = "benchmarks.relevance"
LENGTH = 512
TOKEN = 7
WAYS = ("plain", "train", "attnlrp")
TARGET = 1.1
CAPTUM_TARGET = 3.0


def llama_small(layers: int) -> Any:
    """A Llama of GPT-2 small's size: 12 heads in 4 groups, gated MLPs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS: dict[str, Callable[[int], Any]] = {"gpt2": gpt2_small, "llama": llama_small}


def ways(model: Any, ids: Any) -> dict[str, Callable[[], Any]]:
    """The ways through one prompt."""
    import torch

    import attnlens as al

    lens = al.load(model, check=False)
    target = al.Target(TOKEN)
    _ = lens.conservation  # once a model, whoever asks first

    def by_inputs() -> Any:
        with torch.enable_grad():
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, logits_to_keep=1, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[0, -1, TOKEN], embeddings)
        return (embeddings * gradient).sum(-1)

    def plain() -> Any:
        model.requires_grad_(False)
        try:
            return by_inputs()
        finally:
            model.requires_grad_(True)

    def train() -> Any:
        logits = model(ids, logits_to_keep=1, use_cache=False).logits
        logits[0, -1, TOKEN].backward()
        model.zero_grad(set_to_none=True)

    def heads() -> Any:
        from attnlens.analyses.target import settle
        from attnlens.hooks.gradients import z_gradients

        batch = lens.encode(ids)
        explained = settle(lens, batch, target)
        found = z_gradients(
            model, lens.anatomy, batch.inputs, explained.metric,
            observers=explained.observers(lens, batch),
        )  # fmt: skip
        return torch.stack([(each.z * each.gradient).sum((1, 3)) for each in found.values()])

    return {
        "plain": plain,
        "train": train,
        "attnlrp": lambda: al.attnlrp(lens, ids, target),
        "heads": heads,
        "captum": lambda: by_captum(model, lens, ids),
    }


def by_captum(model: Any, lens: Any, ids: Any) -> Any:
    """z x gradient of every head, a forward and a backward for each layer."""
    import torch
    from captum.attr import LayerGradientXActivation

    def forward(given: Any) -> Any:
        return model(given, logits_to_keep=1, use_cache=False).logits[:, -1, TOKEN]

    found: list[Any] = []
    for site in lens.anatomy.sites:
        layer = LayerGradientXActivation(forward, model.get_submodule(site.output))
        product = layer.attribute(ids, attribute_to_layer_input=True)
        product = product[0] if isinstance(product, tuple) else product
        found.append(product.detach().unflatten(-1, (site.heads, -1)).sum((1, 3)))
    return torch.stack(found)


def check_agreement(runs: dict[str, Callable[[], Any]]) -> None:
    """Both ways to the heads agree, and AttnLRP's ledger closes."""
    import torch

    own, peer = runs["heads"](), runs["captum"]()
    scale = peer.abs().max()
    # Two orders of the same sums, in float32 through twelve layers.
    assert torch.allclose(own / scale, peer / scale, atol=1e-4), "heads disagree with captum"
    error = float(runs["attnlrp"]().ledger.error.max())
    assert error < 1e-4, f"the ledger does not close: {error}"


def peak(way: str, name: str, layers: int) -> float:
    """Peak memory in MB of one way, its libraries loaded and warmed before."""
    import torch

    torch.set_num_threads(THREADS)
    run = ways(MODELS[name](layers), random_ids((1, LENGTH), 30000))[way]
    ways(MODELS[name](1), random_ids((1, 8), 30000))[way]()
    return peak_of(run)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="last line is JSON with the claims")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="two layers, to try the script")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        way, name, layers = arguments.peak
        print(peak(way, name, int(layers)))
        return
    import torch

    torch.set_num_threads(THREADS)
    layers = 2 if arguments.small else 12
    claims: list[Claim] = []
    for name, build in MODELS.items():
        runs = ways(build(layers), random_ids((1, LENGTH), 30000))
        check_agreement(runs)
        seconds = alternate({way: runs[way] for way in WAYS}, arguments.rounds)
        loops = alternate({way: runs[way] for way in ("heads", "captum")}, 3)
        peaks = {way: in_own_process(MODULE, way, name, layers) for way in WAYS}
        print(f"\n{name}, {layers} layers, {LENGTH} tokens")
        print(f"{'way':10s}{'seconds':>10s}{'/ plain':>10s}{'peak MB':>10s}{'/ plain':>10s}")
        for way in WAYS:
            median = statistics.median(seconds[way])
            times, memory = ratio(seconds, way, "plain"), peaks[way] / peaks["plain"]
            print(f"{way:10s}{median:10.2f}{times:10.3f}{peaks[way]:10.0f}{memory:10.2f}")
        for way in loops:
            print(f"{way:10s}{statistics.median(loops[way]):10.2f}")
        time = round(ratio(seconds, "attnlrp", "plain"), 3)
        claims.append(Claim(f"AttnLRP / plain forward and backward, {name}", time, TARGET))
        memory = round(peaks["attnlrp"] / peaks["plain"], 3)
        claims.append(Claim(f"AttnLRP / plain peak memory, {name}", memory, TARGET))
        gain = round(ratio(loops, "captum", "heads"), 2)
        name = f"captum's loop over layers / all heads in one backward, {name}"
        claims.append(Claim(name, gain, CAPTUM_TARGET, at_least=True))
    print_claims(claims, arguments.json)


if __name__ == "__main__":
    main()
