"""What an attribution explains: one logit, the contrast of two, or any scalar of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.errors import InputError
from attnlens.hooks.gradients import MetricOf
from attnlens.hooks.reads import ReadRows
from attnlens.hooks.session import Observer
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch
from attnlens.tasks.task import Task

Token = str | int


@dataclass(frozen=True)
class Target:
    """A logit to explain, `logit[token]`, or a contrast, `logit[token] - logit[against]`.

    Attributes:
        token: an id, or a text that is one token; one for all prompts, or a sequence of one each.
            The likeliest of the run where None.
        against: the token whose logit is taken off; None for no contrast.
        at: position whose next-token logits are read, counted over each prompt's real tokens (a
            decoder's, where there is one); one for all prompts, or a sequence of one each. Models
            that give one row of logits a prompt (classifiers) have no position.

    """

    token: Token | Sequence[Token] | None = None
    against: Token | Sequence[Token] | None = None
    at: int | Sequence[int] = -1

    @classmethod
    def of_task(cls, task: Task) -> Target:
        """The right answer against the wrong one, at the last read of each prompt of a task."""
        return cls(
            task.answers[:, -1].tolist(), task.wrong[:, -1].tolist(), task.reads[:, -1].tolist()
        )


TargetSpec = Target | Token | tuple[Token, Token] | Callable[[Any], Tensor] | None
"""A token, a pair (token, against), a `Target`, a function from the model's output to `batch`
values, or None for the likeliest next token."""


@dataclass(frozen=True)
class Explained:
    """A target settled for one batch."""

    names: tuple[str, ...]
    """What is explained of each prompt, for people."""
    metric: MetricOf
    """The explained value of each prompt, `batch`, from the output of a run under `observers`."""
    reads: Int[Tensor, "batch 1"] | None = None
    """Positions of the padded input whose logits are read; None where the output is whole."""
    tokens: Int[Tensor, " batch"] | None = None
    against: Int[Tensor, " batch"] | None = None

    def observers(self, lens: Lens, batch: Batch) -> tuple[Observer, ...]:
        """What has to watch the run whose output `metric` gets: logits of the reads alone."""
        return () if self.reads is None else (ReadRows(lens.anatomy_for(batch), self.reads),)

    def part(self, prompts: slice | Int[Tensor, " row"]) -> Explained:
        """The same of some prompts, or of one several times; a function is taken as it is."""
        index = torch.arange(len(self.names))[prompts]
        names = tuple(self.names[prompt] for prompt in index.tolist())
        if self.tokens is None:
            return Explained(names, self.metric, self.reads)
        reads = None if self.reads is None else self.reads[index]
        against = None if self.against is None else self.against[index]
        return _of_tokens(names, reads, self.tokens[index], against)


def settle(lens: Lens, batch: Batch, target: TargetSpec) -> Explained:
    """What a target is for these prompts; the likeliest token costs one forward.

    Raises:
        InputError: a text that is no single token, an id outside the vocabulary, a position that a
            prompt does not have, as many as there are not prompts, or a model without logits.

    """
    if callable(target):
        name = getattr(target, "__name__", type(target).__name__)
        return Explained((name,) * batch.size, target)
    if isinstance(target, tuple):
        target = Target(*target)
    if not isinstance(target, Target):
        target = Target(target)
    reads = _reads(lens, batch, target.at)
    if target.token is None:
        tokens = _likeliest(lens, batch, reads)
    else:
        tokens = _ids(lens, target.token, batch.size)
    against = None if target.against is None else _ids(lens, target.against, batch.size)
    names = _names(lens, tokens, against, classes=reads is None)
    return _of_tokens(names, reads, tokens, against)


def _of_tokens(
    names: tuple[str, ...],
    reads: Tensor | None,
    tokens: Int[Tensor, " batch"],
    against: Int[Tensor, " batch"] | None,
) -> Explained:
    def metric(output: Any) -> Float[Tensor, " batch"]:
        logits = _logits(output)
        rows = torch.arange(len(tokens), device=logits.device)
        value = logits[rows, tokens.to(logits.device)]
        return value if against is None else value - logits[rows, against.to(logits.device)]

    return Explained(names, metric, reads, tokens, against)


def _logits(output: Any) -> Float[Tensor, "batch vocab"]:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            "The model returns no logits, so there is no token to explain. Give a function of its "
            "output: target=lambda output: output.last_hidden_state[:, 0, 5]."
        )
    return logits[:, -1] if logits.ndim == 3 else logits


def _reads(lens: Lens, batch: Batch, at: int | Sequence[int]) -> Int[Tensor, "batch 1"] | None:
    """The padded position of each prompt's read; None for a model without an unembedding."""
    anatomy = lens.anatomy_for(batch)
    if anatomy.unembedding is None:
        return None
    tokens = batch.sides.decoder or batch.sides.text
    if tokens.ids is None:
        raise InputError("The input has no token ids, so there is no position to read logits at.")
    wanted = [at] * batch.size if isinstance(at, int) else list(at)
    if len(wanted) != batch.size:
        raise InputError(f"The target names {len(wanted)} positions for {batch.size} prompts.")
    real = tokens.real if tokens.real is not None else torch.ones_like(tokens.ids).bool()
    found: list[int] = []
    for prompt, position in enumerate(wanted):
        own: list[int] = real[prompt].nonzero()[:, 0].tolist()
        if not -len(own) <= position < len(own):
            raise InputError(
                f"The target's position {position} is not in prompt {prompt}, which has "
                f"{len(own)} tokens."
            )
        found.append(own[position])
    return torch.tensor(found)[:, None]


@torch.no_grad()
def _likeliest(lens: Lens, batch: Batch, reads: Tensor | None) -> Int[Tensor, " batch"]:
    if reads is not None:
        return lens.logits_at(batch, reads)[:, 0].argmax(-1).cpu()
    return _logits(lens.observe(batch)).argmax(-1).cpu()


def _ids(lens: Lens, given: Token | Sequence[Token], batch: int) -> Int[Tensor, " batch"]:
    each = [given] * batch if isinstance(given, (str, int)) else list(given)
    if len(each) != batch:
        raise InputError(f"The target names {len(each)} tokens for {batch} prompts: give one each.")
    return torch.tensor([_id(lens, token) for token in each])


def _id(lens: Lens, token: Token) -> int:
    if isinstance(token, str):
        if lens.tokenizer is None:
            raise InputError(f"The model has no tokenizer to read {token!r}; give a token id.")
        found: list[int] = lens.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            pieces = ", ".join(map(repr, lens.token_texts(found)))
            raise InputError(
                f"{token!r} is {len(found)} tokens ({pieces}); a target is one. Give one of them, "
                "or an id."
            )
        return found[0]
    config: Any = lens.model.config
    count = lens.vocab_size if lens.anatomy.unembedding else getattr(config, "num_labels", None)
    if token < 0 or (count is not None and token >= count):
        raise InputError(f"The target {token} is no output of the model, which has {count}.")
    return token


def _names(lens: Lens, tokens: Tensor, against: Tensor | None, classes: bool) -> tuple[str, ...]:
    def named(ids: Tensor) -> list[str]:
        if classes:
            labels: Any = getattr(lens.model.config, "id2label", None) or {}
            return [str(labels.get(i, i)) for i in ids.tolist()]
        return [repr(text) for text in lens.token_texts(ids.tolist())]

    own = named(tokens)
    if against is None:
        return tuple(own)
    return tuple(f"{one} - {other}" for one, other in zip(own, named(against), strict=True))
