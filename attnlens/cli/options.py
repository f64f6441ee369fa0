"""The arguments and options of the commands, each said once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

TASK_FILES = (".csv", ".jsonl")
"""How files of prompts end; see `tasks.read_task`."""


class TaskName(StrEnum):
    """Tasks on which heads are ablated."""

    REPEAT = "repeat"
    IOI = "ioi"
    KEY_VALUE = "key-value"
    NEEDLE = "needle"
    COPY = "copy"
    GREATER_THAN = "greater-than"
    COLOURED_OBJECTS = "coloured-objects"
    AGREEMENT = "agreement"
    DOCSTRING = "docstring"
    CAPITALS = "capitals"
    NONE = "none"


class SweepTask(StrEnum):
    """Tasks of a sweep."""

    REPEAT = "repeat"
    IOI = "ioi"
    KEY_VALUE = "key-value"
    NEEDLE = "needle"
    COPY = "copy"
    GREATER_THAN = "greater-than"
    COLOURED_OBJECTS = "coloured-objects"
    AGREEMENT = "agreement"
    DOCSTRING = "docstring"
    CAPITALS = "capitals"


def _task(given: str) -> str:
    """A task's name, or a file of prompts; anything else is refused by its option."""
    if given.lower().endswith(TASK_FILES) or given in list(SweepTask):
        return given
    raise typer.BadParameter(
        f"{given!r} is no task: choose {', '.join(SweepTask)}, or give FILE.csv or FILE.jsonl."
    )


class Mode(StrEnum):
    """What becomes of an ablated head; the names of `sweeps.modes.Mode`."""

    ZERO = "zero"
    MEAN = "mean"
    POSITION_MEAN = "position_mean"
    RESAMPLE = "resample"
    UNIFORM = "uniform"
    IDENTITY = "identity"
    FROZEN = "frozen"


class By(StrEnum):
    """What is ablated at a time."""

    HEADS = "heads"
    LAYERS = "layers"
    PAIRS = "pairs"
    POSITIONS = "positions"


class MetricName(StrEnum):
    """What a task is graded by."""

    LOGIT_DIFFERENCE = "logit_difference"
    LOSS = "loss"
    ACCURACY = "accuracy"


class Erased(StrEnum):
    """What stands in for an erased token; the names of `replacement.Kind`."""

    PADDING = "padding"
    MEAN = "mean"
    NEUTRAL = "neutral"


class Rule(StrEnum):
    """Which keys are calibration sinks."""

    PAPER = "paper"
    CODE = "code"


TEXTS = "Texts"
MODEL = "Model"

Model = Annotated[str, typer.Argument(help="A model folder with safetensors, or a hub name.")]
Out = Annotated[Path, typer.Option(help="Folder for the report; made if it is not there.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one.", rich_help_panel=MODEL),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16; the checkpoint's where not given.", rich_help_panel=MODEL
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="A folder or hub name, where the model has no tokenizer beside it.",
        rich_help_panel=MODEL,
    ),
]

