"""Jobs of one method each: measure, then a page with its tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from attnlens.analyses.retrieval import RetrievalSettings, retrieval_heads
from attnlens.analyses.sink_tally import Rule, SinkSettings
from attnlens.analyses.sinks import sinks
from attnlens.analyses.syntax import SyntaxSettings, syntax_heads
from attnlens.cli.asked import NeedleAsked, TextsAsked, TreesAsked
from attnlens.cli.output import staged
from attnlens.cli.progress import Steps
from attnlens.cli.texts import Texts, read_text
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.tasks import Needle
from attnlens.tasks.conllu import read_conllu
from attnlens.views.narrative import model_line
from attnlens.views.report_parts import write_page
from attnlens.views.report_results import part_of

Number = TypeVar("Number", int, float)
Opener = Callable[[], Lens]
"""Opens the model: what can be refused without it is refused first."""


def run_sinks(
    lens: Lens, name: str, texts: Texts, asked: TextsAsked, epsilon: float, rule: str, out: Path,
    steps: Steps,
) -> list[str]:  # fmt: skip
    """Find sinks over texts and write them to a folder; gives the findings in short."""
    settings = SinkSettings(epsilon, cast("Rule", rule))
    with staged(out) as folder:
        with steps("Finding sinks") as advance:
            found = sinks(
                lens, texts.every, settings, asked.batch_size, max_tokens=texts.max_tokens,
                state=asked.state_of("sinks"), progress=advance,
            )  # fmt: skip
        read = f"Read: {max(found.prompts):,} text{'s' * (max(found.prompts) != 1)}."
        return _written(lens, f"Sinks of {name}", [found], folder, steps, read)


def run_retrieval(
    opened: Opener, name: str, asked: NeedleAsked, out: Path, steps: Steps
) -> list[str]:
    """Find retrieval heads and write them to a folder; gives the findings in short."""
    lengths = None if asked.lengths is None else _numbers("--lengths", asked.lengths, int)
    depths = _numbers("--depths", asked.depths, float)
    needle = _needle(asked)
    settings = RetrievalSettings(steps=asked.steps, repeat=asked.repeat)
    lens = opened()
    with staged(out) as folder:
        with steps("Asking for needles") as advance:
            found = retrieval_heads(
                lens, needle, lengths, depths, asked.prompts, settings, asked.batch_size, advance
            )
        return _written(lens, f"Retrieval heads of {name}", [found], folder, steps)


def run_syntax(opened: Opener, name: str, asked: TreesAsked, out: Path, steps: Steps) -> list[str]:
    """Find heads that follow syntax and write them to a folder; gives the findings in short."""
    sentences = read_conllu(asked.file)[: asked.limit]
    relations = None if asked.relations is None else _names("--relations", asked.relations)
    settings = SyntaxSettings(least=asked.least, split=asked.split)
    lens = opened()
    with staged(out) as folder:
        with steps(f"Reading {len(sentences):,} sentences") as advance:
            found = syntax_heads(lens, sentences, relations, settings, advance)
        return _written(lens, f"Syntax in {name}", [found], folder, steps)


def _written(
    lens: Lens, title: str, results: Sequence[Any], folder: Path, steps: Steps, *more: str
) -> list[str]:
    """A page of results, and the findings in short."""
    with steps("Writing the report"):
        parts = [part_of(result) for result in results]
        lines = [*more, *(line for part in parts for line in part.lines)]
        write_page(folder, title, model_line(lens.anatomy), lines, parts)
    return [*lines, *(note for part in parts for note in part.notes)]


def _needle(asked: NeedleAsked) -> Needle | None:
    """The user's own needle; None for the built-in one."""
    named = {"--haystack": asked.haystack, "--needle": asked.needle, "--question": asked.question}
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == len(named) and asked.answer is None:
        return None
    if asked.haystack is None or asked.needle is None or asked.question is None:
        raise InputError(
            "A needle of your own takes --haystack, --needle and --question together; "
            f"missing: {', '.join(missing)}."
        )
    return Needle(read_text(asked.haystack), asked.needle, asked.question, asked.answer)


def _numbers(option: str, given: str, kind: type[Number]) -> tuple[Number, ...]:
    """Numbers separated by commas."""
    parts = _names(option, given)
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} takes {what} separated by commas, not {given!r}.") from None


def _names(option: str, given: str) -> tuple[str, ...]:
    """Names separated by commas."""
    found = tuple(part.strip() for part in given.split(",") if part.strip())
    if not found:
        raise InputError(f"{option} is empty: name one thing at least, or leave it out.")
    return found
