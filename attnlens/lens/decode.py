"""Greedy decoding that is watched row by row: the prompt runs unseen, then one query row a token.

The prompt but its last token is read by the model's own kernel with no observer attached, so no map
of it is ever made. From the last prompt token on each step is one query row over the cache, and
observers see these rows only. The cache keeps every key, of windowed layers too, so that the place
of a key is its position; the model's mask does the windowing.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.probe import evaluating
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session
from attnlens.lens.inputs import Batch, first_position

_READ = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})


@dataclass(frozen=True)
class Decoded:
    """Greedy answers of a batch of prompts, and how the rows that were seen are to be read.

    Row `i` is the query of the token before the i-th generated one: row 0 is the last token of the
    prompt, row i > 0 generated token i - 1. Prompts stand at the right end of the batch, so key `s`
    of an observed row is position `s - padding[prompt]` of prompt and answer; rows from
    `len(answers[prompt]) + 1` on are those of an answer that had ended.

    Attributes:
        prompts: token ids of each prompt.
        answers: generated ids of each prompt, without the one that ended the answer.
        stopped: whether an answer ended by itself; else it has as many tokens as steps.
        padding: positions before each prompt's first token.
        rows: number of decoded rows.

    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    stopped: tuple[bool, ...]
    padding: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class Decoder:
    """Decodes with one model: what it is, where its attention sites are, how far it reads."""

    model: nn.Module
    anatomy: Anatomy

    @torch.no_grad()
    def decode(
        self, batch: Batch, steps: int, observers: Sequence[Observer], stop: Collection[int]
    ) -> Decoded:
        """Write up to `steps` tokens after each prompt; see `Lens.decode`."""
        prompts = self.prompts(batch, steps)
        ids, real = at_the_right(prompts, batch.ids)
        cache = whole_cache(self.model)
        length = ids.shape[1]
        written = ids.new_zeros(len(prompts), 0)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)
        ends = torch.tensor(sorted(stop), dtype=ids.dtype, device=ids.device)
        with evaluating(self.model):
            if length > 1:
                self.last_logits(ids[:, :-1], real[:, :-1], cache)
            whole = _WholeCache(self.anatomy, length)
            with Session(self.model, self.anatomy, [whole, *observers]):
                token = ids[:, -1:]
                while written.shape[1] < steps and not bool(ended.all()):
                    logits = self.last_logits(token, real, cache)
                    token = logits.argmax(-1, keepdim=True).to(ids.device)
                    written = torch.cat([written, token], dim=1)
                    ended |= torch.isin(token[:, 0], ends)
                    real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
                    whole.keys += 1
        answers = [until(row, stop) for row in written.tolist()]
        return Decoded(
            tuple(tuple(prompt) for prompt in prompts),
            tuple(tuple(answer) for answer in answers),
            tuple(len(answer) < written.shape[1] for answer in answers),
            tuple(length - len(prompt) for prompt in prompts),
            written.shape[1],
        )

    def prompts(self, batch: Batch, steps: int) -> list[list[int]]:
        """Ids of each prompt without padding; raises where the model cannot write on from them."""
        self.check_model()
        more = sorted(set(batch.inputs) - _READ)
        if batch.ids is None or more:
            raise InputError(
                f"Decoding writes on from tokens alone, and this input holds {', '.join(more)}."
            )
        if steps < 1:
            raise InputError(f"steps={steps} decodes nothing; give 1 at least.")
        real = torch.ones_like(batch.ids).bool() if batch.real is None else batch.real
        prompts = [row[own].tolist() for row, own in zip(batch.ids, real, strict=True)]
        longest, limit = max(map(len, prompts)), self.anatomy.context
        # The last token is written and not read.
        if limit is not None and longest + steps - 1 > limit:
            raise InputError(
                f"A prompt of {longest} tokens and an answer of up to {steps} pass the context of "
                f"{limit}. Shorten the prompt, or give steps={max(limit - longest + 1, 0)} or "
                "fewer."
            )
        return prompts

    def check_model(self) -> None:
        """Raise UnsupportedModelError for a model that does not decode over a common cache."""
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{self.anatomy.model} has an encoder beside its decoder; decoding row by row is "
                "for models that read prompt and answer as one text (decoder-only)."
            )
        common: Any = getattr(self.model, "_supports_default_dynamic_cache", lambda: True)
        if (
            "past_key_values" not in inspect.signature(self.model.forward).parameters
            or not common()
        ):
            raise UnsupportedModelError(
                f"{self.anatomy.model} takes no key/value cache of transformers' common kind, so "
                "attnlens cannot decode with it row by row."
            )

    @torch.no_grad()
    def last_logits(
        self, ids: Int[Tensor, "batch row"], real: Bool[Tensor, "batch key"], cache: Any
    ) -> Float[Tensor, "batch vocab"]:
        """Logits of the last row; the cache takes the rows up.

        `real` tells padding, on the left, from tokens, for the rows in the cache and these.
        """
        accepted = inspect.signature(self.model.forward).parameters
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if not bool(real.all()):
            inputs["attention_mask"] = real.long()
            if "position_ids" in accepted:
                positions = (real.long().cumsum(-1) - 1).clamp_min(0)
                inputs["position_ids"] = positions[:, -ids.shape[1] :] + first_position(self.model)
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        logits = getattr(self.model(**inputs), "logits", None)
        if logits is None:
            raise InputError(
                f"{self.anatomy.model} has no logits: it has no language-model head. Load the "
                "model with its head to decode."
            )
        if bool(logits[:, -1].isnan().any()):
            raise InputError(
                f"{self.anatomy.model} gives NaN for what comes next. Some models' own attention "
                "makes NaN of padding: decode prompts of one length, or in another dtype."
            )
        return logits[:, -1]


class _WholeCache(Observer):
    """Observer that refuses rows over another number of keys than there are positions."""

    def __init__(self, anatomy: Anatomy, keys: int) -> None:
        self.sites = frozenset(site.name for site in anatomy.sites if site.kind == "self")
        self.keys = keys
        self._model = anatomy.model

    def see(self, site: Site, call: Call) -> Call:
        """Check one call."""
        found = call.query.shape[2], call.key.shape[2]
        if found != (1, self.keys):
            raise UnsupportedModelError(
                f"{site.name} of {self._model} decodes {found[0]} rows over {found[1]} keys where "
                f"1 row over {self.keys} is due: its cache is of a kind of its own, so the place "
                "of a key says nothing about its position."
            )
        return call


def end_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text: the generation settings', the config's, the tokenizer's."""
    given = [
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ]
    ids = [number for one in given for number in (one if isinstance(one, list) else [one])]
    return frozenset(number for number in ids if number is not None)


def whole_cache(model: nn.Module) -> DynamicCache:
    """A fresh cache that drops no key."""
    config: Any = model.config
    cache = DynamicCache(config=config)
    cache.layers = [
        DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


def at_the_right(
    prompts: Sequence[Sequence[int]], like: Tensor | None
) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
    """Prompts padded on the left, so that all end at one place, and which positions are real."""
    assert like is not None
    width = max(map(len, prompts))
    ids = like.new_zeros(len(prompts), width)
    real = torch.zeros_like(ids).bool()
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = like.new_tensor(prompt)
        real[row, width - len(prompt) :] = True
    return ids, real


def until(row: list[int], stop: Collection[int]) -> list[int]:
    """The ids before the first that ends an answer."""
    return next((row[:place] for place, token in enumerate(row) if token in stop), row)
