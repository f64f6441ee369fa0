"""Retrieval heads: heads that look at the token of the context that the model writes next.

A needle stands in a long text and is asked for; at each token of the greedy answer a head scores
where its largest key lies in the needle and holds the token that is written. Wu et al. 2024,
Retrieval head mechanistically explains long-context factuality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.analyses.needle_runs import Run, answered, decoding_sites, retrieval_score
from attnlens.analyses.per_head import HeadTable
from attnlens.analyses.uncertainty import bootstrap_mean, check_bootstrap
from attnlens.anatomy import Head
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.tasks import Needle, NeedlePrompt, Task, hidden_tokens, hide_needle, secret_words
from attnlens.tasks.haystack import of_task

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
Needles = Needle | NeedlePrompt | Task | Sequence[Needle | NeedlePrompt]
Progress = Callable[[int, int], None]
"""Called with (done, all) after each run."""


@dataclass(frozen=True)
class RetrievalSettings:
    """What changes the answer, beside the needles.

    Attributes:
        steps: most tokens of an answer.
        repeat: False: a head's score is the share of the needle's distinct tokens that it copied,
            at most 1 (the paper); True: each copy counts 1 / length of the needle each time, which
            may pass 1 (the paper's published code).
        recall: a run counts if its answer recalls more than this share of the needle.
        thresholds: mean scores over which a head is a weak and a strong retrieval head.
        stop: ids that end an answer; the model's end tokens where None.
        seed: of the built-in needles, and of the bootstrap over counted runs.
        resamples, confidence: of the bootstrap.

    Raises:
        InputError: a share outside 0 to 1, an answer without steps, or no resamples.

    """

    steps: int = 50
    repeat: bool = False
    recall: float = 0.5
    thresholds: tuple[float, float] = (0.1, 0.5)
    stop: tuple[int, ...] | None = None
    seed: int = 0
    resamples: int = 1000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.recall < 1:
            raise InputError(f"recall={self.recall} is out of range: from 0 to below 1.")
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: an answer has 1 token at least.")
        if not all(0 <= threshold <= 1 for threshold in self.thresholds):
            raise InputError(f"thresholds={self.thresholds} are out of range: from 0 to 1.")
        check_bootstrap(self.resamples, self.confidence)


@dataclass(frozen=True)
class RetrievalHeads(HeadTable):
    """Scores of every head over the counted runs, and how well the model answered.

    Numbers a head: `score`, the mean retrieval score, and `active`, the share of the counted runs
    in which the head copied a token at all; both NaN where no run counts. Of equal largest weights
    the first key is taken.

    Attributes:
        runs: every run, counted or not.
        scores: score of each run and head, counted or not.
        lengths, depths: where needles stood, in the order of the axes below; prompts have at most
            `length` tokens.
        recall: mean recall of the runs of each length and depth, counted or not; NaN without one.
        counted: number of runs that count, of each length and depth.
        asked: number of runs, of each length and depth.
        settings: what changes the answer.
        notes: what a reader should know.

    """

    runs: tuple[Run, ...]
    scores: Float[Tensor, "run head"]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    recall: Float[Tensor, "length depth"]
    counted: Int[Tensor, "length depth"]
    asked: Int[Tensor, "length depth"]
    settings: RetrievalSettings
    notes: tuple[str, ...]

    @property
    def prompts(self) -> int:
        """Number of runs that count, those that the means are over."""
        return int(self.counted.sum())

    def above(self, threshold: float) -> tuple[Head, ...]:
        """Heads whose mean score is over the threshold, the largest score first."""
        score = self["score"].mean
        order = score.nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
        return tuple(self.heads[i] for i in order if float(score[i]) > threshold)

    @property
    def strong(self) -> tuple[Head, ...]:
        """Heads over the higher threshold (.5)."""
        return self.above(max(self.settings.thresholds))

    @property
    def weak(self) -> tuple[Head, ...]:
        """Heads over the lower threshold (.1), the strong ones too."""
        return self.above(min(self.settings.thresholds))

    def by_place(self) -> pd.DataFrame:
        """One row a length and depth: mean recall, counted runs, runs."""
        return pd.DataFrame(
            [
                {
                    "length": length,
                    "depth": depth,
                    "recall": float(self.recall[i, j]),
                    "counted": int(self.counted[i, j]),
                    "runs": int(self.asked[i, j]),
                }
                for i, length in enumerate(self.lengths)
                for j, depth in enumerate(self.depths)
            ]
        )


def retrieval_heads(
    lens: Lens,
    needles: Needles | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    prompts: int = 2,
    settings: RetrievalSettings | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> RetrievalHeads:
    """Which heads retrieve: `score = |copied tokens as a set and needle| / |needle as a set|`.

    `needles` is a `Needle` (the user's own text, fact and question) or several, each hidden at all
    `lengths` and `depths`; or prepared prompts, whose own lengths and depths are used:
    `NeedlePrompt`s, or a task with `spans`. Where None, `prompts` texts of secret words a place (of
    random tokens, where there is no tokenizer). `lengths` are quarters of the context where not
    given. The prompt runs without a map being made, and the answer is decoded greedily, one row at
    a time. For the recall without some heads, run it inside `lens.edit(al.Uniform(heads))`.

    Raises:
        TaskError: a needle that does not fit (`tasks.hide_needle`).
        InputError: prompt and answer over the context, or settings out of range.
        UnsupportedModelError: a model that does not decode (`Lens.decode`).

    """
    settings = settings or RetrievalSettings()
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: a batch has 1 prompt at least.")
    for name, given in (("lengths", lengths), ("depths", depths)):
        if isinstance(given, (int, float)):
            raise InputError(f"{name}={given}: give several, or a list of one.")
    hidden = _prompts(lens, needles, lengths, tuple(depths), prompts, settings)
    found: dict[int, tuple[Run, Tensor]] = {}
    for number, run, copied in answered(lens, hidden, settings.steps, settings.stop, batch_size):
        needle = run.prompt.ids[slice(*run.prompt.span)]
        found[number] = run, retrieval_score(copied, run.answer, needle, settings.repeat)
        if progress is not None:
            progress(len(found), len(hidden))
    runs, scores = zip(*(found[number] for number in range(len(hidden))), strict=True)
    sites = decoding_sites(lens)
    heads = tuple(site.head(number) for site in sites for number in range(site.heads))
    return _result(heads, runs, torch.stack(scores), settings)


def _lengths(lens: Lens, steps: int) -> tuple[int, ...]:
    """A quarter to all of what the context leaves beside the answer; of 4096 without a limit."""
    room = (4096 if lens.context is None else min(lens.context, 4096)) - steps
    if room < 4:
        raise InputError(
            f"The model's context of {lens.context} tokens has no room for a text beside an answer "
            f"of {steps}: give RetrievalSettings(steps=...) of fewer."
        )
    return tuple(room * quarter // 4 for quarter in (1, 2, 3, 4))


def _prompts(
    lens: Lens,
    needles: Needles | None,
    lengths: Sequence[int] | None,
    depths: tuple[float, ...],
    prompts: int,
    settings: RetrievalSettings,
) -> tuple[NeedlePrompt, ...]:
    """The prompts of any kind of needles."""
    if isinstance(needles, Task):
        return of_task(lens, needles)
    given = () if needles is None else needles if isinstance(needles, Sequence) else (needles,)
    valid = given and all(isinstance(one, (Needle, NeedlePrompt)) for one in given)
    if needles is not None and not valid:
        raise InputError("There is no needle: give a Needle, NeedlePrompts, or a task with spans.")
    if lengths is None and not (given and all(isinstance(one, NeedlePrompt) for one in given)):
        lengths = _lengths(lens, settings.steps)
    places = tuple(lengths or ())
    if needles is None:
        built_in = hidden_tokens if lens.tokenizer is None else secret_words
        return built_in(lens, places, depths, prompts, settings.seed)
    found: list[NeedlePrompt] = []
    for one in given:
        found += hide_needle(lens, one, places, depths) if isinstance(one, Needle) else [one]
    return tuple(found)


def _result(
    heads: tuple[Head, ...],
    runs: tuple[Run, ...],
    scores: Float[Tensor, "run head"],
    settings: RetrievalSettings,
) -> RetrievalHeads:
    """Means over the counted runs, and the table of recalls."""
    counts = torch.tensor([run.recall > settings.recall for run in runs])
    numbers = torch.stack([scores, (scores > 0).double()], dim=-1)
    numbers = numbers.masked_fill(~counts[:, None, None], torch.nan)
    interval = bootstrap_mean(numbers, settings.resamples, settings.confidence, settings.seed)
    lengths = tuple(sorted({run.prompt.length for run in runs}))
    depths = tuple(sorted({run.prompt.depth for run in runs}))
    total = torch.zeros(len(lengths), len(depths), dtype=torch.float64)
    counted, asked = torch.zeros_like(total).long(), torch.zeros_like(total).long()
    for run, counts_too in zip(runs, counts, strict=True):
        place = lengths.index(run.prompt.length), depths.index(run.prompt.depth)
        total[place] += run.recall
        counted[place] += counts_too
        asked[place] += 1
    return RetrievalHeads(
        heads,
        ("score", "active"),
        *interval,
        runs,
        scores,
        lengths,
        depths,
        total / asked,
        counted,
        asked,
        settings,
        _notes(int(counts.sum()), runs, settings),
    )


def _notes(counted: int, runs: Sequence[Run], settings: RetrievalSettings) -> tuple[str, ...]:
    notes = [f"{counted} of {len(runs)} runs count: their recall is over {settings.recall:g}."]
    if counted == 0:
        best = max(run.recall for run in runs)
        notes.append(
            f"The best recall is {best:.2f}: the model does not answer, so no head has a score."
        )
    if counted == 1:
        notes.append("One counted run gives no interval.")
    return tuple(notes)
