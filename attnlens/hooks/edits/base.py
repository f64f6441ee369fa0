"""What every edit is: which heads, positions and phases it changes, and its three openings.

An edit of heads may change what the kernel gets (`enter`), or scores, weights and z after the
kernel has run (`see`). Helpers here write the results back to the chosen heads and rows alone; the
tensors of the model are never written to.

Edits act on a head's tensors in the order in which attention makes them: q, k and v, then scores,
then weights, then z; on one tensor, in the order given. So an edit of weights never undoes one of z
that was given before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.anatomy import Anatomy, Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.edits.text import describe, layers_text, spec_text, where_text
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Asked, Call, View
from attnlens.hooks.where import Phase, Positions, Where, check_phase


@dataclass(frozen=True)
class Edit:
    """A change to a running model at some query positions, in some phases."""

    queries: Positions = field(default=None, kw_only=True)
    """Rows that are changed; see `Positions`. Padding never is."""
    phase: Phase = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        check_phase(self.phase)

    def of_prompts(self, prompts: slice) -> Self:
        """The same edit for some prompts of the batch that it was made for."""
        changed: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name in ("queries", "keys"):
                is_mask = isinstance(value, Tensor) and value.dtype == torch.bool
                if is_mask and value.ndim == 2 and value.shape[0] > 1:
                    changed[part.name] = value[prompts]
            elif part.metadata.get("by_prompt"):
                changed[part.name] = {
                    name: tensor[prompts] if tensor.shape[0] > 1 else tensor
                    for name, tensor in value.items()
                }
        return replace(self, **changed) if changed else self

    def sites(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Names of the sites, or of the blocks' first sites, where it acts."""
        raise NotImplementedError


