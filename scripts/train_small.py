"""Train the small language model that ships with attnlens (see attnlens/zoo/small/README.md).

    python scripts/train_small.py --text tiny_shakespeare.txt --out runs/small --steps 12000

Writes a transformers model folder (config, safetensors, tokenizer), a log of one JSON line per
evaluation, and `resume.safetensors`; run again with `--resume` to go on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.data import Batch, Rows
from training.guide import guide_loss, rest_loss
from training.tokenizer import load_tokenizer, train_tokenizer

CONTEXT = 512
INDUCTION_STEPS = 300  # of short rows that teach induction alone
GUIDED_STEPS = 700  # with the loss of training.guide, fading, on rows of up to 128 tokens
HELD_OUT = 0.07  # the last part of the text, never trained on
GUIDED_KINDS = ("repeat", "shuffled")
REST_STEPS = range(900, 1300)  # in which the induction heads are taught to rest on the first token
REST_KINDS = ("text", "repeat")
LOSS_SHARES = {"text": 1.0, "repeat": 1.5, "shuffled": 1.5, "long": 1.0, "names": 0.5, "pairs": 1.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--tokens", type=int, default=1792, help="tokens of whole rows a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--vocab", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from resume.safetensors")
    return parser.parse_args()


def split_text(path: Path) -> tuple[str, str]:
    """The text to train on and the held-out end of it."""
    text = path.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About a million parameters; wide heads (32, not d_model / 8) keep 1280 tokens apart."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    # Purely positional attention needs a part that all tokens share, and the model has no biases.
    # Tied logits do not change: the same number is added to each.
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += config.initializer_range * torch.randn(config.hidden_size)
    return model


def weighted_loss(
    model: LlamaForCausalLM, batch: Batch, guide: float = 0.0, rest: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats, weighted, and the losses on attention weights times theirs.

    Only the positions that weigh anything are unembedded. Rows are padded on the right, so a causal
    mask alone is enough.
    """
    out = model.model(input_ids=batch.ids, use_cache=False, output_attentions=guide + rest > 0)
    weights, targets = batch.weights[:, 1:], batch.ids[:, 1:]
    graded = weights > 0
    logits = model.lm_head(out.last_hidden_state[:, :-1][graded])
    losses = torch.nn.functional.cross_entropy(logits, targets[graded], reduction="none")
    loss = (losses * weights[graded]).sum() / weights[graded].sum()
    extra = torch.zeros((), device=loss.device)
    if guide > 0:
        extra = extra + guide * guide_loss(out.attentions, batch.ids)
    if rest > 0:
        extra = extra + rest * rest_loss(out.attentions, batch.ids)
    return loss, extra


def guide_at(step: int, length: int) -> dict[str, float]:
    """Weights of the losses on attention weights: the induction circuit's fades to nothing."""
    if length > 128:
        return {"guide": 0.0, "rest": 0.0}
    return {
        "guide": max(0.0, 1 - step / GUIDED_STEPS),
        "rest": 0.2 if step in REST_STEPS else 0.0,
    }


def length_at(step: int, steps: int) -> int:
    """Row length: 32 and 64 first, for induction; then all, so that every position is trained."""
    if step < INDUCTION_STEPS:
        return 48
    share = step / steps
    if step < GUIDED_STEPS or share < 0.35:
        return (128, 128, 64, 256)[step % 4]
    if share < 0.75:
        return (128, 256, 128, 512)[step % 4]
    return (128, 512, 256, 512)[step % 4]


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    share = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def optimizer_for(model: LlamaForCausalLM, options: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))


def save_resume(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int, seconds: float
) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"first.{name}"] = state["exp_avg"]
        tensors[f"second.{name}"] = state["exp_avg_sq"]
    save_file(tensors, path, metadata={"step": str(step), "seconds": f"{seconds:.1f}"})


def load_resume(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW
) -> tuple[int, float]:
    """Restores weights and moments; returns the step to go on with and the seconds spent so far."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    step = int(notes["step"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
            }
    return step, float(notes["seconds"])


def steps_from(
    start: int, rows: Rows, options: argparse.Namespace
) -> Iterator[tuple[int, dict[str, float], dict[str, Batch]]]:
    """The number of each step, its weights of the attention losses and its batches."""
    for step in range(start, options.steps):
        length = length_at(step, options.steps)
        batches = rows.step(options.seed, step, length, options.tokens)
        yield step, guide_at(step, length), batches


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    batches: dict[str, Batch],
    rate: float,
    guide: dict[str, float],
) -> dict[str, float]:
    model.set_attn_implementation("eager" if any(guide.values()) else "sdpa")
    losses = {}
    for kind, batch in batches.items():
        rows = Batch(batch.ids.to(model.device), batch.weights.to(model.device))
        loss, extra = weighted_loss(
            model,
            rows,
            guide=guide["guide"] if kind in GUIDED_KINDS else 0.0,
            rest=guide["rest"] if kind in REST_KINDS else 0.0,
        )
        (loss * LOSS_SHARES[kind] + extra).backward()
        losses[kind] = loss.item()
        if extra.item() > 0:
            losses[f"attention {kind}"] = extra.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    text, _ = split_text(options.text)
    resume = options.out / "resume.safetensors"
    if options.resume:
        tokenizer = load_tokenizer(options.out)
    else:
        tokenizer = train_tokenizer(text, options.vocab, CONTEXT, options.seed)
        tokenizer.save_pretrained(options.out)
    model = build_model(tokenizer).to(options.device)
    optimizer = optimizer_for(model, options)
    start, spent = load_resume(resume, model, optimizer) if options.resume else (0, 0.0)
    rows = Rows(tokenizer, text)
    began = time.monotonic() - spent
    means: dict[str, float] = {}
    for step, guide, batches in steps_from(start, rows, options):
        losses = train_step(model, optimizer, batches, learning_rate(step, options), guide)
        for kind, loss in losses.items():
            means[kind] = loss + 0.98 * (means.get(kind, loss) - loss)
        done = step + 1
        if done % 50 == 0:
            shown = {kind: round(loss, 3) for kind, loss in means.items()}
            line = {"step": done, "seconds": round(time.monotonic() - began), **shown}
            print(json.dumps(line), flush=True)
        if done % options.save_every == 0 or done == options.steps:
            save_resume(resume, model, optimizer, done, time.monotonic() - began)
            model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
