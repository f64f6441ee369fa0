"""A call with z, weights or scores of the chosen heads and rows changed, and what follows from it.

Edits act on a head's tensors in the order in which attention makes them: q, k and v, then scores,
then weights, then z; on one tensor, in the order given. So an edit of weights never undoes one of z
that was given before it. The tensors of the model are never written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.anatomy import Site
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call, View
from attnlens.hooks.where import Where

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
