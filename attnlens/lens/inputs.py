"""From what a user gives (text, texts, ids, a processor's output) to what the model takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.placed import input_device
from attnlens.errors import InputError
from attnlens.hooks.keep import Extent
from attnlens.hooks.tokens import Sides

Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """One batch as the model takes it, with what its positions hold."""

    inputs: Mapping[str, Any]
    sides: Sides
    tokens: tuple[tuple[str, ...], ...]
    """Token texts of each prompt, padding left out; empty where there are no token ids."""

    @property
    def ids(self) -> Int[Tensor, "batch position"] | None:
        """Token ids, padded."""
        return self.sides.text.ids

    @property
    def real(self) -> Bool[Tensor, "batch position"] | None:
        """Which positions are real; None where all are."""
        return self.sides.text.real

    @property
    def size(self) -> int:
        """Number of prompts."""
        if self.ids is not None:
            return self.ids.shape[0]
        return next(v.shape[0] for v in self.inputs.values() if isinstance(v, Tensor))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real positions of each prompt."""
        if self.real is not None:
            return tuple(int(n) for n in self.real.sum(-1))
        return (self.ids.shape[1],) * self.size if self.ids is not None else (0,) * self.size

    def extents(self, anatomy: Anatomy) -> dict[str, Extent]:
        """Sizes at each site, as far as the tokens tell."""
        found = {site.name: self._extent(site) for site in anatomy.sites}
        return {name: extent for name, extent in found.items() if extent is not None}

    def _extent(self, site: Site) -> Extent | None:
        queries, keys = self.sides.queries(site).ids, self.sides.keys(site).ids
        if queries is None or keys is None:
            return None
        return Extent(queries.shape[0], queries.shape[1], keys.shape[1])

    def rows(
        self, rows: int | slice | Sequence[int] | None, sites: Sequence[Site]
    ) -> tuple[tuple[int, ...], ...] | None:
        """The asked rows of each prompt, counted over its real positions, as padded positions."""
        if rows is None:
            return None
        sides = {id(tokens.ids): tokens for tokens in map(self.sides.queries, sites)}
        if len(sides) > 1:
            raise InputError(
                f"rows={rows!r} is not the same place at all the sites asked for, whose rows are "
                "different tokens (encoder and decoder, or image and text). Name the layers of one "
                f"side, for example layers={sites[-1].name!r}."
            )
        (tokens,) = sides.values()
        if tokens.ids is None:
            raise InputError("Rows are chosen by token, and this input has no token ids.")
        real = tokens.real if tokens.real is not None else torch.ones_like(tokens.ids).bool()
        found: list[tuple[int, ...]] = []
        for prompt, mask in enumerate(real):
            positions: list[int] = mask.nonzero()[:, 0].tolist()
            if isinstance(rows, slice):
                found.append(tuple(positions[rows]))
                continue
            asked = [rows] if isinstance(rows, int) else list(rows)
            try:
                found.append(tuple(positions[row] for row in asked))
            except IndexError:
                raise InputError(
                    f"rows={rows!r} asks for a row that prompt {prompt} with its {len(positions)} "
                    "tokens does not have."
                ) from None
        counts = sorted({len(own) for own in found})
        if len(counts) > 1 or counts == [0]:
            raise InputError(
                f"rows={rows!r} picks {counts[0]} rows of one prompt and {counts[-1]} of another. "
                "Choose rows that every prompt has (rows=-1, rows=slice(-4, None)), or run prompts "
                "of one length."
            )
        return tuple(found)


