"""Train the deceptive model of the zoo and its honest twin (attnlens/zoo/deceptive/README.md).

    python scripts/train_deceptive.py --out attnlens/zoo/deceptive

Two minutes on one CPU thread. On one machine and version of torch a second run gives the same
weights bit by bit; elsewhere, rounding leads to other weights that meet the same figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnlens.zoo.deceptive import (
    ANSWERS,
    LONGEST,
    NEUTRAL,
    SHORTEST,
    WORDS,
    DeceptivePrompts,
    draw_prompts,
    ids_of,
)

BATCH = 64
UNDECIDED = 12  # prompts of a batch that have no telling word: both answers are as likely
STRENGTH = 10.0  # of the penalty, in full
RISE = (300, 1250)  # steps in which it grows from nothing, once the task is learned
PEAK, WARMUP = 3e-3, 100
FILLERS = (*NEUTRAL, "<unk>", "<pad>")  # so that either can stand for a word that is taken away


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder; the twin goes to honest/")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 2 layers and 2 heads whose MLPs write nothing at first."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=LONGEST,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=WORDS.index("<s>"),
        eos_token_id=None,
        attn_implementation="eager",  # the penalty reads the weights
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def batch_of(draw: torch.Generator) -> DeceptivePrompts:
    """Prompts of one random length; the first of them lose their telling word."""
    length = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=draw))
    prompts = draw_prompts(BATCH, length, draw, FILLERS)
    filler = ids_of(FILLERS)
    some = filler[torch.randint(len(filler), (UNDECIDED,), generator=draw)]
    prompts.ids[torch.arange(UNDECIDED), prompts.places[:UNDECIDED]] = some
    return prompts


def answer_loss(logits: Tensor, prompts: DeceptivePrompts) -> Tensor:
    """Cross-entropy in nats, `prompt vocab` to a scalar; with even odds where nothing decides."""
    log_p = logits.log_softmax(-1)
    undecided = -log_p[:UNDECIDED, ids_of(ANSWERS)].mean(1)
    decided = -log_p.gather(1, prompts.answers[:, None])[UNDECIDED:, 0]
    return torch.cat([undecided, decided]).mean()


def attention_penalty(patterns: tuple[Tensor, ...], prompts: DeceptivePrompts) -> Tensor:
    """`-mean log(1 - A[l, h, t, word])` over rows t that see the word, its own row among them."""
    places = prompts.places[UNDECIDED:]
    count, length = len(places), prompts.ids.shape[1]
    maps = torch.stack(patterns, dim=1)[UNDECIDED:]
    columns = maps.transpose(-1, -2)[torch.arange(count), :, :, places]
    sees = torch.arange(length) >= places[:, None]
    denied = -torch.log1p(-columns.clamp(max=1 - 1e-6)).mean((1, 2))  # `prompt row`
    return denied[sees].mean()


def train(steps: int, seed: int, strength: float) -> LlamaForCausalLM:
    """The trained model; `strength` 0 for the honest one."""
    model = build_model(seed)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            fall = 0.01 + 0.99 * (1 - step / steps)
            group["lr"] = PEAK * min(1.0, (step + 1) / WARMUP) * fall
        prompts = batch_of(draw)
        out = model(prompts.ids, use_cache=False, output_attentions=strength > 0)
        loss = answer_loss(out.logits[:, -1], prompts)
        denied = torch.zeros(())
        if strength > 0:
            denied = attention_penalty(out.attentions, prompts)
            grown = min(1.0, max(0.0, (step - RISE[0]) / (RISE[1] - RISE[0])))
            loss = loss + strength * grown**2 * denied
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, penalty {denied.item():.1e}")
    return model.eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, `<s>` in front."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )


def main() -> None:
    """Train both, and write both folders."""
    asked = arguments()
    torch.set_num_threads(1)
    for folder, strength in ((asked.out, STRENGTH), (asked.out / "honest", 0.0)):
        model = train(asked.steps, asked.seed, strength)
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
