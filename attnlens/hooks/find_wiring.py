"""Find how a model is wired, by two runs on a small input: no class is known by name.

The first run notes what norms and linear modules are given and return, so that each reader has its
place. In the second every writer is held at what it wrote, so that nothing passes on but the stream
itself, and each has a copy of the prompt in which noise is added to it. What arrives of the noise
at a place is the writer's factor there; where something else arrives, the stream is no sum. Last,
the streams of two prompts have to differ by what the writers wrote, or somebody else writes, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.weights import HeadWeights, output_weight
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.mlp import Mlp
from attnlens.hooks.probe import evaluating
from attnlens.hooks.projections import weights_of_sites
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.residual import Passing, Stream
from attnlens.hooks.returned import first_tensor, put, same_numbers, tensors_of
from attnlens.hooks.session import Handle, Observer, Session
from attnlens.hooks.wiring import Place, Reader, Wiring, Writer, logits_reader

_STACKS = ("", "enc", "dec", "cross")
_PARTS = {"query": "q", "key": "k", "value": "v"}
_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2, torch.float64: 1e-6}
_COPIES = 64
"""Copies of the prompt in one forward."""


@torch.no_grad()
def find_wiring(
    model: nn.Module,
    anatomy: Anatomy,
    mlps: Mapping[str, Mlp],
    example: Mapping[str, Any],
) -> Wiring:
    """The wiring of a model's text stacks, found on an example of several prompts.

    Raises:
        UnsupportedModelError: a stream is no sum of what was written to it (norms after the sums,
            as in BERT, or on what is written, as in Gemma 2), something else writes to it, layers
            share modules, or the queries, keys and values of a site are of no linear module.

    """
    sites = text_sites(anatomy)
    _check(anatomy, sites)
    writers = _writers(anatomy, sites, mlps)
    weights = weights_of_sites(model, anatomy, sites, example)
    seen = _Seen()
    with evaluating(model), Session(model, anatomy, [_Watch(anatomy, writers, seen)]):
        model(**example)
    ordered = tuple(sorted(writers, key=lambda writer: seen.written[writer.name].clock))
    readers = [
        *_attention_readers(sites, weights, seen),
        *_mlp_readers(model, writers, mlps, sites, seen),
    ]
    readers.sort(key=lambda reader: seen.run(reader.modules[0]).clock)
    last = max(writer.layer for writer in writers) + 1
    readers.append(_logits(anatomy, seen, last))
    found = _factors(model, anatomy, ordered, readers, seen, example)
    _check_sums(anatomy, readers, found, seen)
    places = {r.place: Place(r.place, r.place in seen.norms, found[r.place]) for r in readers}
    return Wiring(model, anatomy, ordered, tuple(readers), places)


def text_sites(anatomy: Anatomy) -> tuple[Site, ...]:
    """The sites of a model's text stacks: those whose nodes are in its network."""
    return tuple(site for site in anatomy.sites if site.stack in _STACKS)


def _check(anatomy: Anatomy, sites: Sequence[Site]) -> None:
    if anatomy.unembedding is None:
        raise UnsupportedModelError(
            f"{anatomy.model} has no logits: it has no language-model head. Load the model with "
            "its head, so that edges lead somewhere."
        )
    shared = [site.name for site in sites if site.call or site.block is None]
    if shared or not sites:
        raise UnsupportedModelError(
            f"{anatomy.model} runs one block for several layers, or has no list of blocks "
            f"({', '.join(shared) or 'no text stack'}), so its nodes cannot be told apart."
        )


def _writers(
    anatomy: Anatomy, sites: Sequence[Site], mlps: Mapping[str, Mlp]
) -> tuple[Writer, ...]:
    """Embeddings of each list of blocks, heads of each site, MLPs; not in the order they run."""
    found: list[Writer] = []
    lists: dict[str, str] = {}
    blocks: dict[str, None] = {}
    for site in sites:
        block = site.block
        assert block is not None
        before = block.rpartition(".")[0]
        if before not in lists:
            lists[before] = name = f"{site.stack}.embed" if site.stack else "embed"
            found.append(Writer(name, "embed", block, name, 1, -1))
        stream = lists[before]
        if site.output is None:
            raise UnsupportedModelError(
                f"A gate or a norm stands between the heads of {site.name} and its output "
                "projection, so what a head writes cannot be told and its edges have no ends."
            )
        found.append(Writer(site.name, "head", site.output, stream, site.heads, site.layer))
        if block not in blocks and block in mlps:
            name = f"{site.name}.mlp"
            found.append(Writer(name, "mlp", mlps[block].name, stream, 1, site.layer))
        blocks[block] = None
    return tuple(found)