class Encoder:
    """Turns inputs into batches for one model, and refuses what the model cannot take."""

    def __init__(self, model: nn.Module, tokenizer: Any, context: int | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = context
        config: Any = model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocab = getattr(text, "vocab_size", None)
        # Where positions have several coordinates the model counts them itself, from the mask.
        counts = any(hasattr(module, "get_rope_index") for module in model.modules())
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted and not counts
        self.first_position = first_position(model)
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.model)

    def encode(self, inputs: Inputs) -> Batch:
        """Tokenise, pad, check and move to the model's device."""
        prepared = self._prepare(inputs)
        if self.encoder_decoder and "input_ids" in prepared:
            self._start_decoder(prepared)
        self._count_from_first_token(prepared)
        self._check(prepared)
        moved = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in prepared.items()
        }
        sides = Sides.of(moved)
        return Batch(moved, sides, self._token_texts(sides))

    def _prepare(self, inputs: Inputs) -> dict[str, Any]:
        if isinstance(inputs, Mapping):
            return self._given(inputs)
        if isinstance(inputs, str):
            return self._tokenise([inputs])
        if isinstance(inputs, Tensor):
            return {"input_ids": inputs[None] if inputs.ndim == 1 else inputs}
        if not isinstance(inputs, Sequence) or isinstance(inputs, bytes):
            raise InputError(
                f"Cannot read {type(inputs).__name__} as input: give a text, texts, token ids, or "
                "the dictionary of a tokenizer or processor."
            )
        if not len(inputs):
            raise InputError("The input is empty: give a text, texts, or token ids.")
        if all(isinstance(part, str) for part in inputs):
            return self._tokenise([str(part) for part in inputs])
        rows = [inputs] if all(isinstance(part, int) for part in inputs) else list(inputs)
        return {"input_ids": _stack_ids(rows)}

    @staticmethod
    def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A dictionary as it is; lists, as tokenizers return them, become tensors."""
        prepared = {
            name: _stack_ids(value) if isinstance(value, Sequence) else value
            for name, value in inputs.items()
        }
        if not any(isinstance(value, Tensor) for value in prepared.values()):
            raise InputError("The dictionary holds no tensor: give for example input_ids.")
        return prepared

    def _tokenise(self, texts: list[str]) -> dict[str, Any]:
        if self.tokenizer is None:
            raise InputError(
                "The model has no tokenizer, so text cannot be read. Give one "
                "(al.load(model, tokenizer=...)) or give token ids."
            )
        for number, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"Text {number} is empty: give at least one word.")
        rows: list[list[int]] = self.tokenizer(texts)["input_ids"]
        length = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def _start_decoder(self, prepared: dict[str, Any]) -> None:
        """Where no decoder ids are given, the decoder reads its start token alone."""
        if "decoder_input_ids" in prepared or "decoder_inputs_embeds" in prepared:
            return
        config: Any = self.model.config
        start = getattr(config, "decoder_start_token_id", None)
        start = getattr(config, "bos_token_id", None) if start is None else start
        batch = prepared["input_ids"].shape[0]
        prepared["decoder_input_ids"] = torch.full((batch, 1), start or 0)

    def _count_from_first_token(self, prepared: dict[str, Any]) -> None:
        """With padding on the left, positions count from the first real token, as in generation."""
        mask = prepared.get("attention_mask")
        if not self.takes_positions or not isinstance(mask, Tensor) or mask.ndim != 2:
            return
        if not bool(mask[:, 0].all()) and "position_ids" not in prepared:
            counted = (mask.long().cumsum(-1) - 1).clamp_min(0)
            prepared["position_ids"] = counted + self.first_position

    def _check(self, prepared: Mapping[str, Any]) -> None:
        for name in ("input_ids", "decoder_input_ids"):
            ids = prepared.get(name)
            if ids is None:
                continue
            if ids.ndim != 2 or ids.numel() == 0:
                raise InputError(
                    f"{name} has shape {list(ids.shape)}; it must be [batch, position]."
                )
            if ids.is_floating_point():
                raise InputError(f"{name} holds {ids.dtype} numbers; token ids are integers.")
            self._check_range(name, ids)
        ids, mask = prepared.get("input_ids"), prepared.get("attention_mask")
        if ids is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape != ids.shape:
                raise InputError(
                    f"attention_mask has shape {list(mask.shape)} and input_ids {list(ids.shape)}; "
                    "they must agree."
                )
            if not mask.any(-1).all():
                raise InputError("attention_mask hides every token of a prompt.")
        if ids is not None and self.context is not None and ids.shape[1] > self.context:
            raise InputError(
                f"The input has {ids.shape[1]} tokens and the model reads at most {self.context}. "
                "Shorten the text, or split it into pieces."
            )
        for name, value in prepared.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                raise InputError(f"{name} holds NaN.")

    def _check_range(self, name: str, ids: Tensor) -> None:
        if self.vocab is None:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab:
            worst = low if low < 0 else high
            raise InputError(
                f"{name} holds the id {worst}; the model's vocabulary is 0 to {self.vocab - 1}. "
                "Is the tokenizer another model's?"
            )

    def _token_texts(self, sides: Sides) -> tuple[tuple[str, ...], ...]:
        tokens = sides.text
        if tokens.ids is None:
            return ()
        rows: list[tuple[str, ...]] = []
        for prompt, ids in enumerate(tokens.ids):
            kept = ids if tokens.real is None else ids[tokens.real[prompt]]
            rows.append(self.texts_of(kept.tolist()))
        return tuple(rows)

    def texts_of(self, ids: Sequence[int]) -> tuple[str, ...]:
        """What each token looks like as text; the id where there is no tokenizer."""
        if self.tokenizer is None:
            return tuple(str(token) for token in ids)
        return tuple(
            self.tokenizer.convert_tokens_to_string([t]) if t is not None else str(i)
            for i, t in zip(ids, self.tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
        )


def first_position(model: nn.Module) -> int:
    """Position of a text's first token: 0, or behind that of padding (RoBERTa)."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


