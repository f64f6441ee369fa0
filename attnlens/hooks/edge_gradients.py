"""Edge attribution: by how much a metric would change, to first order, were each edge another's.

    score(u -> v) = sum over positions of (u' - u) . dM/d in_v

One forward and one backward give what all receivers ask for, as gradients of q, k and v as their
linear modules return them, and of what MLPs and the logits are given. From there the way back to
the stream that a receiver read is short: its head's columns of the module, and the norm. It is gone
for some positions at a time, for all receivers of a place together, and what the senders wrote is
`z W_O` of these positions alone; one matrix product then scores all pairs. So nothing of the size
of edges times width is ever held.

Syed et al. 2023 (Attribution patching outperforms automated circuit discovery); with gradients
along a line of inputs Hanna et al. 2024 (Have faith in faithfulness).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.anatomy import Site
from attnlens.anatomy.weights import input_major
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.edge_run import Activations, Listen, writer_hooks
from attnlens.hooks.find_wiring import text_sites
from attnlens.hooks.gradients import MetricOf, usable
from attnlens.hooks.probe import evaluating
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.returned import first_tensor, put, tensors_of
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer, Session
from attnlens.hooks.wiring import Reader, Wiring, Writer

_SPACE = 2**27
"""Bytes that what the senders wrote may take, at some positions of all prompts at a time."""


@dataclass(frozen=True)
class Asked:
    """What readers ask of the stream, and how the metric changes with what writers wrote.

    Attributes:
        activations: what writers wrote, and the stream at every place.
        reads: by module that reads: gradient of what a linear module of q, k and v returned, of
            what an MLP's first modules were given, of the stream itself for the logits.
        writes: by writer: gradient of z, of an MLP's output, of embeddings.

    """

    activations: Activations
    reads: Mapping[str, Tensor]
    writes: Mapping[str, Tensor]


def ask(
    wiring: Wiring,
    inputs: Mapping[str, Any],
    metric: MetricOf,
    observers: tuple[Observer, ...] = (),
    embeddings: Mapping[str, Tensor] | None = None,
) -> Asked:
    """Run a batch forward and backward; `embeddings` go in the place of the model's, by writer.

    Raises:
        InputError: a metric without a gradient, or with one that is not finite.

    """
    graph = _Graph(wiring, embeddings or {})
    model, anatomy = wiring.model, wiring.anatomy
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        Session(model, anatomy, [graph, *observers]),
    ):
        value = metric(model(**usable(model, inputs))).sum()
        if not value.requires_grad:
            raise InputError(
                "The metric has no gradient: accuracy does not. Take a loss or a logit difference."
            )
        named = {("read", name): tensor for name, tensor in graph.reads.items()}
        named |= {("write", name): tensor for name, tensor in graph.writes.items()}
        # What the metric does not depend on has a gradient of 0.
        found = torch.autograd.grad(
            value, list(named.values()), allow_unused=True, materialize_grads=True
        )
    gradients = dict(zip(named, found, strict=True))
    bad = [name for (_, name), gradient in gradients.items() if not bool(gradient.isfinite().all())]
    if bad:
        raise InputError(
            f"The metric's gradient at {bad[0]} is not finite: the logits hold NaN or infinity, or "
            "the model's dtype overflows. Load it in float32 or bfloat16, and look at its logits "
            "(lens.logits)."
        )
    return Asked(
        graph.activations,
        {name: gradient for (side, name), gradient in gradients.items() if side == "read"},
        {name: gradient for (side, name), gradient in gradients.items() if side == "write"},
    )


class _Graph(Observer):
    """Observer that keeps within one autograd graph what is read and what is written."""

    def __init__(self, wiring: Wiring, embeddings: Mapping[str, Tensor]) -> None:
        self.sites = frozenset(site.name for site in text_sites(wiring.anatomy))
        self.reads: dict[str, Tensor] = {}
        self.writes: dict[str, Tensor] = {}
        self._listen = Listen(wiring)
        self._wiring = wiring
        self._embeddings = embeddings

    @property
    def activations(self) -> Activations:
        """What was written and read, without a graph."""
        return self._listen.activations

    def attach(self, model: nn.Module) -> list[Handle]:
        """Hooks on readers and writers."""
        handles = [*writer_hooks(self._wiring, self._begin), *self._listen.attach(model)]
        for writer in self._wiring.writers:
            if writer.kind == "mlp":
                hook = of_this_thread(self._wrote(writer))
                handles.append(model.get_submodule(writer.module).register_forward_hook(hook))
        linear = {r.projection.module for r in self._wiring.readers if r.projection is not None}
        for name in linear:
            hook = of_this_thread(self._returned(name))
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        given = [n for r in self._wiring.readers if r.projection is None for n in _entries(r)]
        for name in dict.fromkeys(given):
            hook = of_this_thread(self._given(name))
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        return handles

    def see(self, site: Site, call: Call) -> Call:
        """Keep z."""
        if not torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{site.name} runs without gradients, inside reentrant checkpointing or "
                "torch.no_grad. Turn checkpointing off."
            )
        self.writes[site.name] = call.output
        return self._listen.see(site, call)

    def _begin(self, writer: Writer, tensor: Tensor) -> Tensor | None:
        """Embeddings begin the graph."""
        if writer.kind != "embed":
            return None
        own = self._embeddings.get(writer.name, tensor)
        self.writes[writer.name] = leaf = own.detach().to(tensor).requires_grad_()
        return leaf.clone()

    def _wrote(self, writer: Writer) -> Callable[..., Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], made: Any) -> Any:
            tensors = tensors_of(made)
            self.writes[writer.name] = first_tensor(made)
            # The model gets a copy: what it does in place must not change what was kept.
            return put(made, [tensors[0].clone(), *tensors[1:]])

        return hook

    def _returned(self, name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Any, ...], made: Tensor) -> Tensor:
            self.reads[name] = made
            return made.clone()

        return hook

    def _given(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """One tensor may be given to several modules: each gets a node of its own."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self.reads[name] = own = args[0].clone()
            return (own, *args[1:])

        return hook


