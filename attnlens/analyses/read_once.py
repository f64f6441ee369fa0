"""A prompt that is read once for two runs: the model as it is, and the model under an edit."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin as _Recurrent

from attnlens.errors import SeamError, UnsupportedModelError
from attnlens.hooks.edits import Edit
from attnlens.hooks.probe import evaluating
from attnlens.hooks.restart import Record, Restart
from attnlens.hooks.session import Session
from attnlens.lens import Lens
from attnlens.lens.decode import Decoder


def read_once(
    lens: Lens,
    ids: Int[Tensor, "batch position"],
    real: Bool[Tensor, "batch position"],
    edit: Edit | None = None,
) -> tuple[DynamicCache, DynamicCache]:
    """Caches of the model and of the edited model, both after these tokens.

    Layers below the edit's lowest run once, and their part of the second cache is a copy of the
    first's; without an edit all of it is. They run again where no forward of the model can go on
    from a layer (one block serves several, or upper layers read the keys of lower ones). What each
    block returned is held while the prompt is read: layers x positions x d_model.
    """
    base = new_cache(lens)
    if not ids.shape[1]:
        return base, new_cache(lens)
    decoder = Decoder(lens.model, lens.anatomy)
    with evaluating(lens.model):
        if edit is None:
            decoder.last_logits(ids, real, base)
            return base, deepcopy(base)
        sites = edit.sites(lens.anatomy)
        lowest = next(site for site in lens.anatomy.sites if site.name in sites)
        record = Record(lens.anatomy, [lowest])
        with Session(lens.model, lens.anatomy, [record]):
            decoder.last_logits(ids, real, base)

        def go_on(*observers: Restart) -> DynamicCache:
            cache = new_cache(lens)
            with Session(lens.model, lens.anatomy, observers), lens.edit(edit):
                decoder.last_logits(ids, real, cache)
            return cache

        try:
            edited = go_on(Restart(record.recording, lowest))
        except (UnsupportedModelError, SeamError, KeyError):
            return base, go_on()
    edited.layers = [
        own if _is_filled(own) else deepcopy(below)
        for own, below in zip(edited.layers, base.layers, strict=True)
    ]
    return base, edited


def new_cache(lens: Lens) -> DynamicCache:
    """An empty cache of the model's own kind (windowed layers keep their windows)."""
    config: Any = lens.model.config
    return DynamicCache(config=config)


def check_states(lens: Lens, cache: DynamicCache) -> None:
    """Raise where a recurrent layer left its state elsewhere than in the cache that was given."""
    if any(isinstance(own, _Recurrent) and not _is_filled(own) for own in cache.layers):
        raise UnsupportedModelError(
            f"{lens.anatomy.model} keeps the state of its recurrent layers beside the cache, so "
            "two runs cannot go side by side. Decode with another model."
        )


def _is_filled(layer: Any) -> bool:
    """Whether a layer of a cache has taken up anything: keys and values, or a state."""
    states = (getattr(layer, f"is_{kind}_states_initialized", {}) for kind in ("conv", "recurrent"))
    return getattr(layer, "is_initialized", False) or any(any(s.values()) for s in states)
