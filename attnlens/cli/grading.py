"""What a model can be asked: whether it reads text, and whether its answers can be graded."""

from __future__ import annotations

from attnlens.lens import Lens


def no_grading(lens: Lens) -> str | None:
    """Why a model cannot be graded on what token comes next; None where it can."""
    anatomy = lens.anatomy
    if any(site.kind != "self" for site in anatomy.sites):
        return "the tasks ask for the next token, and heads of this model see both sides"
    if anatomy.unembedding is None:
        return "the model was loaded without a language-model head, so there is no answer to grade"
    return None


def reads_text(lens: Lens) -> bool:
    """Whether the model takes token ids."""
    return getattr(lens.model, "main_input_name", "input_ids") == "input_ids"
