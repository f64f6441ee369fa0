"""Measure the small language model: the figures that its card gives.

python scripts/evaluate_small.py attnlens/zoo/small --text tiny_shakespeare.txt

Every figure comes from the plain transformers model in eager mode. Prints tables for people and,
with --json FILE, writes the same numbers to a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_small import build_model, split_text

from attnlens.tasks import Task, indirect_object, key_value, needle, repeated_tokens

SEED = 90_001  # training draws from seeds far below


@dataclass(frozen=True)
class Small:
    """The model with what the task builders ask for."""

    model: LlamaForCausalLM
    tokenizer: Any
    vocab_size: int
    context: int
    special_ids: frozenset[int]
    bos_id: int


def load(folder: Path) -> Small:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", local_files_only=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Small(
        model=model,
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        context=model.config.max_position_embeddings,
        special_ids=frozenset(tokenizer.all_special_ids),
        bos_id=tokenizer.bos_token_id,
    )


def text_rows(small: Small, text: str, length: int = 256) -> Tensor:
    """Consecutive pieces of the text, each after a start token: `[row, position]`."""
    ids = small.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[i : i + length - 1] for i in range(0, len(ids) - length + 2, length - 1)]
    return torch.tensor([[small.bos_id, *piece] for piece in pieces])


@torch.no_grad()
def task_score(small: Small, task: Task, metric: str) -> float:
    logits = small.model(**task.clean_inputs()).logits
    return task.score(task.at_reads(logits), metric).mean().item()


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean loss in nats a token."""
    losses = []
    for ids in rows.split(8):
        logits = model(ids).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    return torch.stack(losses).mean().item()


def unigram_loss(small: Small, train: str, held_out: Tensor) -> float:
    """Loss of the training text's token frequencies (one added to each count)."""
    ids = torch.tensor(small.tokenizer(train, add_special_tokens=False)["input_ids"])
    counts = torch.bincount(ids, minlength=small.vocab_size) + 1.0
    return -(counts / counts.sum()).log()[held_out[:, 1:]].mean().item()


def patterns(small: Small, ids: Tensor) -> Iterator[Tensor]:
    """Attention weights `[layer, head, query, key]` of one row after the other."""
    for row in ids:
        with torch.no_grad():
            out = small.model(row[None], output_attentions=True)
        yield torch.cat(out.attentions)


def mean_over(small: Small, ids: Tensor, statistic: Any) -> Tensor:
    """`statistic(pattern, row)` as `[layer, head]`, averaged over rows."""
    values = [statistic(p, row) for p, row in zip(patterns(small, ids), ids, strict=True)]
    return torch.stack(values).mean(dim=0)


def previous_token(pattern: Tensor, row: Tensor) -> Tensor:
    """Mean of `A[i, i - 1]`."""
    return pattern.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=-1)


def own_token(pattern: Tensor, row: Tensor) -> Tensor:
    """Mean of `A[i, i]`."""
    return pattern.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


def first_token(pattern: Tensor, row: Tensor) -> Tensor:
    """Mean of `A[i, 0]` over i > 0."""
    return pattern[..., 1:, 0].mean(dim=-1)


def earlier(row: Tensor, shift: int) -> Tensor:
    """`[query, key]`: key - shift is an earlier token equal to the query's token."""
    same = (row[:, None] == row[None, :]).tril(-1)
    return torch.roll(same, shift, dims=1).tril(0) if shift else same


def mass_on(shift: int) -> Any:
    """Mean mass on earlier equal tokens (shift 0) or on those after them (shift 1)."""

    def statistic(pattern: Tensor, row: Tensor) -> Tensor:
        keys = earlier(row, shift)
        valid = keys.any(dim=1)
        return (pattern * keys).sum(dim=-1)[..., valid].mean(dim=-1)

    return statistic


def needle_mass(small: Small) -> Tensor:
    """Mass that the last token of needle prompts gives to the needle's first word."""
    totals = []
    for depth in (0.1, 0.5, 0.9):
        task = needle(small, prompts=8, length=200, depth=depth, seed=SEED)
        for i in range(len(task)):
            ids, at = task.clean[i][task.mask[i]], int(task.spans[i, 0])
            pattern = next(patterns(small, ids[None]))
            totals.append(pattern[..., -1, at])
    return torch.stack(totals).mean(dim=0)


def answer_mass(small: Small, task: Task) -> Tensor:
    """Mass that the last token gives to the answer's earlier place in the prompt."""
    totals = []
    for i in range(len(task)):
        ids = task.clean[i][task.mask[i]]
        pattern = next(patterns(small, ids[None]))[..., -1, :]
        totals.append(pattern[..., ids == task.answers[i, 0]].sum(dim=-1))
    return torch.stack(totals).mean(dim=0)


