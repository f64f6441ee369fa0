"""Zero ablation of every head on a last-position metric: attnlens beside loops over full forwards.

    python -m benchmarks.sweep [--json] [--rounds 3] [--sizes 32,256] [--shapes gpt2,llama]

The shapes are GPT-2 small's and a Llama's with grouped keys, random weights, 4 prompts. The peers
run every forward whole, so their time grows with the number of heads alone: they run `--heads`
heads, spread over the layers, and their time is given for all. attnlens runs all of them. Ratios
are medians over rounds in which all ways take turns. The numbers of all ways are compared.

The floor is the products that exact ablation cannot do without, at the speed of one large product
on this machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._shared import THREADS, Claim, print_claims, random_ids, ratio

PROMPTS = 4
ANSWER, WRONG = 5, 7


def llama_small(layers: int, positions: int) -> Any:
    """A Llama of GPT-2 small's size: 12 heads in 4 groups."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=768, num_attention_heads=12, num_key_value_heads=4,
        intermediate_size=2048, vocab_size=50257, max_position_embeddings=positions,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Work:
    """One model and one task, and the ways to ablate its heads."""

    def __init__(self, shape: str, tokens: int, heads: int, top: int) -> None:
        import torch

        import attnlens as al
        from attnlens.tasks import Task
        from benchmarks._shared import gpt2_small

        self.model = gpt2_small(12, 1024) if shape == "gpt2" else llama_small(12, 1024)
        self.lens = al.Lens(self.model)
        self.ids = random_ids((PROMPTS, tokens))
        self.top = top
        rows = self.ids.tolist()
        last = [[tokens - 1]] * PROMPTS
        self.task = Task.from_prompts(
            "random", rows, rows, last, [[ANSWER]] * PROMPTS, [[WRONG]] * PROMPTS
        )
        every = self.lens.anatomy.heads
        self.all = len(every)
        step = max(len(every) // heads, 1)
        # A stride that is not a multiple of the heads of a layer, so that all numbers come up.
        self.sample = [every[(i * (step + 1)) % len(every)] for i in range(heads)]
        self.none = torch.zeros(())

    def metric(self, logits: Any) -> Any:
        """Per prompt: the answer's logit less the wrong one's, at the last position."""
        return (logits[:, -1, ANSWER] - logits[:, -1, WRONG]).double()

    def naive(self) -> Any:
        """A loop of whole forwards, the head's part of the output projection's input zeroed."""
        import torch

        found: list[Any] = []
        for head in self.sample:
            site = self.lens.anatomy[head.site]
            part = slice(head.head * site.d_v, (head.head + 1) * site.d_v)

            def zero(_: Any, args: tuple[Any, ...], part: slice = part) -> tuple[Any, ...]:
                z = args[0].clone()
                z[..., part] = 0
                return (z,)

            projection = self.model.get_submodule(site.output)
            handle = projection.register_forward_pre_hook(zero)
            with torch.no_grad():
                found.append(self.metric(self.model(self.ids, use_cache=False).logits))
            handle.remove()
        return torch.stack(found)

    def exact(self) -> Any:
        """attnlens, every head."""
        import attnlens as al

        return al.ablate(self.lens, self.task, controls=0, resamples=1)

    def screened(self) -> Any:
        """attnlens, every head estimated and the leading ones exact."""
        import attnlens as al

        return al.ablate_screened(self.lens, self.task, top=self.top, resamples=1)

    def transformer_lens(self) -> tuple[Callable[[], Any], Any]:
        """TransformerLens' generic patching with zeros, on its bridge over a copy of the model."""
        import pandas as pd
        import torch
        from transformer_lens import patching
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoTokenizer

        from attnlens.zoo import small_path

        own = copy.deepcopy(self.model)
        with tempfile.TemporaryDirectory() as folder:
            own.config.save_pretrained(folder)
            # Some bridges ask for a tokenizer; none is used here.
            tokenizer = AutoTokenizer.from_pretrained(small_path())
            bridge = TransformerBridge.boot_transformers(
                folder, hf_model=own, device="cpu", tokenizer=tokenizer
            )
        table = pd.DataFrame({"layer": [h.layer for h in self.sample],
                              "head": [h.head for h in self.sample]})  # fmt: skip

        def zero(activation: Any, index: Sequence[int], _: Any) -> Any:
            activation[:, :, index[1]] = 0
            return activation

        nothing: Any = defaultdict(lambda: None)  # zeros need no clean activation

        def run() -> Any:
            patching.tqdm = lambda rows: rows  # its bar would be timed, and printed
            with torch.no_grad():
                found = patching.generic_activation_patch(
                    bridge, self.ids, nothing, self.metric, zero, "z", index_df=table, reduce="none"
                )
            return found.values

        return run, bridge


def floor_products(work: Work) -> float:
    """Multiply-adds that exact ablation of all heads needs, in units of the whole naive loop's.

    A head of layer l changes the stream of every position from l on: the MLP of l, every layer
    above but the last, the last one's keys, values and reads, and the logits read.
    """
    config = work.model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", 4 * width)
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys = width * width * groups / config.num_attention_heads
    mlp = width * inner * (3 if hasattr(config, "num_key_value_heads") else 2)
    layer = 2 * width * width + 2 * keys + mlp
    tokens = work.ids.shape[1]
    logits = config.vocab_size * width
    naive = layers * layer + logits
    needed = 0.0
    for own in range(layers):
        above = layers - 1 - own
        if above:
            needed += mlp + (above - 1) * layer + 2 * keys
        needed += (mlp + layer) / tokens + logits / tokens
    return needed / layers / naive


def product_seconds(work: Work) -> float:
    """Seconds of the naive loop's products alone at the speed of one large product here."""
    import torch

    config = work.model.config
    a, b = torch.randn(1024, config.hidden_size), torch.randn(config.hidden_size, 3072)
    a @ b
    times: list[float] = []
    for _ in range(9):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    speed = a.shape[0] * a.shape[1] * b.shape[1] / statistics.median(times)
    weights = sum(p.numel() for n, p in work.model.named_parameters() if p.ndim == 2)
    tables = sum(
        p.numel() for n, p in work.model.named_parameters() if "wpe" in n or "embed_tokens" in n
    )
    return (weights - tables) * work.ids.numel() * work.all / speed


def check(work: Work, ways: dict[str, Any]) -> None:
    """All ways give the same numbers."""
    exact = ways["exact"]
    index = {head: i for i, head in enumerate(exact.heads)}
    own = exact.ablated[[index[head] for head in work.sample]]
    for name in ("naive", "TransformerLens"):
        if name in ways:
            apart = float((ways[name].reshape(own.shape) - own).abs().max())
            print(f"  largest difference from {name}: {apart:.1e}")
            if apart > 1e-5 * max(float(own.abs().max()), 1.0):
                sys.exit(f"{name} and attnlens disagree by {apart:.2g}")
    top = ways["screened"].exact
    same = top.ablated - exact.ablated[[index[head] for head in top.heads]]
    print(f"  screened from exact: {float(same.abs().max()):.1e}; "
          f"rank agreement {ways['screened'].agreement:.2f}")  # fmt: skip


def measure(shape: str, tokens: int, heads: int, top: int, rounds: int) -> list[Claim]:
    """Ratios of one shape and length."""
    import attnlens as al

    work = Work(shape, tokens, heads, top)
    peer, bridge = work.transformer_lens()
    runs = {
        "naive": work.naive,
        "TransformerLens": peer,
        "exact": work.exact,
        "screened": work.screened,
    }
    print(f"{shape}, {PROMPTS} x {tokens} tokens, {work.all} heads ({heads} timed for the loops)")
    al.ablate(work.lens, work.task, "L11", controls=0, resamples=1)  # the first forwards are slow
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        found: dict[str, Any] = {}
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
        if not number:
            check(work, found)
    scale = work.all / heads
    for name in ("naive", "TransformerLens"):
        seconds[name] = [s * scale for s in seconds[name]]
    for name, own in seconds.items():
        print(f"  {name:16s}{statistics.median(own):9.2f} s")
    share = floor_products(work)
    floor = share * product_seconds(work)
    exact = statistics.median(seconds["exact"])
    print(f"  floor: {share:.3f} of the loop's products, {floor:.2f} s at the speed of one large "
          f"product; exact is {exact / floor:.2f} x that")  # fmt: skip
    name = f"{shape} T {tokens}: "
    del bridge
    return [
        Claim(name + "exact, times the naive loop", ratio(seconds, "naive", "exact"), 6, True),
        Claim(name + "exact, times TransformerLens",
              ratio(seconds, "TransformerLens", "exact"), 6, True),
        Claim(name + "screened, times the naive loop",
              ratio(seconds, "naive", "screened"), 25, True),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="32,256")
    parser.add_argument("--shapes", default="gpt2,llama")
    parser.add_argument("--heads", type=int, default=12, help="heads that the loops run")
    parser.add_argument("--top", type=int, default=8, help="heads that screening verifies")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(THREADS)
    claims: list[Claim] = []
    for shape in asked.shapes.split(","):
        for tokens in map(int, asked.sizes.split(",")):
            claims += measure(shape, tokens, asked.heads, asked.top, asked.rounds)
    print_claims(claims, asked.json)


if __name__ == "__main__":
    main()