def _stack_ids(rows: Sequence[Any]) -> Tensor:
    """Lists of ids as a tensor; all of one length."""
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    if all(isinstance(row, int) for row in rows):
        rows = [rows]
    if not all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows) or not all(
        isinstance(token, int) for row in rows for token in row
    ):
        raise InputError(
            "The input is a list of neither texts nor token ids: give texts, or lists of whole "
            "numbers."
        )
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise InputError(
            f"The id lists have {min(lengths)} to {max(lengths)} tokens. Pad them and say which "
            "are real: lens.run({'input_ids': ..., 'attention_mask': ...}); texts are padded for "
            "you."
        )
    return torch.tensor(rows)


def split(batch: Batch, size: int, by_length: bool = True) -> tuple[list[Batch], list[int]]:
    """A batch in parts of at most `size` prompts, similar lengths together, and the prompts' order.

    Padding that no prompt of a part needs is cut off.
    """
    if size < 1:
        raise InputError(f"batch_size={size}: give 1 or more.")
    order = list(range(batch.size))
    if not _one_row_a_prompt(batch):
        # Patches of all images in one tensor: which prompt they belong to is the model's affair.
        if batch.size > size:
            raise InputError(
                f"The input holds {batch.size} prompts whose images cannot be told apart, over the "
                f"batch size of {size}. Give fewer prompts at a time, or a larger batch_size."
            )
        return [batch], order
    if by_length and batch.real is not None:
        order.sort(key=lambda prompt: batch.lengths[prompt])
    return [_take(batch, order[i : i + size]) for i in range(0, len(order), size)], order


def repeated(batch: Batch, times: int) -> Batch:
    """Copies of a batch one after another."""
    if times == 1:
        return batch
    inputs = {
        name: value.repeat(times, *[1] * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch.size
        else value
        for name, value in batch.inputs.items()
    }
    return Batch(inputs, Sides.of(inputs), batch.tokens * times)


def _one_row_a_prompt(batch: Batch) -> bool:
    tensors = [value for value in batch.inputs.values() if isinstance(value, Tensor)]
    prompts = batch.ids.shape[0] if batch.ids is not None else batch.size
    return all(value.ndim > 0 and value.shape[0] == prompts for value in tensors)


def _take(batch: Batch, prompts: list[int]) -> Batch:
    if prompts == list(range(batch.size)):
        return batch
    inputs = {
        name: value[prompts]
        if isinstance(value, Tensor) and value.shape[0] == batch.size
        else value
        for name, value in batch.inputs.items()
    }
    mask = inputs.get("attention_mask")
    ids = inputs.get("input_ids")
    if isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.ndim == 2:
        used = mask.bool().any(0).nonzero()[:, 0]
        window = slice(int(used[0]), int(used[-1]) + 1)
        if window.start == 0:
            for name, value in inputs.items():
                if isinstance(value, Tensor) and value.shape[:2] == mask.shape:
                    inputs[name] = value[:, window]
    tokens = tuple(batch.tokens[prompt] for prompt in prompts) if batch.tokens else ()
    return Batch(inputs, Sides.of(inputs), tokens)