def _entries(reader: Reader) -> tuple[str, ...]:
    """The modules whose input is read: the logits read the stream as it enters their place."""
    return reader.modules or (reader.place,)


def edge_scores(
    wiring: Wiring,
    change: Mapping[str, Tensor],
    asked: Asked,
    real: Mapping[str, Bool[Tensor, "batch position"] | None],
) -> Float[Tensor, "batch sender receiver"]:
    """`sum over positions of (u' - u) . dM/d in_v` of each prompt, in float64; 0 of no edge.

    `change` holds `u' - u` by writer, as `Activations.written` does; padding, where `real` of the
    embeddings' name says so, counts nothing.
    """
    batch = next(iter(change.values())).shape[0]
    scores = torch.zeros(batch, *wiring.network.exists.shape, dtype=torch.float64)
    for stream in dict.fromkeys(writer.stream for writer in wiring.writers):
        writers = [writer for writer in wiring.writers if writer.stream == stream]
        for at in _blocks(wiring, writers, change):
            sent = torch.cat([_added(wiring, w, change[w.name], at) for w in writers], dim=1)
            mask = real.get(stream)
            if mask is not None:
                sent = sent * mask[at][:, None, :, None]
            for place, readers in _by_place(wiring, stream).items():
                # Of what senders wrote, those before the place are the first.
                seen = [w for w in writers if w.name in wiring.places[place].factors]
                rows = wiring.senders(writers[: writers.index(seen[-1]) + 1])
                wanted = _gradients(wiring, place, readers, asked, at).to(sent)
                found = torch.bmm(sent[:, : len(rows)].flatten(2), wanted.flatten(2).mT)
                factors = wiring.factors(place)[rows][:, None]
                cells = torch.tensor(rows)[:, None], torch.tensor(wiring.inputs(readers))
                scores[at[0]][:, *cells] += found.double().cpu() * factors
    return scores