@dataclass(frozen=True)
class _Ran:
    """One run of a module, in the order of the ends of runs."""

    name: str
    clock: int
    given: Tensor
    made: Tensor


class _Seen:
    """What a run showed: norms, matrices, and what the writers wrote."""

    def __init__(self) -> None:
        self.runs: list[_Ran] = []
        self.norms: set[str] = set()
        self.written: dict[str, _Ran] = {}

    def run(self, name: str) -> _Ran:
        """The only run of a module."""
        found = [run for run in self.runs if run.name == name]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{name} runs {len(found)} times in a forward pass, so what reads the stream there "
                "cannot be told."
            )
        return found[0]

    def before(self, run: _Ran) -> str:
        """The place where a module reads: the norm that returned what it is given, or itself."""
        for earlier in reversed(self.runs[: run.clock]):
            if earlier.name in self.norms and same_numbers(earlier.made, run.given):
                return self.run(earlier.name).name
        return run.name

    def note(self, name: str, given: Tensor, made: Tensor) -> None:
        """One more run."""
        self.runs.append(_Ran(name, len(self.runs), given.detach(), made.detach()))


class _Watch(Observer):
    """Observer that fills a `_Seen`."""

    def __init__(self, anatomy: Anatomy, writers: Sequence[Writer], seen: _Seen) -> None:
        self._anatomy = anatomy
        self._writers = writers
        self._seen = seen

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on norms and matrices; on MLPs, whole ones too; on what enters first blocks."""
        return list(self._hooks(model))

    def _hooks(self, model: nn.Module) -> Iterator[Handle]:
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                self._seen.norms.add(name)
            yield module.register_forward_hook(of_this_thread(self._note(name)), with_kwargs=True)
        for writer in self._writers:
            if writer.kind == "embed":
                yield embeddings(model, self._anatomy, writer, self._embedded(writer))
            else:
                module = model.get_submodule(writer.module)
                yield module.register_forward_hook(of_this_thread(self._written(writer)))

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Any) -> None:
            given = tensors_of((*args, *kwargs.values()))
            if given and tensors_of(made):
                self._seen.note(name, given[0], first_tensor(made))

        return hook

    def _written(self, writer: Writer) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], made: Any) -> None:
            self._keep(writer, first_tensor(made))

        return hook

    def _embedded(self, writer: Writer) -> Callable[[Tensor], None]:
        return lambda stream: self._keep(writer, stream)

    def _keep(self, writer: Writer, tensor: Tensor) -> None:
        written, clock = self._seen.written, len(self._seen.runs)
        written[writer.name] = _Ran(writer.module, clock, tensor.detach(), tensor.detach())


def embeddings(
    model: nn.Module,
    anatomy: Anatomy,
    writer: Writer,
    look: Callable[[Tensor], Tensor | None],
) -> Handle:
    """Show what enters a first block to `look`, which may return another tensor to go on with."""
    site = next(site for site in anatomy.sites if site.block == writer.module)
    return Passing(model, anatomy, [Stream(site)], lambda _, stream: look(stream))


def _attention_readers(
    sites: Sequence[Site], weights: Mapping[str, HeadWeights], seen: _Seen
) -> Iterator[Reader]:
    for site in sites:
        output_weight(weights[site.name].model, site)
        projections = weights[site.name].projections
        for part, kind in _PARTS.items():
            own = projections.get(part)
            if own is None:
                getattr(weights[site.name], part)  # its error says why there is none
            assert own is not None
            place = seen.before(seen.run(own.module))
            inputs = len(own.features)
            yield Reader(site.name, kind, place, (own.module,), own, site.layer, inputs)  # type: ignore[arg-type]


def _mlp_readers(
    model: nn.Module,
    writers: Sequence[Writer],
    mlps: Mapping[str, Mlp],
    sites: Sequence[Site],
    seen: _Seen,
) -> Iterator[Reader]:
    for writer in writers:
        if writer.kind != "mlp":
            continue
        site = next(site for site in sites if f"{site.name}.mlp" == writer.name)
        assert site.block is not None
        own = [other for other in sites if other.block == site.block]
        modules = _entries(mlps[site.block], site.block, own, model, seen)
        place = seen.before(seen.run(modules[0]))
        yield Reader(writer.name, "mlp", place, modules, None, writer.layer, 1)


def _entries(
    mlp: Mlp, block: str, sites: Sequence[Site], model: nn.Module, seen: _Seen
) -> tuple[str, ...]:
    """The modules that a block's MLP begins with: itself, or the matrices given one same tensor."""
    if mlp.computed is not None:
        return (mlp.computed,)
    attention = tuple(f"{site.module}." for site in sites)
    outputs = [site.output for site in sites]
    inside = [
        run
        for run in seen.runs[: seen.run(mlp.name).clock + 1]
        if run.name.startswith(f"{block}.")
        and not f"{run.name}.".startswith(attention)
        and run.name not in outputs
        and any(weight.ndim > 1 for weight in model.get_submodule(run.name).parameters())
    ]
    for run in inside:
        if seen.before(run) != run.name and seen.before(run).startswith(f"{block}."):
            return tuple(other.name for other in inside if same_numbers(other.given, run.given))
    raise UnsupportedModelError(
        f"Where the MLP of {block} reads the stream cannot be told, so the edges into it are not "
        "known."
    )


