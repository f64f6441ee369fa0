"""Run a model with some of its edges cut: each input reads the sum that its own edges give it.

What a node wrote reaches an input along an edge that is kept as it is in this run, and along one
that is cut as it is in a reference (another prompt's run, a mean, or 0):

    in_v = in_v(reference) + sum over kept edges u -> v of (u(this run) - u(reference))

Everything after it is the model's own: norms, projections, rotary embedding, kernels, MLPs. Several
choices of edges run side by side along the batch. One head's query, key and value, and those of
other heads, read different sums, so linear modules of q, k and v are computed head by head, each
from its own input; that costs as many products as usual, but norms run once for each input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attnlens.anatomy import Site
from attnlens.anatomy.placed import weight_of
from attnlens.anatomy.weights import input_major
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.find_wiring import text_sites
from attnlens.hooks.module_runs import embeddings
from attnlens.hooks.replaced import Replaced, of_this_thread
from attnlens.hooks.returned import first_tensor
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer
from attnlens.hooks.wiring import Reader, Wiring, Writer

_SPACE = 512 * 2**20
"""Bytes that the inputs of one place may take at a time, all copies together."""


@dataclass(frozen=True)
class Activations:
    """What every writer wrote in one run, and the stream at every place.

    Attributes:
        written: by writer: z `batch position head d_v` of heads, else `batch position d_model`.
        streams: by place: `batch position d_model`.

    """

    written: Mapping[str, Tensor]
    streams: Mapping[str, Float[Tensor, "batch position d_model"]]


class Listen(Observer):
    """Observer that keeps the `Activations` of a run."""

    def __init__(self, wiring: Wiring) -> None:
        self.sites = frozenset(site.name for site in text_sites(wiring.anatomy))
        self.written: dict[str, Tensor] = {}
        self.streams: dict[str, Tensor] = {}
        self._wiring = wiring

    @property
    def activations(self) -> Activations:
        """What was kept."""
        return Activations(self.written, self.streams)

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on places and on what writes, but for heads."""
        handles = writer_hooks(self._wiring, self._keep)
        for place in self._wiring.places:
            hook = of_this_thread(self._read(place))
            handles.append(model.get_submodule(place).register_forward_pre_hook(hook))
        return handles

    def see(self, site: Site, call: Call) -> Call:
        """Keep z."""
        self.written[site.name] = call.output.detach().clone()
        return call

    def _keep(self, writer: Writer, tensor: Tensor) -> None:
        self.written[writer.name] = tensor.detach().clone()

    def _read(self, place: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            # Some blocks fold prompts and positions into one axis before their MLP.
            prompts = next(iter(self.written.values())).shape[0]
            stream = args[0].detach()
            self.streams[place] = stream.reshape(prompts, -1, stream.shape[-1]).clone()

        return hook


def writer_hooks(wiring: Wiring, keep: Callable[[Writer, Tensor], Tensor | None]) -> list[Handle]:
    """Show what embeddings and MLPs write, `batch position d_model`, to `keep`.

    What it returns, if anything, goes on in the place of embeddings; MLPs it cannot change.
    """
    shapes: dict[str, torch.Size] = {}

    def begin(writer: Writer) -> Callable[[Tensor], Tensor | None]:
        def look(stream: Tensor) -> Tensor | None:
            shapes[writer.name] = stream.shape
            return keep(writer, stream)

        return look

    def leave(writer: Writer) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], made: Any) -> None:
            # Some blocks fold prompts and positions into one axis before their MLP.
            keep(writer, first_tensor(made).reshape(shapes[writer.stream]))

        return hook

    handles: list[Handle] = []
    for writer in wiring.writers:
        if writer.kind == "embed":
            handles.append(embeddings(wiring.model, wiring.anatomy, writer, begin(writer)))
        elif writer.kind == "mlp":
            module = wiring.model.get_submodule(writer.module)
            handles.append(module.register_forward_hook(of_this_thread(leave(writer))))
    return handles


def as_reference(wiring: Wiring, clean: Activations, written: Mapping[str, Tensor]) -> Activations:
    """Activations of a run that never was, in which writers write something else.

    `in_v(reference) = in_v - sum over writers of (u - u(reference))`, biases as they are.
    """
    streams = {place: stream.clone() for place, stream in clean.streams.items()}
    for writer in wiring.writers:
        change = (written[writer.name] - clean.written[writer.name]).to(clean.written[writer.name])
        whole = wiring.added(writer, change).sum(1)
        for place, stream in streams.items():
            factor = wiring.places[place].factors.get(writer.name, 0.0)
            if factor:
                stream += factor * whole
    return Activations(written, streams)