def node_scores(
    wiring: Wiring,
    change: Mapping[str, Tensor],
    asked: Asked,
    real: Mapping[str, Bool[Tensor, "batch position"] | None],
) -> Float[Tensor, "batch sender"]:
    """`sum over positions of (u' - u) . dM/du` of each prompt and node, in float64."""
    found: list[Tensor] = []
    for writer in wiring.writers:
        own = change[writer.name]
        gradient = asked.writes[writer.name].reshape(own.shape)
        wide = torch.promote_types(own.dtype, torch.float32)
        products = (own.to(wide) * gradient.to(wide)).sum(-1)
        products = products if writer.kind == "head" else products[..., None]
        mask = real.get(writer.stream)
        if mask is not None:
            products = products.masked_fill(~mask[..., None], 0)
        found.append(products.sum(1).double().cpu())
    return torch.cat(found, dim=1)


Block = tuple[slice, slice]
"""Some prompts and some positions."""


def _blocks(wiring: Wiring, writers: Sequence[Writer], change: Mapping[str, Tensor]) -> list[Block]:
    """All positions of all prompts, as many at a time as what was written there leaves room for."""
    batch, length, width = change[writers[0].name].shape
    rows = max(1, _SPACE // (4 * width * sum(writer.heads for writer in writers)))
    prompts = max(1, rows // length)
    return [
        (slice(b, b + prompts), slice(t, t + rows))
        for b in range(0, batch, prompts)
        for t in range(0, length, rows)
    ]


def _added(
    wiring: Wiring, writer: Writer, change: Tensor, at: Block
) -> Float[Tensor, "batch sender position d_model"]:
    part = change[at]
    wide = torch.promote_types(part.dtype, torch.float32)
    return wiring.added(writer, part.to(wide))


def _by_place(wiring: Wiring, stream: str) -> dict[str, list[Reader]]:
    """The readers of a stream, by place."""
    own = {writer.name for writer in wiring.writers if writer.stream == stream}
    found: dict[str, list[Reader]] = {}
    for reader in wiring.readers:
        if own.intersection(wiring.places[reader.place].factors):
            found.setdefault(reader.place, []).append(reader)
    return found


def _gradients(
    wiring: Wiring, place: str, readers: list[Reader], asked: Asked, at: Block
) -> Float[Tensor, "batch receiver position d_model"]:
    """The metric's gradient by the stream, as each receiver at a place reads it."""
    stream = asked.activations.streams[place]
    found = torch.cat([_given(wiring, reader, asked, stream.shape, at) for reader in readers], 1)
    if not wiring.places[place].norm or not readers[0].modules:
        return found
    with torch.enable_grad(), torch.inference_mode(False):
        wide = stream[at][:, None].repeat(1, found.shape[1], 1, 1).requires_grad_()
        normed = wiring.normed(place, wide)
        return torch.autograd.grad(normed, wide, found.to(normed))[0]


def _given(
    wiring: Wiring, reader: Reader, asked: Asked, shape: torch.Size, at: Block
) -> Float[Tensor, "batch input position d_model"]:
    """The gradient by what a reader's modules are given, for each of its inputs."""
    if reader.projection is None:
        total = sum(asked.reads[name] for name in _entries(reader))
        assert isinstance(total, Tensor)
        return total.reshape(shape)[at][:, None]
    made = asked.reads[reader.projection.module]
    made = made.reshape(*shape[:2], -1)[at]
    features = reader.projection.features.to(made.device)
    weight = input_major(wiring.model.get_submodule(reader.projection.module))
    columns = weight[:, features.flatten()].unflatten(1, features.shape).to(made)
    own = made[..., features.flatten()].unflatten(-1, features.shape)
    return torch.einsum("btnh,dnh->bntd", own, columns)
