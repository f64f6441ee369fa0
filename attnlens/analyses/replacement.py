"""What stands in for a token that is taken out of a prompt: nothing, an average, or another."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analyses.target import Token
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.embedded import Embedded, token_tables
from attnlens.hooks.session import Observer
from attnlens.lens import Batch, Lens
from attnlens.lens.inputs import first_position

Kind = Literal["padding", "mean", "neutral"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_AT_ONCE = 8192
"""Rows of a table of embeddings that are averaged at a time."""


@dataclass(frozen=True)
class Replacement:
    """What stands in for an erased token: a choice that changes every score by erasure.

    Attributes:
        kind: "padding" hides the token from all others by the attention mask, their positions
            staying as they are; the token whose logits are read cannot be hidden, and stays.
            "mean" puts the mean of the model's whole table of token embeddings in its place.
            "neutral" puts another token there.
        token: that other token, an id or a text that is one token. Where None, the tokenizer's
            mask token, else its unknown token (if that is no start or end token too), else a
            space; results say which.
        special: whether special tokens are erased too (start, separator, mask); by default they
            stay.

    Raises:
        InputError: an unknown kind, or a token for another kind than "neutral".

    """

    kind: Kind = "padding"
    token: Token | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"A token cannot be replaced by {self.kind!r}; choose {', '.join(KINDS)}."
            )
        if self.token is not None and self.kind != "neutral":
            raise InputError(
                f"token={self.token!r} is for Replacement('neutral'); {self.kind!r} takes none."
            )

    @classmethod
    def of(cls, given: Replacement | Kind) -> Replacement:
        """The setting itself, or the one of a name."""
        return given if isinstance(given, Replacement) else cls(given)


@dataclass(frozen=True)
class Side:
    """A text that a model reads, and where it stands among all positions, one text after another.

    An encoder-decoder reads two.
    """

    ids: str
    mask: str
    columns: slice

    @classmethod
    def all_of(cls, batch: Batch) -> tuple[Side, ...]:
        """The texts of a batch; InputError where it has no token ids."""
        if batch.ids is None:
            raise InputError(
                "The input has no token ids, so no token of it can be erased. Give text or ids."
            )
        width = batch.ids.shape[1]
        sides = (cls("input_ids", "attention_mask", slice(0, width)),)
        if batch.sides.decoder is None or batch.sides.decoder.ids is None:
            return sides
        end = width + batch.sides.decoder.ids.shape[1]
        return (*sides, cls("decoder_input_ids", "decoder_attention_mask", slice(width, end)))


Erased = Sequence[tuple[Side, Bool[Tensor, "row position"]]]
"""Each text, and which of its positions are erased."""


class Rule:
    """A replacement made ready for one model."""

    said: str
    """What stands in for an erased token, in words."""

    def put(self, inputs: dict[str, Any], erased: Erased) -> tuple[Observer, ...]:
        """Change the inputs of some rows; gives what has to watch their run."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise where the run that was watched did not take up what was put."""


def rule_for(lens: Lens, batch: Batch, replacement: Replacement) -> Rule:
    """The rule of a replacement for a model.

    Raises:
        InputError: a model without an attention mask to hide tokens by, or without a tokenizer to
            take a neutral token from; a token that is none of the model's.
        UnsupportedModelError: a model with several tables of embeddings, for "mean".

    """
    if replacement.kind == "padding":
        return _Hidden(lens)
    if replacement.kind == "mean":
        return _Averaged(lens)
    return _Other(lens, replacement.token)


class _Hidden(Rule):
    said = "nothing: erased tokens are hidden by the attention mask, positions stay"

    def __init__(self, lens: Lens) -> None:
        accepted = inspect.signature(lens.model.forward).parameters
        counts = any(hasattr(module, "get_rope_index") for module in lens.model.modules())
        if "attention_mask" not in accepted or counts:
            why = "counts positions by its attention mask" if counts else "takes no attention mask"
            raise InputError(
                f"{lens.anatomy.model} {why}, so that tokens cannot be hidden. Take "
                "replacement='mean' or 'neutral'."
            )
        self._first = first_position(lens.model)
        self._pinned = "position_ids" in accepted

    def put(self, inputs: dict[str, Any], erased: Erased) -> tuple[Observer, ...]:
        """Hide tokens; positions are those of the whole text, which a model would count anew."""
        for side, gone in erased:
            if not bool(gone.any()):
                continue
            ids = inputs[side.ids]
            mask = inputs.get(side.mask, torch.ones_like(ids))
            if mask.ndim != 2:
                raise InputError(
                    f"{side.mask} has shape {list(mask.shape)}; tokens are hidden by one of shape "
                    "[batch, position]. Take replacement='mean' or 'neutral'."
                )
            left = mask.bool() & ~gone
            if not bool(left.any(-1).all()):
                raise InputError(
                    "Every token of a prompt would be hidden. Keep its special tokens "
                    "(special=False), or take replacement='mean' or 'neutral'."
                )
            inputs[side.mask] = left.to(mask.dtype)
            if self._pinned and side.ids == "input_ids":
                positions = torch.arange(ids.shape[1], device=ids.device) + self._first
                inputs.setdefault("position_ids", positions.expand(ids.shape))
        return ()


