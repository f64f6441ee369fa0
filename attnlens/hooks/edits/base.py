"""What every edit is: which heads, positions and phases it changes, and its three openings.

An edit of heads may change what the kernel gets (`enter`), or scores, weights and z after the
kernel has run (`see`). Helpers here write the results back to the chosen heads and rows alone; the
tensors of the model are never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.anatomy import Anatomy, Head, HeadSpec, Site
from attnlens.errors import InputError
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
        return f"{describe(self)} of {spec_text(self.heads)}{_where_text(self)}"


@dataclass(frozen=True)
class StreamEdit(Edit):
    """A change to the residual stream or to what an MLP writes, at some layers.

    The stream is the one that enters the block of a layer; it is named by the block's first site.
    """

    layers: HeadSpec | int
    stream: str = "residual"
    """`residual`: what enters the layer's block; `mlp`: what its MLP adds to the stream."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream not in ("residual", "mlp"):
            raise InputError(f"There is no stream {self.stream!r}; choose residual or mlp.")

    def sites(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Sites of the layers."""
        return tuple(site.name for site in anatomy.layers(self.layers))

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
        text = f"{describe(self)} of {self.stream} {spec_text(self.layers)}"
        return text + _where_text(self)


def at_site(
    tensors: Mapping[str, Tensor], site: Site, what: str, heads: int | None = None
) -> Tensor:
    """The tensor of a site among those that an edit was given, with the head axis it must have."""
    if site.name not in tensors:
        ways = {"mean z": "lens.mean_z(reference)", "vector": "a vector a head"}
        way = ways.get(what, f"lens.run(prompts, keep={what!r})")
        raise InputError(
            f"There is no {what} for {site.name}; the edit covers {', '.join(tensors)}. "
            f"Make it with {way} for all sites that are edited."
        )
    tensor = tensors[site.name]
    axis = 1 if tensor.ndim >= 4 else -2
    if heads is not None and tensor.shape[axis] != heads:
        raise InputError(
            f"The {what} for {site.name} has shape {list(tensor.shape)}; it must hold all {heads} "
            f"heads (groups, for keys and values) of the site. Keep them all in lens.run."
        )
    return tensor


def with_z(call: Call, where: Where, z: Float[Tensor, "#batch #query chosen d_v"]) -> Call:
    """The call with z of the chosen heads and rows replaced."""
    output = call.output.clone()
    z = z.to(output.dtype)
    if where.rows is not None:
        z = torch.where(where.rows[:, :, None, None], z, output[:, :, where.heads])
    output[:, :, where.heads] = z
    return replace(call, output=output)


PatternRule = Callable[[Tensor, Tensor | None, View], Tensor]


def with_pattern(
    site: Site, call: Call, where: Where, rule: PatternRule, z: Tensor | None = None
) -> Call:
    """The call with weights of the chosen heads and rows changed, and z as the weights make it.

    `z` spares computing rows where a method knows it by a shorter way.
    """

    def edit(pattern: Tensor, seen: Tensor | None, view: View) -> Tensor:
        return torch.where(chosen_cells(where, view), rule(pattern, seen, view), pattern)

    changed = replace(call, pattern_edits=(*call.pattern_edits, edit))
    return with_z(changed, where, z_of_rows(site, changed, where) if z is None else z)


def with_scores(
    site: Site, call: Call, where: Where, rule: Callable[[Tensor, View], Tensor]
) -> Call:
    """The call with scores of the chosen heads and rows changed, and z as they make it."""

    def edit(scores: Tensor, view: View) -> Tensor:
        return torch.where(chosen_cells(where, view), rule(scores, view), scores)

    changed = replace(call, score_edits=(*call.score_edits, edit))
    return with_z(changed, where, z_of_rows(site, changed, where))


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
    values: Tensor, axis: int, places: Int[Tensor, " place"], decoding: bool, site: Site, what: str
) -> tuple[Tensor, Bool[Tensor, " place"] | None]:
    """Kept values at the places of rows or keys, and which places they cover (None for all).

    Tokens that a text got after the values were kept are not covered; a prompt of another length
    is refused.
    """
    size, last = values.shape[axis], int(places[-1])
    if last >= size and not decoding:
        raise InputError(
            f"The {what} for {site.name} covers {size} positions and the input has {last + 1}: "
            "the two prompts must have one length."
        )
    found = values.index_select(axis, places.clamp(max=size - 1).to(values.device))
    return found, places < size if last >= size else None


def describe(edit: Edit) -> str:
    """The edit's name with its numbers: `Scale 0.5`."""
    numbers = [
        f"{value:g}"
        for part in fields(edit)
        if isinstance(value := getattr(edit, part.name), float)
    ]
    kind = getattr(edit, "kind", None)
    return " ".join([type(edit).__name__, *([kind] if kind else []), *numbers])


def spec_text(spec: HeadSpec | int) -> str:
    """A specification as its text: `L3H5,L4H0`."""
    if isinstance(spec, str):
        return spec
    if isinstance(spec, int):
        return f"L{spec}"
    if isinstance(spec, Head):
        return str(spec)
    parts = list(spec)
    if len(parts) == 2 and all(isinstance(part, int) for part in parts):
        return f"L{parts[0]}H{parts[1]}"
    return ",".join(spec_text(part) for part in parts)


def _where_text(edit: Edit) -> str:
    text = ""
    for name in ("queries", "keys"):
        positions = getattr(edit, name, None)
        if positions is not None:
            text += f" at {name} {positions_text(positions)}"
    return text if edit.phase == "all" else f"{text} in {edit.phase}"


def positions_text(positions: Positions) -> str:
    """Positions as people write them."""
    if isinstance(positions, slice):
        parts = [positions.start, positions.stop, positions.step]
        shown = ["" if part is None else str(part) for part in parts]
        return ":".join(shown if positions.step is not None else shown[:2])
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return f"of a mask {list(positions.shape)}"
    if callable(positions) and not isinstance(positions, Tensor):
        return f"of {getattr(positions, '__name__', 'a function')}"
    return str(positions.tolist() if isinstance(positions, Tensor) else positions)
