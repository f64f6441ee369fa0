"""The same attention rows of every layer side by side, one prompt at a time.

Queries and keys of all layers are held over a forward pass; maps are made for a few rows at a time
and let go, so memory is O(tokens x width) a layer and one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.anatomy import HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.held import HeldRows
from attnlens.hooks.rows import Rows
from attnlens.lens import Inputs, Lens
from attnlens.lens.inputs import Batch, split

HELD_BYTES = 500_000_000
"""Queries and keys of a batch; those of the batch before may still be there while it runs."""
MOST_PROMPTS = 16


@dataclass(frozen=True)
class PromptRows:
    """The attention rows of one prompt at several sites whose rows and keys are the same tokens."""

    number: int
    """Which of the prompts this is, counted from 0 as they were given."""
    rules: tuple[Rows, ...]
    """The rule of each site, as a batch of one."""
    queries: tuple[int, ...]
    """Padded positions of the rows that are real."""

    @property
    def leaks(self) -> bool:
        """Whether rows may sum to less than 1 (learned sinks, edited patterns)."""
        return any(rule.sinks is not None or rule.edited for rule in self.rules)

    def sample(self, rows: int | None, seed: int) -> tuple[int, ...]:
        """The real rows, or that many of them at random: the same however prompts are padded."""
        if rows is None or rows >= len(self.queries):
            return self.queries
        generator = torch.Generator().manual_seed(1_000_003 * seed + self.number)
        chosen = torch.randperm(len(self.queries), generator=generator)[:rows]
        return tuple(self.queries[row] for row in chosen.sort().values.tolist())

    @torch.no_grad()
    def blocks(self, rows: Sequence[int], budget: int) -> Iterator[Float[Tensor, "head row key"]]:
        """Weights of the given rows, all sites' heads one after the other, in about `budget` bytes.

        Float32 at least. Keys to which no head gives weight in a block are left out of it.
        """
        cells = sum(rule.shape[1] for rule in self.rules) * self.rules[0].shape[3]
        size = max(budget // (4 * cells), 1)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            maps = torch.cat([rule.dense(part)[0] for rule in self.rules])
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
            yield maps[..., (maps != 0).any(0).any(0)]


def comparable_sites(lens: Lens, layers: HeadSpec | int | None) -> tuple[Site, ...]:
    """The sites of `layers`, which must be of one stack: else their rows are different tokens."""
    sites = lens.anatomy.layers(layers)
    stacks = tuple(dict.fromkeys(site.stack for site in sites))
    if len(stacks) > 1:
        raise InputError(
            "Heads are compared row by row, and the rows of "
            f"{', '.join(repr(stack) for stack in stacks)} are different tokens. Name the layers "
            f"of one stack: {ways_to_name(stacks)}."
        )
    return sites


def ways_to_name(stacks: Sequence[str]) -> str:
    """How `layers` names all layers of each of some stacks."""
    return ", ".join(f"layers={f'{stack}.L0:' if stack else 'L0:'!r}" for stack in stacks)


def check_rows(rows: int | None) -> None:
    """Raise InputError unless it is a number of rows, or None for all."""
    if rows is not None and not (isinstance(rows, int) and rows >= 1):
        raise InputError(
            f"rows={rows!r} is out of range: 1 or more rows of a prompt, None for all."
        )


def prompt_rows(
    lens: Lens, texts: Inputs, sites: Sequence[Site], batch_size: int | None
) -> Iterator[PromptRows]:
    """Run the texts and give each prompt's rows; prompts of similar length come together.

    Without a batch size as many prompts run at a time as `HELD_BYTES` of queries and keys allow.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give 1 or more.")
    whole = lens.encode(texts)
    element = next(lens.model.parameters()).element_size()
    token = element * sum(site.d_qk * (site.heads + site.groups) for site in sites)
    fits = HELD_BYTES // (token * max(*whole.lengths, 1))
    parts, order = split(whole, batch_size or min(max(fits, 1), MOST_PROMPTS))
    numbers = iter(order)
    for part in parts:
        held = HeldRows(sites)
        lens.observe(part, held)
        rules = [held.rows[site.name] for site in sites]
        _check_shapes(sites, rules, part.size)
        for index in range(part.size):
            own = tuple(rule.prompt(index) for rule in rules)
            yield PromptRows(next(numbers), own, _real_rows(part, sites[0], index, own[0].shape[2]))


def _check_shapes(sites: Sequence[Site], rules: Sequence[Rows], prompts: int) -> None:
    """Raise unless the rules are of the prompts, and of the same rows and keys."""
    first = sites[0].name
    for site, rule in zip(sites, rules, strict=True):
        if rule.shape[0] != prompts:
            raise InputError(
                f"{site.name} attends over a batch of {rule.shape[0]}, not of {prompts} prompts "
                "(windows of an image, or images in one row): which rows are whose is not known. "
                "Leave this layer out with layers=..., or give one prompt at a time."
            )
        if rule.shape[2:] != rules[0].shape[2:]:
            raise InputError(
                f"{first} has {rules[0].shape[2]} rows and {rules[0].shape[3]} keys, {site.name} "
                f"has {rule.shape[2]} and {rule.shape[3]}, so they do not compare. Name layers of "
                "one shape with layers=..."
            )


def _real_rows(part: Batch, site: Site, index: int, rows: int) -> tuple[int, ...]:
    """Positions of the rows of one prompt that are no padding."""
    real = part.sides.queries(site).cut(rows).real
    return tuple(range(rows)) if real is None else tuple(real[index].nonzero()[:, 0].tolist())
