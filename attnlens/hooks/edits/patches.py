"""Edits that put kept tensors in the place of the model's own, or add vectors to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.anatomy import Anatomy, Head, Site
from attnlens.errors import InputError
from attnlens.hooks.edits.base import HeadEdit, StreamEdit
from attnlens.hooks.edits.changes import chosen_keys, with_pattern, with_z
from attnlens.hooks.edits.given import (
    at_site,
    check_number,
    check_prompts,
    check_tensors,
    taken_at,
)
from attnlens.hooks.edits.text import spec_text
from attnlens.hooks.positions import Positions
from attnlens.hooks.seam import Asked, Call, View
from attnlens.hooks.where import Where

Kind = Literal["q", "k", "v", "z", "pattern"]


@dataclass(frozen=True)
class _OfKind(HeadEdit):
    """An edit of one of the tensors that attention is made of.

    Heads that share keys and values share an edit of them: `moved` names them all.
    """

    kind: Kind

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in get_args(Kind):
            raise InputError(f"There is no {self.kind!r}; choose {', '.join(get_args(Kind))}.")
        unfit = {"q": "keys", "z": "keys", "k": "queries", "v": "queries"}.get(self.kind, "")
        if getattr(self, unfit, None) is not None:
            fit = {"keys": "queries", "queries": "keys"}[unfit]
            raise InputError(f"{self.kind} has no {unfit}: choose its positions as {fit}=...")

    def moved(self, anatomy: Anatomy) -> tuple[Head, ...]:
        """The heads named, and for k and v those that share them."""
        named = super().moved(anatomy)
        if self.kind not in ("k", "v"):
            return named
        found: dict[Head, None] = {}
        for head in named:
            site = anatomy[head.site]
            size = site.heads // site.groups
            first = head.head // size * size
            found |= dict.fromkeys(site.head(n) for n in range(first, first + size))
        return tuple(found)

    def __str__(self) -> str:
        text, named = super().__str__(), spec_text(self.heads)
        if self.kind in ("k", "v") and "H" in named:
            text = text.replace(f" of {named}", f" of {named} and all heads that share it", 1)
        return text


@dataclass(frozen=True, eq=False)
class Patch(_OfKind):
    """q, k, v, z or pattern = what was kept of another run: activation patching.

    `values` holds a tensor a site name as `lens.run(prompts, keep=kind)[kind]` gives it, with all
    heads: q and z `batch head query d`, k and v `batch group key d` (after rotary embedding),
    pattern `batch head query key`. A batch of one serves all prompts. `queries` chooses rows of q,
    z and pattern, `keys` those of k and v, and columns of pattern. A key that a row does not see
    gets no weight, whatever the kept pattern says.
    """

    values: Mapping[str, Float[Tensor, "batch heads position last"]] = field(
        metadata={"by_prompt": True}, repr=False
    )
    keys: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensors("values", self.values)

    def enter(self, site: Site, asked: Asked, where: Where) -> Asked:
        """Replace q, k or v."""
        if self.kind not in ("q", "k", "v"):
            return asked
        kept, covered = self._taken(site, where, asked.query.shape[0])
        return _change_input(site, asked, where, self.kind, lambda own: kept.to(own), covered)

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Replace z, or the weights and with them z."""
        if self.kind == "z":
            kept, covered = self._taken(site, where, call.query.shape[0])
            z = kept[:, where.heads.to(kept.device)].transpose(1, 2).to(call.output)
            return with_z(call, _only(where, covered), z.expand_as)
        if self.kind == "pattern":
            return self._with_pattern(site, call, where)
        return call

    def _with_pattern(self, site: Site, call: Call, where: Where) -> Call:
        rows, covered = self._taken(site, where, call.query.shape[0])
        end = _keys_end(site, where)
        weights, _ = taken_at(rows, 3, where.key_places, end, where.decoding, site, "pattern")
        weights = weights.to(call.output)

        def patched(pattern: Tensor, seen: Tensor | None, view: View) -> Tensor:
            own = weights if weights.shape[0] == 1 else weights[view.prompts]
            own, keys = own[:, view.heads, view.rows, view.keys], chosen_keys(where, view)
            own = own if seen is None else own.masked_fill(~seen, 0)
            return own.expand_as(pattern) if keys is None else torch.where(keys, own, pattern)

        return with_pattern(site, call, _only(where, covered), patched)

    def _taken(self, site: Site, where: Where, batch: int) -> tuple[Tensor, Tensor | None]:
        of_keys = self.kind in ("k", "v")
        heads, width = _size(self.kind, site)
        kept = at_site(self.values, site, self.kind, None, heads, None, width)
        check_prompts(kept, batch, site, self.kind)
        places = where.key_places if of_keys else where.row_places
        end = _keys_end(site, where) if of_keys else where.row_places.stop
        return taken_at(kept, 2, places, end, where.decoding, site, self.kind)


