"""An induction circuit wired by hand into a real GPT-2: every answer about it is known.

The residual stream has four parts of 32 directions each, and every part is a one-hot code:

    token       which token stands here              the token embedding writes it
    position    at which position                    the position embedding writes it
    previous    which token stands one before        L0H1 writes it
    output      which token comes next               L1H2 writes it, the unembedding reads it

L0H1, the previous-token head, asks "which key stands at my position - 1?" and copies the token
found there into `previous`. L1H2, the induction head, asks "after which token like mine did
something follow?", that is, it matches its own token against the `previous` of every key, and
copies the token found into `output`. Where nothing matches, a weaker, constant score draws it to
the start token: a deliberate sink, whose value is the start token itself, so that the model then
answers START. The six other heads and both MLPs write nothing.

After the embeddings each position holds two ones among zeros, after layer 0 three, after layer 1
four (there up to the tails of a softmax), whatever the text. LayerNorm's mean and variance are
therefore constants, and its weight and bias are set to undo it: the norm is the identity on every
stream of the model's own, and the weights below mean what they say.

On distinct random tokens said twice after START, L1H2 answers every token of the second copy but
the first, which nothing announces. Weights follow Elhage et al. 2021 (a mathematical framework for
transformer circuits) and Olsson et al. 2022 (induction heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

START = 0
"""The token that begins every text, and the sink of the induction head."""
PREVIOUS_TOKEN_HEAD = "L0H1"
INDUCTION_HEAD = "L1H2"

CODE = 32
"""Width of one part of the stream: tokens, positions and d_head all have 32 directions."""
WIDTH = 4 * CODE
TOKEN, POSITION, PREVIOUS, OUTPUT = (slice(i, i + CODE) for i in range(0, WIDTH, CODE))

# Scores in nats over those of every other key. The two heads' softmaxes are saturated on purpose.
PREVIOUS_TOKEN_SCORE = 60.0  # in float64, too, the other keys get nothing that a sum can show
MATCH_SCORE = 23.0  # as far above the sink as the sink is above the rest
SINK_SCORE = 11.5  # .9999 on START where nothing matches
LOGIT = 16.0  # the answer's logit; all other tokens have 0

_QUERY, _KEY, _VALUE = range(3)  # the three blocks of columns in GPT-2's fused projection


def induction_model() -> GPT2LMHeadModel:
    """The hand-wired induction model: 2 layers, 4 heads, 32 tokens, 32 positions, width 128.

    Deterministic float32 weights, in evaluation mode; `.double()` for float64. Takes token ids;
    it has no tokenizer.
    """
    model = _blank_model()
    with torch.no_grad():
        embed_tokens(model.transformer.wte)
        embed_positions(model.transformer.wpe)
        first, second = cast(Sequence[GPT2Block], model.transformer.h)
        undo_norm(first.ln_1, ones=2)
        attend_to_previous_token(first.attn, head=1)
        undo_norm(first.ln_2, ones=3)
        undo_norm(second.ln_1, ones=3)
        attend_to_what_followed(second.attn, head=2)
        undo_norm(second.ln_2, ones=4)
        undo_norm(model.transformer.ln_f, ones=4)
        unembed_output(model.lm_head)
    return model


def embed_tokens(embedding: nn.Embedding) -> None:
    """Token v is direction v of the token part."""
    embedding.weight[:, TOKEN] = _code(embedding.weight)


def embed_positions(embedding: nn.Embedding) -> None:
    """Position p is direction p of the position part."""
    embedding.weight[:, POSITION] = _code(embedding.weight)


def attend_to_previous_token(attention: GPT2Attention, head: int) -> None:
    """score(t, s) = 60 [s = t - 1]; the token found goes to the previous part.

    Position 0 sees only itself, so its `previous` is its own token.
    """
    project, code = _projections(attention), _code(attention.c_proj.weight)
    # The query of position t is the code of t - 1: ones below the diagonal, and none for 0.
    earlier = code.roll(-1, dims=1)
    earlier[0] = 0
    project[_QUERY][POSITION, _columns(head)] = _unscaled(PREVIOUS_TOKEN_SCORE) * earlier
    project[_KEY][POSITION, _columns(head)] = code
    copy_tokens(attention, head, PREVIOUS)


def attend_to_what_followed(attention: GPT2Attention, head: int) -> None:
    """score(t, s) = 23 [token before s = token at t] + 11.5 [token at s is START].

    START never stands before the copy that is looked for, so its direction of d_head is free: there
    every query says 11.5 and only START's key answers.
    """
    project, code = _projections(attention), _code(attention.c_proj.weight)
    ordinary = code.clone()
    ordinary[START] = 0
    project[_QUERY][TOKEN, _columns(head)] = _unscaled(MATCH_SCORE) * ordinary
    project[_KEY][PREVIOUS, _columns(head)] = ordinary
    queries = attention.c_attn.bias.chunk(3)[_QUERY]
    queries[_columns(head)] = _unscaled(SINK_SCORE) * code[START]
    project[_KEY][TOKEN, _columns(head)] = code - ordinary
    copy_tokens(attention, head, OUTPUT)


def copy_tokens(attention: GPT2Attention, head: int, part: slice) -> None:
    """The head's value is the token part, written unchanged into another part."""
    code = _code(attention.c_proj.weight)
    _projections(attention)[_VALUE][TOKEN, _columns(head)] = code
    attention.c_proj.weight[_columns(head), part] = code


def undo_norm(norm: nn.LayerNorm, ones: int) -> None:
    """LayerNorm(x) = x for every x of `ones` ones among zeros: weight = sigma, bias = mean."""
    mean = ones / WIDTH
    norm.weight.fill_((mean * (1 - mean) + norm.eps) ** 0.5)
    norm.bias.fill_(mean)


def unembed_output(unembedding: nn.Linear) -> None:
    """logit(v) = 16 * direction v of the output part."""
    unembedding.weight[:, OUTPUT] = LOGIT * _code(unembedding.weight)


def _blank_model() -> GPT2LMHeadModel:
    """A GPT-2 of the right shape with every weight 0; the global random state stays as it is."""
    config = GPT2Config(
        vocab_size=CODE,
        n_positions=CODE,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_inner=CODE,  # the MLPs write nothing
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        tie_word_embeddings=False,  # tokens are read from another part than they are written to
        bos_token_id=START,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _code(like: Tensor) -> Tensor:
    """The one-hot code, `CODE CODE`: row i is direction i."""
    return torch.eye(CODE, dtype=like.dtype, device=like.device)


def _projections(attention: GPT2Attention) -> tuple[Tensor, ...]:
    """Views of W_Q, W_K and W_V, each `d_model head*d_head`, in GPT-2's fused projection."""
    return attention.c_attn.weight.chunk(3, dim=1)


def _columns(head: int) -> slice:
    """A head's columns in W_Q, W_K, W_V, and its rows in W_O."""
    return slice(head * CODE, (head + 1) * CODE)


def _unscaled(score: float) -> float:
    """The product of query and key that gives a score: attention divides it by sqrt(d_head)."""
    return score * CODE**0.5
