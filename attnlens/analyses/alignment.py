"""Whether strong attention goes where a property of two tokens holds, more often than by chance.

Vig et al. 2020, BERTology meets biology: interpreting attention in protein language models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analyses.per_head import HeadTable
from attnlens.analyses.uncertainty import Interval, bootstrap_ratio, check_bootstrap
from attnlens.analyses.words import text_sites
from attnlens.anatomy import HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.measure import Measure
from attnlens.hooks.tokens import Layout
from attnlens.lens import Inputs, Lens
from attnlens.lens.inputs import Batch, split

Property = (
    Callable[[tuple[int, ...], tuple[str, ...]], Tensor] | Sequence[Bool[Tensor, "#query #key"]]
)
"""A function of a prompt's token ids and texts, or a tensor a prompt: `Bool[#query #key]`."""


@dataclass(frozen=True)
class PropertyAlignment(HeadTable):
    """Per head: `aligned`, the share of its arcs at which the property holds, and `background`.

    An arc is a weight of `threshold` or more; the background is the share of all pairs that the
    head sees. `aligned` is NaN for heads with fewer than `least` arcs.
    """

    arcs: Int[Tensor, " head"]
    """Number of arcs of each head."""
    prompts: int
    threshold: float
    least: int
    special: bool
    """Whether arcs to and from special tokens count."""
    notes: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a head: its numbers with bounds, `gain` (aligned - background), and `arcs`."""
        frame = super().to_frame()
        frame["gain"] = frame["aligned"] - frame["background"]
        frame["arcs"] = self.arcs.tolist()
        return frame


def property_alignment(
    lens: Lens,
    inputs: Inputs,
    property: Property,
    threshold: float = 0.3,
    least: int = 100,
    special: bool = False,
    layers: HeadSpec | int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PropertyAlignment:
    """Share of each head's strong weights at which a property of two tokens holds.

    `p(f) = sum f(i, j) [A[i, j] >= threshold] / sum [A[i, j] >= threshold]` over the tokens i, j of
    all prompts. `property` gives for a prompt of n tokens a Bool tensor `query key`, n or 1 long on
    each side (`[1, n]` is a property of the key alone); it is a function of the prompt's token ids
    and texts, or one tensor a prompt. Intervals are over prompts, of ratios of sums. Arcs to and
    from special tokens are left out unless `special`.

    Raises:
        InputError: a threshold outside 0 to 1, inputs without token ids, a property of another
            shape or type, or not one a prompt.

    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold} is out of range: over 0, at most 1.")
    check_bootstrap(resamples, confidence)
    whole = lens.encode(inputs)
    sites = text_sites(lens, whole, layers)
    properties = _properties(lens, whole, property)
    left_out = frozenset[int]() if special else lens.special_ids
    reducer = partial(AlignedArcs, threshold=threshold, special=left_out)
    counts = _count(lens, whole, sites, properties, reducer, batch_size)
    rates = bootstrap_ratio(counts[..., ::2], counts[..., 1::2], resamples, confidence, seed)
    arcs = counts[..., 1].sum(0).long()
    few = torch.stack([arcs < least, torch.zeros_like(arcs).bool()], -1)
    rates = Interval(*(bound.masked_fill(few, torch.nan) for bound in rates))
    return PropertyAlignment(
        tuple(site.head(number) for site in sites for number in range(site.heads)),
        ("aligned", "background"),
        *rates,
        arcs=arcs,
        prompts=len(counts),
        threshold=threshold,
        least=least,
        special=special,
        notes=_notes(len(counts), int(few.any(-1).sum()), least, len(arcs)),
    )


def _count(
    lens: Lens,
    whole: Batch,
    sites: Sequence[Site],
    properties: Sequence[Bool[Tensor, "#query #key"]],
    reducer: Callable[[tuple[Tensor, ...]], AlignedArcs],
    batch_size: int,
) -> Float[Tensor, "prompt head count"]:
    """The counts of every prompt, in the order of their lengths: all that follows are sums."""
    parts, order = split(whole, batch_size)
    found: list[Float[Tensor, "prompt head count"]] = []
    done = 0
    for part in parts:
        own = reducer(tuple(properties[number] for number in order[done : done + part.size]))
        done += part.size
        observer = Measure(sites, [own], part.sides)
        lens.observe(part, observer)
        found.append(torch.cat([observer.results[own.name][site.name] for site in sites], 1))
    return torch.cat(found).cpu()


class _Counts(NamedTuple):
    """State of a count at one site: which tokens count, and what was counted."""

    layout: Layout
    place: Int[Tensor, "batch position"]
    """Each token's place in its prompt; -1 for padding and special tokens left out."""
    counts: Float[Tensor, "batch head count"]