@dataclass(frozen=True)
class HeadEdit(Edit):
    """A change to some heads."""

    heads: HeadSpec

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", _held(self.heads))

    def sites(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Sites of the heads."""
        return tuple(dict.fromkeys(head.site for head in anatomy.find(self.heads)))

    def moved(self, anatomy: Anatomy) -> tuple[Head, ...]:
        """The heads whose output it changes; more than named where heads share keys or values."""
        return anatomy.find(self.heads)

    @property
    def key_positions(self) -> Positions:
        """Keys that it changes."""
        return getattr(self, "keys", None)

    def enter(self, site: Site, asked: Asked, where: Where) -> Asked:
        """Change what the kernel gets."""
        return asked

    def see(self, site: Site, call: Call, where: Where) -> Call:
        """Change what the kernel gave."""
        return call

    def __str__(self) -> str:
        return f"{describe(self)} of {spec_text(self.heads)}{where_text(self)}"


@dataclass(frozen=True)
class StreamEdit(Edit):
    """A change to the residual stream or to what an MLP writes, at some layers.

    A block has one stream that enters it and one MLP; they are named by the block's first site.
    """

    layers: HeadSpec | int
    stream: str = "residual"
    """`residual`: what enters the layer's block; `mlp`: what its MLP adds to the stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", _held(self.layers))
        if self.stream not in ("residual", "mlp"):
            raise InputError(f"There is no stream {self.stream!r}; choose residual or mlp.")

    def sites(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The first site of each block of the layers."""
        first: dict[tuple[str, int], str] = {}
        for site in anatomy.sites:
            first.setdefault((site.block or site.name, site.call), site.name)
        layers = anatomy.layers(self.layers)
        return tuple(dict.fromkeys(first[site.block or site.name, site.call] for site in layers))

    def change(
        self,
        site: Site,
        stream: Float[Tensor, "batch row d_model"],
        rows: Tensor | None,
        start: int,
    ) -> Float[Tensor, "batch row d_model"]:
        """The stream as edited; `rows` are the chosen ones, `start` the place of the first."""
        raise NotImplementedError

    def __str__(self) -> str:
        text = f"{describe(self)} of {self.stream} {layers_text(self.layers)}"
        return text + where_text(self)


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


ZRule = Callable[[Float[Tensor, "batch query chosen d_v"]], Tensor]
"""z of the chosen heads -> z as edited."""
PatternRule = Callable[[Tensor, Tensor | None, View], Tensor]


@dataclass(frozen=True)
class Edited(Call):
    """A call whose z was edited: z as the weights made it, and what was done to it since."""

    made: Float[Tensor, "batch query head d_v"] = field(kw_only=True)
    z_edits: tuple[Callable[[Tensor], Tensor], ...] = field(kw_only=True)


def with_z(call: Call, where: Where, rule: ZRule) -> Call:
    """The call with z of the chosen heads and rows changed."""

    def edit(output: Tensor) -> Tensor:
        return _put(output, where, rule(output[:, :, where.heads]))

    made, earlier = (call.made, call.z_edits) if isinstance(call, Edited) else (call.output, ())
    own = {part.name: getattr(call, part.name) for part in fields(Call)}
    own["output"] = edit(call.output)
    return Edited(**own, made=made, z_edits=(*earlier, edit))


def with_pattern(
    site: Site, call: Call, where: Where, rule: PatternRule, z: ZRule | None = None
) -> Call:
    """The call with weights of the chosen heads and rows changed, and z as the weights make it.

    `z` spares computing rows where a method knows it by a shorter way from z before.
    """

    def edit(pattern: Tensor, seen: Tensor | None, view: View) -> Tensor:
        return torch.where(chosen_cells(where, view), rule(pattern, seen, view), pattern)

    return _made_anew(site, replace(call, pattern_edits=(*call.pattern_edits, edit)), where, z)


def with_scores(
    site: Site, call: Call, where: Where, rule: Callable[[Tensor, View], Tensor]
) -> Call:
    """The call with scores of the chosen heads and rows changed, and z as they make it."""

    def edit(scores: Tensor, view: View) -> Tensor:
        return torch.where(chosen_cells(where, view), rule(scores, view), scores)

    return _made_anew(site, replace(call, score_edits=(*call.score_edits, edit)), where)


def _made_anew(site: Site, call: Call, where: Where, z: ZRule | None = None) -> Call:
    """The call with z of the chosen heads and rows made anew, and edits of z done again."""
    before = call.made if isinstance(call, Edited) else call.output
    own = z_of_rows(site, call, where) if z is None else z(before[:, :, where.heads])
    output = made = _put(before, where, own)
    if not isinstance(call, Edited):
        return replace(call, output=made)
    for edit in call.z_edits:
        output = edit(output)
    return replace(call, output=output, made=made)


def _put(output: Tensor, where: Where, z: Tensor) -> Float[Tensor, "batch query head d_v"]:
    """z of all heads with that of the chosen heads and rows replaced."""
    z = z.to(output.dtype)
    if where.rows is not None:
        z = torch.where(where.rows[:, :, None, None], z, output[:, :, where.heads])
    changed = output.clone()
    changed[:, :, where.heads] = z
    return changed


def chosen_cells(where: Where, view: View) -> Bool[Tensor, "#batch head #row 1"]:
    """Which rows of which heads of a block are chosen."""
    chosen = torch.isin(view.heads, where.heads)[None, :, None, None]
    if where.rows is None:
        return chosen
    rows = where.rows if where.rows.shape[0] == 1 else where.rows[view.prompts]
    return chosen & rows[:, None, view.rows, None]


def chosen_keys(where: Where, view: View) -> Bool[Tensor, "#batch 1 1 key"] | None:
    """Which keys of a block are chosen; None for all."""
    if where.keys is None:
        return None
    keys = where.keys if where.keys.shape[0] == 1 else where.keys[view.prompts]
    return keys[:, None, None, view.keys]


def z_of_rows(site: Site, call: Call, where: Where) -> Float[Tensor, "batch query chosen d_v"]:
    """z of the chosen heads from their rows as edited, a block of rows at a time.

    Rows that no prompt chose are left at 0 and not computed.
    """
    rows = Rows.at(site, call).select(where.heads)
    value = call.value[:, where.heads // (site.heads // site.groups)]
    parts: list[Tensor] = []
    for run in _runs(where.rows, call.query.shape[2]):
        for part in rows.blocks(rows=run) if isinstance(run, slice) else ():
            keys = rows.keys_seen(part)
            pattern = rows.pattern(rows.scores(part, keys), part, keys)
            parts.append(pattern @ value[:, :, keys])
        if isinstance(run, int):
            parts.append(value.new_zeros(*value.shape[:2], run, value.shape[3]))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _runs(rows: Bool[Tensor, "batch row"] | None, length: int) -> list[slice | int]:
    """Runs of rows that some prompt chose, as slices; lengths of the runs between them."""
    if rows is None:
        return [slice(0, length)]
    chosen, counts = torch.unique_consecutive(rows.any(0), return_counts=True)
    runs: list[slice | int] = []
    start = 0
    for own, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        runs.append(slice(start, start + count) if own else count)
        start += count
    return runs


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


def _held(spec: HeadSpec | int) -> HeadSpec | int:
    """A specification that can be read more than once."""
    return spec if isinstance(spec, str | Head | int | tuple) else tuple(spec)
