"""Trials that change nothing before a position do not run the positions before it again.

In a causal model rows from position p on depend on those before through their keys and values
alone. These are kept of one clean run, and the prompts are run from p on: the clean run of their
rest, on which trials go on from their layers as on any clean run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from attnlens.errors import AttnlensError
from attnlens.hooks.tokens import Sides
from attnlens.lens import Lens
from attnlens.lens.decode import Decoder, whole_cache
from attnlens.lens.inputs import Batch
from attnlens.sweeps.clean_run import CleanRun

PARTS = 8
"""Starts are rounded down to multiples of a prompt's eighth: few clean runs serve all positions."""


def shared_positions(clean: CleanRun, starts: Sequence[int]) -> list[int]:
    """How many positions trials that change nothing before `starts` need not run again.

    None of them is read. It is no position at all where a quarter of the prompt is not saved, or
    where so few trials share a start that its clean run costs more than they save.
    """
    step = -(-clean.width // PARTS)
    last = int(clean.task.reads.min())
    firsts = [min(start, last) // step * step for start in starts]
    trials = Counter(firsts)
    # A trial runs half of the layers on average; half of what is saved is left as a margin.
    worth = {f for f in trials if 4 * f >= clean.width and trials[f] * f >= 4 * clean.width}
    return [first if first in worth else 0 for first in firsts]


def after_prefix(clean: CleanRun, first: int) -> CleanRun | None:
    """The clean run of the positions from `first` on; None where its logits are not the clean ones.

    So it is with models that are not causal, or whose cache is of another kind than keys and
    values of every position.
    """
    ids = clean.text.ids
    assert ids is not None
    try:
        cache = _known(clean.lens, ids[:, :first])
        if cache is None:
            return None
        # No padding stands before a position that is read, nor before one of the prefix.
        inputs = dict(clean.text.inputs) | {"input_ids": ids[:, first:], "past_key_values": cache}
        batch = Batch(inputs, Sides.of(inputs), ())
        rest = CleanRun.from_row(clean.lens, clean.task, clean.metric, clean.text, batch, first)
    except (AttnlensError, RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return None
    return None if clean.apart(rest.logits) else rest


def _known(lens: Lens, ids: Tensor) -> DynamicCache | None:
    """A cache that holds the keys and values of these tokens for good; None where there is none."""
    Decoder(lens.model, lens.anatomy).check_model()
    cache = whole_cache(lens.model)
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache}
    lens.observe(Batch(inputs, Sides.of(inputs), ()))
    layers = [_Known.of(layer) for layer in cache.layers if type(layer) is DynamicLayer]
    if len(layers) < len(cache.layers) or not all(layer.is_initialized for layer in layers):
        return None
    cache.layers[:] = layers
    return cache


class _Known(DynamicLayer):
    """Keys and values of a prefix, for copies of its prompts; what follows them is not kept."""

    @classmethod
    def of(cls, layer: DynamicLayer) -> _Known:
        """What a layer holds."""
        known = cls()
        vars(known).update(vars(layer))
        return known

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix and of what follows."""
        assert self.keys is not None
        assert self.values is not None
        copies = key_states.shape[0] // self.keys.shape[0], 1, 1, 1
        keys = torch.cat([self.keys.repeat(copies), key_states], dim=-2)
        return keys, torch.cat([self.values.repeat(copies), value_states], dim=-2)
