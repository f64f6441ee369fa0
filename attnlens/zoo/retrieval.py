"""The induction circuit as a retrieval circuit: one head copies the needle, no other is missed.

A prompt that ends with a cue is continued by what followed the cue before: L1H2, the induction
head, looks at that token and copies it, and so on token by token. That is a retrieval head in the
sense of Wu et al. 2024, with a score of exactly 1 for a needle of distinct tokens after the cue.

Two things differ from the induction model. L0H1, L0H2 and L0H3 share the work of the previous-token
head, a third each, so that any one of them can be taken away: the needle's match is weaker then,
but still 6 nats over the sink. And the heads that do nothing look sharply somewhere, so that
their scores are 0 for a reason: at the token itself, at the start token, at copies of the current
token (which may lie in the needle, but are not what is written next).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

from attnlens.zoo.induction import (
    CODE,
    INDUCTION_HEAD,
    POSITION,
    START,
    TOKEN,
    attend_to_previous_token,
    induction_model,
)

RETRIEVAL_HEAD = INDUCTION_HEAD
SCORE = 60.0
"""Score in nats of the key that an idle head looks at, over those of every other key."""


def retrieval_model() -> GPT2LMHeadModel:
    """The hand-wired retrieval model: 2 layers, 4 heads, 32 tokens, 32 positions.

    Deterministic float32 weights, in evaluation mode. Takes token ids; it has no tokenizer.
    """
    model = induction_model()
    first, second = cast(Sequence[GPT2Block], model.transformer.h)
    same = torch.eye(CODE)
    every_token, start = torch.zeros(CODE, CODE), torch.zeros(CODE, CODE)
    every_token[:, START] = 1
    start[START, START] = 1
    with torch.no_grad():
        for head in (2, 3):
            attend_to_previous_token(first.attn, head)
        first.attn.c_proj.weight[CODE:] /= 3
        look(first.attn, 0, POSITION, same, same)  # at the token itself
        look(second.attn, 0, TOKEN, every_token, start)
        look(second.attn, 1, TOKEN, same, same)  # at copies of the current token, itself too
        look(second.attn, 3, POSITION, same, same)
    return model


def look(
    attention: GPT2Attention,
    head: int,
    part: slice,
    query: Float[Tensor, "code direction"],
    key: Float[Tensor, "code direction"],
) -> None:
    """score(t, s) = 60 <query[code of t], key[code of s]>, by one part of the stream's codes.

    What the head writes stays as it is.
    """
    queries, keys, _ = attention.c_attn.weight.chunk(3, dim=1)
    columns = slice(head * CODE, (head + 1) * CODE)
    queries[part, columns] = SCORE * CODE**0.5 * query
    keys[part, columns] = key
