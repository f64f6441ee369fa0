"""Information-flow routes the slow way: all parts of every sum at once, then every path one by one.

For GPT-2 and Llama, whose blocks are read by the names of their modules, in eager attention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (step, kind, head, query, source) -> number; of one layer
Edge = tuple[int, str, int, int, int]


@dataclass
class Layer:
    """The two sums of a block: parts by edge, and the bias of the first; `position d_model`."""

    attention: dict[Edge, Tensor]
    mlp: dict[Edge, Tensor]
    bias: Tensor
    after_attention: Tensor
    after_mlp: Tensor


@torch.no_grad()
def layers_of(model: Any, ids: Tensor) -> list[Layer]:
    """Every part of every sum of one prompt, `ids` of shape `position`."""
    model.set_attn_implementation("eager")
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    seen: dict[tuple[int, str], Tensor] = {}

    def note(layer: int, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[layer, name] = (output if isinstance(output, Tensor) else output[0])[0]

        return hook

    handles = []
    for layer, block in enumerate(blocks):
        handles.append(block.mlp.register_forward_hook(note(layer, "mlp")))
        handles.append(block.register_forward_hook(note(layer, "left")))
        inner = block.attn.c_attn if hasattr(block, "attn") else block.self_attn.v_proj
        handles.append(inner.register_forward_hook(note(layer, "values")))
    out = model(ids[None], output_attentions=True, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for layer, block in enumerate(blocks):
        weights, values = out.attentions[layer][0], seen[layer, "values"]
        found.append(
            _layer(block, weights, values, out.hidden_states[layer][0], seen[layer, "mlp"])
        )
        assert torch.allclose(found[-1].after_mlp, seen[layer, "left"], atol=1e-10)
    return found


def _layer(block: Any, weights: Tensor, values: Tensor, stream: Tensor, mlp: Tensor) -> Layer:
    heads, length, _ = weights.shape
    if hasattr(block, "attn"):
        width = stream.shape[-1]
        values, project, bias = (
            values[:, 2 * width :],
            block.attn.c_proj.weight,
            block.attn.c_proj.bias,
        )
    else:
        project = block.self_attn.o_proj.weight.T
        bias = torch.zeros(stream.shape[-1], dtype=stream.dtype)
        if block.self_attn.o_proj.bias is not None:
            bias = block.self_attn.o_proj.bias
    size = project.shape[0] // heads
    groups = values.shape[-1] // size
    attention: dict[Edge, Tensor] = {}
    after = stream + bias
    for h in range(heads):
        group = h // (heads // groups)
        own = values[:, group * size : (group + 1) * size] @ project[h * size : (h + 1) * size]
        for t in range(length):
            for s in range(length):
                attention[0, "attention", h, t, s] = weights[h, t, s] * own[s]
    for (_, _, _, t, _), part in attention.items():
        after = after.index_add(0, torch.tensor([t]), part[None])
    for t in range(length):
        attention[0, "residual", -1, t, t] = stream[t]
    after_mlp = after + mlp
    below = {(1, "residual", -1, t, t): after[t] for t in range(length)}
    below |= {(1, "mlp", -1, t, t): mlp[t] for t in range(length)}
    return Layer(attention, below, bias, after, after_mlp)


@torch.no_grad()
def importances(layer: Layer, step: int) -> tuple[dict[Edge, float], dict[int, float]]:
    """Importance of each edge of a sum, and of the bias at each row."""
    parts, total = (
        (layer.attention, layer.after_attention) if step == 0 else (layer.mlp, layer.after_mlp)
    )

    def nearer(t: int, part: Tensor) -> float:
        return max(0.0, float(total[t].abs().sum() - (total[t] - part).abs().sum()))

    edges = {edge: nearer(edge[3], part) for edge, part in parts.items()}
    bias = {t: nearer(t, layer.bias) if step == 0 else 0.0 for t in range(len(total))}
    sums = dict(bias)
    for edge, value in edges.items():
        sums[edge[3]] += value
    return (
        {edge: value / sums[edge[3]] for edge, value in edges.items()},
        {t: value / sums[t] for t, value in bias.items()},
    )


def kept(
    edges: dict[Edge, float], bias: dict[int, float], threshold: float
) -> tuple[dict[Edge, float], dict[int, float]]:
    """Those of at least the threshold, or the strongest of a row, scaled to sum to 1."""
    best: dict[int, float] = defaultdict(float)
    for edge, value in edges.items():
        best[edge[3]] = max(best[edge[3]], value)
    strong = {
        edge: value
        for edge, value in edges.items()
        if value > 0 and (value >= threshold or value == best[edge[3]])
    }
    held = {t: value if value >= threshold else 0.0 for t, value in bias.items()}
    sums = dict(held)
    for edge, value in strong.items():
        sums[edge[3]] += value
    return (
        {edge: value / sums[edge[3]] for edge, value in strong.items()},
        {t: value / sums[t] for t, value in held.items()},
    )


@dataclass
class Traced:
    """What the paths from the target down say."""

    edges: list[dict[Edge, float]]
    """Weights of the edges that a path takes, by layer."""
    tokens: dict[int, float]
    heads: dict[tuple[int, int], float]
    lost: float


def trace(found: list[Layer], target: int, threshold: float) -> Traced:
    """Follow every path from the target down, one at a time."""
    steps = [[kept(*importances(layer, step), threshold) for step in (0, 1)] for layer in found]
    traced = Traced([{} for _ in found], defaultdict(float), defaultdict(float), 0.0)
    waiting: list[tuple[int, int, float]] = [(2 * len(found) - 1, target, 1.0)]
    while waiting:
        level, row, weight = waiting.pop()
        if level < 0:
            traced.tokens[row] += weight
            continue
        edges, bias = steps[level // 2][level % 2]
        traced.lost += weight * bias[row]
        for edge, share in _into(edges, row):
            traced.edges[level // 2][edge] = share
            if edge[2] >= 0:
                traced.heads[level // 2, edge[2]] += weight * share
            waiting.append((level - 1, edge[4], weight * share))
    return traced


def _into(edges: dict[Edge, float], row: int) -> Iterator[tuple[Edge, float]]:
    return ((edge, share) for edge, share in edges.items() if edge[3] == row)
