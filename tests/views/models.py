"""Small models for figures: the hand-wired one, and one with three stacks."""

from __future__ import annotations

from functools import cache

import torch
from transformers import T5Config, T5ForConditionalGeneration

from attnlens.lens import Lens, load
from attnlens.zoo.induction import induction_model


@cache
def hand_wired() -> Lens:
    return load(induction_model(), check=False)


@cache
def three_stacks() -> Lens:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=4, num_heads=3, num_layers=2, d_ff=16,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return load(T5ForConditionalGeneration(config).eval(), check=False)


REPEATED = [0, 5, 9, 7, 3, 5, 9, 7, 3]
