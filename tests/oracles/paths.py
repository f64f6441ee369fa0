"""The forward pass of a GPT-2 with one edge replaced, written out: slow, and right to look at.

The stream that an input (q, k or v of a head, an MLP, the logits) reads is the sum of what `embed`,
earlier heads and earlier MLPs wrote. An edge is replaced by putting what its sender wrote in
another run in place of what it writes in this one, in the input of its receiver and nowhere else;
all that follows from it is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import GPT2LMHeadModel

Edge = tuple[str, str, str]
Written = dict[str, Tensor]
"""By sender (`embed`, `L0H1`, `M0`): what it adds to the stream, `batch position d_model`."""
Offsets = Mapping[tuple[str, str], Tensor]
"""By input: what is added to the stream that it reads."""


def edges_of(model: GPT2LMHeadModel) -> list[Edge]:
    """Every edge between embed, heads and logits of a GPT-2, MLPs left out."""
    senders, found = ["embed"], []
    for layer in range(model.config.n_layer):
        heads = [f"L{layer}H{head}" for head in range(model.config.n_head)]
        found += [(s, r, kind) for s in senders for r in heads for kind in "qkv"]
        senders += heads
    return found + [(sender, "logits", "") for sender in senders]


def run(
    model: GPT2LMHeadModel,
    ids: Tensor,
    edge: Edge | None = None,
    other: Written | None = None,
    offsets: Offsets | None = None,
    known: Written | None = None,
) -> tuple[Tensor, Written]:
    """Logits, and what each sender wrote; with `edge`, its sender in its receiver is `other`'s.

    `known` is what senders write without the edge: layers before its receiver are not run again.
    """
    body = model.transformer
    written: Written = {"embed": body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))}
    first = len(body.h) if edge and edge[1] == "logits" else int(edge[1][1]) if edge else 0

    def reads(stream: Tensor, receiver: str, kind: str = "") -> Tensor:
        if edge is not None and other is not None and edge[1:] == (receiver, kind):
            stream = stream - written[edge[0]] + other[edge[0]]
        offset = (offsets or {}).get((receiver, kind))
        return stream if offset is None else stream + offset

    for layer, block in enumerate(body.h):
        if known is not None and layer < first:
            written |= {name: known[name] for name in known if name[1:2] == str(layer)}
            continue
        stream = sum(written.values())
        for head in range(model.config.n_head):
            name = f"L{layer}H{head}"
            written[name] = _head(block, head, *(reads(stream, name, kind) for kind in "qkv"))
        written[f"B{layer}"] = block.attn.c_proj.bias.expand_as(stream)
        written[f"M{layer}"] = block.mlp(
            _normed(block.ln_2, reads(sum(written.values()), f"M{layer}"))
        )
    return model.lm_head(_normed(body.ln_f, reads(sum(written.values()), "logits"))), written


def gradient_estimates(
    model: GPT2LMHeadModel, clean: Tensor, corrupt: Tensor, score: Callable[[Tensor], Tensor]
) -> dict[Edge, Tensor]:
    """`sum (u(x') - u(x)) . dM/d in_v` of each edge, a number a prompt (attribution patching)."""
    with torch.no_grad():
        _, other = run(model, corrupt)
    inputs = sorted({(receiver, kind) for _, receiver, kind in edges_of(model)})
    shape = other["embed"]
    offsets = {name: torch.zeros_like(shape, requires_grad=True) for name in inputs}
    logits, written = run(model, clean, offsets=offsets)
    gradients = torch.autograd.grad(score(logits).sum(), list(offsets.values()))
    by_input = dict(zip(offsets, gradients, strict=True))
    return {
        (sender, receiver, kind): (
            (other[sender] - written[sender].detach()) * by_input[receiver, kind]
        ).sum((1, 2))
        for sender, receiver, kind in edges_of(model)
    }


def _head(block: nn.Module, head: int, *streams: Tensor) -> Tensor:
    """What one head writes, its q, k and v read from a stream each."""
    attention = block.attn
    width = attention.head_dim
    own = slice(head * width, (head + 1) * width)
    weights, biases = attention.c_attn.weight.chunk(3, 1), attention.c_attn.bias.chunk(3)
    q, k, v = (
        _normed(block.ln_1, stream) @ weight[:, own] + bias[own]
        for stream, weight, bias in zip(streams, weights, biases, strict=True)
    )
    scores = q @ k.mT / width**0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v @ attention.c_proj.weight[own]


def _normed(norm: nn.LayerNorm, stream: Tensor) -> Tensor:
    return layer_norm(stream, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
