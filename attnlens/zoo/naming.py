"""A name-copying circuit of seven heads, wired by hand into a real GPT-2: its edges are known.

A prompt says two names among other words, says one of them again, and ends with ASK; the model
answers the name that was said once (the indirect object of Wang et al. 2022):

    START . A . B . . A . ASK  ->  B

The residual stream has seven parts of 32 directions each, every one a one-hot code of tokens, or of
positions:

    token, position    the embeddings write them
    previous           which name stands one before             L0H2 writes it
    duplicate          which name was said here for the 2nd     L0H1 and L1H0 write it, half each
    inhibited          which name not to answer                 L2H1 and L2H3 write it, half each
    output             which token comes next                   L3H0 and L3H2 write it
    aside              what the bystanders found                nobody reads it

L0H1, the duplicate-token head, asks "where else does my name stand?" and copies it. L0H2, the
previous-token head, and L1H0, the induction head, find the same by another way: L1H0 asks "what
stands after a name like mine?" and copies the `previous` of that place. L2H1 and L2H3, the
inhibition heads, look at what `duplicate` marks and move that name to `inhibited`. L3H0 and L3H2,
the name movers, look at all names but less at the inhibited one, and copy what they find. The nine
other heads write nothing that anyone reads: five look sharply somewhere and write nothing at all,
and four, the bystanders, write the token that they found to `aside`.

The name said twice is there twice to be looked at, so that without inhibition the movers answer it.
Inhibition is just strong enough: without any one of the five heads before the movers the answer is
the other name. The two movers do the same; without one of them the answer stays, at half its
margin. No softmax is saturated, so that gradients see every edge.

LayerNorm takes the mean away and divides by `sqrt(variance + eps)`. Whatever is written here is
taken off one direction that nobody reads, so that the mean is 0, and eps is 2^40, so that the
variance of a stream of such a kind is lost beside it; with a weight of 2^20 the norm is the
identity, whatever the heads write. So an edge that is not wired has no effect at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block

from attnlens.errors import InputError

START, ASK = 0, 1
"""The tokens that begin and end every prompt."""
NAMES = range(2, 14)
"""Tokens that are names; those after them are other words."""

LAYERS, HEADS = 4, 4
CODE = 32
"""Width of one part of the stream: there are 32 tokens and 32 positions."""
D_HEAD = 2 * CODE
WIDTH = HEADS * D_HEAD
TOKEN, POSITION, PREVIOUS, DUPLICATE, INHIBITED, OUTPUT, ASIDE = (
    slice(i * CODE, (i + 1) * CODE) for i in range(7)
)
BALANCE = 7 * CODE
"""The direction that whatever is written is taken off: the mean of the stream stays 0."""

DUPLICATE_HEAD, PREVIOUS_HEAD, INDUCTION_HEAD = "L0H1", "L0H2", "L1H0"
INHIBITION_HEADS = ("L2H1", "L2H3")
MOVERS = ("L3H0", "L3H2")
IDLE = ("L0H0", "L1H1", "L2H0", "L2H2", "L3H1")
"""Heads that look somewhere and write nothing."""
BYSTANDERS = ("L0H3", "L1H2", "L1H3", "L3H3")
"""Heads that write what they found where nobody reads it."""

# Scores in nats over those of other keys.
MATCH_SCORE = 6.0  # of a name like the query's
SINK_SCORE = 3.0  # of START, where nothing matches
PREVIOUS_SCORE = 6.0
MARK_SCORE = 6.0  # of a position that `duplicate` marks in full
NAME_SCORE = 5.0  # of any name, for the movers
INHIBITION = 1.15  # by which the inhibited name is less to them
LOOK_SCORE = 6.0
LOGIT = 16.0  # of a token that one mover looks at with all its weight

_EPS = 2.0**40
_QUERY, _KEY, _VALUE = range(3)  # the three blocks of columns in GPT-2's fused projection


class Edge(NamedTuple):
    """What a head, or `logits`, gets from an earlier head, or from `embed`."""

    sender: str
    receiver: str
    kind: Literal["q", "k", "v", ""]
    """The input of the receiving head; "" of `logits`, which have one."""


@dataclass(frozen=True)
class NamePrompts:
    """Prompts with two names, one of them said twice, and their twins."""

    clean: Int[Tensor, "prompt position"]
    corrupt: Int[Tensor, "prompt position"]
    answers: Int[Tensor, " prompt"]
    """The name said once."""
    wrong: Int[Tensor, " prompt"]
    """The name said twice; in the corrupt prompt it is the one said once."""
    places: Int[Tensor, "prompt place"]
    """Where names stand: clean in the first three, corrupt in the first, second and fourth."""


def name_circuit() -> tuple[Edge, ...]:
    """The 25 edges that carry an effect from corrupt prompts (`name_prompts`), senders first.

    All other edges between `embed`, heads and `logits` have none. Positions are embedded too, and
    L0H1 and L0H2 read them, but both prompts have the same.
    """
    found = [Edge("embed", DUPLICATE_HEAD, kind) for kind in ("q", "k", "v")]
    found += [Edge("embed", PREVIOUS_HEAD, "v"), Edge("embed", INDUCTION_HEAD, "q")]
    found += [Edge("embed", mover, kind) for mover in MOVERS for kind in ("k", "v")]
    found += [Edge(PREVIOUS_HEAD, INDUCTION_HEAD, kind) for kind in ("k", "v")]
    found += [
        Edge(sender, receiver, kind)
        for sender in (DUPLICATE_HEAD, INDUCTION_HEAD)
        for receiver in INHIBITION_HEADS
        for kind in ("k", "v")
    ]
    found += [Edge(head, mover, "q") for head in INHIBITION_HEADS for mover in MOVERS]
    return (*found, *(Edge(mover, "logits", "") for mover in MOVERS))


def name_prompts(count: int, length: int = 14, seed: int = 0) -> NamePrompts:
    """Prompts of `length` tokens; names, their places and the other words drawn by the seed.

    Names stand at three places p1 < p2 < p3, never side by side, the name of the third also at one
    of the others: A B A or B A A. The corrupt twin has a third name at p1 and p2 and A, said once,
    at a place p4 after p3: C C . A. So the twin differs in which name was said twice, and in where,
    and A is not among what p3 looks back to: each edge of the circuit has an effect of its own.

    Raises:
        InputError: no prompt, or a length outside 9 to 32.

    """
    if count < 1 or not 9 <= length <= CODE:
        raise InputError(
            f"{count} prompts of {length} tokens; ask for one at least, of 9 to {CODE} tokens: "
            "four places apart, the start and the end, and no more than the model has positions."
        )
    draw = torch.Generator().manual_seed(seed)
    first_word = NAMES.stop
    clean = torch.randint(first_word, CODE, (count, length), generator=draw)
    clean[:, 0], clean[:, -1] = START, ASK
    corrupt = clean.clone()
    names = _distinct(count, len(NAMES), 3, draw) + NAMES.start
    twice, once, other = names.unbind(1)
    # Of distinct numbers in order, the second moved by 1, the third by 2: never side by side.
    places = _distinct(count, length - 5, 4, draw).sort(1).values + torch.arange(1, 5)
    swapped = torch.randint(2, (count,), generator=draw).bool()
    clean = clean.scatter(
        1,
        places[:, :3],
        torch.stack([twice.where(~swapped, once), once.where(~swapped, twice), twice], 1),
    )
    corrupt = corrupt.scatter(1, places[:, [0, 1, 3]], torch.stack([other, other, twice], 1))
    return NamePrompts(clean, corrupt, once, twice, places)


def name_model() -> GPT2LMHeadModel:
    """The hand-wired name-copying model: 4 layers, 4 heads, 32 tokens, 32 positions, width 256.

    Deterministic float32 weights, in evaluation mode; `.double()` for float64. Takes token ids; it
    has no tokenizer. Of 64 prompts a length it answers all; the logit of the answer is above
    that of the other name by 5.2 to 5.3 at 9 tokens, 4.4 to 4.8 at 14 and 1.5 to 3.3 at 32.
    """
    model = _blank_model()
    with torch.no_grad():
        for embedding, part in ((model.transformer.wte, TOKEN), (model.transformer.wpe, POSITION)):
            embedding.weight[:, part] = torch.eye(CODE)
            embedding.weight[:, BALANCE] = -1
        blocks = cast(Sequence[GPT2Block], model.transformer.h)
        norms = [norm for block in blocks for norm in (block.ln_1, block.ln_2)]
        for norm in (*norms, model.transformer.ln_f):
            norm.weight.fill_(_EPS**0.5)
        attentions = [block.attn for block in blocks]
        find_duplicates(attentions[0], head=1)
        find_previous(attentions[0], head=2)
        find_after(attentions[1], head=0)
        for head in (1, 3):
            inhibit(attentions[2], head)
        for head in (0, 2):
            move_names(attentions[3], head)
        for number, name in enumerate((*IDLE, *BYSTANDERS)):
            attention, head = attentions[int(name[1])], int(name[3])
            look(attention, head, back=number % 3)
            if name in BYSTANDERS:
                copy(attention, head, TOKEN, ASIDE, torch.eye(CODE))
        model.lm_head.weight[:, OUTPUT] = LOGIT * torch.eye(CODE)
    return model


def find_duplicates(attention: GPT2Attention, head: int) -> None:
    """score(t, s) = 6 [one name at t and s] - 6 [t = s] + 3 [START at s]; the name, halved."""
    query, key, _ = _weights(attention, head)
    query[TOKEN, :CODE] = _unscaled(MATCH_SCORE) * _names()
    key[TOKEN, :CODE] = _names()
    query[POSITION, CODE:] = -_unscaled(MATCH_SCORE) * torch.eye(CODE)
    key[POSITION, CODE:] = torch.eye(CODE)
    look_at_start(attention, head)
    copy(attention, head, TOKEN, DUPLICATE, _names() / 2)


def find_previous(attention: GPT2Attention, head: int) -> None:
    """score(t, s) = 6 [s = t - 1]; names go to `previous`."""
    query, key, _ = _weights(attention, head)
    query[POSITION, CODE:] = _unscaled(PREVIOUS_SCORE) * _back(1)
    key[POSITION, CODE:] = torch.eye(CODE)
    copy(attention, head, TOKEN, PREVIOUS, _names())


def find_after(attention: GPT2Attention, head: int) -> None:
    """score(t, s) = 6 [the name at t is previous at s] + 3 [START at s]; that name, halved."""
    query, key, _ = _weights(attention, head)
    query[TOKEN, :CODE] = _unscaled(MATCH_SCORE) * _names()
    key[PREVIOUS, :CODE] = _names()
    look_at_start(attention, head)
    copy(attention, head, PREVIOUS, DUPLICATE, _names() / 2)


def inhibit(attention: GPT2Attention, head: int) -> None:
    """score(t, s) = 6 (sum of `duplicate` at s); the name marked there, halved."""
    key = _weights(attention, head)[_KEY]
    key[DUPLICATE, CODE] = 1
    _query_bias(attention, head)[CODE] = _unscaled(MARK_SCORE)
    copy(attention, head, DUPLICATE, INHIBITED, _names() / 2)


def move_names(attention: GPT2Attention, head: int) -> None:
    """score(t, s) = 5 [a name at s] - 1.15 <inhibited at t, token at s>; the name to `output`."""
    query, key, _ = _weights(attention, head)
    query[INHIBITED, :CODE] = -_unscaled(INHIBITION) * _names()
    key[TOKEN, :CODE] = _names()
    key[TOKEN, CODE] = _names().sum(1)
    _query_bias(attention, head)[CODE] = _unscaled(NAME_SCORE)
    copy(attention, head, TOKEN, OUTPUT, _names())


def look(attention: GPT2Attention, head: int, back: int) -> None:
    """score(t, s) = 6 [s = t - back]; what the head writes stays as it is."""
    query, key, _ = _weights(attention, head)
    query[POSITION, CODE:] = _unscaled(LOOK_SCORE) * _back(back)
    key[POSITION, CODE:] = torch.eye(CODE)


def look_at_start(attention: GPT2Attention, head: int) -> None:
    """Add 3 [START at s] to the scores of a head that matches names, and START is none."""
    _query_bias(attention, head)[START] = _unscaled(SINK_SCORE)
    _weights(attention, head)[_KEY][TOKEN, START][START] = 1


def copy(
    attention: GPT2Attention,
    head: int,
    source: slice,
    target: slice,
    what: Float[Tensor, "code code"],
) -> None:
    """The head's value is one part of the stream, written into another and taken off BALANCE."""
    own = slice(head * D_HEAD, head * D_HEAD + CODE)
    _weights(attention, head)[_VALUE][source, :CODE] = torch.eye(CODE)
    attention.c_proj.weight[own, target] = what
    attention.c_proj.weight[own, BALANCE] = -what.sum(1)