def abilities(small: Small) -> dict[str, float]:
    """Accuracy on each task, prompts of seeds that training never drew."""
    figures = {
        f"repeat accuracy, period {period}": task_score(
            small, repeated_tokens(small, 16, period, seed=SEED), "accuracy"
        )
        for period in (8, 12, 24, 50, 100, 128)
    }
    for pairs in (4, 8, 12):
        task = key_value(small, 200, pairs, seed=SEED)
        figures[f"key-value accuracy, {pairs} pairs"] = task_score(small, task, "accuracy")
    names = indirect_object(small, 300, seed=SEED)
    figures["indirect object accuracy"] = task_score(small, names, "accuracy")
    figures["indirect object logit difference"] = task_score(small, names, "logit_difference")
    for length in (100, 200, 400):
        scores = [
            task_score(small, needle(small, 20, length, depth, seed=SEED), "accuracy")
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        figures[f"needle accuracy, {length} tokens"] = sum(scores) / len(scores)
    return figures


def head_scores(small: Small, text: Tensor) -> dict[str, Tensor]:
    """Scores of every head, `[layer, head]`."""
    four = repeated_tokens(small, 8, 32, repeats=4, seed=SEED).clean
    return {
        "previous token": mean_over(small, text[:8], previous_token),
        "own token": mean_over(small, text[:8], own_token),
        "first token (text)": mean_over(small, text[:8], first_token),
        "first token (random)": mean_over(small, four, first_token),
        "duplicate token": mean_over(small, four, mass_on(0)),
        "induction": mean_over(small, four, mass_on(1)),
        "key-value answer": answer_mass(small, key_value(small, 32, 8, seed=SEED)),
        "indirect object answer": answer_mass(small, indirect_object(small, 32, seed=SEED)),
        "needle": needle_mass(small),
    }


@contextmanager
def zeroed(small: Small, layer: int, heads: Iterable[int]) -> Iterator[None]:
    """Within it the output of these heads is zero."""
    width = small.model.config.head_dim
    columns = [c for head in heads for c in range(head * width, (head + 1) * width)]

    def zero(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].index_fill(-1, torch.tensor(columns), 0.0),)

    hook = small.model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def ablation(small: Small, text: Tensor) -> dict[str, dict[str, float]]:
    """What is left of each ability with nothing, one head, or one layer's heads set to zero."""
    tasks = {
        "repeat": repeated_tokens(small, 8, 24, seed=SEED),
        "key-value": key_value(small, 40, 8, seed=SEED),
        "indirect object": indirect_object(small, 60, seed=SEED),
        "needle": needle(small, 12, 120, seed=SEED),
    }

    def measure() -> dict[str, float]:
        scores = {name: task_score(small, task, "accuracy") for name, task in tasks.items()}
        return scores | {"text loss": text_loss(small.model, text[:8])}

    every = range(small.model.config.num_attention_heads)
    rows = {"none": measure()}
    for layer in range(small.model.config.num_hidden_layers):
        for name, heads in [*((f"L{layer}H{h}", [h]) for h in every), (f"L{layer}", every)]:
            with zeroed(small, layer, heads):
                rows[name] = measure()
    return rows


def report(small: Small, path: Path) -> dict[str, Any]:
    train, held = split_text(path)
    rows = text_rows(small, held)
    torch.manual_seed(0)
    untrained = build_model(small.tokenizer).eval()
    figures: dict[str, Any] = {
        "held-out loss": text_loss(small.model, rows),
        "unigram loss": unigram_loss(small, train, rows),
        "random-init loss": text_loss(untrained, rows),
        **abilities(small),
    }
    heads = head_scores(small, rows)
    figures["heads"] = {name: score.tolist() for name, score in heads.items()}
    figures["ablation"] = ablation(small, rows)
    return figures


def show(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:36s} {value:.3f}")
    names = list(figures["heads"])
    print("\n| head | " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * len(names))
    layers, heads = len(figures["heads"][names[0]]), len(figures["heads"][names[0]][0])
    for layer in range(layers):
        for head in range(heads):
            cells = [f"{figures['heads'][name][layer][head]:.2f}" for name in names]
            print(f"| L{layer}H{head} | " + " | ".join(cells) + " |")
    print("\n| zeroed | " + " | ".join(figures["ablation"]["none"]) + " |")
    for name, row in figures["ablation"].items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="the text it was trained on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = report(load(options.model), options.text)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
