"""A task: clean and corrupt prompts of equal length, where they are graded, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.errors import TaskError
from attnlens.tasks.metrics import METRICS


class TaskModel(Protocol):
    """What a builder needs to know of a model: its tokenizer and its limits."""

    @property
    def tokenizer(self) -> Any | None:
        """A transformers tokenizer, or None."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def context(self) -> int | None:
        """Longest prompt in tokens; None where the model sets no limit."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no ordinary tokens."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The start token, if there is one."""
        ...


@dataclass(frozen=True)
class Task:
    """Prompts with known answers; prompts are padded on the right.

    A clean prompt and its corrupt twin have the same length, so that positions correspond.

    Attributes:
        name: what the task is called.
        clean: token ids `[prompt, position]`.
        corrupt: ids of the prompts in which the answer is another one, same lengths.
        mask: True where a real token stands.
        reads: positions `[prompt, read]` whose next-token logits are graded.
        answers: the right next token at each read of the clean prompt.
        wrong: the token that the corrupt prompt would have there.
        metric: name of the default metric: "logit_difference", "loss" (nats) or "accuracy".
        texts: the clean prompts as text; "" where ids have no text.
        spans: first and one past the last position `[prompt, 2]` of a needle; None without one.

    Raises:
        TaskError: shapes do not agree, a read lies outside its prompt, or the metric is unknown.

    """

    name: str
    clean: Int[Tensor, "prompt position"]
    corrupt: Int[Tensor, "prompt position"]
    mask: Bool[Tensor, "prompt position"]
    reads: Int[Tensor, "prompt read"]
    answers: Int[Tensor, "prompt read"]
    wrong: Int[Tensor, "prompt read"]
    metric: str
    texts: tuple[str, ...]
    spans: Int[Tensor, "prompt 2"] | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        if self.clean.ndim != 2 or 0 in self.clean.shape:
            raise TaskError(
                f"task {self.name!r}: clean has shape {tuple(self.clean.shape)}; it needs "
                "[prompt, position] with at least one prompt and one token"
            )
        prompts, width = self.clean.shape
        same_as_clean = {"corrupt": self.corrupt, "mask": self.mask}
        same_as_reads = {"answers": self.answers, "wrong": self.wrong}
        wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            name: (t, (prompts, width)) for name, t in same_as_clean.items()
        }
        wanted["reads"] = (self.reads, (prompts, *self.reads.shape[1:2]))
        wanted |= {name: (t, tuple(self.reads.shape)) for name, t in same_as_reads.items()}
        if self.spans is not None:
            wanted["spans"] = (self.spans, (prompts, 2))
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise TaskError(
                    f"task {self.name!r}: {name} has shape {tuple(tensor.shape)}, expected {shape}"
                )
        if self.reads.ndim != 2 or self.reads.shape[1] == 0:
            raise TaskError(f"task {self.name!r}: reads must be [prompt, read], one read at least")
        if len(self.texts) != prompts:
            raise TaskError(f"task {self.name!r}: {len(self.texts)} texts for {prompts} prompts")

    def _check_values(self) -> None:
        check_metric(self.metric)
        if self.mask.dtype != torch.bool:
            raise TaskError(f"task {self.name!r}: mask is {self.mask.dtype}, it must be bool")
        lengths = self.mask.sum(dim=1)
        padded_right = self.mask == (
            torch.arange(self.mask.shape[1], device=self.mask.device) < lengths[:, None]
        )
        _refuse(self.name, ~padded_right.all(dim=1), "is not padded on the right (see mask)")
        _refuse(self.name, lengths == 0, "has no token")
        ids = torch.cat([self.clean, self.corrupt, self.answers, self.wrong], dim=1)
        _refuse(self.name, (ids < 0).any(dim=1), "has a negative token id")
        outside = (self.reads < 0) | (self.reads >= lengths[:, None])
        _refuse(self.name, outside.any(dim=1), "has a read outside its tokens")
        if self.spans is not None:
            first, last = self.spans[:, 0], self.spans[:, 1]
            bad = (first < 0) | (last <= first) | (last > lengths)
            _refuse(self.name, bad, "has a span outside its tokens")

    @classmethod
    def from_prompts(
        cls,
        name: str,
        clean: Sequence[Sequence[int]],
        corrupt: Sequence[Sequence[int]],
        reads: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        wrong: Sequence[Sequence[int]],
        *,
        metric: str = "logit_difference",
        texts: Sequence[str] | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        pad_id: int = 0,
    ) -> Task:
        """A task from ragged lists of ids, padded on the right with `pad_id`.

        Raises:
            TaskError: a clean prompt and its corrupt twin differ in length, or a list is uneven.

        """
        if not clean or len(clean) != len(corrupt):
            raise TaskError(
                f"task {name!r}: {len(clean)} clean and {len(corrupt)} corrupt prompts; "
                "give as many of both, at least one"
            )
        for index, (one, other) in enumerate(zip(clean, corrupt, strict=True)):
            if len(one) != len(other):
                raise TaskError(
                    f"task {name!r}: prompt {index} has {len(one)} clean and {len(other)} corrupt "
                    "tokens; use words of the same number of tokens"
                )
        width = max(len(ids) for ids in clean)
        lengths = torch.tensor([len(ids) for ids in clean])
        return cls(
            name=name,
            clean=torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in clean]),
            corrupt=torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in corrupt]),
            mask=torch.arange(width) < lengths[:, None],
            reads=_even(name, "reads", reads),
            answers=_even(name, "answers", answers),
            wrong=_even(name, "wrong", wrong),
            metric=metric,
            texts=("",) * len(clean) if texts is None else tuple(texts),
            spans=None if spans is None else torch.tensor([list(span) for span in spans]),
        )

    def __len__(self) -> int:
        return self.clean.shape[0]

    def clean_inputs(self) -> dict[str, Tensor]:
        """The clean prompts as a model takes them: `input_ids` and `attention_mask`."""
        return {"input_ids": self.clean, "attention_mask": self.mask.long()}

    def corrupt_inputs(self) -> dict[str, Tensor]:
        """The corrupt prompts as a model takes them: `input_ids` and `attention_mask`."""
        return {"input_ids": self.corrupt, "attention_mask": self.mask.long()}

    def at_reads(
        self, logits: Float[Tensor, "prompt position vocab"]
    ) -> Float[Tensor, "prompt read vocab"]:
        """The logits at the graded positions out of those at all positions."""
        if tuple(logits.shape[:2]) != tuple(self.clean.shape):
            raise TaskError(
                f"task {self.name!r}: logits of shape {tuple(logits.shape)} for prompts of shape "
                f"{tuple(self.clean.shape)}"
            )
        rows = torch.arange(len(self), device=logits.device)[:, None]
        return logits[rows, self.reads.to(logits.device)]

    def score(
        self, logits: Float[Tensor, "prompt read vocab"], metric: str | None = None
    ) -> Float[Tensor, "prompt"]:
        """The metric of each prompt, averaged over its reads; the task's own one unless named.

        Raises:
            TaskError: the metric is unknown, or the logits are not one row a read.

        """
        if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(self.reads.shape):
            raise TaskError(
                f"task {self.name!r}: logits of shape {tuple(logits.shape)}, expected "
                f"{(*self.reads.shape, 'vocab')}; take them at task.reads (task.at_reads does)"
            )
        graded = METRICS[check_metric(metric or self.metric)]
        answers, wrong = self.answers.to(logits.device), self.wrong.to(logits.device)
        return graded(logits, answers, wrong).mean(dim=1)

    def subset(self, index: slice | Sequence[int]) -> Task:
        """The same task with some of its prompts, by a slice or by numbers."""
        numbers = range(len(self))[index] if isinstance(index, slice) else index
        for number in numbers:
            if not -len(self) <= number < len(self):
                raise TaskError(f"task {self.name!r} has {len(self)} prompts, no number {number}")
        chosen = torch.tensor(list(numbers), dtype=torch.long)
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = value[chosen.to(value.device)]
        return replace(self, texts=tuple(self.texts[n] for n in numbers), **changed)


def check_metric(metric: str) -> str:
    """The metric's name; TaskError if there is none of that name."""
    if metric not in METRICS:
        raise TaskError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    return metric


def _refuse(name: str, bad: Bool[Tensor, "prompt"], reason: str) -> None:
    if bad.any():
        raise TaskError(f"task {name!r}: prompt {int(bad.nonzero()[0])} {reason}")


def _even(name: str, what: str, rows: Sequence[Sequence[int]]) -> Int[Tensor, "prompt read"]:
    counts = sorted({len(row) for row in rows})
    if len(counts) != 1:
        raise TaskError(f"task {name!r}: {what} must be as many in every prompt, got {counts}")
    return torch.tensor([list(row) for row in rows], dtype=torch.long)
