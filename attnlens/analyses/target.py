"""What an attribution explains: one logit, the contrast of two, or any scalar of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.errors import InputError
from attnlens.hooks.gradients import MetricOf, usable
from attnlens.hooks.probe import evaluating
from attnlens.hooks.reads import ReadRows
from attnlens.hooks.session import Observer, Session
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch
from attnlens.tasks.task import Task

Token = str | SupportsIndex
"""A text that is one token, or its id (of a classifier: a label, or its number)."""


@dataclass(frozen=True)
class Target:
    """A logit to explain, `logit[token]`, or a contrast, `logit[token] - logit[against]`.

    Attributes:
        token: an id, or a text that is one token (of a classifier a label); one for all prompts,
            or a sequence of one each. The likeliest of the run where None.
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
class _Given:
    """A function of the output that was given as a target, held to one value a prompt."""

    function: Callable[[Any], Tensor]
    prompts: int

    def __call__(self, output: Any) -> Float[Tensor, " batch"]:
        value: Any = self.function(output)
        if not isinstance(value, Tensor) or value.shape != (self.prompts,):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"The target's function gives {found} for {self.prompts} prompts; it has to give a "
                "tensor of one finite number a prompt, as lambda output: output.logits[:, -1, 5]."
            )
        return value


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

    @torch.no_grad()
    def value(self, lens: Lens, batch: Batch, *observers: Observer) -> Float[Tensor, " batch"]:
        """The explained value of each prompt by a run for it alone; float64, on the CPU."""
        watching = (*observers, *self.observers(lens, batch))
        with evaluating(lens.model), Session(lens.model, lens.anatomy_for(batch), watching):
            output = lens.model(**usable(lens.model, batch.inputs))
        return self.metric(output).double().cpu()

    def part(self, prompts: slice | Int[Tensor, " row"]) -> Explained:
        """The same of some prompts, or of one several times; a function is taken as it is."""
        rows = torch.arange(len(self.names))[prompts]
        names = tuple(self.names[prompt] for prompt in rows.tolist())
        if isinstance(self.metric, _Given):
            return Explained(names, _Given(self.metric.function, len(rows)))
        assert self.tokens is not None
        reads = None if self.reads is None else self.reads[rows]
        against = None if self.against is None else self.against[rows]
        return _of_tokens(names, reads, self.tokens[rows], against)


def settle(lens: Lens, batch: Batch, target: TargetSpec) -> Explained:
    """What a target is for these prompts; the likeliest token costs one forward.

    Raises:
        InputError: a text that is no single token or no label, an id outside the vocabulary, a
            position that a prompt does not have, as many as there are not prompts, a model without
            logits, or with logits of every position that are none of a next token.

    """
    if callable(target):
        name = getattr(target, "__name__", type(target).__name__)
        name = "a function of the output" if name == "<lambda>" else name
        return Explained((name,) * batch.size, _Given(target, batch.size))
    if isinstance(target, tuple):
        target = Target(*target)
    if not isinstance(target, Target):
        target = Target(target)
    reads = _reads(lens, batch, target.at)
    if target.token is None:
        tokens = _likeliest(lens, batch, reads)
    else:
        tokens = _ids(lens, target.token, batch.size, classes=reads is None)
    against = None
    if target.against is not None:
        against = _ids(lens, target.against, batch.size, classes=reads is None)
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
    if logits.ndim == 3 and logits.shape[1] > 1:
        raise InputError(
            "The model gives logits of every position, and they are none of a next token, so which "
            "of them is explained is not known. Give a function of its output: "
            "target=lambda output: output.logits[:, 4, 1]."
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


def _ids(
    lens: Lens, given: Token | Sequence[Token], batch: int, classes: bool
) -> Int[Tensor, " batch"]:
    found: Any = given.tolist() if isinstance(given, (Tensor, np.ndarray)) else given
    one = isinstance(found, str) or not isinstance(found, Sequence)
    each: list[Any] = [found] * batch if one else list(found)
    if len(each) != batch:
        raise InputError(f"The target names {len(each)} tokens for {batch} prompts: give one each.")
    return torch.tensor([_id(lens, token, classes) for token in each])


def _id(lens: Lens, token: Token, classes: bool) -> int:
    if isinstance(token, str) and classes:
        return _label(lens, token)
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
    count = getattr(config, "num_labels", None) if classes else lens.vocab_size
    try:
        number = index(token)
    except TypeError:
        raise InputError(f"{token!r} is no token; a target is a text or an id.") from None
    if number < 0 or (count is not None and number >= count):
        raise InputError(f"The target {number} is no output of the model, which has {count}.")
    return number


def _label(lens: Lens, name: str) -> int:
    """The number of a classifier's label."""
    config: Any = lens.model.config
    labels = {str(label): n for n, label in (getattr(config, "id2label", None) or {}).items()}
    if name not in labels:
        raise InputError(
            f"{name!r} is no label of the model, whose labels are {', '.join(map(repr, labels))}. "
            "Give one of them, or the number of one."
        )
    return int(labels[name])


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