File = Annotated[
    Path | None,
    typer.Option(
        help="What the model reads; a built-in text where not given. A UTF-8 text, of which "
        "several are separated by <|endoftext|>; with --lines one text a line; or a Parquet file, "
        "a folder of them, or a dataset saved on disk (the folder of one split): a text a row.",
        rich_help_panel=TEXTS,
    ),
]
Corpus = Annotated[
    Path,
    typer.Option(
        help="A UTF-8 text, of which several are separated by <|endoftext|>; with --lines one "
        "text a line; or a Parquet file, a folder of them, or a dataset saved on disk (the folder "
        "of one split): a text a row.",
        rich_help_panel=TEXTS,
    ),
]
Lines = Annotated[
    bool, typer.Option("--lines", help="Each line of the file is a text.", rich_help_panel=TEXTS)
]
Column = Annotated[
    str | None,
    typer.Option(
        help='Column of the table that holds the texts; "text" where not given.',
        rich_help_panel=TEXTS,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Read the first N tokens of each text. Texts of --lines and of tables are cut to the "
        "model's context where not given.",
        metavar="N",
        rich_help_panel=TEXTS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Read the first N texts.", metavar="N", rich_help_panel=TEXTS),
]
Cut = Annotated[
    bool,
    typer.Option("--cut", help="Read texts over the context in pieces.", rich_help_panel=TEXTS),
]
State = Annotated[
    Path | None,
    typer.Option(
        help="Save what was counted as FILE.profile and FILE.sinks; the same command goes on from "
        "there after a stop.",
        metavar="FILE",
        rich_help_panel=TEXTS,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Texts that run together.", metavar="N", rich_help_panel=TEXTS),
]

NeedleBatch = Annotated[int, typer.Option(min=1, help="Prompts that run together.", metavar="N")]

Prompts = Annotated[int, typer.Option(min=2, help="Prompts of the task.")]
Ablate = Annotated[
    Mode,
    typer.Option(help="What takes the place of a head's output; attnlens ablate --help tells."),
]
Heads = Annotated[
    str, typer.Option(help='Heads to ablate: "all", "L3", "L2:", "L3H5,L4H0", "dec.L1H2".')
]
Budget = Annotated[
    str, typer.Option(help="Memory for the attention maps of the prompt; refused over it.")
]
Task = Annotated[
    TaskName, typer.Option(help="Task on which every head is ablated; none leaves it out.")
]

Epsilon = Annotated[float, typer.Option(help="A key is a sink where its mean weight exceeds this.")]
CalibrationRule = Annotated[
    Rule,
    typer.Option(
        help="A key of one text is a calibration sink over 5 / length (paper) or over 0.1 (code)."
    ),
]

NEEDLE = "Your own needle"
Lengths = Annotated[
    str | None,
    typer.Option(help="Lengths of the prompts in tokens: 128,256. Quarters of the context where "
                 "not given."),
]  # fmt: skip
Depths = Annotated[
    str, typer.Option(help="Where the needle stands, from 0 (first) to 1 (last): 0,0.5,1.")
]
NeedlePrompts = Annotated[
    int, typer.Option(min=1, help="Built-in prompts at each length and depth.")
]
Haystack = Annotated[
    Path | None,
    typer.Option(help="A UTF-8 text to hide the needle in.", rich_help_panel=NEEDLE),
]
NeedleText = Annotated[
    str | None, typer.Option(help="The fact that is hidden.", rich_help_panel=NEEDLE)
]
Question = Annotated[
    str | None,
    typer.Option(
        help="What the prompt ends with; the answer should follow it.", rich_help_panel=NEEDLE
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(
        help="The part of the needle that a right answer repeats; all of it where not given.",
        rich_help_panel=NEEDLE,
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Repeat = Annotated[
    bool,
    typer.Option(
        "--repeat",
        help="Count each copy of a token, as the paper's published code does; else each token "
        "once.",
    ),
]

Trees = Annotated[Path, typer.Argument(help="Sentences with dependency trees, in CoNLL-U.")]
Sentences = Annotated[
    int | None, typer.Option(min=1, help="Read the first N sentences.", metavar="N")
]
Relations = Annotated[
    str | None,
    typer.Option(help="Relations by name: obj,det. All with --least arcs where not given."),
]
Least = Annotated[int, typer.Option(min=1, help="Fewest arcs of a relation.", metavar="N")]
Split = Annotated[
    bool,
    typer.Option(
        "--split", help="Choose heads on every other sentence and report them on the rest."
    ),
]

SWEEP = "How the work is done; the values do not depend on it"
SweepModel = Annotated[
    str | None,
    typer.Argument(help="A model folder with safetensors, or a hub name; not with --show."),
]
Store = Annotated[
    Path | None,
    typer.Option(help="Folder for the sweep: every value as soon as it is known, then results."),
]
Show = Annotated[
    Path | None,
    typer.Option(
        help="Draw the sweep in this folder, finished or not; no model is loaded. Its results go "
        "to --out where that is given too."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the sweep in --out; what is there is kept.")
]
SweepTaskAsked = Annotated[
    str,
    typer.Option(
        parser=_task,
        metavar="TASK|FILE",
        help=f"What the model is asked to do: {', '.join(SweepTask)}; or prompts of your own in "
        "FILE.csv or FILE.jsonl, with columns clean, corrupt, answer and wrong.",
    ),
]
SweepPrompts = Annotated[
    int,
    typer.Option(min=1, help="Prompts of the task; of a file all are taken.", metavar="N"),
]
SweepMode = Annotated[
    Mode,
    typer.Option(
        help="What takes the place of a head's output: zero; its mean over all positions, or at "
        "the same position, of the corrupt prompts; what it writes on the prompt's corrupt twin "
        "(resample); the mean of the values it sees (uniform); the value of the row's own token "
        "(identity); zero, while later heads attend as before (frozen)."
    ),
]
Metric = Annotated[
    MetricName | None, typer.Option(help="What the task is graded by; its own where not given.")
]
SweepBy = Annotated[
    By,
    typer.Option(
        help="What is ablated at a time: a head, all heads of a layer, two heads (and each by "
        "itself), a head at one position."
    ),
]
Seed = Annotated[int, typer.Option(help="Of prompts, random heads beside, and intervals.")]
PromptBatch = Annotated[
    int,
    typer.Option(
        min=1, help="Prompts whose clean run is kept at a time.", metavar="N", rich_help_panel=SWEEP
    ),
]
TokensAtOnce = Annotated[
    int,
    typer.Option(
        min=1,
        help="Positions in one forward at most, of all heads side by side. More is faster on a "
        "GPU; halved where memory runs out.",
        metavar="N",
        rich_help_panel=SWEEP,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Spread the work with Ray: local, or a cluster's address.",
        metavar="ADDRESS",
        rich_help_panel=SWEEP,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Models on the cluster; one a GPU, or one, where not given.",
        metavar="N",
        rich_help_panel=SWEEP,
    ),
]
Gpus = Annotated[
    float,
    typer.Option(
        min=0, help="Share of a GPU that each worker takes.", metavar="X", rich_help_panel=SWEEP
    ),
]

Methods = Annotated[
    str | None,
    typer.Option(
        help="Methods to judge, by name: attnlrp,input_gradient,rollout. All where not given; an "
        "unknown name lists them. Random scores are always judged too.",
        metavar="NAMES",
    ),
]
ErasedBy = Annotated[
    Erased,
    typer.Option(
        "--replacement",
        help="What stands in for an erased token: nothing, it is hidden by the attention mask "
        "(padding); the mean token embedding (mean); a token that says little (neutral).",
    ),
]
Neutral = Annotated[
    str | None,
    typer.Option(
        "--token",
        help="The token of --replacement neutral: a text, or an id: id:7. The tokenizer's mask or "
        "unknown token, or a space, where not given.",
        metavar="TOKEN",
    ),
]
Special = Annotated[
    bool, typer.Option("--special", help="Erase special tokens (start, separator) too.")
]
JudgeSeed = Annotated[
    int, typer.Option(help="Of prompts, random scores, equal scores and intervals.")
]
MethodBatch = Annotated[
    int, typer.Option(min=1, help="Prompts that a method scores at a time.", metavar="N")
]
