"""The commands. Each opens a model, hands over to the main job or the doctor, and prints."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from attnlens import __version__
from attnlens.errors import AttnlensError

app = typer.Typer(
    name="attnlens",
    help="Read, measure and edit the attention of pretrained transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class TaskName(StrEnum):
    """Tasks on which heads are ablated."""

    REPEAT = "repeat"
    IOI = "ioi"
    KEY_VALUE = "key-value"
    NEEDLE = "needle"
    NONE = "none"


class Mode(StrEnum):
    """What becomes of an ablated head."""

    ZERO = "zero"
    MEAN = "mean"
    UNIFORM = "uniform"


Model = Annotated[str, typer.Argument(help="A model folder with safetensors, or a hub name.")]
Out = Annotated[Path, typer.Option(help="Folder for the report; made if it is not there.")]
File = Annotated[
    Path | None,
    typer.Option(
        help="A UTF-8 text for the model to read; several texts separated by <|endoftext|>. "
        "A built-in text where not given."
    ),
]
Cut = Annotated[bool, typer.Option("--cut", help="Read texts over the context in pieces.")]
Prompts = Annotated[int, typer.Option(min=2, help="Prompts of the task.")]
Ablate = Annotated[
    Mode,
    typer.Option(help="Put zero, the head's mean output, or evenly spread attention in its place."),
]
Heads = Annotated[
    str, typer.Option(help='Heads to ablate: "all", "L3", "L2:", "L3H5,L4H0", "dec.L1H2".')
]
Budget = Annotated[
    str, typer.Option(help="Memory for the attention maps of the prompt; refused over it.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16; the checkpoint's where not given.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="A folder or hub name, where the model has no tokenizer beside it."),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnlens {__version__}")
        raise typer.Exit


def _commands() -> Any:
    """The module that does the work, loaded only when there is work: it takes seconds."""
    from attnlens.cli.progress import progress

    with progress() as steps, steps("Loading torch and transformers"):
        return import_module("attnlens.cli.commands")


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(out: Out, prompts: Prompts = 16, ablate: Ablate = Mode.ZERO) -> None:
    """Profile the small language model that ships with attnlens: under a minute on one core."""
    from attnlens.cli.passages import PLAY
    from attnlens.zoo.trained import small_path

    report = _commands().report
    name = "attnlens' small model"
    report(str(small_path()), out, name=name, texts=PLAY, prompts=prompts, mode=ablate.value)


@app.command()
def profile(
    model: Model,
    out: Out,
    file: File = None,
    task: Annotated[
        TaskName, typer.Option(help="Task on which every head is ablated; none leaves it out.")
    ] = TaskName.REPEAT,
    prompts: Prompts = 16,
    ablate: Ablate = Mode.ZERO,
    heads: Heads = "all",
    budget: Budget = "2GB",
    cut: Cut = False,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Say what every head of a model does and which heads matter, as a page, tables and figures.

    Checks the instrument, profiles every head, finds sinks and known head types, rolls attention
    out over one prompt and ablates every head on a task.
    """
    _commands().report(
        model, out, file=file, task=task.value, prompts=prompts, mode=ablate.value, heads=heads,
        budget=budget, cut=cut,
        tokenizer=tokenizer, device=device, dtype=dtype,
    )  # fmt: skip


@app.command()
def doctor(
    model: Model,
    file: File = None,
    cut: Cut = False,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Check that attnlens sees a model exactly, and name its clearest heads. Exit code 0 or 1."""
    sound = _commands().diagnose(
        model, file=file, cut=cut, tokenizer=tokenizer, device=device, dtype=dtype
    )
    raise typer.Exit(0 if sound else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for an error that the user can mend."""
    try:
        app(None if arguments is None else list(arguments), prog_name="attnlens")
    except AttnlensError as error:
        typer.echo(f"attnlens: {error}", err=True)
        return 2
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code == 130:
            typer.echo("attnlens: interrupted; nothing was written.", err=True)
        return code
    return 0
