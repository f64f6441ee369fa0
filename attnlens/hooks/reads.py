"""Logits at the positions that a metric reads, and at no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import InputError, SeamError, UnsupportedModelError
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.session import Handle, Observer


class ReadRows(Observer):
    """Observer under which the unembedding is given the read positions alone.

    The model's logits are then `batch read vocab`: row `i` of a prompt is position `reads[i]`.

    Raises:
        InputError: reads that are no positions of prompts.
        UnsupportedModelError: the model has no unembedding, or does not run it as a module.

    """

    def __init__(self, anatomy: Anatomy, reads: Int[Tensor, "batch read"]) -> None:
        if anatomy.unembedding is None:
            raise UnsupportedModelError(
                f"{anatomy.model} has no unembedding, so there are no logits to read. Load the "
                "model with its head."
            )
        check_reads(reads)
        self._name = anatomy.unembedding
        self._reads = reads
        self._fired = False

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hook the unembedding, and see to it that every forward comes by it."""
        unembedding = model.get_submodule(self._name)
        return [
            model.register_forward_pre_hook(of_this_thread(self._begin)),
            unembedding.register_forward_pre_hook(of_this_thread(self._take), with_kwargs=True),
            model.register_forward_hook(of_this_thread(self._check)),
        ]

    def _begin(self, *_: object) -> None:
        self._fired = False

    def _take(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._fired = True
        if args:
            return (self._rows(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: self._rows(kwargs[name])}

    def _rows(self, hidden: Tensor) -> Tensor:
        reads = self._reads.to(hidden.device)
        fits = hidden.ndim == 3 and hidden.shape[0] == reads.shape[0]
        if not fits or int(reads.max()) >= hidden.shape[1]:
            raise SeamError(
                f"{self._name} is given {list(hidden.shape)}, in which the positions read, "
                f"{list(reads.shape)} up to {int(reads.max())}, cannot be found. Give reads "
                "[batch, read] of the padded input, and leave logits_to_keep alone."
            )
        return hidden.gather(1, reads[..., None].expand(-1, -1, hidden.shape[2]))

    def _check(self, *_: object) -> None:
        if not self._fired:
            raise UnsupportedModelError(
                f"{self._name} did not run in this forward: the model computes its logits in "
                "another way, and they are of all positions. Read them from its output yourself; "
                "an attribution takes a function: target=lambda output: output.logits[:, 3, 17]."
            )


def check_reads(reads: Tensor, prompts: int | None = None) -> None:
    """Raise InputError for what is not `prompt read` positions from 0, of so many prompts."""
    whole = (
        isinstance(reads, Tensor) and not reads.is_floating_point() and reads.dtype != torch.bool
    )
    if not whole or reads.ndim != 2 or not reads.numel() or prompts not in (None, len(reads)):
        shape = f"{reads.dtype} {list(reads.shape)}" if isinstance(reads, Tensor) else repr(reads)
        wanted = "prompt" if prompts is None else prompts
        raise InputError(
            f"reads is {shape}; give a tensor [{wanted}, read] of whole numbers, a row a prompt."
        )
    if int(reads.min()) < 0:
        raise InputError(
            f"reads holds {int(reads.min())}; positions count from 0 in the padded input."
        )
