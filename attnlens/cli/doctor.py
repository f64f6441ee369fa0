"""The doctor: is the instrument exact on this model, and what are its clearest heads?"""

from __future__ import annotations

from collections.abc import Sequence

from attnlens.analyses.head_types import HeadTypes, head_types
from attnlens.cli.grading import reads_text
from attnlens.cli.progress import Steps, silent
from attnlens.lens import Lens
from attnlens.views.narrative import TYPES, check_line, strongest_line, type_line
from attnlens.views.tables import CHECK_COLUMNS, aligned, check_rows

SHOWN = ("previous_token", "induction")


def verdict(
    lens: Lens, texts: Sequence[str], name: str, steps: Steps = silent
) -> tuple[list[str], bool]:
    """What the doctor says, line by line, and whether the self-check passed."""
    with steps("Checking the instrument"):
        check = lens.check()
    lines = [str(lens.anatomy), "", aligned(CHECK_COLUMNS, check_rows(check)), check_line(check)]
    if not check.passed:
        return [*lines, f"Verdict: attnlens cannot be trusted on {name}."], False
    lines += ["", *_heads(lens, texts, steps)]
    return [*lines, f"Verdict: attnlens can be trusted on {name}."], True


def _heads(lens: Lens, texts: Sequence[str], steps: Steps) -> list[str]:
    if not reads_text(lens):
        return ["No head types: the model reads no text."]
    with steps("Scoring known head types"):
        types = head_types(lens, list(texts) or None)
    notes = [note for note in types.notes if "opying" not in note]  # copying is not shown here
    return [*_strongest(types, bool(texts)), *notes]


def _strongest(types: HeadTypes, on_texts: bool) -> list[str]:
    frame = types.to_frame()
    where = "over the text" if on_texts else "over random tokens (no tokenizer)"
    lines: list[str] = []
    for name in SHOWN:
        own = where if name == "previous_token" else "on repeated random tokens"
        lines.append(f"Strongest {TYPES[name]} heads {own}: {strongest_line(frame, name)}")
        lines.append(type_line(frame, name))
    return lines
