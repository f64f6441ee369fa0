"""The gradient of a metric at the token embeddings: one forward and one backward.

The graph begins at the embeddings as they are looked up, so frozen models work, and no weight's
gradient is computed. Embeddings of positions come after the look-up and are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import InputError
from attnlens.hooks.embedded import Embedded
from attnlens.hooks.gradients import MetricOf, usable
from attnlens.hooks.probe import evaluating
from attnlens.hooks.session import Observer, Session

Put = Callable[[int, Float[Tensor, "batch position d_model"]], Tensor]
"""(number of the look-up in the run, its embeddings) -> embeddings to go on with."""


@dataclass(frozen=True)
class LookUp:
    """One look-up of token embeddings in a run, and how the metric changes with it."""

    ids: Int[Tensor, "batch position"]
    embeddings: Float[Tensor, "batch position d_model"]
    """What the model went on with."""
    gradient: Float[Tensor, "batch position d_model"]
    """0 where the metric does not depend on it."""


def embedding_gradients(
    model: nn.Module,
    anatomy: Anatomy,
    inputs: Mapping[str, Any],
    metric: MetricOf,
    observers: Sequence[Observer] = (),
    put: Put | None = None,
) -> tuple[Float[Tensor, " batch"], tuple[LookUp, ...]]:
    """The metric of each prompt and its gradient at every look-up, in the order of the run.

    Raises:
        InputError: input without token ids, or a metric whose gradient is none or not finite.
        UnsupportedModelError: a model that reads no tokens.

    """
    leaves: list[tuple[Tensor, Tensor]] = []

    def look(ids: Tensor, embeddings: Tensor) -> Tensor:
        given = embeddings if put is None else put(len(leaves), embeddings)
        leaves.append((ids, given.detach().clone().requires_grad_()))
        # The model gets a copy, which it may change in place.
        return leaves[-1][1].clone()

    with graph_run(model, anatomy, [Embedded(look), *observers], inputs) as output:
        if not leaves:
            raise InputError(
                "The model looked up no token in this run (its embeddings were given, perhaps), so "
                "there is no token to score. Give token ids."
            )
        value = metric(output)
        found = gradients(value, [leaf for _, leaf in leaves], "a token embedding")
    return value.detach(), tuple(
        LookUp(ids, leaf.detach(), torch.zeros_like(leaf) if gradient is None else gradient)
        for (ids, leaf), gradient in zip(leaves, found, strict=True)
    )


@contextmanager
def graph_run(
    model: nn.Module,
    anatomy: Anatomy,
    observers: Sequence[Observer],
    inputs: Mapping[str, Any],
) -> Generator[Any]:
    """Run in evaluation mode with a graph, under observers; yields the model's output."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        Session(model, anatomy, observers) as session,
    ):
        output = model(**usable(model, inputs))
        session.check_fired()
        yield output


def gradients(
    value: Float[Tensor, " batch"], leaves: Sequence[Tensor], what: str
) -> list[Tensor | None]:
    """The gradient of a value at each leaf, of every prompt by itself; None where none comes.

    Raises:
        InputError: no leaf has one, or one is not finite.

    """
    found: list[Tensor | None] = [None] * len(leaves)
    if value.requires_grad:
        found = [*torch.autograd.grad(value.sum(), list(leaves), allow_unused=True)]
    known = [gradient for gradient in found if gradient is not None]
    if not known:
        raise InputError(
            f"The target has no gradient: it depends on {what} by no differentiable step (accuracy "
            "does not). Take a logit or a difference of logits."
        )
    if not all(bool(gradient.isfinite().all()) for gradient in known):
        raise InputError(
            f"The target's gradient at {what} is not finite: the logits hold NaN or infinity, or "
            "the model's dtype overflows. Load it in float32 or bfloat16, and look at its logits "
            "(lens.logits)."
        )
    return found
