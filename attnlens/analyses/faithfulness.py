"""Which attribution to believe: every method held against what erasing tokens does to the model.

No measure is the truth. Leave-one-out asks for one token at a time, deletion for many; both put
the model before prompts that it may never have seen. So there are several measures, each beside
that of random scores, and what stands in for an erased token is a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.attribute import METHODS, method_of
from attnlens.analyses.deletion import BINS, FRACTIONS
from attnlens.analyses.erasure import TOKENS
from attnlens.analyses.judging import RANDOM, Bench, Method, sources_of
from attnlens.analyses.replacement import Kind, Replacement
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.tasks import Task

MEASURES = {
    "loo_spearman": True,
    "gradient_spearman": True,
    "deletion": False,
    "insertion": True,
    "abpc": True,
    "comprehensiveness": True,
    "sufficiency": False,
    "pointing": True,
}
"""The measures, and whether more is better."""


@dataclass(frozen=True)
class Faithfulness:
    """How far each method's scores agree with what the model does; means over prompts.

    M is the logit of the right answer less that of the wrong one, where the task's last read is
    graded; x the prompt; s a method's signed scores. Measures by erasure rank the n tokens that
    may be erased (all but special ones, and the read one where erasing hides), equal scores in a
    random order. `M(x - S)` is M with the tokens S erased, S_k the k of highest score, S'_k the k
    of lowest.

    - `loo_spearman`: Spearman's correlation, over those n tokens, of s with leave-one-out,
      `M(x) - M(x - {i})`.
    - `gradient_spearman`: the same with the embedding times its gradient, summed over its width
      (`input_gradient`).
    - `deletion`: area under `M(x - S_k)` over k/n from 0 to 1, most relevant first (MoRF), by
      trapezoids, at `steps` numbers of tokens; in logits, less is better.
    - `insertion`: area under M while the most relevant tokens come back first into a prompt
      without any. These are the prompts of deletion least relevant first (LeRF), `M(x - S'_k)`, in
      the other direction: the area is the same number, and is computed once. More is better.
    - `abpc`: `insertion - deletion`, the area between the LeRF and the MoRF curve (Achtibat et al.
      2024; Bluecher et al. 2024). Random scores have 0 on average.
    - `comprehensiveness`: mean over `bins` f of `M(x) - M(x - S_k)`, k = ceil(f n) (DeYoung et al.
      2020, ERASER; there of probabilities, here of M). More is better.
    - `sufficiency`: mean over `bins` of `M(x) - M(x - S'_(n-k))`, the k highest alone kept. Less is
      better.
    - `pointing`: share of prompts in which the token of largest |s|, of all tokens, special ones
      too, is one of `sources`; of several that tie, the share that are.

    Attributes:
        task: what was graded.
        methods: every method that scored, in the order of every `method` axis; `random`, a mean
            over draws, last.
        by_prompt: each measure of each prompt; NaN where it has none.
        intervals: each measure's mean over prompts with its bootstrap interval.
        morf, lerf: mean over prompts of M at each of `fractions` erased, most and least relevant
            first.
        whole, empty: M of each prompt, and of what is left of it when all n tokens are erased.
        failed: what a method that did not score said.
        replacement, in_place: what stands in for an erased token, and the same in words.
        settings: what else changes the numbers.
        forwards: forwards that erasing took; the methods' own are not counted.
        notes: what a reader should know.

    """

    task: str
    methods: tuple[str, ...]
    by_prompt: Mapping[str, Float[Tensor, "method prompt"]]
    intervals: Mapping[str, Interval]
    fractions: Float[Tensor, " fraction"]
    morf: Float[Tensor, "method fraction"]
    lerf: Float[Tensor, "method fraction"]
    whole: Float[Tensor, " prompt"]
    empty: Float[Tensor, " prompt"]
    failed: Mapping[str, str]
    replacement: Replacement
    in_place: str
    settings: Mapping[str, Any]
    forwards: int
    notes: tuple[str, ...]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.whole)

    def __getitem__(self, measure: str) -> Interval:
        """A measure of each method: mean over prompts, low, high, each `method`."""
        if measure not in self.intervals:
            raise InputError(f"There is no measure {measure!r}; there is {', '.join(MEASURES)}.")
        return self.intervals[measure]

    def over_random(self, measure: str) -> Interval:
        """A method's measure less that of random scores, prompt by prompt; each `method`.

        An interval that leaves 0 out tells a method from chance.
        """
        assert measure in self.by_prompt, measure
        values = self.by_prompt[measure]
        chance = values[self.methods.index(RANDOM)]
        return _interval(values - chance, self.settings)

    def to_frame(self) -> pd.DataFrame:
        """One row a method: each measure, with `_low` and `_high`."""
        columns: dict[str, Any] = {"method": self.methods}
        for measure, (mean, low, high) in self.intervals.items():
            columns |= {measure: mean, f"{measure}_low": low, f"{measure}_high": high}
        return pd.DataFrame({name: list(values) for name, values in columns.items()}).astype(
            dict.fromkeys(list(columns)[1:], float)
        )

    def curves_frame(self) -> pd.DataFrame:
        """One row a method and share of the tokens erased: method, fraction, morf, lerf."""
        parts = [
            pd.DataFrame({"method": name, "fraction": self.fractions, "morf": most, "lerf": least})
            for name, most, least in zip(self.methods, self.morf, self.lerf, strict=True)
        ]
        return pd.concat(parts, ignore_index=True)

    def prompts_frame(self) -> pd.DataFrame:
        """One row a method and prompt: method, prompt, each measure."""
        count = self.prompts
        return pd.DataFrame(
            {
                "method": [name for name in self.methods for _ in range(count)],
                "prompt": list(range(count)) * len(self.methods),
                **{name: values.flatten() for name, values in self.by_prompt.items()},
            }
        )


def faithfulness(
    lens: Lens,
    task: Task,
    methods: Sequence[str] | Mapping[str, Method] | None = None,
    replacement: Replacement | Kind = "padding",
    sources: Sequence[Sequence[int]] | None = None,
    steps: int = 10,
    bins: Sequence[float] = BINS,
    draws: int = 5,
    batch_size: int = 8,
    tokens: int = TOKENS,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Faithfulness:
    """Hold attribution methods against what erasing tokens does: Spearman, deletion, pointing.

    The measures are defined at `Faithfulness`. A method that refuses the model, or that torch stops
    (out of memory, an operation that is not there), is left out with its reason; random scores are
    always there.

    Args:
        lens: the model.
        task: prompts with a right and a wrong answer, whose contrast at the last read is explained.
        methods: names that `attribute` knows, or functions `(lens, inputs, target)` by name, such
            as `{"attnlrp": functools.partial(al.attnlrp, strict=False)}`; all where None.
        replacement: what stands in for an erased token: "padding", "mean", "neutral", or a
            `Replacement`. Leave-one-out uses it too.
        sources: positions of each prompt that the answer is known to come from, for pointing.
            Where None: the task's `spans`, else where the answer itself stands before the read.
        steps: numbers of tokens at which deletion is measured.
        bins: shares of the tokens for comprehensiveness and sufficiency.
        draws: random scores of each prompt; their measures are means over these.
        batch_size: prompts that a method scores at a time.
        tokens: positions of erased prompts in one forward at most.
        seed: of random scores, of the order of equal scores, and of the intervals.
        resamples: of the bootstrap.
        confidence: of the intervals.
        progress: called with how many (prompt, method) are done, and of how many.

    Raises:
        InputError: an unknown method or replacement, settings out of range, sources that are no
            positions, or a model that cannot be graded.

    """
    check_bootstrap(resamples, confidence)
    _check(bins, steps=steps, draws=draws, batch_size=batch_size)
    settings: dict[str, Any] = {
        "steps": steps, "bins": tuple(bins), "draws": draws, "seed": seed, "resamples": resamples,
        "confidence": confidence,
    }  # fmt: skip
    asked = _asked(methods, seed, draws)
    bench = Bench(lens, task, asked, Replacement.of(replacement), tokens, settings)
    known, said = sources_of(lens, task, sources)
    for start in range(0, len(task), batch_size):
        bench.judge(range(start, min(start + batch_size, len(task))), known, progress)
    return _result(bench, said)


def _result(bench: Bench, said: str) -> Faithfulness:
    """All prompts together."""
    names = tuple(name for name in bench.methods if name in bench.found)
    values = {
        measure: torch.stack(
            [torch.cat([part[measure] for part in bench.found[name]]) for name in names]
        )
        for measure in (*MEASURES, "morf", "lerf")
    }
    curves = {way: values.pop(way).nanmean(1) for way in ("morf", "lerf")}
    whole, empty = (
        torch.cat([getattr(ends, end) for ends in bench.ends]) for end in ("whole", "empty")
    )
    return Faithfulness(
        task=bench.task.name,
        methods=names,
        by_prompt=values,
        intervals={name: _interval(own, bench.settings) for name, own in values.items()},
        fractions=FRACTIONS,
        morf=curves["morf"],
        lerf=curves["lerf"],
        whole=whole,
        empty=empty,
        failed=bench.failed,
        replacement=bench.replacement,
        in_place=bench.in_place,
        settings={**bench.settings, "replacement": asdict(bench.replacement)},
        forwards=bench.forwards,
        notes=(*bench.notes(whole, empty), said),
    )


def _asked(
    methods: Sequence[str] | Mapping[str, Method] | None, seed: int, draws: int
) -> dict[str, tuple[Method | None, ...]]:
    """Methods by name, None where `attribute` knows them; random ones last, draw by draw."""
    if isinstance(methods, Mapping):
        asked: dict[str, tuple[Method | None, ...]] = {n: (own,) for n, own in methods.items()}
    else:
        names = (methods,) if isinstance(methods, str) else METHODS if methods is None else methods
        for name in names:
            method_of(name)
        asked = dict.fromkeys(names, (None,))
    asked.pop(RANDOM, None)
    chance = tuple(partial(method_of(RANDOM), seed=seed + draw) for draw in range(draws))
    return {**asked, RANDOM: chance}


def _check(bins: Sequence[float], **counts: int) -> None:
    if min(counts.values()) < 1:
        given = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise InputError(f"{given}: give 1 or more of each.")
    if not bins or not all(0 < share <= 1 for share in bins):
        raise InputError(f"bins={tuple(bins)}: shares of the tokens lie over 0, up to 1.")


def _interval(values: Float[Tensor, "method prompt"], settings: Mapping[str, Any]) -> Interval:
    return bootstrap_mean(values.T, settings["resamples"], settings["confidence"], settings["seed"])