def _logits(anatomy: Anatomy, seen: _Seen, layer: int) -> Reader:
    """Where the logits read: before the last norm, whatever scales stand after it."""
    assert anatomy.unembedding is not None
    last = seen.run(anatomy.unembedding)
    given = last.given.double().flatten()
    for run in reversed(seen.runs[: last.clock]):
        if run.name in seen.norms and run.made.numel() == given.numel():
            made = run.made.double().flatten()
            if float((made @ given) ** 2 / (made @ made * (given @ given))) > 1 - 1e-4:
                return logits_reader(run.name, (), layer)
            break
    return logits_reader(last.name, (), layer)


def _factors(
    model: nn.Module,
    anatomy: Anatomy,
    writers: Sequence[Writer],
    readers: Sequence[Reader],
    seen: _Seen,
    example: Mapping[str, Any],
) -> dict[str, dict[str, float]]:
    """By place, the factor of every writer that is seen there."""
    places = dict.fromkeys(reader.place for reader in readers)
    found: dict[str, dict[str, float]] = {place: {} for place in places}
    batch = len(next(value for value in example.values() if isinstance(value, Tensor)))
    for start in range(0, len(writers), _COPIES):
        part = writers[start : start + _COPIES]
        held = _Held(anatomy, writers, part, seen, batch, tuple(places))
        with evaluating(model), Session(model, anatomy, [held]):
            model(**_copies(example, batch, len(part) + 1))
        for place, arrived in held.arrived.items():
            for writer, noise, change in zip(part, held.noise, _changes(arrived), strict=True):
                factor = _factor(anatomy, writer, place, noise, change, arrived)
                if factor:
                    found[place][writer.name] = factor
    return found


