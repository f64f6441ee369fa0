"""Where an edit acts: phases of a text's reading, and the rows and keys of one call.

While a cache is in use positions go on counting, so position 12 is the same token in the prompt's
own pass and later.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attnlens.anatomy import Site
from attnlens.errors import InputError
from attnlens.hooks.positions import Positions, resolve
from attnlens.hooks.seam import Asked
from attnlens.hooks.session import Handle
from attnlens.hooks.thread import this_thread
from attnlens.hooks.tokens import Sides, Tokens

Phase = Literal["all", "prefill", "decode"]
"""Which passes: the one that reads the prompt, those that follow with a cache, or all."""


@dataclass(frozen=True)
class Where:
    """What an edit changes in one call. None stands for everything."""

    heads: Int[Tensor, " head"]
    rows: Bool[Tensor, "batch row"] | None
    """Chosen rows, padding never among them."""
    keys: Bool[Tensor, "batch key"] | None
    row_places: range
    """Places of the rows in the padded input, those in the cache counted."""
    key_places: range
    real: Bool[Tensor, "batch position"] | None
    """Real positions of the padded text that the rows stand for; None where none is padded."""

    @property
    def counted(self) -> Int[Tensor, "#batch row"]:
        """Number of each row's token among the real tokens of its text; 0 for padding before."""
        if self.real is None:
            return torch.tensor([self.row_places], device=self.heads.device)
        counts = (self.real.long().cumsum(-1) - 1).clamp_min(0)
        return counts[:, self.row_places.start : self.row_places.stop]

    @property
    def decoding(self) -> bool:
        """Whether rows before these are in a cache."""
        return self.row_places.start > 0


