"""The command `patch`; `app` registers it."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from attnlens.cli import options as ask
from attnlens.cli.asked import ModelAsked, PatchAsked
from attnlens.cli.loading import loaded
from attnlens.errors import InputError


class Patched(StrEnum):
    """What is patched; the names of `sweeps.patches.Kind`."""

    Q = "q"
    K = "k"
    V = "v"
    Z = "z"
    PATTERN = "pattern"
    RESIDUAL = "residual"
    MLP = "mlp"


class Direction(StrEnum):
    """Which run is patched."""

    DENOISE = "denoise"
    NOISE = "noise"


Kind = Annotated[
    Patched,
    typer.Option(
        help="What a run is given of its twin: of each head q, k, v, z (its output) or pattern; "
        "of each layer the stream that enters it (residual) or what its MLP writes (mlp)."
    ),
]
Towards = Annotated[
    Direction,
    typer.Option(
        help="denoise: the corrupt prompt is given what the clean one has, so what is enough is "
        "seen; noise: the other way round, so what is needed is seen."
    ),
]
Positions = Annotated[
    str | None,
    typer.Option(
        help="each position by itself, or some: 0,5,-1. All together where not given.",
        metavar="each|NUMBERS",
    ),
]
Places = Annotated[
    str | None,
    typer.Option(help='Heads to patch: "L3", "L2:", "L3H5,L4H0"; or layers. All where not given.'),
]
Store = Annotated[
    Path,
    typer.Option(help="Folder for the sweep: every value as soon as it is known, then results."),
]
Model = Annotated[str, typer.Argument(help="A model folder with safetensors, or a hub name.")]


def patch(
    given: typer.Context,
    model: Model,
    out: Store,
    task: ask.SweepTaskAsked = ask.SweepTask.REPEAT,
    kind: Kind = Patched.Z,
    direction: Towards = Direction.DENOISE,
    positions: Positions = None,
    places: Places = None,
    metric: ask.Metric = None,
    prompts: ask.SweepPrompts = 16,
    seed: ask.Seed = 0,
    resume: ask.Resume = False,
    batch_size: ask.PromptBatch = 16,
    tokens: ask.TokensAtOnce = 1024,
    ray: ask.Ray = None,
    workers: ask.Workers = None,
    gpus: ask.Gpus = 0.0,
    tokenizer: ask.Tokenizer = None,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
) -> None:
    """Give a run what its twin had at one place, and see how much of the task comes along.

    Every value is kept in DIR as soon as it is known: the same command with
    --resume goes on after a stop, and attnlens ablate --show DIR draws what is
    there. The page is DIR/results/index.html.

    Example: attnlens patch MODEL --task ioi --kind z --positions each --out DIR
    """
    asked = PatchAsked(
        task, prompts, seed, places or "", "places", "", metric and metric.value, resume,
        batch_size, tokens, ray, workers, gpus, kind.value, direction.value,
        _where(positions),
    )  # fmt: skip
    opened = ModelAsked(model, tokenizer, device, dtype)
    loaded().find_ablation(opened, asked, out, given.obj or sys.argv[1:])


def _where(given: str | None) -> tuple[int, ...] | Literal["each"] | None:
    if given is None or given == "each":
        return given
    try:
        return tuple(int(number) for number in given.split(","))
    except ValueError:
        raise InputError(
            f"--positions {given!r}: write each, or numbers with commas: 0,5,-1."
        ) from None
