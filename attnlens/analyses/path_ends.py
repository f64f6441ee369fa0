"""Where paths begin and end: heads, one input of a head, MLPs, the embeddings, the logits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from attnlens.anatomy import Anatomy, Head, HeadSpec
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.edits.base import StreamEdit
from attnlens.lens import Lens

EndSpec = str | Head | tuple[int, int] | Iterable["str | Head | tuple[int, int]"]

Input = Literal["q", "k", "v"]
INPUTS: tuple[Input, ...] = ("q", "k", "v")
LOGITS, EMBED, MLP = "logits", "embed", ".mlp"


@dataclass(frozen=True)
class End:
    """A sender or a receiver.

    Attributes:
        name: `L3H5`, `L3H5<k>`, `L3.mlp`, `embed`, `dec.embed` or `logits`.
        kind: what it is.
        site: the head's site, or the first one of the block whose MLP it is or that `embed` enters;
            "" for the logits.
        place: where it stands in a forward pass; a sender is below what has a later place.
        head: the head.
        inputs: which inputs of a receiving head.

    """

    name: str
    kind: Literal["head", "mlp", "embed", "logits"]
    site: str
    place: tuple[int, int]
    head: Head | None = None
    inputs: tuple[Input, ...] = INPUTS

    def precedes(self, other: End) -> bool:
        """Whether what it writes can reach the other without a head between."""
        return self.place < other.place


def senders_of(lens: Lens, spec: EndSpec | None) -> tuple[End, ...]:
    """The senders that a specification names, all heads where there is none, each once.

    Raises:
        HeadError: a head or layer that the model does not have.
        InputError: what cannot send.
        UnsupportedModelError: the model has no such MLP or embeddings that can be edited.

    """
    found = _ends(lens, "all" if spec is None else spec)
    for end in found:
        if end.kind == "logits" or "<" in end.name:
            raise InputError(f"{end.name} sends nothing: senders are heads, 'L3.mlp' and 'embed'.")
    return found


def receivers_of(lens: Lens, spec: EndSpec) -> tuple[End, ...]:
    """The receivers that a specification names, each once.

    Raises:
        HeadError, UnsupportedModelError: as for senders.
        InputError: `embed`, or `logits` beside others.

    """
    found = _ends(lens, spec)
    for end in found:
        if end.kind == "embed":
            raise InputError("embed receives nothing: receivers are logits, heads and 'L3.mlp'.")
        if end.kind == "logits" and len(found) > 1:
            raise InputError(
                "The logits receive all that reaches them on any path: give logits alone, or the "
                f"others ({', '.join(own.name for own in found if own is not end)}) without it."
            )
    return found


def _ends(lens: Lens, spec: EndSpec) -> tuple[End, ...]:
    ends = {end.name: end for part in _parts(spec) for end in _read(lens, part)}
    if not ends:
        raise InputError("A path needs ends: 'L3H5', 'L3H5<k>', 'L3.mlp', 'embed', 'logits'.")
    return tuple(ends.values())


def _parts(spec: EndSpec) -> list[str | HeadSpec]:
    if isinstance(spec, str):
        return [part.strip() for part in spec.split(",")]
    if isinstance(spec, Head):
        return [spec]
    parts: list[Any] = list(spec)
    if len(parts) == 2 and all(isinstance(part, int) for part in parts):
        return [cast(HeadSpec, tuple(parts))]
    return [own for part in parts for own in _parts(part)]


_INPUT = re.compile(r"^(?P<heads>[^<]*)<(?P<input>[^>]*)>$")


def _read(lens: Lens, part: str | HeadSpec) -> list[End]:
    """The ends that one part of a specification names."""
    anatomy = lens.anatomy
    order = {site.name: number for number, site in enumerate(anatomy.sites)}
    if part == LOGITS:
        return [End(LOGITS, "logits", "", (len(order), 0))]
    if isinstance(part, str) and part.rpartition(".")[2] == EMBED:
        return [_embed(anatomy, part.rpartition(".")[0], order)]
    if isinstance(part, str) and part.endswith(MLP):
        return _mlps(lens, part.removesuffix(MLP), order)
    found = _INPUT.match(part) if isinstance(part, str) else None
    heads = anatomy.find(found["heads"] if found else part)
    if found is None:
        return [End(str(h), "head", h.site, (order[h.site], 0), h) for h in heads]
    if found["input"] not in INPUTS:
        raise InputError(
            f"{part!r} names no input of a head: write L3H5<q>, L3H5<k> or L3H5<v>, or L3H5 for "
            "all three."
        )
    own = cast(Input, found["input"])
    return [End(f"{h}<{own}>", "head", h.site, (order[h.site], 0), h, (own,)) for h in heads]


def _embed(anatomy: Anatomy, stack: str, order: dict[str, int]) -> End:
    name = f"{stack}.{EMBED}" if stack else EMBED
    first = next((site for site in anatomy.sites if site.stack == stack), None)
    if first is None:
        known = ", ".join(f"{own}.{EMBED}" if own else EMBED for own in anatomy.stacks)
        raise InputError(f"{anatomy.model} has no {name}; there is {known}.")
    if first.block is None:
        raise UnsupportedModelError(
            f"{anatomy.model} has no block around {first.name}, so there is no stream that enters "
            "it: send from heads."
        )
    return End(name, "embed", first.name, (order[first.name], -1))


def _mlps(lens: Lens, layers: str, order: dict[str, int]) -> list[End]:
    anatomy = lens.anatomy
    found: list[End] = []
    for name in StreamEdit(layers, stream="mlp").sites(anatomy):
        block = anatomy[name].block
        if block is None or block not in lens.mlp_names():
            raise UnsupportedModelError(
                f"No MLP was found at {name} of {anatomy.model} whose output is added to the "
                "residual stream: name heads, or the MLPs of other layers."
            )
        call = anatomy[name].call
        last = [site.name for site in anatomy.sites if (site.block, site.call) == (block, call)][-1]
        found.append(End(f"{name}{MLP}", "mlp", name, (order[last], 1)))
    return found
