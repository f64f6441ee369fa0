"""What a person asks for on the command line, as plain values: nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class StoppedError(Exception):
    """Ctrl-C where something is kept; its text says what, and how to go on."""


@dataclass(frozen=True)
class ModelAsked:
    """Which model, and how it is opened."""

    model: str
    tokenizer: str | None = None
    device: str | None = None
    dtype: str | None = None
    name: str | None = None
    """What to call it; the folder's own name, or the hub's, where None."""

    @property
    def title(self) -> str:
        """What pages and steps call the model."""
        path = Path(self.model).expanduser()
        return self.name or (path.resolve().name if path.is_dir() else self.model)


@dataclass(frozen=True)
class TextsAsked:
    """Which texts, and how they are read.

    Attributes:
        file: where the texts are; built-in ones where None.
        lines: one text a line.
        column: the column of a table; read as a table where the file is one, too.
        cut: read texts over the context in pieces.
        max_tokens: read the first so many tokens of each text.
        limit: read the first so many texts.
        state: where to save what was counted, to go on from.
        batch_size: texts that run together.

    """

    file: Path | None = None
    lines: bool = False
    column: str | None = None
    cut: bool = False
    max_tokens: int | None = None
    limit: int | None = None
    state: Path | None = None
    batch_size: int = 8

    @property
    def streamed(self) -> bool:
        """Whether texts come one by one from a source of any length."""
        if self.file is None:
            return False
        return bool(
            self.lines or self.column or self.file.is_dir() or self.file.suffix == ".parquet"
        )

    def state_of(self, method: str) -> Path | None:
        """Where one of several methods that read the same texts saves what it counted."""
        return None if self.state is None else self.state.with_name(f"{self.state.name}.{method}")


@dataclass(frozen=True)
class NeedleAsked:
    """Which needles, where they stand, and how answers are graded."""

    lengths: str | None
    depths: str
    prompts: int
    steps: int
    repeat: bool
    batch_size: int
    haystack: Path | None
    needle: str | None
    question: str | None
    answer: str | None


@dataclass(frozen=True)
class TreesAsked:
    """Which sentences and relations."""

    file: Path
    limit: int | None
    relations: str | None
    least: int
    split: bool


@dataclass(frozen=True)
class SweepAsked:
    """What is ablated, on what, and how the work is spread.

    Attributes:
        by: heads, layers, pairs or positions.
        resume: go on with the sweep in the folder.
        batch_size, tokens, ray, workers, gpus: as in `SweepSettings`.

    """

    task: str
    prompts: int
    seed: int
    heads: str
    by: str
    mode: str
    metric: str | None
    resume: bool
    batch_size: int
    tokens: int
    ray: str | None
    workers: int | None
    gpus: float


@dataclass(frozen=True)
class PatchAsked(SweepAsked):
    """What is patched, on what, and how the work is spread; `heads` "" for all places.

    Attributes:
        kind, direction: as in `al.patch`.
        positions: each by itself, or some; all together where None.

    """

    kind: str
    direction: str
    positions: tuple[int, ...] | Literal["each"] | None


@dataclass(frozen=True)
class ScoresAsked:
    """What is explained of one text, and how.

    Attributes:
        target, against: tokens as they are written, or `id:262`; the likeliest where None.
        at: the position whose next token is explained.
        settings: of the method, as `name=value`.
        top: so many tokens are printed.

    """

    text: str
    method: str
    target: str | None
    against: str | None
    at: int
    settings: tuple[str, ...]
    top: int
    out: Path | None


@dataclass(frozen=True)
class PathsAsked:
    """Which paths to one position of a text are traced, and where their graph goes.

    Attributes:
        method: attention_flow, rollout or routes.
        target: the position.
        threshold: weaker edges are left out.
        top: so many sources are printed.
        source: the position whose paths the graph holds; the method's own choice where None.
        stack: the stack of a model that has several.

    """

    text: str
    method: str
    target: int
    threshold: float
    top: int
    out: Path | None
    source: int | None = None
    stack: str | None = None


@dataclass(frozen=True)
class JudgedAsked:
    """Which methods are judged, on what, and what stands in for an erased token.

    Attributes:
        methods: names separated by commas; all where None.
        token: of the replacement "neutral", as it is written, or `id:262`.

    """

    task: str
    methods: str | None
    replacement: str
    token: str | None
    special: bool
    prompts: int
    seed: int
    batch_size: int


@dataclass(frozen=True)
class CircuitAsked:
    """Which circuit is looked for, or evaluated, and how.

    Attributes:
        method: eap-ig, eap, exact or removal.
        top: so many edges, or nodes; of a removal so many it begins with. The rule's own where
            None, and no threshold.
        threshold: the least size of a score; of a removal the share of the task an edge may cost.
        order: how a removal visits edges.
        resume: go on with the removal in the folder.
        graphs: suffixes of the graph's files, separated by commas.
        evaluate: a saved circuit that is run in place of finding one.

    """

    task: str
    prompts: int
    seed: int
    method: str
    steps: int
    ablation: str
    metric: str | None
    top: int | None
    threshold: float | None
    greedy: bool
    granularity: str
    order: str | None
    resume: bool
    batch_size: int
    graphs: str
    evaluate: Path | None
