"""Greater-than: something lasted from a year on; the year in which it ended is later."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from attnlens.errors import TaskError
from attnlens.tasks.prompts import check_context, check_prompts, encode, following
from attnlens.tasks.task import Task, TaskModel

NAME = "greater_than"
EVENTS = (
    "war", "reign", "siege", "voyage", "trial", "drought", "famine", "plague", "truce", "march",
    "exile", "alliance", "quarrel", "revolt", "crusade", "expedition",
)  # fmt: skip
CENTURIES = range(11, 18)
CORRUPT = 1
"""The corrupt prompt begins in the year 01 of its century."""


def greater_than(
    model: TaskModel, prompts: int = 16, pairs: int | None = None, seed: int = 0
) -> Task:
    """Sentences such as "The war lasted from the year 1743 to the year 17" (44 to 99).

    The last position is graded by `pairs` pairs of a later year and one that is not later: the
    nearest first, 44 against 43, 45 against 42 and so on. The score, their mean logit difference,
    is the mean logit of the later years less that of the others. The paper takes all years and
    the difference of summed probabilities; pairs keep the score a difference of logits, as other
    tasks have it, and equally many tokens on both sides. The corrupt prompt begins in the year 01,
    after which all of them are later. `spans` is the 43. Hanna et al. 2023.

    Where the tokenizer writes digits one by one, the first digit of the year is graded: 5 against
    3, 6 against 2. A digit that begins both later years and others (4) is not graded. Years that
    the tokenizer does not part after their first two digits are left out.

    Args:
        model: what the prompts are for.
        prompts: number of prompts.
        pairs: reads of each prompt; 10, or 3 where digits are graded, if None.
        seed: of the words and the years.

    Raises:
        TaskError: no tokenizer, one that does not part years so, `pairs` for which no year has
            enough tokens on both sides, or a prompt over the context.

    """
    check_prompts(prompts, NAME)
    if pairs is not None and pairs < 1:
        raise TaskError(f"task {NAME!r}: pairs={pairs}; at least 1")
    years = {century: _years(model, century) for century in CENTURIES}
    count = _pairs(pairs, years)
    starts = [
        (century, start)
        for century, own in years.items()
        for start in own.written
        if CORRUPT in own.written and min(map(len, own.graded(start))) >= count
    ]
    if not starts:
        raise TaskError(_too_few(count, years))
    draw = random.Random(seed)
    texts: list[str] = []
    corrupt: list[list[int]] = []
    answers: list[list[int]] = []
    wrong: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    for _ in range(prompts):
        century, start = draw.choice(starts)
        opening = _opening(draw.choice(EVENTS), century)
        texts.append(f"{opening}{start:02d} to the year {century}")
        corrupt.append(encode(model, f"{opening}{CORRUPT:02d} to the year {century}", NAME))
        later, others = years[century].graded(start)
        answers.append(later[:count])
        wrong.append(others[:count])
        first = len(encode(model, opening, NAME))
        spans.append((first, first + len(years[century].written[start])))
    clean = [encode(model, text, NAME) for text in texts]
    check_context(model, clean + corrupt, NAME)
    reads = [[len(ids) - 1] * count for ids in clean]
    return Task.from_prompts(NAME, clean, corrupt, reads, answers, wrong, texts=texts, spans=spans)


@dataclass(frozen=True)
class _Years:
    """How a tokenizer writes the years of a century: the tokens after its first two digits."""

    written: dict[int, tuple[int, ...]]

    @cached_property
    def first(self) -> dict[int, list[int]]:
        """The years that each token begins, in their order."""
        found: dict[int, list[int]] = {}
        for year, ids in self.written.items():
            found.setdefault(ids[0], []).append(year)
        return found

    def graded(self, start: int) -> tuple[list[int], list[int]]:
        """Tokens that begin later years alone, and such that do not, each the nearest first."""
        first = self.first
        later = [token for token, own in first.items() if own[0] > start]
        # Of the corrupt prompt all of these are later.
        others = [token for token, own in first.items() if own[0] > CORRUPT and own[-1] <= start]
        return later, others[::-1]


def _opening(event: str, century: int) -> str:
    return f"The {event} lasted from the year {century}"


def _years(model: TaskModel, century: int) -> _Years:
    """The years that are parted after their first two digits, all of equally many tokens."""
    opening = _opening(EVENTS[0], century)
    written = {year: tuple(following(model, opening, f"{year:02d}", NAME)) for year in range(100)}
    known = {
        year: ids
        for year, ids in written.items()
        if ids and not model.special_ids.intersection(ids)
    }
    length = min(map(len, known.values()), default=0)
    return _Years({year: ids for year, ids in known.items() if len(ids) == length})


def _pairs(asked: int | None, years: dict[int, _Years]) -> int:
    if asked is not None:
        return asked
    digits = max(len(own.first) for own in years.values()) <= 10
    return 3 if digits else 10


def _too_few(count: int, years: dict[int, _Years]) -> str:
    parted = max(len(own.written) for own in years.values())
    if parted < 3:
        return (
            f"task {NAME!r} needs years such as 1743 written as 17 and 43, or digit by digit, and "
            f"this tokenizer writes {parted} of the 100 years of a century so; give prompts of "
            "your own with read_task, or take another task"
        )
    return (
        f"task {NAME!r}: pairs={count}; no year that this tokenizer parts has so many tokens of "
        "later years and of others: ask for fewer"
    )
