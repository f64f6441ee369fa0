"""Blocks whose inner values are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from attnlens.anatomy import Anatomy
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.backward.mode import Rules
from attnlens.hooks.replaced import Replaced
from attnlens.hooks.thread import acting_for, this_thread


def blocks_again(model: nn.Module, anatomy: Anatomy, rules: Rules) -> list[Replaced]:
    """Handles of a model's blocks, each checkpointed; the rules hold in the second run too.

    Raises:
        UnsupportedModelError: there is no list of blocks, or one block serves several layers, whose
            second runs come in another order.

    """
    names = [site.block for site in anatomy.sites if site.block is not None]
    if not names or any(site.call for site in anatomy.sites):
        raise UnsupportedModelError(
            f"{anatomy.model} has no list of blocks that run once each, so they cannot be run "
            "again one by one: leave checkpoint out."
        )
    modules = [model.get_submodule(name) for name in dict.fromkeys(names)]
    return [Replaced(module, _again(module.forward, rules)) for module in modules]


def _again(own: Callable[..., Any], rules: Rules) -> Callable[..., Any]:
    thread = this_thread()

    @contextmanager
    def second() -> Generator[None]:
        with acting_for(thread), rules:
            yield

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), second()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(own, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward
