"""What a task is graded by: pure functions of the logits where an answer is due."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Metric = Callable[
    [Float[Tensor, "*read vocab"], Int[Tensor, "*read"], Int[Tensor, "*read"]],
    Float[Tensor, "*read"],
]


def _at(logits: Float[Tensor, "*read vocab"], ids: Int[Tensor, "*read"]) -> Float[Tensor, "*read"]:
    return logits.gather(-1, ids[..., None])[..., 0]


def logit_difference(
    logits: Float[Tensor, "*read vocab"],
    answers: Int[Tensor, "*read"],
    wrong: Int[Tensor, "*read"],
) -> Float[Tensor, "*read"]:
    """Logit of the right answer less that of the wrong one: `logits[answer] - logits[wrong]`."""
    return _at(logits, answers) - _at(logits, wrong)


def loss(
    logits: Float[Tensor, "*read vocab"],
    answers: Int[Tensor, "*read"],
) -> Float[Tensor, "*read"]:
    """Negative log-likelihood of the right answer in nats: `logsumexp(logits) - logits[answer]`."""
    return torch.logsumexp(logits, dim=-1) - _at(logits, answers)


def accuracy(
    logits: Float[Tensor, "*read vocab"],
    answers: Int[Tensor, "*read"],
) -> Float[Tensor, "*read"]:
    """1 where the right answer has the highest logit of the whole vocabulary, else 0."""
    return (logits.argmax(dim=-1) == answers).to(logits.dtype)


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "loss": lambda logits, answers, wrong: loss(logits, answers),
    "accuracy": lambda logits, answers, wrong: accuracy(logits, answers),
}
