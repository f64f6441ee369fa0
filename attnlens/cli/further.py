"""What the main job finds beyond profiles and types: large values, ranks, likeness, retrieval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attnlens.analyses.layer_similarity import layer_similarity
from attnlens.analyses.massive_activations import massive_activations
from attnlens.analyses.massive_qk import massive_qk
from attnlens.analyses.ranks import head_ranks
from attnlens.analyses.retrieval import RetrievalHeads, RetrievalSettings, retrieval_heads
from attnlens.cli.grading import no_grading, reads_text
from attnlens.cli.progress import Advance, Steps
from attnlens.errors import BudgetError, InputError, UnsupportedModelError
from attnlens.lens import Lens

TEXTS = 16
"""So many texts are enough here: large values and likeness hardly depend on which."""
ROWS = 64
"""Rows of each text by which layers are compared."""
LENGTHS = (64, 128)
DEPTHS = (0.0, 0.5, 1.0)
ANSWER = 16
"""Tokens of an answer: the built-in needle is three words."""


def further(
    lens: Lens, sample: Sequence[str], steps: Steps, left_out: list[str]
) -> tuple[Any, ...]:
    """Massive values, effective ranks, likeness of layers, retrieval heads: those there are."""
    found: list[Any] = []

    def part(name: str, doing: str, make: Callable[[Advance], Any]) -> None:
        try:
            with steps(doing) as advance:
                found.append(make(advance))
        except (InputError, UnsupportedModelError, BudgetError) as error:
            left_out.append(f"{name} left out: {error}")

    texts = list(sample[:TEXTS])
    if texts and reads_text(lens):
        part("Massive activations are", "Looking for massive activations",
             lambda _: massive_activations(lens, texts))  # fmt: skip
        part("Channels of queries and keys are", "Measuring channels of queries and keys",
             lambda _: massive_qk(lens, texts))  # fmt: skip
    part("Effective ranks are", "Taking effective ranks", lambda _: head_ranks(lens))
    own = [site.name for site in lens.anatomy.sites if site.stack == lens.anatomy.stacks[0]]
    if texts and reads_text(lens) and len(own) > 1:
        part("Likeness of layers is", "Comparing layers",
             lambda _: layer_similarity(lens, texts, ROWS, ",".join(own)))  # fmt: skip
    why = no_grading(lens)
    if why is None and reads_text(lens):
        part("Retrieval heads are", "Asking for needles", lambda advance: _retrieval(lens, advance))
    else:
        left_out.append(f"Retrieval heads are left out: {why or 'the model reads no text'}.")
    return tuple(found)


def _retrieval(lens: Lens, advance: Advance) -> RetrievalHeads:
    """The built-in needle in short texts; raises InputError where no answer holds it."""
    room = (lens.context or max(LENGTHS) + ANSWER) - ANSWER
    lengths = tuple(sorted({max(min(length, room), 1) for length in LENGTHS}))
    settings = RetrievalSettings(steps=ANSWER)
    result = retrieval_heads(lens, None, lengths, DEPTHS, 2, settings, progress=advance)
    if not result.prompts:
        best = max(run.recall for run in result.runs)
        raise InputError(
            f"the model answers none of {len(result.runs)} questions for a needle in texts of up "
            f"to {max(lengths)} tokens (best recall {best:.2f})."
        )
    return result
