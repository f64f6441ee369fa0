"""Token embeddings, shown as they are looked up to those who read them or put others there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.errors import UnsupportedModelError
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.session import Handle, Observer

Look = Callable[
    [Int[Tensor, "batch position"], Float[Tensor, "batch position d_model"]], Tensor | None
]
"""(ids, their embeddings) -> embeddings to go on with, or None to leave them."""


class Embedded(Observer):
    """Observer that shows each look-up of token embeddings to `look(ids, embeddings)`.

    An encoder and its decoder look up one after the other; ids tell them apart.

    Raises:
        UnsupportedModelError: a model that reads no tokens.

    """

    def __init__(self, look: Look) -> None:
        self._look = look

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hook every table of token embeddings."""
        tables = token_tables(model)
        if not tables:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no table of token embeddings: it reads no tokens."
            )
        return [table.register_forward_hook(of_this_thread(self._shown)) for table in tables]

    def _shown(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self._look(args[0], output)


def token_tables(model: nn.Module) -> tuple[nn.Embedding, ...]:
    """The tables in which a model and its parts look up tokens, each once."""
    found: dict[int, nn.Embedding] = {}
    for module in model.modules():
        own = getattr(module, "get_input_embeddings", None)
        try:
            table = own() if own is not None else None
        except (NotImplementedError, AttributeError):  # parts that read no tokens
            continue
        if isinstance(table, nn.Embedding):
            found.setdefault(id(table), table)
    return tuple(found.values())
