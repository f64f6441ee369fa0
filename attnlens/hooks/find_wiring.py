"""Find how a model is wired, by two runs on a small input: no class is known by name.

The first run notes what norms and linear modules are given and return, so that each reader has its
place. In the second every writer is held at what it wrote, so that nothing passes on but the stream
itself, and each has a copy of the prompt in which noise is added to it. What arrives of the noise
at a place is the writer's factor there; where something else arrives, the stream is no sum. Last,
the streams of two prompts have to differ by what the writers wrote, or somebody else writes, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.weights import HeadWeights, output_weight
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.mlp import Mlp
from attnlens.hooks.module_runs import Seen, Watch
from attnlens.hooks.probe import evaluating
from attnlens.hooks.projections import weights_of_sites
from attnlens.hooks.returned import same_numbers
from attnlens.hooks.session import Session
from attnlens.hooks.stream_factors import check_sums, stream_factors
from attnlens.hooks.wiring import Place, Reader, Wiring, Writer, logits_reader

_STACKS = ("", "enc", "dec", "cross")
_PARTS = {"query": "q", "key": "k", "value": "v"}
_PROMPTS = 4
"""So many tell the linear modules of queries and keys that a rotary embedding turns."""


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
        InputError: an example of one prompt, or of too few to tell queries and keys.

    """
    sites = text_sites(anatomy)
    _check(anatomy, sites)
    if (prompts := _prompts(example)) < 2:
        raise _too_few(prompts)  # only two that differ show who else writes
    writers = _writers(anatomy, sites, mlps)
    weights = weights_of_sites(model, anatomy, sites, example)
    seen = Seen()
    with evaluating(model), Session(model, anatomy, [Watch(anatomy, writers, seen)]):
        model(**example)
    ordered = tuple(sorted(writers, key=lambda writer: seen.written[writer.name].clock))
    readers = [
        *_attention_readers(sites, weights, seen, prompts),
        *_mlp_readers(model, writers, mlps, sites, seen),
    ]
    readers.sort(key=lambda reader: seen.run(reader.modules[0]).clock)
    last = max(writer.layer for writer in writers) + 1
    readers.append(_logits(anatomy, seen, last))
    found = stream_factors(model, anatomy, ordered, readers, seen, example)
    check_sums(anatomy, readers, found, seen)
    places = {r.place: Place(r.place, r.place in seen.norms, found[r.place]) for r in readers}
    return Wiring(model, anatomy, ordered, tuple(readers), places)


def text_sites(anatomy: Anatomy) -> tuple[Site, ...]:
    """The sites of a model's text stacks: those whose nodes are in its network."""
    return tuple(site for site in anatomy.sites if site.stack in _STACKS)


def _prompts(example: Mapping[str, Any]) -> int:
    return len(next(value for value in example.values() if isinstance(value, Tensor)))


def _too_few(prompts: int) -> InputError:
    return InputError(
        f"The example that the model was opened with holds {prompts} of the {_PROMPTS} different "
        "prompts on which edges are found. Give so many, al.load(model, example=...), or none, "
        "where attnlens can make its own."
    )


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


def _attention_readers(
    sites: Sequence[Site], weights: Mapping[str, HeadWeights], seen: Seen, prompts: int
) -> Iterator[Reader]:
    for site in sites:
        output_weight(weights[site.name].model, site)
        projections = weights[site.name].projections
        for part, kind in _PARTS.items():
            own = projections.get(part)
            if own is None and prompts < _PROMPTS:
                raise _too_few(prompts)
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
    seen: Seen,
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
    mlp: Mlp, block: str, sites: Sequence[Site], model: nn.Module, seen: Seen
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


def _logits(anatomy: Anatomy, seen: Seen, layer: int) -> Reader:
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
