"""Where an edit acts: positions of a text, phases of its reading, rows and keys of one call.

Positions count the real tokens of a text from 0; padding is never among them. While a cache is in
use they go on counting, so position 12 is the same token in the prompt's own pass and later.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attnlens.anatomy import Site
from attnlens.errors import InputError
from attnlens.hooks.seam import Asked
from attnlens.hooks.session import Handle
from attnlens.hooks.tokens import Sides, Tokens

PositionsOf = Callable[[Int[Tensor, "batch position"]], Bool[Tensor, "batch position"]]
Positions = int | slice | Sequence[int] | Tensor | PositionsOf | None
"""One position (`-1` the last), a slice, several, a mask `[position]` or `[batch, position]` over
the padded input, or a function of the token ids that returns such a mask; None for all."""

Phase = Literal["all", "prefill", "decode"]
"""Which passes: the one that reads the prompt, those that follow with a cache, or all."""


@dataclass(frozen=True)
class Where:
    """What an edit changes in one call. None stands for everything."""

    heads: Int[Tensor, " head"]
    rows: Bool[Tensor, "batch row"] | None
    """Chosen rows, padding never among them."""
    keys: Bool[Tensor, "batch key"] | None
    row_places: Int[Tensor, " row"]
    """Place of each row in the padded input, those in the cache counted."""
    key_places: Int[Tensor, " key"]
    real: Bool[Tensor, "batch position"] | None
    """Real positions of the padded text that the rows stand for."""

    @property
    def counted(self) -> Int[Tensor, "#batch row"]:
        """Number of each row's token among the real tokens of its text; 0 for padding before."""
        if self.real is None:
            return self.row_places[None]
        return (self.real.long().cumsum(-1) - 1).clamp_min(0)[:, self.row_places]

    @property
    def decoding(self) -> bool:
        """Whether rows before these are in a cache."""
        return int(self.row_places[0]) > 0

    def of_prompts(self, prompts: slice) -> Where:
        """The same for some prompts of the batch."""

        def part(mask: Tensor | None) -> Tensor | None:
            return mask if mask is None or mask.shape[0] == 1 else mask[prompts]

        return replace(self, rows=part(self.rows), keys=part(self.keys), real=part(self.real))


