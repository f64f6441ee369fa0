"""Tiny random models whose every edge the oracles follow, and norms that do not use float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import attnlens as al
from tests.architectures import randomise
from tests.hooks.wired import cut, heard
from tests.oracles import edges


def wide_norms(patch: pytest.MonkeyPatch) -> None:
    """Norms of Llama and T5 in the dtype of the stream: float32 would hide small differences."""

    def forward(self: Any, stream: Tensor) -> Tensor:
        size = (stream.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return self.weight * stream / size

    for norm in (LlamaRMSNorm, T5LayerNorm):
        patch.setattr(norm, "forward", forward)


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=40,
        n_positions=12,
        n_embd=24,
        n_layer=3,
        n_head=3,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval().double()
    randomise(model, seed=5)
    return model


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval().double()
    randomise(model, seed=6)
    return model


class Tiny:
    """A tiny model with its oracle, and two runs of it."""

    def __init__(self, name: str) -> None:
        model: Any = tiny_gpt2() if name == "gpt2" else tiny_llama()
        self.lens = al.load(model)
        self.network = self.lens.wiring.network
        self.oracle: edges.Decoder = edges.Gpt2(model) if name == "gpt2" else edges.Llama(model)
        draw = torch.Generator().manual_seed(2)
        ids, other = torch.randint(4, 40, (2, 2, 7), generator=draw)
        self.inputs, self.ids = {"input_ids": ids}, ids
        self.others = {"input_ids": other}
        self.clean, self.logits = heard(self.lens, self.inputs)
        self.other, _ = heard(self.lens, self.others)
        with torch.no_grad():
            self.wanted, _ = edges.run(self.oracle, ids)
            _, self.written = edges.run(self.oracle, other)

    @torch.no_grad()
    def by_oracle(self, kept: Tensor, written: edges.Written | None = None) -> Tensor:
        names = {self.network.edge_names[number] for number in self.network.numbers(kept)}
        return edges.run(self.oracle, self.ids, names, written or self.written)[0]

    def run(self, kept: Tensor) -> Tensor:
        return cut(self.lens, self.inputs, self.other.written, kept)
