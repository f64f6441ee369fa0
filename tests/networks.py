"""Networks written by hand: what a model of some layers and heads would have."""

from __future__ import annotations

import torch

from attnlens.anatomy.network import LOGITS, Network, Receiver, Sender
from attnlens.zoo.naming import name_circuit


def network(layers: int, heads: int, groups: int | None = None, mlps: bool = True) -> Network:
    """All edges of a decoder whose MLPs read its heads; keys and values shared by group."""
    groups = groups or heads
    senders, receivers = [Sender("embed", "embed", "embed", -1)], []
    before: list[int] = []  # how many senders each receiver reads
    for layer in range(layers):
        site, start = f"L{layer}", len(senders)
        for head in range(heads):
            name = f"{site}H{head}"
            senders.append(Sender(name, "head", site, layer, head))
            receivers.append(Receiver(f"{name}<q>", "q", site, layer, head, (name,)))
        for kind in ("k", "v"):
            for group in range(groups):
                own = range(group * heads // groups, (group + 1) * heads // groups)
                nodes = tuple(f"{site}H{head}" for head in own)
                name = nodes[0] if groups == heads else f"{site}G{group}"
                receivers.append(Receiver(f"{name}<{kind}>", kind, site, layer, group, nodes))
        before += [start] * (len(receivers) - len(before))
        if mlps:
            name = f"{site}.mlp"
            receivers.append(Receiver(name, "mlp", name, layer, 0, (name,)))
            before.append(len(senders))
            senders.append(Sender(name, "mlp", name, layer))
    receivers.append(Receiver(LOGITS, "logits", LOGITS, layers, 0, (LOGITS,)))
    before.append(len(senders))
    exists = torch.arange(len(senders))[:, None] < torch.tensor(before)
    return Network(tuple(senders), tuple(receivers), exists)


def naming() -> tuple[Network, torch.Tensor]:
    """The network of the name model, and which of its edges are the known circuit."""
    own = network(4, 4, mlps=False)
    names = [f"{a}->{b}<{kind}>" if kind else f"{a}->{b}" for a, b, kind in name_circuit()]
    return own, own.mask(own.find(names))


def random_mask(own: Network, count: int, seed: int = 0) -> torch.Tensor:
    """So many edges, drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    return own.mask(torch.randperm(len(own), generator=draw)[:count])
