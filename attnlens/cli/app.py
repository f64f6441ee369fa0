"""The commands. Each hands what was asked for to the module that does the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from attnlens import __version__
from attnlens.cli import circuit_commands, patch_command
from attnlens.cli import explaining as explain
from attnlens.cli import options as ask
from attnlens.cli.asked import (
    JudgedAsked,
    ModelAsked,
    NeedleAsked,
    PathsAsked,
    ScoresAsked,
    StoppedError,
    SweepAsked,
    TextsAsked,
    TreesAsked,
)
from attnlens.cli.loading import loaded
from attnlens.cli.prompt import read_prompt
from attnlens.errors import AttnlensError, InputError

app = typer.Typer(
    name="attnlens",
    help="Read, measure and edit the attention of pretrained transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnlens {__version__}")
        raise typer.Exit


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
def demo(out: ask.Out, prompts: ask.Prompts = 16, ablate: ask.Ablate = ask.Mode.ZERO) -> None:
    """Profile the small language model that ships with attnlens: under a minute on one core."""
    from attnlens.cli.passages import PLAY
    from attnlens.zoo.trained import small_path

    asked = ModelAsked(str(small_path()), name="attnlens' small model")
    loaded().report(asked, TextsAsked(), out, built_in=PLAY, prompts=prompts, mode=ablate.value)


@app.command()
def profile(
    model: ask.Model,
    out: ask.Out,
    task: ask.Task = ask.TaskName.REPEAT,
    prompts: ask.Prompts = 16,
    ablate: ask.Ablate = ask.Mode.ZERO,
    heads: ask.Heads = "all",
    budget: ask.Budget = "2GB",
    file: ask.File = None,
    lines: ask.Lines = False,
    column: ask.Column = None,
    limit: ask.Limit = None,
    max_tokens: ask.MaxTokens = None,
    cut: ask.Cut = False,
    batch_size: ask.BatchSize = 8,
    state: ask.State = None,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Say what every head of a model does and which heads matter, as a page, tables and figures.

    Checks the instrument, profiles every head, finds sinks, known head types, massive values,
    effective ranks and retrieval heads, rolls attention out over one prompt and ablates every head
    on a task.
    """
    texts = TextsAsked(file, lines, column, cut, max_tokens, limit, state, batch_size)
    loaded().report(
        ModelAsked(model, tokenizer, device, dtype), texts, out,
        task=task.value, prompts=prompts, mode=ablate.value, heads=heads, budget=budget,
    )  # fmt: skip