@dataclass(frozen=True)
class AlignedArcs:
    """Numbers of aligned arcs, arcs, aligned pairs and pairs of each prompt and head."""

    properties: tuple[Bool[Tensor, "#query #key"], ...]
    """One a prompt, over its real tokens."""
    threshold: float = 0.3
    special: frozenset[int] = frozenset()
    """Ids of tokens that are left out."""
    name: str = "aligned"
    columns: tuple[str, ...] = ("aligned_arcs", "arcs", "aligned_pairs", "pairs")

    def start(self, layout: Layout) -> _Counts:
        """Nothing counted yet."""
        ids, real = layout.key_tokens.ids, layout.key_tokens.real
        assert ids is not None  # sites of the text alone are asked
        real = torch.ones_like(ids).bool() if real is None else real
        dropped = torch.tensor(sorted(self.special), dtype=ids.dtype, device=ids.device)
        place = (real.long().cumsum(-1) - 1).masked_fill(~real | torch.isin(ids, dropped), -1)
        shape = (layout.batch, layout.heads, 4)
        return _Counts(layout, place, torch.zeros(shape, dtype=torch.float64, device=ids.device))

    def update(self, state: _Counts, block: Block) -> None:
        """Count the arcs of some rows, which are few, and the pairs of tokens that they see."""
        rows, keys = state.place[:, block.rows], state.place[:, block.keys]
        counted = (rows >= 0)[:, :, None] & (keys >= 0)[:, None]
        holds = counted & self._holds(rows, keys)
        prompt, head, row, key = (block.pattern >= self.threshold).nonzero(as_tuple=True)
        own = state.counts[:, block.heads]
        for column, pairs in enumerate((holds, counted)):
            hit = pairs[prompt, row, key].double()
            own[..., column].index_put_((prompt, head), hit, accumulate=True)
            seen = pairs[:, None]
            if block.visible is not None:
                seen = seen & block.visible
            own[..., 2 + column] += seen.sum((-1, -2))

    def finish(self, state: _Counts) -> Float[Tensor, "batch head count"]:
        """The four numbers, in the order of `columns`."""
        return state.counts

    def _holds(
        self, rows: Int[Tensor, "batch row"], keys: Int[Tensor, "batch key"]
    ) -> Bool[Tensor, "batch row key"]:
        """The property at pairs of places."""
        found: list[Tensor] = []
        for own, row, key in zip(self.properties, rows, keys, strict=True):
            own = own.to(rows.device)
            wide = own[row.clamp_min(0) if own.shape[0] > 1 else torch.zeros_like(row)]
            found.append(wide[:, key.clamp_min(0) if own.shape[1] > 1 else torch.zeros_like(key)])
        return torch.stack(found)


def _properties(lens: Lens, batch: Batch, given: Property) -> list[Bool[Tensor, "#query #key"]]:
    """The property of each prompt, checked."""
    assert batch.ids is not None  # text_sites found sites whose rows are the text's tokens
    if callable(given):
        real = torch.ones_like(batch.ids).bool() if batch.real is None else batch.real
        ids = [tuple(row[mask].tolist()) for row, mask in zip(batch.ids, real, strict=True)]
        given = [given(own, texts) for own, texts in zip(ids, batch.tokens, strict=True)]
    if not isinstance(given, (Sequence, Tensor)):
        raise InputError(
            f"The property is {type(given).__name__}; give a function of a prompt's token ids and "
            "texts, or a tensor of torch.bool a prompt."
        )
    if len(given) != batch.size:
        raise InputError(
            f"There are {len(given)} properties and {batch.size} prompts; give one a prompt."
        )
    for number, (own, length) in enumerate(zip(given, batch.lengths, strict=True)):
        if not isinstance(own, Tensor) or own.dtype != torch.bool:
            kind = own.dtype if isinstance(own, Tensor) else type(own).__name__
            raise InputError(
                f"The property of prompt {number} is {kind}; it must be a tensor of torch.bool."
            )
        if own.ndim != 2 or any(size not in (1, length) for size in own.shape):
            raise InputError(
                f"The property of prompt {number} has shape {list(own.shape)}; the prompt has "
                f"{length} tokens, so it must be [{length}, {length}], with 1 for either of them "
                "where it does not depend on that side."
            )
    return list(given)


def _notes(prompts: int, few: int, least: int, heads: int) -> tuple[str, ...]:
    notes: list[str] = []
    if prompts < 2:
        notes.append("One prompt gives no interval over prompts; give several.")
    if few:
        notes.append(f"{few} of {heads} heads have fewer than {least} arcs, too few to tell.")
    return tuple(notes)
