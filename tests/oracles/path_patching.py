"""Path patching written out with plain hooks on a GPT-2 or a Llama: one sender, full forwards.

The first run puts z of every head, what enters each output projection, back to what it was in the
own run, and that of the sender to what it was in the other; MLPs are left to run. What receivers
read is taken off the projections of q, k and v, before rotary embedding where there is one, and put
there again in the second run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Receiver = tuple[int, int, str]
"""Layer, head and which of q, k and v; or layer, -1 and "mlp"."""


@dataclass(frozen=True)
class Layout:
    """Where things are in a model of one family."""

    blocks: Sequence[nn.Module]
    heads: int
    groups: int
    outputs: Sequence[nn.Module]
    mlps: Sequence[nn.Module]
    inputs: Sequence[Mapping[str, tuple[nn.Module, slice]]]
    """By layer and input the module that makes it, and its columns of what the module returns."""

    @classmethod
    def of(cls, model: Any) -> Layout:
        if hasattr(model, "transformer"):
            blocks, width, heads = model.transformer.h, model.config.n_embd, model.config.n_head
            parts = {kind: slice(i * width, (i + 1) * width) for i, kind in enumerate("qkv")}
            inputs = [{k: (b.attn.c_attn, part) for k, part in parts.items()} for b in blocks]
            outputs, groups = [block.attn.c_proj for block in blocks], heads
        else:
            blocks, heads = model.model.layers, model.config.num_attention_heads
            groups = model.config.num_key_value_heads
            inputs = [
                {k: (getattr(b.self_attn, f"{k}_proj"), slice(None)) for k in "qkv"} for b in blocks
            ]
            outputs = [block.self_attn.o_proj for block in blocks]
        return cls(blocks, heads, groups, outputs, [block.mlp for block in blocks], inputs)

    def columns(self, tensor: Tensor, head: int, kind: str) -> slice:
        """A head's columns of all heads side by side, those of its group for k and v."""
        grouped = kind in "kv"
        count = self.groups if grouped else self.heads
        number = head // (self.heads // self.groups) if grouped else head
        width = tensor.shape[-1] // count
        return slice(number * width, (number + 1) * width)


@torch.no_grad()
def path_logits(
    model: Any,
    own: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    sender: str,
    receivers: Sequence[Receiver] | None,
) -> Tensor:
    """Logits with one path patched; `receivers` None for the logits themselves."""
    layout = Layout.of(model)
    here, there = _kept(model, layout, own), _kept(model, layout, other)
    hooks = [_in(module, _replacing(z)) for module, z in zip(layout.outputs, here.z, strict=True)]
    hooks += _sending(layout, here, there, sender)
    hooks += (read := _Reading(layout, receivers or ())).hooks()
    with _on(hooks):
        logits = model(**own).logits
    if receivers is None:
        return logits
    with _on(read.putting()):
        return model(**own).logits


@dataclass(frozen=True)
class _Kept:
    z: list[Tensor]
    mlp: list[Tensor]
    embed: Tensor


def _kept(model: Any, layout: Layout, inputs: Mapping[str, Tensor]) -> _Kept:
    z: list[Tensor] = []
    mlp: list[Tensor] = []
    embed: list[Tensor] = []
    hooks = [_in(module, lambda x: z.append(x.clone())) for module in layout.outputs]
    hooks += [_out(module, lambda y: mlp.append(y.clone())) for module in layout.mlps]
    hooks += [_in(layout.blocks[0], lambda x: embed.append(x.clone()))]
    with _on(hooks):
        model(**inputs)
    return _Kept(z, mlp, embed[0])


def _sending(layout: Layout, here: _Kept, there: _Kept, sender: str) -> list[Callable[[], Any]]:
    if sender == "embed":
        return [_in(layout.blocks[0], _replacing(there.embed))]
    layer = int(sender[1:].partition("H")[0].partition(".")[0])
    if sender.endswith(".mlp"):
        return [_out(layout.mlps[layer], _replacing(there.mlp[layer]))]
    z = here.z[layer].clone()
    own = layout.columns(z, int(sender.partition("H")[2]), "q")
    z[..., own] = there.z[layer][..., own]
    return [_in(layout.outputs[layer], _replacing(z))]


class _Reading:
    """Takes off what receivers read, and makes the hooks that put it back."""

    def __init__(self, layout: Layout, receivers: Sequence[Receiver]) -> None:
        self._layout = layout
        self._receivers = receivers
        self._seen: dict[Receiver, Tensor] = {}

    def hooks(self) -> list[Callable[[], Any]]:
        return [self._hook(receiver, put=False) for receiver in self._receivers]

    def putting(self) -> list[Callable[[], Any]]:
        return [self._hook(receiver, put=True) for receiver in self._receivers]

    def _hook(self, receiver: Receiver, put: bool) -> Callable[[], Any]:
        layer, head, kind = receiver
        if kind == "mlp":
            module, part = self._layout.mlps[layer], slice(None)
        else:
            module, part = self._layout.inputs[layer][kind]

        def look(output: Tensor) -> Tensor | None:
            changed = output.clone()
            whole = changed[..., part]
            own = slice(None) if kind == "mlp" else self._layout.columns(whole, head, kind)
            if not put:
                self._seen[receiver] = whole[..., own].clone()
                return None
            whole[..., own] = self._seen[receiver]
            return changed

        return _out(module, look)


def _replacing(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _in(module: nn.Module, look: Callable[[Tensor], Any]) -> Callable[[], Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = look(args[0])
        return None if changed is None else (changed, *args[1:])

    return lambda: module.register_forward_pre_hook(hook)


def _out(module: nn.Module, look: Callable[[Tensor], Any]) -> Callable[[], Any]:
    return lambda: module.register_forward_hook(lambda _, __, output: look(output))


@contextmanager
def _on(hooks: Sequence[Callable[[], Any]]) -> Iterator[None]:
    handles = [hook() for hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
