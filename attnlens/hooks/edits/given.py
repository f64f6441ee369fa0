"""What an edit is given: heads, numbers and kept tensors, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from operator import index
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from attnlens.anatomy import Head, Site
from attnlens.errors import HeadError, InputError

HeldHeads = str | Head | tuple[str | Head, ...]


def held_heads(spec: Any) -> HeldHeads:
    """A specification of heads in one form, to be read more than once: pairs are heads.

    Raises:
        HeadError: it is none, or is empty.

    """
    if isinstance(spec, str | Head):
        return spec
    try:
        parts: list[Any] = list(spec)
    except TypeError as error:
        raise _no_heads(spec) from error
    if len(parts) == 2 and all(map(_is_number, parts)):
        return Head("", index(parts[0]), index(parts[1]))
    held = [held_heads(part) for part in parts]
    if not held:
        raise _no_heads(spec)
    return tuple(one for part in held for one in (part if isinstance(part, tuple) else (part,)))


def held_layers(spec: Any) -> HeldHeads:
    """A specification of layers in one form: numbers are layers of the unnamed stack."""
    if isinstance(spec, str | Head):
        return spec
    if _is_number(spec):
        return f"L{index(spec)}"
    try:
        parts: list[Any] = list(spec)
    except TypeError as error:
        raise _no_heads(spec) from error
    if parts and all(map(_is_number, parts)):
        return ",".join(f"L{index(part)}" for part in parts)
    return held_heads(parts)


def _no_heads(spec: Any) -> HeadError:
    return HeadError(
        f'{spec!r} names no heads: write "L3H5", "L3" (a layer), a (layer, head) pair of numbers, '
        "or several of these in a list."
    )


def _is_number(value: Any) -> bool:
    try:
        index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def check_number(name: str, value: Any) -> None:
    """Raise InputError for what is no real number."""
    alone = isinstance(value, Tensor) and value.ndim == 0
    if isinstance(value, bool) or not (alone or isinstance(value, Real)):
        raise InputError(f"{name}={value!r} is no number.")


def check_tensors(name: str, tensors: Any) -> None:
    """Raise InputError for what does not hold tensors by site name."""
    if not isinstance(tensors, Mapping):
        wrong = f"{name} is of type {type(tensors).__name__}"
    else:
        held: Mapping[Any, Any] = tensors
        bad = [key for key in held if not (isinstance(key, str) and isinstance(held[key], Tensor))]
        if not bad:
            return
        wrong = f"{name}[{bad[0]!r}] is of type {type(held[bad[0]]).__name__}"
    raise InputError(f"{wrong}: give tensors by site name, as {{'L3': tensor}}.")


def at_site(tensors: Mapping[str, Tensor], site: Site, what: str, *shape: int | None) -> Tensor:
    """The tensor of a site among those that an edit was given, of the shape it must have.

    Raises:
        InputError: there is none, or it has another shape (None stands for any size).

    """
    names = tuple(tensors)
    if site.name not in names:
        ways = {"mean z": "lens.mean_z(reference)", "vector": "one for each head or layer"}
        way = ways.get(what, f"lens.run(prompts, keep={what!r})")
        raise InputError(
            f"There is no {what} for {site.name}; the edit covers {', '.join(names) or 'nothing'}. "
            f"Give {way} for all sites that are edited."
        )
    tensor = tensors[site.name]
    fits = zip(tensor.shape, shape, strict=False)
    if tensor.ndim != len(shape) or any(want not in (None, own) for own, want in fits):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(
            f"The {what} for {site.name} has shape {list(tensor.shape)}; it must be [{wanted}], "
            "with all heads of the site (groups, for k and v) where it has heads."
        )
    return tensor


def taken_at(
    values: Tensor, axis: int, places: range, end: int, decoding: bool, site: Site, what: str
) -> tuple[Tensor, Bool[Tensor, " place"] | None]:
    """Kept values at the places of rows or keys, and which places they cover (None for all).

    A text of `end` positions so far may have grown since its values were kept, and may yet grow to
    be as long as they are: its further tokens are not covered.

    Raises:
        InputError: the values are of a text of another length, and this one does not grow.

    """
    size = values.shape[axis]
    grows = site.kind == "self"
    if size != end and not (grows and (size > end or decoding)):
        raise InputError(
            f"The {what} for {site.name} covers {size} positions and the input has {end}: the two "
            "prompts must have one length."
        )
    chosen = torch.arange(places.start, places.stop, device=values.device)
    taken = values.index_select(axis, chosen.clamp(max=size - 1))
    return taken, chosen < size if places.stop > size else None


def check_prompts(values: Tensor, batch: int, site: Site, what: str) -> None:
    """Raise InputError for values of another number of prompts than the input's."""
    if values.shape[0] not in (1, batch):
        raise InputError(
            f"The {what} for {site.name} is of {values.shape[0]} prompts and the input has "
            f"{batch}: keep them of as many, or of one for all (beams and several answers a prompt "
            "multiply the input's batch)."
        )
