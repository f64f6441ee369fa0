"""The main job: what a model's heads do and which matter, in one folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attnlens.analyses.ablation import Ablation, ablate
from attnlens.analyses.ablation_groups import SetAblation, ablate_together
from attnlens.analyses.head_types import HeadTypes, head_types
from attnlens.analyses.profile import Profile, profile
from attnlens.analyses.rollout import Rollout, rollout
from attnlens.analyses.sinks import Sinks, sinks
from attnlens.anatomy import HeadSpec
from attnlens.cli.asked import TextsAsked
from attnlens.cli.further import further
from attnlens.cli.grading import no_grading, reads_text
from attnlens.cli.options import TASK_FILES
from attnlens.cli.output import staged
from attnlens.cli.progress import Steps, silent
from attnlens.cli.texts import Texts, cut_texts
from attnlens.errors import TaskError
from attnlens.lens import Inputs, Lens, Trace
from attnlens.tasks import (
    Task,
    agreement,
    capitals,
    coloured_objects,
    copy_task,
    docstring_arguments,
    greater_than,
    indirect_object,
    key_value,
    needle,
    read_task,
    repeated_tokens,
)
from attnlens.views.findings import Findings
from attnlens.views.narrative import THRESHOLD
from attnlens.views.report import write_report

TASKS: dict[str, Callable[..., Task]] = {
    "repeat": repeated_tokens,
    "ioi": indirect_object,
    "key-value": key_value,
    "needle": needle,
    "copy": copy_task,
    "greater-than": greater_than,
    "coloured-objects": coloured_objects,
    "agreement": agreement,
    "docstring": docstring_arguments,
    "capitals": capitals,
}
PROMPT_TOKENS = 40
"""The prompt of the heat maps is at most so long: its labels can be read."""


@dataclass(frozen=True)
class Plan:
    """What can be chosen about the main job."""

    name: str = "model"
    """What the report calls the model."""
    mode: str = "zero"
    """What takes the place of an ablated head; see `sweeps.modes.Mode`."""
    heads: HeadSpec = "all"
    """The heads to ablate."""
    budget: str = "2GB"
    """Memory for the attention maps of the prompt."""
    reading: TextsAsked = field(default_factory=TextsAsked)
    """How the texts are read: batches, and where to save what was counted."""


def run_report(
    lens: Lens,
    texts: Texts,
    task: Task | None,
    out: str | Path,
    plan: Plan | None = None,
    steps: Steps = silent,
) -> Findings:
    """Find out what a model's heads do and write it to the folder `out`.

    Self-check, profile, sinks, head types, attention and rollout of one prompt, ablation of every
    head on the task, and what `further` finds. Writes index.html, heads.csv, heads.parquet,
    tables/, rollout.graphml and figures/; on an error or an interrupt `out` is as it was. Parts
    that the model has nothing for are left out, and the findings say why. Raises what the parts
    raise, and FileError.
    """
    with staged(Path(out)) as folder:
        findings = find_out(lens, texts, task, plan, steps)
        with steps("Writing the report"):
            write_report(findings, folder)
    return findings


def find_out(
    lens: Lens,
    texts: Texts,
    task: Task | None,
    plan: Plan | None = None,
    steps: Steps = silent,
) -> Findings:
    """Everything that `run_report` writes, as one value."""
    plan = plan or Plan()
    lens.anatomy.find(plan.heads)  # a head that is not there is said before anything runs
    left_out: list[str] = []
    with steps("Checking the instrument"):
        check = lens.check()
        check.raise_problems()
    read = _read(lens, texts, plan, steps, left_out)
    prompt = _prompt(lens, texts.sample, plan, steps, left_out)
    ablation = _ablation(lens, task, plan, steps, left_out)
    together = _together(lens, task, read[2], plan, steps)
    return Findings(
        plan.name,
        lens.anatomy,
        check,
        texts.sample,
        *read,
        *prompt,
        _repeated(lens, read[2]),
        ablation,
        together,
        further(lens, texts.sample, steps, left_out),
        tuple(left_out),
    )


def build_task(lens: Lens, name: str, prompts: int, seed: int = 0) -> Task | None:
    """The task of a name or of a file; None for "none" and for models that no task can grade.

    Of a file all prompts are taken. Raises TaskError for an unknown name, and where the model's
    tokens do not allow the task; and what `read_task` raises.
    """
    of_file = name.lower().endswith(TASK_FILES)
    if name != "none" and name not in TASKS and not of_file:
        raise TaskError(f"There is no task {name!r}; choose {', '.join(TASKS)} or none.")
    if name == "none" or no_grading(lens) is not None:
        return None
    return read_task(name, lens) if of_file else TASKS[name](lens, prompts, seed=seed)


def _read(
    lens: Lens, texts: Texts, plan: Plan, steps: Steps, left_out: list[str]
) -> tuple[Profile | None, Sinks | None, HeadTypes | None]:
    """Profile, sinks and head types."""
    if not reads_text(lens):
        left_out.append(
            "Profile, sinks and head types are left out: the model reads no text. From Python, "
            "lens.run and lens.measure take what its processor makes."
        )
        return None, None, None
    with steps("Scoring known head types"):
        types = head_types(lens, list(texts.sample) or None)
    if not texts.sample:
        left_out.append(
            "Profile, sinks, attention maps and rollout are left out: the model has no tokenizer, "
            "so it can read no text. Previous-token scores are of random tokens."
        )
        return None, None, types
    inputs, longest = _inputs(lens, texts, left_out)
    asked = plan.reading
    with steps(f"Profiling {len(lens.anatomy.heads)} heads") as advance:
        profiled = profile(
            lens, inputs, batch_size=asked.batch_size, max_tokens=longest,
            state=asked.state_of("profile"), progress=advance,
        )  # fmt: skip
    with steps("Finding sinks") as advance:
        sunk = sinks(
            lens, inputs, batch_size=asked.batch_size, max_tokens=longest,
            state=asked.state_of("sinks"), progress=advance,
        )  # fmt: skip
    return profiled, sunk, types


def _inputs(
    lens: Lens, texts: Texts, left_out: list[str]
) -> tuple[Inputs | Iterable[str], int | None]:
    """The texts and where to cut them.

    Where there is a decoder beside an encoder it reads them too, shifted by one.
    """
    if "dec" not in lens.anatomy.stacks:
        return texts.every, texts.max_tokens
    inputs = dict(lens.encode(list(texts.sample)).inputs)
    ids, start = inputs["input_ids"], inputs["decoder_input_ids"]
    inputs["decoder_input_ids"] = torch.cat([start[:, :1], ids[:, :-1]], dim=1)
    inputs["decoder_attention_mask"] = inputs["attention_mask"]
    left_out.append("Encoder and decoder read the same texts, the decoder after its start token.")
    if not texts.whole:
        left_out.append(f"Of the texts the first {len(texts.sample)} were read, all at once.")
    return inputs, None


def _prompt(
    lens: Lens, texts: Sequence[str], plan: Plan, steps: Steps, left_out: list[str]
) -> tuple[Trace | None, Rollout | None]:
    """Attention and rollout of the beginning of the first text."""
    if not texts or not reads_text(lens):
        return None, None
    start = cut_texts(lens, (texts[0],), PROMPT_TOKENS)[0]
    with steps("Rolling attention out over a prompt"):
        trace = lens.run(start, keep=("pattern",), budget=plan.budget)
        stack = lens.anatomy.stacks[0]
        rolled = rollout(trace, stack=stack or None)
    if len(lens.anatomy.stacks) > 1:
        left_out.append(f"The rollout goes through the {stack} stack alone.")
    return trace, rolled


def _repeated(lens: Lens, types: HeadTypes | None) -> Trace | None:
    """The best induction head, if there is one, on random tokens said twice."""
    found = types.of_type("induction", THRESHOLD) if types is not None else ()
    if not found or no_grading(lens) is not None:
        return None
    return lens.run(repeated_tokens(lens, 1).clean, keep=("pattern",), heads=found[0])


def _ablation(
    lens: Lens, task: Task | None, plan: Plan, steps: Steps, left_out: list[str]
) -> Ablation | None:
    if task is None:
        why = no_grading(lens) or "no task was asked for"
        left_out.append(f"Ablation is left out: {why}.")
        return None
    count = len(lens.anatomy.find(plan.heads))
    with steps(f"Ablating {count} heads one by one") as advance:
        return ablate(lens, task, plan.heads, plan.mode, progress=advance)


def _together(
    lens: Lens, task: Task | None, types: HeadTypes | None, plan: Plan, steps: Steps
) -> SetAblation | None:
    """All induction heads at once: where several do the same, taking out one shows little."""
    found = types.of_type("induction", THRESHOLD) if types is not None else ()
    if task is None or len(found) < 2:
        return None
    with steps(f"Ablating {len(found)} induction heads together") as advance:
        return ablate_together(lens, task, found, plan.mode, progress=advance)
