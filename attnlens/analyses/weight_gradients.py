"""Attention weights and how a metric changes with them, a block of rows at a time.

`z = A V`, so `dM/dA = (dM/dz) V^T`: both A and its gradient follow from q, k, v and dM/dz, which
one forward and one backward give. Nothing of size queries x keys x heads outlives its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.analyses.target import Explained
from attnlens.anatomy import Anatomy, Head, HeadSpec, Site
from attnlens.errors import BudgetError, InputError
from attnlens.hooks.gradients import ZGradient, z_gradients
from attnlens.hooks.keep import gigabytes
from attnlens.hooks.rows import Rows
from attnlens.hooks.tokens import Sides
from attnlens.lens import Batch, Lens
from attnlens.lens.asked import check_prompts, choose, parse_bytes

TEXT, DECODER, OUTSIDE = "text", "decoder", "outside"
"""Sides: the text, a decoder's own tokens, what cross-attention reads that is no token."""


@dataclass(frozen=True)
class WeightBlock:
    """Some rows of some heads: their weights and dM/dA, in float32 at least."""

    rows: slice
    keys: slice
    pattern: Float[Tensor, "batch head row key"]
    gradient: Float[Tensor, "batch head row key"]

    @property
    def products(self) -> Float[Tensor, "batch head row key"]:
        """`A * dM/dA`; 0 in rows of padding."""
        return self.pattern * self.gradient


