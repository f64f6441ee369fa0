"""How well a model predicts a text: its mean next-token loss, with logits of a few rows at a time.

Logits of a whole batch may take more memory than all else (8192 tokens of a vocabulary of 250,000
are 8 GB in float32). So the body, the part of a model below its unembedding, runs once; then the
model's own forward runs once for each chunk of positions, with the body replaced by what it
returned and the unembedding given the rows of the chunk. Whatever a model does to its logits (a
scale, a soft cap) is thus done by the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.replaced import Replaced
from attnlens.hooks.session import Handle, Observer
from attnlens.lens.inputs import Batch
from attnlens.lens.lens import Lens

LOGIT_BYTES = 2**27
"""Bytes of logits that are held at a time."""


def next_token_loss(
    lens: Lens, batch: Batch, logit_bytes: int = LOGIT_BYTES
) -> tuple[Float[Tensor, " prompt"], Int[Tensor, " prompt"]]:
    """`L = mean_{t >= 2} -ln p(x_t | x_<t)` in nats of each prompt, and how many tokens it is over.

    Padding is neither predicted nor predicted from; NaN for a prompt of one token. Edits of
    `lens.edit` act. Logits are held for as many positions as `logit_bytes` allows, one at least.

    Raises:
        InputError: no token ids, or a model without logits.
        UnsupportedModelError: a model that does not read from left to right.

    """
    anatomy = lens.anatomy_for(batch)
    ids = _checked(anatomy, batch)
    real = torch.ones_like(ids, dtype=torch.bool) if batch.real is None else batch.real
    counted = real[:, 1:] & real[:, :-1]
    losses = torch.zeros(counted.shape, dtype=torch.float64, device=ids.device)
    held = _HeldBody(lens.model, anatomy)
    chunk = counted.shape[1]
    if held.name is not None:
        element = next(lens.model.parameters()).element_size()
        chunk = max(logit_bytes // (ids.shape[0] * lens.vocab_size * max(element, 4)), 1)
    for start in range(0, counted.shape[1], max(chunk, 1)):
        reads = torch.arange(start, min(start + chunk, counted.shape[1]), device=ids.device)
        logits = lens.logits_at(batch, reads.expand(ids.shape[0], -1), held)
        answers = ids[:, reads + 1].to(logits.device)
        losses[:, reads] = _losses(logits, answers).to(losses)
    count = counted.sum(1)
    return losses.where(counted, 0).sum(1).div(count).cpu(), count.cpu()


class _HeldBody(Observer):
    """Observer under which the body runs at its first call, and gives the same at every other."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.name = _body(model, anatomy)
        self._output: Any = None

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Replace the body's forward."""
        if self.name is None:
            return ()
        body = model.get_submodule(self.name)
        own = body.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._output is None:
                self._output = own(*args, **kwargs)
            return self._output

        return (Replaced(body, forward),)


def _body(model: nn.Module, anatomy: Anatomy) -> str | None:
    """The child that holds every site and not the unembedding; None where there is no such one."""
    for name, _ in model.named_children():
        inside = [site.module.startswith(f"{name}.") for site in anatomy.sites]
        if all(inside) and not f"{anatomy.unembedding}.".startswith(f"{name}."):
            return name
    return None


def _losses(
    logits: Float[Tensor, "prompt read vocab"], answers: Int[Tensor, "prompt read"]
) -> Float[Tensor, "prompt read"]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.transpose(1, 2), answers, reduction="none")


def _checked(anatomy: Anatomy, batch: Batch) -> Int[Tensor, "prompt position"]:
    """The token ids of a batch whose next tokens the model can predict."""
    if batch.ids is None:
        raise InputError("The loss of a text is over its tokens, and this input has no token ids.")
    text = [site for site in anatomy.sites if site.stack not in ("vision", "audio")]
    if not all(site.causal and site.kind == "self" for site in text):
        raise UnsupportedModelError(
            f"{anatomy.model} does not read a text from left to right alone, so its tokens have no "
            "next-token loss; take a decoder-only language model."
        )
    return batch.ids