def _weights(attention: GPT2Attention, head: int) -> list[Tensor]:
    """Views of a head's W_Q, W_K and W_V, each `d_model d_head`."""
    own = slice(head * D_HEAD, (head + 1) * D_HEAD)
    return [block[:, own] for block in attention.c_attn.weight.chunk(3, dim=1)]


def _query_bias(attention: GPT2Attention, head: int) -> Float[Tensor, " d_head"]:
    """A view of what is added to every query of a head."""
    own = slice(head * D_HEAD, (head + 1) * D_HEAD)
    return attention.c_attn.bias.chunk(3)[_QUERY][own]


def _names() -> Float[Tensor, "code code"]:
    """The one-hot code of names; 0 for tokens that are none."""
    code = torch.zeros(CODE, CODE)
    code[list(NAMES), list(NAMES)] = 1
    return code


def _back(steps: int) -> Float[Tensor, "code code"]:
    """For each position the code of the one `steps` before, 0 where there is none."""
    return torch.diag(torch.ones(CODE - steps), -steps)


def _unscaled(score: float) -> float:
    """The product of query and key that gives a score: attention divides it by sqrt(d_head)."""
    return score * D_HEAD**0.5


def _distinct(count: int, high: int, each: int, draw: torch.Generator) -> Int[Tensor, "row each"]:
    """Rows of distinct numbers below `high`, in random order."""
    return torch.rand(count, high, generator=draw).argsort(1)[:, :each]


def _blank_model() -> GPT2LMHeadModel:
    """A GPT-2 of the right shape with every weight 0; the global random state stays as it is."""
    config = GPT2Config(
        vocab_size=CODE,
        n_positions=CODE,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=CODE,  # the MLPs write nothing
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        layer_norm_epsilon=_EPS,
        tie_word_embeddings=False,
        bos_token_id=START,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model
