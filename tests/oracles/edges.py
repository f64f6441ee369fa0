"""Forward passes in which each input reads edges of its own, written out: slow, right to look at.

Every input (q, k or v of a head or group, an MLP, the logits) reads the sum over all earlier
senders (`embed`, heads, MLPs) of what each wrote: in this run along an edge that is kept, in
another run along one that is cut. Biases of output projections are no sender's: all read them.
Edges have the names that `Network.edge_names` gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

Written = dict[str, Tensor]
"""By sender: what it adds to the stream, `batch position d_model`."""


class Decoder(ABC):
    """A decoder of serial blocks, taken to pieces."""

    layers: int
    heads: int
    groups: int

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first block."""

    @abstractmethod
    def head(self, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What a head adds, its query, key and value read from a stream each."""

    @abstractmethod
    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """What an MLP adds."""

    @abstractmethod
    def logits(self, stream: Tensor) -> Tensor:
        """The logits of a stream."""

    def bias(self, layer: int) -> Tensor | float:
        """What attention of a layer adds whatever its heads write."""
        return 0.0

    def shared(self, layer: int, head: int) -> str:
        """The name of whose key and value a head reads."""
        if self.groups == self.heads:
            return f"L{layer}H{head}"
        return f"L{layer}G{head * self.groups // self.heads}"


def run(
    model: Decoder,
    ids: Tensor,
    kept: Collection[str] | None = None,
    other: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Written]:
    """Logits, and what each sender wrote; edges that are not `kept` carry what `other` holds."""
    written: Written = {"embed": model.embed(ids)}
    constant = torch.zeros_like(written["embed"])

    def reads(receiver: str) -> Tensor:
        total = constant.clone()
        for sender, own in written.items():
            cut = kept is not None and f"{sender}->{receiver}" not in kept
            if cut:
                assert other is not None
            total += other[sender] if cut and other is not None else own
        return total

    for layer in range(model.layers):
        new: Written = {}
        for head in range(model.heads):
            name, shared = f"L{layer}H{head}", model.shared(layer, head)
            streams = reads(f"{name}<q>"), reads(f"{shared}<k>"), reads(f"{shared}<v>")
            new[name] = model.head(layer, head, *streams)
        written |= new
        constant = constant + model.bias(layer)
        written[f"L{layer}.mlp"] = model.mlp(layer, reads(f"L{layer}.mlp"))
    return model.logits(reads("logits")), written


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one head, `batch position width`."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


class Gpt2(Decoder):
    """A GPT2LMHeadModel."""

    def __init__(self, model: Any) -> None:
        self.layers, self.heads = model.config.n_layer, model.config.n_head
        self.groups = self.heads
        self._model, self._body = model, model.transformer

    def embed(self, ids: Tensor) -> Tensor:
        return self._body.wte(ids) + self._body.wpe(torch.arange(ids.shape[1]))

    def head(self, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block = self._body.h[layer]
        attention = block.attn
        width = attention.head_dim
        own = slice(head * width, (head + 1) * width)
        weights, biases = attention.c_attn.weight.chunk(3, 1), attention.c_attn.bias.chunk(3)
        made = [
            _layer_normed(block.ln_1, stream) @ weight[:, own] + bias[own]
            for stream, weight, bias in zip((q, k, v), weights, biases, strict=True)
        ]
        return attended(*made) @ attention.c_proj.weight[own]

    def bias(self, layer: int) -> Tensor:
        return self._body.h[layer].attn.c_proj.bias

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        block = self._body.h[layer]
        return block.mlp(_layer_normed(block.ln_2, stream))

    def logits(self, stream: Tensor) -> Tensor:
        return self._model.lm_head(_layer_normed(self._body.ln_f, stream))


class Llama(Decoder):
    """A LlamaForCausalLM, whose norms are in the dtype of the stream."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.groups = config.num_key_value_heads
        self._model, self._body = model, model.model

    def embed(self, ids: Tensor) -> Tensor:
        return self._body.embed_tokens(ids)

    def head(self, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block = self._body.layers[layer]
        attention, group = block.self_attn, head * self.groups // self.heads
        parts = ((q, "q_proj", head), (k, "k_proj", group), (v, "v_proj", group))
        width = attention.head_dim
        query, key, value = (
            _rms_normed(block.input_layernorm, stream)
            @ getattr(attention, name).weight[at * width : (at + 1) * width].T
            for stream, name, at in parts
        )
        # The angles are the model's own, which it computes in float32.
        cos, sin = self._body.rotary_emb(query, torch.arange(query.shape[1])[None])
        made = attended(_turned(query, cos, sin), _turned(key, cos, sin), value)
        return made @ attention.o_proj.weight[:, head * width : (head + 1) * width].T

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        block = self._body.layers[layer]
        given = _rms_normed(block.post_attention_layernorm, stream)
        mlp = block.mlp
        return mlp.down_proj(silu(mlp.gate_proj(given)) * mlp.up_proj(given))

    def logits(self, stream: Tensor) -> Tensor:
        return self._model.lm_head(_rms_normed(self._body.norm, stream))


def _layer_normed(norm: nn.LayerNorm, stream: Tensor) -> Tensor:
    return layer_norm(stream, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _rms_normed(norm: Any, stream: Tensor) -> Tensor:
    size = (stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return norm.weight * stream / size


def _turned(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: the first half of a head's width turned with the second."""
    half = part.shape[-1] // 2
    turned = torch.cat([-part[..., half:], part[..., :half]], dim=-1)
    return part * cos + turned * sin