@dataclass(frozen=True)
class Edges:
    """The weights of some heads of one site with their gradients, made when they are asked for."""

    site: Site
    heads: tuple[int, ...]
    rows: Rows
    value: Float[Tensor, "batch group key d_v"]
    gradient: Float[Tensor, "batch query head d_v"]
    """dM/dz; 0 in rows of padding."""
    real_keys: Bool[Tensor, "batch key"] | None

    @classmethod
    def of(cls, site: Site, found: ZGradient, sides: Sides, heads: tuple[int, ...]) -> Edges:
        """The edges of the chosen heads of one call."""
        rows, value, gradient = Rows.summing(site, found.call), found.call.value, found.gradient
        if heads != tuple(range(rows.shape[1])):
            numbers = torch.tensor(heads, device=value.device)
            value = value[:, numbers // (rows.shape[1] // value.shape[1])]
            rows, gradient = rows.select(numbers), gradient[:, :, numbers]
        real = sides.queries(site).cut(rows.shape[2]).real
        if real is not None:
            gradient = gradient.masked_fill(~real[:, :, None, None], 0)
        return cls(site, heads, rows, value, gradient, sides.keys(site).cut(rows.shape[3]).real)

    @property
    def names(self) -> tuple[Head, ...]:
        """The heads, by name."""
        return tuple(self.site.head(head) for head in self.heads)

    def zeros(self, *shape: int) -> Float[Tensor, "..."]:
        """Zeros in the dtype of the products."""
        return self.value.new_zeros(shape, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 in a model of float64."""
        return torch.promote_types(self.value.dtype, torch.float32)

    def blocks(self, wanted: Bool[Tensor, "batch query"] | None = None) -> Iterator[WeightBlock]:
        """Every row once; `dM/dA[t, s] = dM/dz_t . v_s` with the values of the head's group.

        Blocks without a wanted row are left out.
        """
        groups = self.value.shape[1]
        value = self.value.to(self.dtype)
        for rows in self.rows.blocks():
            if wanted is not None and not bool(wanted[:, rows].any()):
                continue
            keys = self.rows.keys_seen(rows)
            pattern = self.rows.pattern(self.rows.scores(rows, keys), rows, keys).to(self.dtype)
            above = self.gradient[:, rows].to(self.dtype).unflatten(2, (groups, -1))
            gradient = torch.einsum("btghv,bgsv->bghts", above, value[:, :, keys])
            yield WeightBlock(rows, keys, pattern, gradient.flatten(1, 2))


@dataclass(frozen=True)
class Gathered:
    """Sums of one site's products, each taken signed, absolute or positive."""

    heads: Float[Tensor, "batch head"]
    """Over rows and keys."""
    columns: Float[Tensor, "batch key"]
    """Over heads and rows: what each key is worth."""
    maps: Float[Tensor, "batch head query key"] | None


def gather(edges: Edges, part: Callable[[Tensor], Tensor], maps: bool) -> Gathered:
    """Sums of `part(A * dM/dA)` a head and a key, and the map where it is asked for."""
    batch, count, queries, keys = edges.rows.shape
    heads, columns = edges.zeros(batch, count), edges.zeros(batch, keys)
    whole = edges.zeros(batch, count, queries, keys) if maps else None
    for block in edges.blocks():
        products = part(block.products)
        heads += products.sum((2, 3))
        columns[:, block.keys] += products.sum((1, 2))
        if whole is not None:
            whole[:, :, block.rows, block.keys] = products
    return Gathered(heads, columns, whole)


def positive(products: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """`x^+`, the part above 0."""
    return products.clamp_min(0)


def weight_gradients(
    lens: Lens,
    batch: Batch,
    explained: Explained,
    layers: HeadSpec | int | None = None,
    heads: HeadSpec | None = None,
) -> tuple[Float[Tensor, " batch"], tuple[Edges, ...]]:
    """The explained value, float64, and the edges of each chosen site, in the order they run.

    One forward and one backward. Where no layers are named, towers that read images or sound for a
    model of text are left out, since their keys are no tokens.

    Raises:
        InputError: heads that are not there, sites whose rows are no prompts (windows of an image),
            or an edit of z in `lens.edit`, behind which no weight has this gradient.

    """
    anatomy = lens.anatomy_for(batch)
    chosen = chosen_heads(anatomy, layers, heads)
    sites = [site for site in anatomy.sites if site.name in chosen]
    values: list[Tensor] = []

    def kept(output: Any) -> Tensor:
        values.append(explained.metric(output))
        return values[-1]

    observers = explained.observers(lens, batch)
    found = z_gradients(lens.model, anatomy, batch.inputs, kept, sites, observers)
    check_prompts({"": {name: one.gradient for name, one in found.items()}}, batch.size)
    edges = tuple(Edges.of(s, found[s.name], batch.sides, chosen[s.name]) for s in sites)
    if lens.edited:
        for own in edges:
            _check_whole(own, found[own.site.name].z)
    return values[0].detach().double().cpu(), edges


def chosen_heads(
    anatomy: Anatomy, layers: HeadSpec | int | None, heads: HeadSpec | None
) -> dict[str, tuple[int, ...]]:
    """Heads by site; where no layers are named, of the sites on whose way tokens are."""
    chosen = choose(anatomy, layers, heads)
    rows = {name: query_side(anatomy, anatomy[name]) for name in chosen}
    tokens = {name: chosen[name] for name in chosen if rows[name] in (TEXT, DECODER)}
    if layers is None and tokens:
        return tokens
    if len(set(rows.values()) - {DECODER}) > 1:
        sides = ", ".join(sorted(set(rows.values())))
        raise InputError(
            f"The layers chosen are of {sides}, whose positions are not the same. Choose layers of "
            "one of them: layers=..."
        )
    return chosen


def query_side(anatomy: Anatomy, site: Site) -> str:
    """Whose positions the rows of a site are: the text's, the decoder's, or a tower's by name."""
    if site.kind == "cross":
        return DECODER if "dec" in anatomy.stacks else TEXT
    return _own_side(site)


def key_side(anatomy: Anatomy, site: Site) -> str:
    """Whose positions the columns of a site are; cross-attention may look outside the text."""
    if site.kind == "cross":
        return TEXT if "enc" in anatomy.stacks else OUTSIDE
    return _own_side(site)


def _own_side(site: Site) -> str:
    if site.stack == "dec":
        return DECODER
    # The only stack of a model of images or sound is unnamed, too.
    return TEXT if site.stack in ("", "enc") else site.stack


def start_rows(
    anatomy: Anatomy, batch: Batch, explained: Explained, edges: Edges, row: int | None
) -> Float[Tensor, "batch query"]:
    """1 at each prompt's row to explain: that of the target's logits, or `row` among real tokens.

    Where the target names no position it is the last token under causal attention, else the first
    (a class token). `edges` are those of the last site.
    """
    queries = edges.rows.shape[2]
    start = edges.zeros(edges.rows.shape[0], queries)
    if row is None and explained.reads is not None:
        if query_side(anatomy, edges.site) != (DECODER if batch.sides.decoder else TEXT):
            raise InputError(
                f"The layers chosen end with {edges.site.name}, in which the target's logits have "
                "no row. Choose layers up to the last, or say which row is explained: row=0 (for "
                "flows a group named 'target')."
            )
        return start.scatter(1, explained.reads.to(start.device), 1)
    real_rows = batch.sides.queries(edges.site).cut(queries).real
    own_sites = [s for s in anatomy.sites if s.kind != "cross" and s.stack == edges.site.stack]
    last = own_sites[-1].causal if own_sites else True
    wanted = row if row is not None else -1 if last else 0
    for prompt in range(len(start)):
        real = range(queries)
        if real_rows is not None:
            real = real_rows[prompt].nonzero()[:, 0].tolist()
        if not -len(real) <= wanted < len(real):
            raise InputError(
                f"row={wanted} is not in prompt {prompt}, which has {len(real)} positions."
            )
        start[prompt, real[wanted]] = 1
    return start


def check_dense(
    what: str, lens: Lens, batch: Batch, counts: Mapping[str, int], budget: str | float, way: str
) -> None:
    """Refuse so many maps at each site over a budget, before the model runs.

    Raises:
        BudgetError: the maps take more; the message ends with the way out.

    """
    extents, limit = batch.extents(lens.anatomy_for(batch)), parse_bytes(budget)
    element = max(next(lens.model.parameters()).element_size(), 4)
    sizes = [(extents[name], count) for name, count in counts.items() if name in extents]
    total = sum(n * at.batch * at.queries * at.keys * element for at, n in sizes)
    if total > limit:
        raise BudgetError(
            f"{what} takes {gigabytes(total)}, over the budget of {gigabytes(limit)}. {way}, or "
            f"give fewer or shorter prompts, or budget='{gigabytes(int(total * 1.01) + 1)}'."
        )


def _check_whole(edges: Edges, z: Float[Tensor, "batch query head d_v"]) -> None:
    """Raise InputError unless `sum_s A dM/dA = z . dM/dz`: else z is not what A makes of V."""
    own = z[:, :, list(edges.heads)].to(edges.dtype) * edges.gradient.to(edges.dtype)
    found = gather(edges, lambda products: products, maps=False).heads
    size = gather(edges, torch.abs, maps=False).heads + own.abs().sum((1, 3))
    if bool(((found - own.sum((1, 3))).abs() > 0.02 * size).any()):
        raise InputError(
            f"An edit changes z at {edges.site.name} after its weights were applied (al.Zero, "
            "al.Scale, al.Mean, ...), so the gradient of the weights cannot be read off that of z. "
            "Leave these heads out (layers=..., heads=...), or edit scores or weights instead: "
            "al.Hide, al.Drop."
        )