class Running:
    """What the model is reading while a session is open: tokens, padding, phase.

    It listens at the model's own inputs, and at those of an encoder that `generate` runs by itself.
    """

    def __init__(self) -> None:
        self.cached = 0
        self._first = 0
        self._inside = False
        self._sides = Sides(Tokens())
        self._ids: dict[str, Tensor] = {}
        self._unread: set[str] = set()
        self._chosen: dict[tuple[object, ...], tuple[Positions, Tensor | None]] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Listen at the inputs of the model, and of its encoder where it has one."""

        def enter(inputs: Mapping[str, Any]) -> None:
            self.begin(inputs)
            self._inside = True

        def leave(*_: object) -> None:
            self._inside = False

        def encode(inputs: Mapping[str, Any]) -> None:
            if not self._inside:
                self.begin(inputs)

        handles: list[Handle] = [
            _listen(model, enter),
            model.register_forward_hook(leave, always_call=True),
        ]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder: Any = model.get_encoder()  # type: ignore[operator]
            handles.append(_listen(encoder, encode))
        return handles

    def in_phase(self, phase: Phase) -> bool:
        """Whether the pass that is running is of this phase."""
        return phase == "all" or (phase == "decode") == (self.cached > 0)

    def at(
        self, site: Site, asked: Asked, heads: Tensor, queries: Positions, keys: Positions = None
    ) -> Where:
        """Rows and keys of one call that positions choose."""
        batch, _, rows, _ = asked.query.shape
        columns, device = asked.key.shape[2], asked.query.device
        start = self._start(site)
        end = start + rows
        # A windowed cache holds the last keys only, a static one has room for more.
        first = 0 if site.kind == "cross" else max(end - columns, 0)
        row_places, key_places = range(start, end), range(first, first + columns)
        key_end = columns if site.kind == "cross" else end
        real = self._real(self._name(site, "query"), end)
        return Where(
            heads,
            self._choose(site, "query", queries, row_places, end, batch, device),
            self._choose(site, "key", keys, key_places, key_end, batch, device),
            row_places,
            key_places,
            None if real is None else real.to(device),
        )

    def rows_of_stream(
        self, site: Site, stream: Tensor, queries: Positions
    ) -> tuple[Bool[Tensor, "batch row"] | None, int]:
        """Chosen rows of the stream at a site's block, and the place of its first row."""
        start = self._start(site)
        end = start + stream.shape[1]
        places, batch = range(start, end), stream.shape[0]
        return self._choose(site, "query", queries, places, end, batch, stream.device), start

    def begin(self, inputs: Mapping[str, Any], first: int = 0) -> None:
        """Take note of what the model is given for the pass that begins.

        `first` is the place of the first row where the pass reads the rest of these inputs only,
        what is before being known: a prefill all the same.
        """
        self._first = first
        cache: Any = inputs.get("past_key_values")
        self.cached = int(cache.get_seq_length()) if cache is not None else 0
        self._sides = Sides.of(inputs)
        self._chosen.clear()
        self._unread = {ids for ids, mask in _MASK_OF.items() if not _is_flat(inputs.get(mask))}
        encoded = inputs.get("encoder_outputs") is not None
        for name in _MASK_OF:
            now, before = inputs.get(name), self._ids.get(name)
            if not isinstance(now, Tensor):
                if not (encoded and name == "input_ids"):
                    self._ids.pop(name, None)
                continue
            if self.cached and before is not None:
                known = before.shape == (now.shape[0], self.cached)
                now = torch.cat([before, now], dim=1) if known else now
            self._ids[name] = now

    def _start(self, site: Site) -> int:
        """Place of the first row of this pass: how much is known where the stack has a cache."""
        alone = site.stack == "enc" or site.stack.startswith(("vision", "audio"))
        return 0 if alone else max(self.cached, self._first)

    def _name(self, site: Site, side: str) -> str | None:
        """Name of the input that rows or keys stand for; None where they are no tokens."""
        if site.stack.startswith(("vision", "audio")):
            return None
        two = self._sides.decoder is not None
        if site.kind == "cross":
            if side == "key":
                return "input_ids" if two else None
            return "decoder_input_ids" if two else "input_ids"
        return "decoder_input_ids" if site.stack == "dec" else "input_ids"

    def _real(self, name: str | None, end: int) -> Bool[Tensor, "batch position"] | None:
        """Which of the first `end` positions of an input are real; None where all are."""
        if name is None:
            return None
        tokens = self._sides.text if name == "input_ids" else self._sides.decoder or Tokens()
        return tokens.cut(end).real

    def _choose(
        self,
        site: Site,
        side: str,
        positions: Positions,
        places: range,
        end: int,
        batch: int,
        device: torch.device,
    ) -> Bool[Tensor, "batch place"] | None:
        """The mask over `places` that positions of a text of `end` positions stand for."""
        name = self._name(site, side)
        key = id(positions), name, places, end, batch, device
        if key not in self._chosen:
            mask = self._mask(name, positions, end, batch, self._start(site) > self._first)
            if mask is not None:
                missing = max(places.stop - end, 0)
                mask = torch.nn.functional.pad(mask, (0, missing))[:, places.start : places.stop]
                mask = mask.to(device)
            # Holding the positions keeps their id from being given to others.
            self._chosen[key] = positions, mask
        return self._chosen[key][1]

    def _mask(
        self, name: str | None, positions: Positions, end: int, batch: int, growing: bool
    ) -> Bool[Tensor, "batch position"] | None:
        real = self._real(name, end)
        if positions is None:
            return real
        if name in self._unread:
            raise InputError(
                "Positions count real tokens, and the padding of this pass is not known: its "
                "attention mask is not [batch, position] (generate makes another for a static "
                "cache). Give such a mask and a dynamic cache, or edit all positions."
            )
        if real is None:
            real = torch.ones(batch, end, dtype=torch.bool)
        return resolve(positions, real, self._ids.get(name or ""), growing)


_MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def _is_flat(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)


def _listen(module: nn.Module, told: Callable[[Mapping[str, Any]], None]) -> Handle:
    """Tell a module's inputs by their names, before each of its passes in this thread."""
    names = list(inspect.signature(module.forward).parameters)
    thread = this_thread()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if this_thread() == thread:
            told({**dict(zip(names, args, strict=False)), **kwargs})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def check_phase(phase: str) -> None:
    """Raise InputError for an unknown phase."""
    if phase not in get_args(Phase):
        raise InputError(f"There is no phase {phase!r}; choose {', '.join(get_args(Phase))}.")
