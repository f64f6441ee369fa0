"""What a run's positions hold: token ids, and which positions are real and not padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnlens.anatomy import Site


@dataclass(frozen=True)
class Tokens:
    """Ids and padding of one side of a model; both None where the side has no tokens (images)."""

    ids: Int[Tensor, "batch position"] | None = None
    real: Bool[Tensor, "batch position"] | None = None
    """None where nothing is padded."""

    def cut(self, length: int) -> Tokens:
        """The tokens if they are `length` positions, else nothing known."""
        return Tokens(
            self.ids if self.ids is not None and self.ids.shape[-1] == length else None,
            self.real if self.real is not None and self.real.shape[-1] == length else None,
        )


@dataclass(frozen=True)
class Sides:
    """The tokens that feed a model: the text, and the decoder's own where there is an encoder."""

    text: Tokens
    decoder: Tokens | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Sides:
        """Read ids and masks from a model's inputs."""
        text = _tokens(inputs, "input_ids", "attention_mask")
        if "decoder_input_ids" not in inputs:
            return cls(text)
        return cls(text, _tokens(inputs, "decoder_input_ids", "decoder_attention_mask"))

    def queries(self, site: Site) -> Tokens:
        """What the rows of a site stand for."""
        if site.kind == "cross":
            return self.decoder or Tokens()
        return self._of_stack(site)

    def keys(self, site: Site) -> Tokens:
        """What the columns of a site stand for."""
        return self.text if site.kind == "cross" else self._of_stack(site)

    def _of_stack(self, site: Site) -> Tokens:
        if site.stack in ("vision", "audio"):
            return Tokens()
        return self.decoder or Tokens() if site.stack == "dec" else self.text


def _tokens(inputs: Mapping[str, Any], ids: str, mask: str) -> Tokens:
    given, real = inputs.get(ids), inputs.get(mask)
    if isinstance(real, Tensor) and real.ndim == 2 and not bool(real.bool().all()):
        return Tokens(given, real.bool())
    return Tokens(given, None)


@dataclass(frozen=True)
class Layout:
    """What a reducer may know about a site before the first block of rows comes."""

    site: Site
    batch: int
    heads: int
    queries: int
    keys: int
    offset: int
    """Key position of the first query: 0, or the cache's length while decoding."""
    query_tokens: Tokens
    key_tokens: Tokens
    device: torch.device

    def real_rows(self, rows: slice) -> Bool[Tensor, "batch row"] | None:
        """Which rows of a block are real; None where all are."""
        real = self.query_tokens.real
        return None if real is None else real[:, rows]

    def positions(self, rows: slice) -> Int[Tensor, " row"]:
        """Key position of each row's own token."""
        return torch.arange(rows.start, rows.stop, device=self.device) + self.offset

    def partners(self, rows: slice) -> Int[Tensor, "#batch row"]:
        """Key at the same distance from the first real key as each row from the first real row.

        The row's own position, but in cross-attention, where each side may have its own padding.
        """
        shift = self.first_key() - self.first_query()
        return self.positions(rows) + shift[:, None]

    def first_key(self) -> Int[Tensor, " batch"]:
        """Position of each prompt's first real key (0 unless padded on the left)."""
        return _first_real(self.key_tokens.real, self.batch, self.device)

    def first_query(self) -> Int[Tensor, " batch"]:
        """Position of each prompt's first real row among the keys of its own text."""
        if self.site.kind != "cross":
            return self.first_key()
        return _first_real(self.query_tokens.real, self.batch, self.device)

    def align_keys(self, values: Tensor, fill: float) -> Tensor:
        """`batch head key` shifted so that the first real key is column 0; the rest is `fill`."""
        return _align(values, self.key_tokens.real, fill)

    def align_queries(self, values: Tensor, fill: float) -> Tensor:
        """`batch head query` shifted so that the first real row is column 0; the rest is `fill`."""
        return _align(values, self.query_tokens.real, fill)


def _first_real(real: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if real is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return real.int().argmax(-1)


def _align(values: Tensor, real: Tensor | None, fill: float) -> Tensor:
    """Move each prompt's real positions to the left, in their order."""
    if real is None:
        return values
    order = (~real).int().argsort(dim=-1, stable=True)
    moved = values.gather(-1, order[:, None].expand(values.shape))
    kept = real.gather(-1, order)[:, None]
    return moved.masked_fill(~kept, fill)