class EdgeRun(Observer):
    """Observer under which inputs read the kept edges alone, those that are cut as in a reference.

    The batch is whole copies of the reference's prompts, one for each choice of edges in `kept`.
    `known` holds, by writer, what those write that do not run, the same in all copies.
    """

    def __init__(
        self,
        wiring: Wiring,
        reference: Activations,
        kept: Bool[Tensor, "copy sender receiver"],
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._known = known or {}
        sites = {site.name for site in text_sites(wiring.anatomy)}
        self.sites = frozenset(sites - self._known.keys())
        self._wiring = wiring
        self._reference = reference
        self._copies = len(kept)
        self._weights = _weights(wiring, kept)
        self._rows, self._sizes = _streams(wiring)
        self._changes: dict[str, Tensor] = {}
        self._ready: dict[tuple[str, str], Tensor] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on what writes and what reads."""
        # First what may be refused: a session takes back the hooks that it was given alone.
        projected = self._linear(model)
        handles = writer_hooks(self._wiring, self._wrote)
        for reader in self._wiring.readers:
            if reader.projection is not None:
                continue
            names = reader.modules or (reader.place,)
            for name in names:
                hook = of_this_thread(self._enter(reader, normed=bool(reader.modules)))
                handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        handles += [Replaced(module, forward) for module, forward in projected]
        return handles

    def _linear(self, model: nn.Module) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The linear modules of queries, keys and values, with what runs in their place."""
        found: dict[str, list[Reader]] = {}
        for reader in self._wiring.readers:
            if reader.projection is not None:
                found.setdefault(reader.projection.module, []).append(reader)
        modules = {name: model.get_submodule(name) for name in found}
        return [(modules[n], self._projected(n, modules[n], own)) for n, own in found.items()]

    def see(self, site: Site, call: Call) -> Call:
        """Note what the heads write."""
        writer = next(w for w in self._wiring.writers if w.name == site.name)
        self._wrote(writer, call.output)
        return call

    def _wrote(self, writer: Writer, written: Tensor) -> None:
        """Note by what a writer's nodes differ from the reference."""
        copies = written.unflatten(0, (self._copies, -1))
        if writer.kind == "embed":
            self._begin(writer, copies)
        self._note(writer, copies)

    def _begin(self, writer: Writer, copies: Tensor) -> None:
        """Make room for what is written to a stream, and note what is known of it."""
        copy, size, length, width = copies.shape
        wide = torch.promote_types(copies.dtype, torch.float32)
        self._changes[writer.name] = copies.new_empty(
            copy, self._sizes[writer.name], size, length, width, dtype=wide
        )
        for other in self._wiring.writers:
            if other.stream == writer.name and other.name in self._known:
                self._note(other, self._known[other.name][None])

    def _note(self, writer: Writer, copies: Tensor) -> None:
        """`copies` are `copy batch position ...`, or one that stands for all."""
        change = (copies - self._reference.written[writer.name]).flatten(0, 1)
        added = self._wiring.added(writer, change).unflatten(0, (len(copies), -1))
        self._changes[writer.stream][:, self._rows[writer.name]] = added.transpose(1, 2)

    def _inputs(self, reader: Reader, chosen: slice) -> Tensor:
        """The sums that some receivers of a reader read: `copy input prompt position d_model`."""
        return self._sums([reader], chosen)

    def _sums(self, readers: Sequence[Reader], chosen: slice) -> Tensor:
        """The same for several readers at one place, the chosen inputs of each."""
        stream = self._weights[readers[0].part, readers[0].kind][0]
        own = [self._weights[reader.part, reader.kind][1][:, chosen] for reader in readers]
        weights = torch.cat(own, dim=1)
        changes = self._changes[stream][:, : weights.shape[2]]
        base = self._reference.streams[readers[0].place]
        total = torch.bmm(weights.to(changes), changes.flatten(2)).unflatten(2, changes.shape[2:])
        return total.add_(base).to(base.dtype)

    def _enter(self, reader: Reader, normed: bool) -> Callable[..., Any]:
        """An input that is one stream: an MLP's, through its norm, or the logits' before theirs."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            stream = self._inputs(reader, slice(None))[:, 0].flatten(0, 1)
            given = self._wiring.normed(reader.place, stream) if normed else stream
            return (given.reshape(args[0].shape).to(args[0].dtype), *args[1:])

        return hook

    def _projected(
        self, name: str, module: nn.Module, readers: Sequence[Reader]
    ) -> Callable[[Tensor], Tensor]:
        """The forward of a linear module in which each head's features have an input of their own.

        Raises:
            UnsupportedModelError: the module makes more than queries, keys and values.

        """
        covered = sum(r.projection.features.numel() for r in readers if r.projection is not None)
        if covered != input_major(module).shape[1]:
            raise UnsupportedModelError(
                f"{name} makes more than queries, keys and values (a gate, say), so what its heads "
                "read cannot be told apart."
            )

        def forward(given: Tensor) -> Tensor:
            weight = input_major(module)
            made = given.new_empty(*given.shape[:-1], covered, dtype=weight.dtype)
            for reader in readers:
                self._project(reader, module, weight, made)
            return made

        return forward

    def _project(self, reader: Reader, module: nn.Module, weight: Tensor, made: Tensor) -> None:
        assert reader.projection is not None
        features = reader.projection.features.to(weight.device)
        bias = getattr(module, "bias", None)
        for chosen, given in self._normed(reader):
            own = features[chosen]
            columns = weight[:, own.flatten()].unflatten(1, own.shape)
            out = torch.einsum("cnbtd,dnh->cbtnh", given.to(weight.dtype), columns).flatten(3)
            if bias is not None:
                out = out + weight_of(module, "bias")[own.flatten()]
            made[..., own.flatten()] = out.reshape(*made.shape[:-1], -1)

    def _normed(self, reader: Reader) -> Iterator[tuple[slice, Tensor]]:
        """What a reader's linear module is given, for some inputs at a time.

        What senders wrote is the large thing here: queries, keys and values of a site that read at
        one place are summed in one pass over it, where memory allows.
        """
        together = self._together(reader)
        inputs = sum(other.inputs for other in together)
        each = 2 * self._copies * self._reference.streams[reader.place].nbytes
        if inputs * each > _SPACE:
            step = max(1, _SPACE // each)
            for start in range(0, reader.inputs, step):
                chosen = slice(start, start + step)
                yield chosen, self._wiring.normed(reader.place, self._inputs(reader, chosen))
            return
        key = reader.part, reader.kind
        if key not in self._ready:
            sums = self._sums(together, slice(None))
            normed = self._wiring.normed(reader.place, sums)
            parts = normed.split([other.inputs for other in together], dim=1)
            self._ready |= {(o.part, o.kind): n for o, n in zip(together, parts, strict=True)}
        yield slice(None), self._ready.pop(key)

    def _together(self, reader: Reader) -> list[Reader]:
        """The queries, keys and values of a site that read at the same place."""
        return [r for r in self._wiring.readers if (r.part, r.place) == (reader.part, reader.place)]


def _weights(
    wiring: Wiring, kept: Bool[Tensor, "copy sender receiver"]
) -> dict[tuple[str, str], tuple[str, Float[Tensor, "copy input sender"]]]:
    """By reader, the stream it reads and the weight of each of its senders so far, 0 where cut."""
    found: dict[tuple[str, str], tuple[str, Tensor]] = {}
    for reader, columns in wiring.columns():
        factors = wiring.factors(reader.place)
        seen = [w for w in wiring.writers if w.name in wiring.places[reader.place].factors]
        stream = seen[0].stream
        of_stream = [w for w in wiring.writers if w.stream == stream]
        until = of_stream.index(seen[-1]) + 1
        rows = wiring.senders(of_stream[:until])
        weights = kept[:, rows, columns] * factors[rows][:, None]
        found[reader.part, reader.kind] = stream, weights.transpose(1, 2).contiguous()
    return found


def _streams(wiring: Wiring) -> tuple[dict[str, slice], dict[str, int]]:
    """Where each writer's nodes are among those of its stream, and how many a stream has."""
    rows: dict[str, slice] = {}
    sizes: dict[str, int] = {}
    for writer in wiring.writers:
        start = sizes.get(writer.stream, 0)
        rows[writer.name] = slice(start, start + writer.heads)
        sizes[writer.stream] = start + writer.heads
    return rows, sizes