@app.command()
def ablate(
    given: typer.Context,
    model: ask.SweepModel = None,
    out: ask.Store = None,
    task: ask.SweepTaskAsked = ask.SweepTask.REPEAT,
    heads: ask.Heads = "all",
    by: ask.SweepBy = ask.By.HEADS,
    mode: ask.SweepMode = ask.Mode.ZERO,
    metric: ask.Metric = None,
    prompts: ask.SweepPrompts = 16,
    seed: ask.Seed = 0,
    resume: ask.Resume = False,
    show: ask.Show = None,
    batch_size: ask.PromptBatch = 16,
    tokens: ask.TokensAtOnce = 1024,
    ray: ask.Ray = None,
    workers: ask.Workers = None,
    gpus: ask.Gpus = 0.0,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Say which heads a task needs: ablate each by itself, beside random heads of its layer.

    Every value is kept in DIR as soon as it is known: the same command with --resume goes on after
    a stop, and --show DIR draws what is there. The page is DIR/results/index.html.

    Example: attnlens ablate MODEL --task ioi --out DIR
    """
    if show is not None:
        _check_show_alone(given)
        return loaded("attnlens.cli.ablate_show").show_sweep(show, out)
    if model is None:
        raise InputError("Give a MODEL to ablate, or --show DIR to draw a sweep that is there.")
    if out is None:
        raise InputError("Give --out DIR: every value is kept there as soon as it is known.")
    asked = SweepAsked(
        task, prompts, seed, heads, by.value, mode.value, metric and metric.value, resume,
        batch_size, tokens, ray, workers, gpus,
    )  # fmt: skip
    opened = ModelAsked(model, tokenizer, device, dtype)
    return loaded().find_ablation(opened, asked, out, given.obj or sys.argv[1:])


def _check_show_alone(given: typer.Context) -> None:
    """A stored sweep is shown as it is: what else was asked for would be passed over in silence."""
    for name in given.params:
        source = given.get_parameter_source(name)
        if name in ("show", "out") or source is None or source.name != "COMMANDLINE":
            continue
        shown = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        raise InputError(f"--show draws a sweep as it is stored: leave {shown} out.")


@app.command()
def sinks(
    model: ask.Model,
    file: ask.Corpus,
    out: ask.Out,
    epsilon: ask.Epsilon = 0.3,
    rule: ask.CalibrationRule = ask.Rule.PAPER,
    lines: ask.Lines = False,
    column: ask.Column = None,
    limit: ask.Limit = None,
    max_tokens: ask.MaxTokens = None,
    cut: ask.Cut = False,
    batch_size: ask.BatchSize = 8,
    state: ask.State = None,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Find where attention gathers over a corpus of any size: by head, layer, position and token.

    Example: attnlens sinks MODEL --file corpus.parquet --column text --limit 10000 --out sinks-out
    """
    texts = TextsAsked(file, lines, column, cut, max_tokens, limit, state, batch_size)
    loaded().find_sinks(
        ModelAsked(model, tokenizer, device, dtype), texts, out, epsilon, rule.value
    )


@app.command()
def retrieval(
    model: ask.Model,
    out: ask.Out,
    lengths: ask.Lengths = None,
    depths: ask.Depths = "0,0.25,0.5,0.75,1",
    prompts: ask.NeedlePrompts = 2,
    steps: ask.Steps = 50,
    repeat: ask.Repeat = False,
    batch_size: ask.NeedleBatch = 8,
    haystack: ask.Haystack = None,
    needle: ask.NeedleText = None,
    question: ask.Question = None,
    answer: ask.Answer = None,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Find the heads that copy a fact out of a long text, and how well the model answers.

    Hides built-in secret words, or your own needle, at each length and depth and asks for them.

    Example: attnlens retrieval MODEL --lengths 128,256 --depths 0,0.5,1 --out retrieval-out
    """
    asked = NeedleAsked(
        lengths, depths, prompts, steps, repeat, batch_size, haystack, needle, question, answer
    )
    loaded().find_retrieval(ModelAsked(model, tokenizer, device, dtype), asked, out)


@app.command()
def syntax(
    model: ask.Model,
    trees: ask.Trees,
    out: ask.Out,
    limit: ask.Sentences = None,
    relations: ask.Relations = None,
    least: ask.Least = 50,
    split: ask.Split = False,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Find the heads that follow syntax, beside the best fixed offset of each relation.

    Example: attnlens syntax MODEL trees.conllu --relations obj,det --out syntax-out
    """
    asked = TreesAsked(trees, limit, relations, least, split)
    loaded().find_syntax(ModelAsked(model, tokenizer, device, dtype), asked, out)


@app.command()
def attribute(
    model: ask.Model,
    text: explain.Prompt = None,
    target: explain.TargetToken = None,
    against: explain.AgainstToken = None,
    at: explain.At = -1,
    method: explain.Method = "attnlrp",
    top: explain.Top = 15,
    out: explain.ScoresOut = None,
    settings: explain.Settings = None,
    file: explain.PromptFile = None,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Say which tokens of a text make the model expect the next one.

    Example: attnlens attribute MODEL "Ann met Ben. Ben saw" --target " Ann" --against " Ben"
    """
    asked = ScoresAsked(
        read_prompt(text, file), method, target, against, at, tuple(settings or ()), top, out
    )
    job = loaded("attnlens.cli.attribute_job")
    job.explain(ModelAsked(model, tokenizer, device, dtype), asked)


@app.command()
def flow(
    model: ask.Model,
    text: explain.Prompt = None,
    target: explain.TargetPosition = -1,
    source: explain.SourcePosition = None,
    method: explain.FlowBy = explain.FlowMethod.ATTENTION_FLOW,
    threshold: explain.FlowThreshold = 0.01,
    top: explain.Top = 15,
    out: explain.GraphOut = None,
    file: explain.PromptFile = None,
    stack: explain.Stack = None,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Follow attention from one position down to the tokens that it can draw from.

    Example: attnlens flow MODEL "Ann met Ben. Ben saw" --out flow.gexf
    """
    asked = PathsAsked(
        read_prompt(text, file), method.value, target, threshold, top, out, source, stack
    )
    loaded("attnlens.cli.flow_job").follow(ModelAsked(model, tokenizer, device, dtype), asked)


@app.command()
def routes(
    model: ask.Model,
    text: explain.Prompt = None,
    target: explain.TargetPosition = -1,
    threshold: explain.RouteThreshold = 0.04,
    top: explain.Top = 15,
    out: explain.GraphOut = None,
    file: explain.PromptFile = None,
    stack: explain.Stack = None,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Trace what one position becomes back to the heads, MLPs and tokens that it is made of.

    Example: attnlens routes MODEL "Ann met Ben. Ben saw" --threshold 0.02 --out routes.json
    """
    asked = PathsAsked(read_prompt(text, file), "routes", target, threshold, top, out, stack=stack)
    loaded("attnlens.cli.flow_job").follow(ModelAsked(model, tokenizer, device, dtype), asked)


@app.command()
def faithfulness(
    model: ask.Model,
    out: ask.Out,
    task: ask.SweepTaskAsked = ask.SweepTask.REPEAT,
    methods: ask.Methods = None,
    replacement: ask.ErasedBy = ask.Erased.PADDING,
    token: ask.Neutral = None,
    special: ask.Special = False,
    prompts: ask.SweepPrompts = 16,
    seed: ask.JudgeSeed = 0,
    batch_size: ask.MethodBatch = 8,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Say which attribution method to believe: erase tokens and see whose scores foretold it.

    Every method scores the tokens of each prompt for the right answer against the wrong one.
    The scores are held against leave-one-out and the gradient, tokens are deleted in their
    order, and all of it stands beside random scores.

    Example: attnlens faithfulness MODEL --task ioi --methods attnlrp,rollout --out judged
    """
    asked = JudgedAsked(task, methods, replacement.value, token, special, prompts, seed, batch_size)
    job = loaded("attnlens.cli.faithfulness_job")
    job.judge(ModelAsked(model, tokenizer, device, dtype), asked, out)


app.command()(patch_command.patch)
app.command()(circuit_commands.circuit)
app.command()(circuit_commands.compare)


@app.command()
def doctor(
    model: ask.Model,
    file: ask.File = None,
    lines: ask.Lines = False,
    column: ask.Column = None,
    limit: ask.Limit = None,
    max_tokens: ask.MaxTokens = None,
    cut: ask.Cut = False,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Check that attnlens sees a model exactly, and name its clearest heads. Exit code 0 or 1."""
    texts = TextsAsked(file, lines, column, cut, max_tokens, limit)
    sound = loaded().diagnose(ModelAsked(model, tokenizer, device, dtype), texts)
    raise typer.Exit(0 if sound else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for an error that the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(words, prog_name="attnlens", obj=words)
    except StoppedError as left:
        typer.echo(f"attnlens: interrupted; {left}", err=True)
        return 130
    except AttnlensError as error:
        typer.echo("\n".join([f"attnlens: {error}", *getattr(error, "__notes__", ())]), err=True)
        return 2
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code == 130:
            typer.echo("attnlens: interrupted; nothing was written.", err=True)
        return code
    return 0
