"""AttnLRP and CP-LRP of one prompt in float64, as relevance handed down step by step.

Forward and backward are written out from the papers' rules, without a gradient anywhere:

    y = W x + b        R_j = sum_i x_j W_ij R_i / y_i,  R_b = b_i R_i / y_i       (epsilon 0)
    y = a b            R_a = R_b = R / 2; a constant b hands all of it to a
    s = softmax(x)     R_x = x_i (R_i - s_i sum_j R_j)
    y = f(x)           R_x = R_y
    norms              their statistics are constants, so linear maps
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Handed:
    """Relevance of one prompt at every place where it is read."""

    value: float
    tokens: Tensor
    heads: list[Tensor]
    """`query head` of each layer."""
    maps: list[Tensor]
    """`head query key` of each layer."""
    streams: list[Tensor]
    """`position` of what enters each layer, and of what leaves the last."""
    entries: dict[str, float] = field(default_factory=dict[str, float])


@dataclass
class _Layer:
    """One layer's weights, as `y = W x + b`, and what it kept of its forward."""

    norms: list[Any]
    qkv: list[tuple[Tensor, Tensor | None]]
    out: tuple[Tensor, Tensor | None]
    mlp: list[tuple[Tensor, Tensor | None]]
    act: Any
    scale: float
    kept: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Oracle:
    """A llama or GPT-2, run and explained by hand."""

    def __init__(self, model: nn.Module, through_patterns: bool) -> None:
        self.through = through_patterns
        self.model: Any = model.double()
        self.heads = model.config.num_attention_heads
        self.llama = hasattr(model, "model")
        self.layers = _llama(self.model) if self.llama else _gpt2(self.model)
        self.entries = dict.fromkeys(("biases", "softmax"), 0.0)

    @torch.no_grad()
    def explain(self, ids: Tensor, at: int, token: int, against: int | None = None) -> Handed:
        """Relevance of `logit[token]`, less `logit[against]` where it is given, at a position."""
        embedded, positions = self._embed(ids)
        x = embedded + positions
        for layer in self.layers:
            x = self._layer(layer, x)
        normed = self._norm(self._final, x)
        logits = normed @ self.model.lm_head.weight.T
        relevance = torch.zeros_like(logits)
        relevance[at, token] = logits[at, token]
        if against is not None:
            relevance[at, against] = -logits[at, against]
        value = float(relevance.sum())
        head = self.model.lm_head.weight, None
        relevance = self._norm_back(self._final, x, self._linear_back(head, normed, relevance))
        heads, maps, streams = [], [], [relevance.sum(-1)]
        for layer in reversed(self.layers):
            relevance = self._layer_back(layer, relevance)
            heads.insert(0, layer.kept["R_z"])
            maps.insert(0, layer.kept["R_A"])
            streams.insert(0, relevance.sum(-1))
        self.entries["tokens"] = float(_share(embedded, x := embedded + positions, relevance).sum())
        self.entries["positions"] = float(_share(positions, x, relevance).sum())
        return Handed(value, streams[0], heads, maps, streams, self.entries)

    def _embed(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.llama:
            embedded = self.model.model.embed_tokens.weight[ids]
            return embedded, torch.zeros_like(embedded)
        body = self.model.transformer
        return body.wte.weight[ids], body.wpe.weight[: len(ids)]

    @property
    def _final(self) -> Any:
        return self.model.model.norm if self.llama else self.model.transformer.ln_f

    # Forward

    def _layer(self, layer: _Layer, x: Tensor) -> Tensor:
        kept = layer.kept
        kept["x"] = x
        kept["n1"] = self._norm(layer.norms[0], x)
        for name, (weight, bias) in zip("qkv", layer.qkv, strict=True):
            kept[name] = kept["n1"] @ weight.T + (0 if bias is None else bias)
        q, k, v = (_by_head(kept[name], self._width(layer)) for name in "qkv")
        turn = self._rotations(x, q.shape[-1])
        kept["turned_q"], kept["turned_k"] = (torch.einsum("tij,htj->hti", turn, y) for y in (q, k))
        group = q.shape[0] // k.shape[0]
        k, v = kept["turned_k"].repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = layer.scale * kept["turned_q"] @ k.mT
        hidden = torch.ones_like(scores).triu(1).bool()
        kept["scores"], kept["A"] = scores, scores.masked_fill(hidden, -torch.inf).softmax(-1)
        kept["z"] = kept["A"] @ v
        kept["attended"] = _linear(layer.out, _flat(kept["z"]))
        kept["middle"] = x + kept["attended"]
        kept["n2"] = self._norm(layer.norms[1], kept["middle"])
        kept["up"] = _linear(layer.mlp[0], kept["n2"])
        kept["gate"] = _linear(layer.mlp[2], kept["n2"]) if self.llama else kept["up"]
        kept["inner"] = layer.act(kept["gate"]) * (kept["up"] if self.llama else 1)
        kept["written"] = _linear(layer.mlp[1], kept["inner"])
        return kept["middle"] + kept["written"]

    def _width(self, layer: _Layer) -> int:
        return layer.qkv[0][0].shape[0] // self.heads

    def _rotations(self, x: Tensor, width: int) -> Tensor:
        """What each position's queries and keys are multiplied by, `position width width`."""
        turn = torch.eye(width, dtype=x.dtype).repeat(len(x), 1, 1)
        if self.llama:
            cos, sin = self.model.model.rotary_emb(x[None], torch.arange(len(x))[None])
            half = width // 2
            turn *= cos[0][:, :, None]
            for i in range(half):
                turn[:, i, i + half] = -sin[0][:, i]
                turn[:, i + half, i] = sin[0][:, i + half]
        return turn

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        return _linear((self._norm_map(norm, x), getattr(norm, "bias", None)), x)

    def _norm_map(self, norm: Any, x: Tensor) -> Tensor:
        """The linear map that a norm is at each position, `position width width`."""
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        if self.llama:
            spread = x.pow(2).mean(-1) + norm.variance_epsilon
            return torch.diag(norm.weight) / spread.sqrt()[:, None, None]
        spread = x.var(-1, correction=0) + norm.eps
        return norm.weight[:, None] * (eye - 1 / len(eye)) / spread.sqrt()[:, None, None]

    # Backward

    def _layer_back(self, layer: _Layer, relevance: Tensor) -> Tensor:
        kept = layer.kept
        total = kept["middle"] + kept["written"]
        written = self._linear_back(
            layer.mlp[1], kept["inner"], _share(kept["written"], total, relevance)
        )
        middle = _share(kept["middle"], total, relevance)
        if self.llama:  # gate and up get half each, and f(x) hands all of it to x
            n2 = self._linear_back(layer.mlp[2], kept["n2"], written / 2)
            n2 += self._linear_back(layer.mlp[0], kept["n2"], written / 2)
        else:
            n2 = self._linear_back(layer.mlp[0], kept["n2"], written)
        middle += self._norm_back(layer.norms[1], kept["middle"], n2)
        attended = _share(kept["attended"], kept["middle"], middle)
        z = self._linear_back(layer.out, _flat(kept["z"]), attended)
        n1 = self._attention_back(layer, _by_head(z, z.shape[-1] // self.heads))
        return _share(kept["x"], kept["middle"], middle) + self._norm_back(
            layer.norms[0], kept["x"], n1
        )

    def _attention_back(self, layer: _Layer, r_z: Tensor) -> Tensor:
        kept = layer.kept
        kept["R_z"] = r_z.sum(-1).T
        value = _by_head(kept["v"], self._width(layer))
        group = self.heads // len(value)
        v = value.repeat_interleave(group, 0)
        # What key s's channel c gave to z[t, c], by head: A_ts v_sc R_tc / z_tc.
        given = torch.einsum("hts,hsc,htc->htsc", kept["A"], v, _ratio(r_z, kept["z"]))
        share = 0.5 if self.through else 1.0
        r_v = (share * given).sum(1)
        r_a = kept["R_A"] = (share * given).sum(-1)
        r_n1 = self._linear_back(layer.qkv[2], kept["n1"], _flat(_grouped(r_v, group)))
        if not self.through:
            return r_n1
        scores = kept["scores"]
        r_scores = scores * (r_a - kept["A"] * r_a.sum(-1, keepdim=True))
        r_scores = r_scores.tril()
        self.entries["softmax"] += float(r_a.sum() - r_scores.sum())
        k = kept["turned_k"].repeat_interleave(group, 0)
        ratio = layer.scale * _ratio(r_scores, scores) / 2
        r_q = kept["turned_q"] * (ratio @ k)
        r_k = _grouped(k * (ratio.mT @ kept["turned_q"]), group)
        turn = self._rotations(kept["x"], r_q.shape[-1])
        for place, own in ((0, r_q), (1, r_k)):
            before = _by_head(kept["qkv"[place]], self._width(layer))
            after = kept[("turned_q", "turned_k")[place]]
            back = before * torch.einsum("tij,hti->htj", turn, _ratio(own, after))
            r_n1 = r_n1 + self._linear_back(layer.qkv[place], kept["n1"], _flat(back))
        return r_n1

    def _linear_back(
        self, linear: tuple[Tensor, Tensor | None], x: Tensor, relevance: Tensor
    ) -> Tensor:
        weight, bias = linear
        ratio = _ratio(relevance, _linear(linear, x))
        if bias is not None:
            self.entries["biases"] += float((bias * ratio).sum())
        return x * (ratio[:, None] @ weight).squeeze(1)

    def _norm_back(self, norm: Any, x: Tensor, relevance: Tensor) -> Tensor:
        linear = self._norm_map(norm, x), getattr(norm, "bias", None)
        return self._linear_back(linear, x, relevance)


def _llama(model: Any) -> list[_Layer]:
    found = []
    for block in model.model.layers:
        own, mlp = block.self_attn, block.mlp
        found.append(_Layer(
            [block.input_layernorm, block.post_attention_layernorm],
            [(each.weight, each.bias) for each in (own.q_proj, own.k_proj, own.v_proj)],
            (own.o_proj.weight, own.o_proj.bias),
            [(each.weight, each.bias) for each in (mlp.up_proj, mlp.down_proj, mlp.gate_proj)],
            F.silu,
            model.config.head_dim**-0.5,
        ))  # fmt: skip
    return found


def _gpt2(model: Any) -> list[_Layer]:
    found = []
    for number, block in enumerate(model.transformer.h):
        own, mlp = block.attn, block.mlp
        width = own.embed_dim // own.num_heads
        inverse = number + 1 if model.config.scale_attn_by_inverse_layer_idx else 1
        weights, biases = own.c_attn.weight.T.chunk(3), own.c_attn.bias.chunk(3)
        found.append(_Layer(
            [block.ln_1, block.ln_2],
            list(zip(weights, biases, strict=True)),
            (own.c_proj.weight.T, own.c_proj.bias),
            [(each.weight.T, each.bias) for each in (mlp.c_fc, mlp.c_proj)],
            lambda x: F.gelu(x, approximate="tanh"),
            width**-0.5 / inverse,
        ))  # fmt: skip
    return found


def _linear(linear: tuple[Tensor, Tensor | None], x: Tensor) -> Tensor:
    """`W x + b`, by one map or by one a position."""
    weight, bias = linear
    return (weight @ x[..., None]).squeeze(-1) + (0 if bias is None else bias)


def _ratio(relevance: Tensor, value: Tensor) -> Tensor:
    """`R / y`; 0 where nothing arrives."""
    return torch.where(relevance == 0, 0, relevance / value)


def _share(part: Tensor, total: Tensor, relevance: Tensor) -> Tensor:
    return part * _ratio(relevance, total)


def _by_head(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(0, 1)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def _grouped(x: Tensor, group: int) -> Tensor:
    """What the query heads of each group send, summed."""
    return x.unflatten(0, (-1, group)).sum(1)