class _Averaged(Rule):
    said = "the mean of the model's table of token embeddings"

    def __init__(self, lens: Lens) -> None:
        tables = {table.weight.data_ptr(): table for table in token_tables(lens.model)}
        if len(tables) != 1:
            raise UnsupportedModelError(
                f"{lens.anatomy.model} has {len(tables)} tables of token embeddings and a mean is "
                "taken of one. Take replacement='padding' or 'neutral'."
            )
        self._mean = _mean_row(next(iter(tables.values())), lens.device)
        self._left: list[tuple[Int[Tensor, "row position"], Bool[Tensor, "row position"]]] = []

    def put(self, inputs: dict[str, Any], erased: Erased) -> tuple[Observer, ...]:
        """Wait for the look-up of each text that has an erased token."""
        self._left = [(inputs[side.ids], gone) for side, gone in erased if bool(gone.any())]
        return (Embedded(self._look),)

    def _look(self, ids: Tensor, embeddings: Tensor) -> Tensor | None:
        for number, (own, gone) in enumerate(self._left):
            if own.shape == ids.shape and torch.equal(own, ids):
                del self._left[number]
                mean = self._mean.to(embeddings)
                return torch.where(gone[..., None].to(embeddings.device), mean, embeddings)
        return None

    def check(self) -> None:
        """Raise where a text was never looked up."""
        if self._left:
            raise UnsupportedModelError(
                "The model does not look its input ids up as they are (tokens that stand for an "
                "image, perhaps), so that no embedding could be replaced. Take "
                "replacement='padding' or 'neutral'."
            )


@torch.no_grad()
def _mean_row(table: torch.nn.Embedding, device: torch.device) -> Float[Tensor, " d_model"]:
    """The mean of what a table gives for all ids (scaled, where it scales), in float64 inside."""
    rows = torch.arange(table.num_embeddings, device=device)
    sums = torch.stack([table(part).double().sum(0) for part in rows.split(_AT_ONCE)])
    return sums.sum(0) / len(rows)


class _Other(Rule):
    def __init__(self, lens: Lens, token: Token | None) -> None:
        self._token, what = _neutral(lens) if token is None else (_id(lens, token), "token")
        self.said = f"the {what} {lens.token_texts([self._token])[0]!r} (id {self._token})"

    def put(self, inputs: dict[str, Any], erased: Erased) -> tuple[Observer, ...]:
        """Write the other token's id."""
        for side, gone in erased:
            inputs[side.ids] = inputs[side.ids].masked_fill(gone, self._token)
        return ()


def _neutral(lens: Lens) -> tuple[int, str]:
    """A token that says little, and what it is."""
    tokenizer = lens.tokenizer
    if tokenizer is None:
        raise InputError(
            "The model has no tokenizer to take a neutral token from. Name one: "
            "al.Replacement('neutral', token=7), or take replacement='mean' or 'padding'."
        )
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id, "mask token"
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
        return tokenizer.unk_token_id, "unknown token"
    for text in (" ", ",", "."):
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) == 1:
            return found[0], "token"
    raise InputError(
        "The tokenizer has no mask or unknown token, nor a space, comma or full stop that is one "
        "token. Name a token: al.Replacement('neutral', token=7)."
    )


def _id(lens: Lens, token: Token) -> int:
    if isinstance(token, int):
        if not 0 <= token < lens.vocab_size:
            raise InputError(f"There is no token {token}; ids are 0 to {lens.vocab_size - 1}.")
        return token
    if lens.tokenizer is None:
        raise InputError(f"The model has no tokenizer to read {token!r}; give a token id.")
    found: list[int] = lens.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        raise InputError(f"{token!r} is {len(found)} tokens; one stands in for an erased token.")
    return found[0]