def _copies(example: Mapping[str, Any], batch: int, times: int) -> dict[str, Any]:
    """The first prompt, so many times."""
    return {
        name: value[:1].repeat(times, *[1] * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim and len(value) == batch
        else value
        for name, value in example.items()
    }


def _changes(arrived: Float[Tensor, "copy position d"]) -> Float[Tensor, "copy position d"]:
    """What is different from the first copy, to which no noise was added."""
    wide = arrived.double()
    return wide[1:] - wide[:1]


def _factor(
    anatomy: Anatomy, writer: Writer, place: str, noise: Tensor, change: Tensor, arrived: Tensor
) -> float:
    """By what factor noise arrived; 0 where nothing did."""
    tolerance = _TOLERANCE.get(arrived.dtype, 1e-4)
    if change.shape != noise.shape:  # a place of the other stack
        return 0.0 if not bool(change.any()) else _no_sum(anatomy, writer, place)
    size = float(noise.norm())
    # Rounding goes with the stream, of which the noise may be a small part.
    rough = tolerance * max(size, float(arrived[0].double().norm()))
    if float(change.norm()) <= rough:
        return 0.0
    factor = float((change * noise).sum() / size**2)
    if float((change - factor * noise).norm()) > rough:
        return _no_sum(anatomy, writer, place)
    return 1.0 if abs(factor - 1) < 10 * tolerance else factor


def _no_sum(anatomy: Anatomy, writer: Writer, place: str) -> float:
    raise UnsupportedModelError(
        f"What {writer.name} of {anatomy.model} writes is not simply added to the stream that "
        f"{place} reads: a norm or another step stands between (post-norm blocks, norms of what is "
        "written). So the stream is no sum of what nodes wrote, and its edges are not defined. "
        "Patch whole heads instead: al.patch(lens, task), or al.path_patch(lens, task)."
    )


class _Held(Observer):
    """Observer that holds writers at what they wrote, each of `part` with noise in its own copy."""

    def __init__(
        self,
        anatomy: Anatomy,
        writers: Sequence[Writer],
        part: Sequence[Writer],
        seen: _Seen,
        batch: int,
        places: Sequence[str],
    ) -> None:
        self.arrived: dict[str, Tensor] = {}
        self._anatomy = anatomy
        self._writers = writers
        self._places = places
        generator = torch.Generator().manual_seed(0)
        own = {w.name: first_prompt(seen.written[w.name].made, batch) for w in writers}
        sizes = {name: float(tensor.double().pow(2).mean().sqrt()) for name, tensor in own.items()}
        # Beside the stream even what a silent part adds has to be seen.
        self.noise = [
            _noise(own[w.name], max(sizes[w.name], sizes[w.stream]) or 1.0, generator) for w in part
        ]
        self._held: dict[str, Tensor] = {}
        for writer in writers:
            copies = own[writer.name].repeat(len(part) + 1, 1, 1)
            for number, (other, noise) in enumerate(zip(part, self.noise, strict=True)):
                if other.name == writer.name:
                    copies[number + 1] += noise.to(copies)
            self._held[writer.name] = copies

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on writers and places."""
        return list(self._hooks(model))

    def _hooks(self, model: nn.Module) -> Iterator[Handle]:
        for writer in self._writers:
            held = self._held[writer.name]
            if writer.kind == "embed":
                look: Callable[[Tensor], Tensor] = lambda stream, held=held: held.to(stream)  # noqa: E731
                yield embeddings(model, self._anatomy, writer, look)
            else:
                module = model.get_submodule(writer.module)
                yield module.register_forward_hook(of_this_thread(_returns(held)))
        for place in self._places:
            module = model.get_submodule(place)
            yield module.register_forward_pre_hook(of_this_thread(self._arrive(place)))

    def _arrive(self, place: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.arrived[place] = (
                args[0].detach().reshape(len(self.noise) + 1, -1, args[0].shape[-1])
            )

        return hook


def _returns(held: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], made: Any) -> Any:
        first, *others = tensors_of(made)
        return put(made, [held.reshape(first.shape).to(first), *others])

    return hook


def first_prompt(made: Tensor, batch: int) -> Float[Tensor, "1 position d"]:
    """What was written for the first prompt; some modules fold prompts into one axis."""
    return made.reshape(batch, -1, made.shape[-1])[:1].clone()


def _noise(
    like: Float[Tensor, "1 position d"], size: float, generator: torch.Generator
) -> Float[Tensor, "position d"]:
    noise = torch.randn(like.shape[1:], generator=generator, dtype=torch.float64)
    return size * noise.to(like.device)


def _check_sums(
    anatomy: Anatomy,
    readers: Sequence[Reader],
    factors: Mapping[str, Mapping[str, float]],
    seen: _Seen,
) -> None:
    """Raise where two prompts' streams differ by more than what the writers wrote."""
    for place in dict.fromkeys(reader.place for reader in readers):
        given = seen.run(place).given
        stream = given.double()
        if stream.ndim != 3 or len(stream) < 2:
            continue
        wanted = stream[1] - stream[0]
        total = torch.zeros_like(wanted)
        size = stream.norm()
        for name, factor in factors[place].items():
            written = seen.written[name].made.double().reshape(len(stream), -1, stream.shape[-1])
            total += factor * (written[1] - written[0])
            size = torch.maximum(size, written.norm())
        if float((wanted - total).norm()) > 10 * _TOLERANCE.get(given.dtype, 1e-4) * float(size):
            raise UnsupportedModelError(
                f"The stream that {place} of {anatomy.model} reads holds more than embeddings, "
                "heads and MLPs wrote: some other module writes to it (a layer without attention, "
                "a router), so its edges are not all known."
            )
