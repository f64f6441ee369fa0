"""The bench of attribution methods: all that each measure needs, a few prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnlens.analyses.attribute import METHODS, method_of
from attnlens.analyses.attribution import Attribution
from attnlens.analyses.deletion import Ends, delete
from attnlens.analyses.erasure import Eraser, left_out
from attnlens.analyses.rank_agreement import spearman
from attnlens.analyses.replacement import Replacement
from attnlens.analyses.target import Target
from attnlens.errors import AttnlensError, InputError
from attnlens.lens import Lens
from attnlens.tasks import Task

Method = Callable[..., Attribution]
"""`(lens, inputs, target) -> Attribution`, as the functions that `attribute` knows."""
RANDOM, ERASED, GRADIENT = "random", "leave_one_out", "input_gradient"


@dataclass
class Bench:
    """Methods, prompts, and what was measured so far."""

    lens: Lens
    task: Task
    methods: Mapping[str, Sequence[Method | None]]
    """By name; several are averaged, None is the method that `attribute` knows."""
    replacement: Replacement
    tokens: int
    settings: Mapping[str, Any]
    failed: dict[str, str] = field(default_factory=dict[str, str])
    no_gradient: str = ""
    found: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict[str, Any])
    ends: list[Ends] = field(default_factory=list[Ends])
    in_place: str = ""
    kept: int = 0
    forwards: int = 0

    def judge(
        self,
        prompts: range,
        known: Bool[Tensor, "prompt position"] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """All methods on some prompts."""
        own = self.task.subset(prompts)
        target = Target.of_task(own)
        eraser = Eraser(self.lens, own.clean_inputs(), target, self.replacement, self.tokens)
        ends = Ends.of(eraser)
        references = {ERASED: left_out(eraser).scores, GRADIENT: self._gradient(own, eraser)}
        places = None if known is None else known[prompts.start : prompts.stop]
        for number, (name, draws) in enumerate(self.methods.items(), 1):
            measured = [
                self._measured(scores, eraser, ends, references, places)
                for scores in self._scores(name, draws, own, eraser, references)
            ]
            if measured:
                mean = {key: torch.stack([m[key] for m in measured]).mean(0) for key in measured[0]}
                self.found.setdefault(name, []).append(mean)
            if progress is not None:
                done = prompts.start * len(self.methods) + number * len(prompts)
                progress(done, len(self.task) * len(self.methods))
        self.ends.append(ends)
        self.in_place = eraser.said
        self.kept += int((eraser.real & ~eraser.erasable).sum())
        self.forwards += eraser.forwards

    def _gradient(self, own: Task, eraser: Eraser) -> Tensor | None:
        """Embedding times gradient; None, and why, where there is none."""
        if self.no_gradient or GRADIENT not in METHODS:
            return None
        try:
            return _aligned(method_of(GRADIENT), self.lens, own, eraser)
        except (AttnlensError, RuntimeError) as error:
            self.no_gradient = _told(error)
            return None

    def _scores(
        self,
        name: str,
        draws: Sequence[Method | None],
        own: Task,
        eraser: Eraser,
        references: Mapping[str, Tensor | None],
    ) -> list[Float[Tensor, "prompt position"]]:
        """A method's scores, draw by draw; none, and why, where it gives none."""
        if name in self.failed:
            return []
        known = references.get(name)
        if known is not None and None in draws:
            return [known]
        try:
            return [_aligned(each or method_of(name), self.lens, own, eraser) for each in draws]
        except (AttnlensError, RuntimeError) as error:  # one may break where the others do not
            self.failed[name] = _told(error)
            self.found.pop(name, None)
            return []

    def _measured(
        self,
        scores: Float[Tensor, "prompt position"],
        eraser: Eraser,
        ends: Ends,
        references: Mapping[str, Tensor | None],
        places: Bool[Tensor, "prompt position"] | None,
    ) -> dict[str, Tensor]:
        """Every measure of some prompts, and the curves."""
        seed, steps, bins = (self.settings[name] for name in ("seed", "steps", "bins"))
        gone = delete(eraser, scores, ends, steps, bins, seed)
        alike = {
            name: torch.full((len(scores),), torch.nan, dtype=torch.float64)
            if reference is None
            else spearman(scores, reference, eraser.erasable)
            for name, reference in references.items()
        }
        return {
            "loo_spearman": alike[ERASED],
            "gradient_spearman": alike[GRADIENT],
            "deletion": gone.areas[:, 0],
            "insertion": gone.areas[:, 1],
            "abpc": gone.areas[:, 1] - gone.areas[:, 0],
            "comprehensiveness": gone.comprehensiveness,
            "sufficiency": gone.sufficiency,
            "pointing": points_at(scores, eraser.real, places),
            "morf": gone.morf,
            "lerf": gone.lerf,
        }

    def notes(self, whole: Tensor, empty: Tensor) -> Iterator[str]:
        """What a reader should know."""
        count = len(whole)
        yield f"In place of an erased token: {self.in_place}."
        if self.kept:
            yield f"Never erased: {self.kept / count:.3g} tokens a prompt (special or read ones)."
        if self.task.reads.shape[1] > 1:
            yield f"Of the {self.task.reads.shape[1]} reads of a prompt the last is explained."
        if GRADIENT not in METHODS or self.no_gradient:
            yield f"No gradient to compare with. {self.no_gradient}".rstrip()
        wrong = int((whole <= 0).sum())
        if wrong:
            yield f"In {wrong} of {count} prompts the model does not prefer the right answer."
        if float((whole - empty).mean()) <= 0:
            yield (
                "Prompts without their tokens are worth no less to the target, so areas, "
                "comprehensiveness and sufficiency say little here."
            )
        if count < 2:
            yield "One prompt gives no interval over prompts; give several."
        for name, why in self.failed.items():
            yield f"{name} did not score: {why}"