@dataclass(frozen=True, eq=False)
class Steer(_OfKind):
    """q, k, v or z + factor * vector: one direction a head, at the chosen rows or keys.

    `vectors` holds `head d` (`group d` for k and v) a site name. On q and k of contextual heads
    these are Focus Directions; a weight pattern has no direction.
    """

    vectors: Mapping[str, Float[Tensor, "heads last"]]
    factor: float = 1.0
    keys: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "pattern":
            raise InputError("A pattern has no direction to steer in; choose q, k, v or z.")
        check_tensors("vectors", self.vectors)
        check_number("factor", self.factor)

    def enter(self, site: Site, asked: Asked, where: Where) -> Asked:
        """Add to q, k or v."""
        if self.kind == "z":
            return asked
        step = self._step(site)
        return _change_input(site, asked, where, self.kind, lambda own: own + step.to(own)[:, None])

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Add to z."""
        if self.kind != "z":
            return call
        step = self._step(site).to(call.output)[where.heads]
        return with_z(call, where, lambda z: z + step)

    def _step(self, site: Site) -> Float[Tensor, "heads last"]:
        return self.factor * at_site(self.vectors, site, "vector", *_size(self.kind, site))


@dataclass(frozen=True, eq=False)
class PatchStream(StreamEdit):
    """Residual stream or MLP output = what was kept of another run.

    `values` holds `batch query d_model` a site name, as `lens.run(prompts, keep="residual")` gives
    the stream that enters a layer's block.
    """

    values: Mapping[str, Float[Tensor, "batch query d_model"]] = field(
        kw_only=True, metadata={"by_prompt": True}, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensors("values", self.values)

    def change(self, site: Site, stream: Tensor, rows: Tensor | None, start: int) -> Tensor:
        """Put the kept stream in the place of the model's."""
        kept = at_site(self.values, site, self.stream, None, None, stream.shape[-1])
        check_prompts(kept, stream.shape[0], site, self.stream)
        places = range(start, start + stream.shape[1])
        taken, covered = taken_at(kept, 1, places, places.stop, start > 0, site, self.stream)
        rows = _both(rows, covered, stream.device)
        taken = taken.to(stream).expand_as(stream)
        return taken if rows is None else torch.where(rows[..., None], taken, stream)


@dataclass(frozen=True, eq=False)
class SteerStream(StreamEdit):
    """Residual stream or MLP output + factor * vector, `d_model` a site name."""

    vectors: Mapping[str, Float[Tensor, " d_model"]] = field(kw_only=True)
    factor: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensors("vectors", self.vectors)
        check_number("factor", self.factor)

    def change(self, site: Site, stream: Tensor, rows: Tensor | None, start: int) -> Tensor:
        """Add the vector."""
        vector = at_site(self.vectors, site, "vector", stream.shape[-1])
        moved = stream + self.factor * vector.to(stream)
        return moved if rows is None else torch.where(rows[..., None], moved, stream)


def _size(kind: Kind, site: Site) -> tuple[int, int | None]:
    """Heads (groups) and width of a tensor of attention; None for the keys of a pattern."""
    width = {"q": site.d_qk, "k": site.d_qk, "v": site.d_v, "z": site.d_v}.get(kind)
    return site.groups if kind in ("k", "v") else site.heads, width


def _change_input(
    site: Site,
    asked: Asked,
    where: Where,
    kind: Kind,
    change: Callable[[Tensor], Tensor],
    covered: Tensor | None = None,
) -> Asked:
    """The call with q, k or v of the chosen heads and positions changed."""
    name = {"q": "query", "k": "key", "v": "value"}[kind]
    own: Tensor = getattr(asked, name)
    changed = change(own)
    positions, heads = where.rows, where.heads
    if kind != "q":
        positions, heads = where.keys, torch.unique(heads // (site.heads // site.groups))
    positions = _both(positions, covered, own.device)
    if positions is not None:
        changed = torch.where(positions[:, None, :, None], changed, own)
    result = own.clone()
    result[:, heads] = changed.expand_as(own)[:, heads]
    return replace(asked, **{name: result})


def _keys_end(site: Site, where: Where) -> int:
    """Number of positions of the text that the keys stand for, so far."""
    return where.key_places.stop if site.kind == "cross" else where.row_places.stop


def _only(where: Where, covered: Bool[Tensor, " row"] | None) -> Where:
    return replace(where, rows=_both(where.rows, covered, where.heads.device))


def _both(
    chosen: Bool[Tensor, "batch place"] | None,
    covered: Bool[Tensor, " place"] | None,
    device: torch.device,
) -> Bool[Tensor, "#batch place"] | None:
    if covered is None:
        return chosen
    covered = covered.to(device)[None]
    return covered if chosen is None else chosen & covered