class Running:
    """What the model is reading while a session is open: tokens, padding, phase.

    It listens at the model's own inputs, so it knows them in `generate` too.
    """

    def __init__(self) -> None:
        self.cached = 0
        self._sides = Sides(Tokens())
        self._ids: dict[str, Tensor] = {}
        self._chosen: dict[tuple[int, str, str, int], Tensor | None] = {}

    def attach(self, model: nn.Module) -> Handle:
        """Listen at the model's inputs."""
        names = list(inspect.signature(model.forward).parameters)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.begin({**dict(zip(names, args, strict=False)), **kwargs})

        return model.register_forward_pre_hook(hook, with_kwargs=True)

    def in_phase(self, phase: Phase) -> bool:
        """Whether the pass that is running is of this phase."""
        return phase == "all" or (phase == "decode") == (self.cached > 0)

    def at(
        self, site: Site, asked: Asked, heads: Tensor, queries: Positions, keys: Positions = None
    ) -> Where:
        """Rows and keys of one call that positions choose."""
        rows, columns = asked.query.shape[2], asked.key.shape[2]
        row_start = 0 if site.stack in ("vision", "audio", "enc") else self.cached
        device = asked.query.device
        row_places = torch.arange(row_start, row_start + rows, device=device)
        key_places = torch.arange(columns, device=device)
        if site.kind != "cross":
            # A windowed cache holds the last keys only.
            key_places = key_places + max(row_start + rows - columns, 0)
        chosen_rows = self._choose(site, "query", queries, row_places)
        chosen_keys = self._choose(site, "key", keys, key_places)
        real = self._sides.queries(site).real
        return Where(heads, chosen_rows, chosen_keys, row_places, key_places, real)

    def rows_of_stream(
        self, site: Site, stream: Tensor, queries: Positions
    ) -> tuple[Bool[Tensor, "batch row"] | None, int]:
        """Chosen rows of the stream at a site's block, and the place of its first row."""
        start = 0 if site.stack in ("vision", "audio", "enc") else self.cached
        places = torch.arange(start, start + stream.shape[1], device=stream.device)
        return self._choose(site, "query", queries, places), start

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Take note of what the model is given for the pass that begins."""
        cache: Any = inputs.get("past_key_values")
        self.cached = int(cache.get_seq_length()) if cache is not None else 0
        self._sides = Sides.of(inputs)
        self._chosen.clear()
        for name in ("input_ids", "decoder_input_ids"):
            now, before = inputs.get(name), self._ids.pop(name, None)
            if isinstance(now, Tensor):
                known = before is not None and before.shape == (now.shape[0], self.cached)
                if self.cached and known and before is not None:
                    now = torch.cat([before, now], dim=1)
                self._ids[name] = now

    def _choose(
        self, site: Site, side: str, positions: Positions, places: Int[Tensor, " place"]
    ) -> Bool[Tensor, "batch place"] | None:
        key = id(positions), site.name, side, len(places)
        if key not in self._chosen:
            found = self._chosen_at(site, side, positions, places)
            self._chosen[key] = None if found is None else found.to(places.device)
        return self._chosen[key]

    def _chosen_at(
        self, site: Site, side: str, positions: Positions, places: Tensor
    ) -> Tensor | None:
        of_rows = side == "query"
        tokens = self._sides.queries(site) if of_rows else self._sides.keys(site)
        total = int(places[-1]) + 1
        cached = self.cached if of_rows or site.kind != "cross" else 0
        real = tokens.real if tokens.real is not None and tokens.real.shape[1] >= total else None
        if positions is None:
            return None if real is None else real[:, places]
        ids = self._ids.get("decoder_input_ids" if self._reads_decoder(site, side) else "input_ids")
        if real is None:
            batch = 1 if ids is None else ids.shape[0]
            real = torch.ones(batch, total, dtype=torch.bool, device=places.device)
        mask = resolve(positions, real[:, :total], ids, growing=cached > 0)
        return (mask.to(real.device) & real[:, :total])[:, places]

    def _reads_decoder(self, site: Site, side: str) -> bool:
        return site.stack == "dec" or (site.kind == "cross" and side == "query")


def check_phase(phase: str) -> None:
    """Raise InputError for an unknown phase."""
    if phase not in get_args(Phase):
        raise InputError(f"There is no phase {phase!r}; choose {', '.join(get_args(Phase))}.")


def resolve(
    positions: Positions,
    real: Bool[Tensor, "batch position"],
    ids: Int[Tensor, "batch position"] | None,
    growing: bool = False,
) -> Bool[Tensor, "batch position"]:
    """The mask that positions stand for, in a padded batch; `growing` texts may yet have them."""
    if positions is None:
        return real
    if callable(positions) and not isinstance(positions, Tensor):
        return _asked_of_ids(positions, real, ids)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return _widened(positions, real, growing)
    counts: list[int] = real.sum(-1).tolist()
    mask = torch.zeros_like(real)
    for prompt, count in enumerate(counts):
        numbers = _numbers(positions, count, prompt, growing)
        own = real[prompt].nonzero()[:, 0]
        mask[prompt, own[torch.tensor(numbers, dtype=torch.long, device=own.device)]] = True
    return mask


def _numbers(positions: Any, count: int, prompt: int, growing: bool) -> list[int]:
    """Positions of one prompt of `count` real tokens, from 0."""
    if isinstance(positions, slice):
        return list(range(count))[positions]
    asked = [positions] if isinstance(positions, int) else [int(p) for p in positions]
    outside = [p for p in asked if not -count <= p < count]
    if outside and not growing:
        raise InputError(
            f"Position {outside[0]} is outside prompt {prompt}, which has {count} tokens: choose "
            f"{-count} to {count - 1}, or a slice, which takes what is there."
        )
    return [p % count for p in asked if -count <= p < count]


def _widened(mask: Tensor, real: Tensor, growing: bool) -> Tensor:
    """A mask over the input as wide as the text is by now; what was not asked is not chosen."""
    wide = mask.to(real.device)
    wide = wide if wide.ndim == 2 else wide[None]
    fits = wide.shape[1] == real.shape[1] or growing
    if not fits or wide.shape[0] not in (1, real.shape[0]):
        raise InputError(
            f"A mask of positions has shape {list(mask.shape)}, and the input is "
            f"{list(real.shape)}: give [position] or [batch, position] of the padded input."
        )
    missing = max(real.shape[1] - wide.shape[1], 0)
    wide = torch.nn.functional.pad(wide, (0, missing))[:, : real.shape[1]]
    return wide.expand(real.shape[0], -1)


def _asked_of_ids(function: PositionsOf, real: Tensor, ids: Tensor | None) -> Tensor:
    if ids is None or ids.shape[1] != real.shape[1]:
        raise InputError(
            "Positions are given by a function of the token ids, and the ids of this pass are not "
            "known (embeddings instead of ids, or a cache that was filled before the edit began)."
        )
    mask = function(ids)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
        raise InputError(
            f"The function of positions must return a boolean tensor of the shape of the ids, "
            f"{list(ids.shape)}."
        )
    return mask