def _told(error: Exception) -> str:
    """What an error says; by its kind, where it is torch's and not a refusal."""
    return str(error) if isinstance(error, AttnlensError) else f"{type(error).__name__}: {error}"


def points_at(
    scores: Float[Tensor, "prompt position"],
    real: Bool[Tensor, "prompt position"],
    sources: Bool[Tensor, "prompt source_position"] | None,
) -> Float[Tensor, " prompt"]:
    """Whether the token of largest |score| is a source; of tied ones the share that are.

    NaN for prompts without sources.
    """
    if sources is None:
        return torch.full((len(scores),), torch.nan, dtype=torch.float64)
    size = scores.abs().masked_fill(~real, -1)
    largest = size == size.amax(1, keepdim=True)
    padded = torch.zeros_like(real)
    padded[:, : sources.shape[1]] = sources[:, : real.shape[1]]
    hits = (largest & padded).sum(1).double() / largest.sum(1)
    return hits.masked_fill(~padded.any(1), torch.nan)


def _aligned(
    method: Method, lens: Lens, own: Task, eraser: Eraser
) -> Float[Tensor, "prompt position"]:
    """A method's scores, once they are of the tokens that are erased."""
    found = method(lens, own.clean_inputs(), Target.of_task(own))
    counts, wanted = ([len(words) for words in each] for each in (found.tokens, eraser.words))
    if counts != wanted:
        raise InputError(f"it scores {counts[0]} tokens where the first prompt has {wanted[0]}.")
    scores = found.scores.detach().double().cpu()
    if not bool(scores.isfinite().all()):
        raise InputError("its scores are not all finite.")
    return scores


def sources_of(
    lens: Lens, task: Task, given: Sequence[Sequence[int]] | None
) -> tuple[Bool[Tensor, "prompt position"] | None, str]:
    """Where each prompt's answer comes from, and how that is known."""
    positions = torch.arange(task.clean.shape[1])
    if given is not None:
        lengths = task.mask.sum(1).tolist()
        if len(given) != len(task):
            raise InputError(f"sources names {len(given)} prompts; the task has {len(task)}.")
        known = torch.zeros_like(task.mask)
        for prompt, (own, length) in enumerate(zip(given, lengths, strict=True)):
            for place in own:
                if not 0 <= place < length:
                    raise InputError(f"sources: prompt {prompt} has no position {place}.")
                known[prompt, place] = True
        return known, "Pointing: at the sources that were given."
    if task.spans is not None:
        known = (positions >= task.spans[:, :1]) & (positions < task.spans[:, 1:])
        return known, "Pointing: at the task's needle."
    if lens.anatomy.unembedding is not None:
        known = (task.clean == task.answers[:, -1:]) & (positions <= task.reads[:, -1:])
        if bool(known.any()):
            return known, "Pointing: at the answer's own token where it stands before the read."
    return None, "Pointing is left out: no source of the answer is known."
