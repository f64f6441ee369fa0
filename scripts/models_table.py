"""Write docs/models.md: every tested architecture, how exact its rows are, and what is refused.

Run as `python -m scripts.models_table [NAME ...]`; with names it prints their lines only. Each
architecture is built small, with random weights, from transformers' own classes, and examined the
way a user's model is. Nothing is fetched.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

import attnlens as al
from attnlens.anatomy import Anatomy, Site
from attnlens.errors import AttnlensError, UnsupportedModelError
from attnlens.hooks import seam
from attnlens.hooks.backward import check_conservation
from attnlens.hooks.probe import examine, output_tensors
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session
from tests.architectures import ARCHITECTURES, PARTIAL, UNSUPPORTED, Architecture

TARGET = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEAD = """\
# Tested architectures

This file is made by `make docs` (`scripts/models_table.py`); do not edit it by hand. It was made
with transformers {transformers} and torch {torch}.

Each architecture is a real transformers class, built small from a config with random weights whose
attention is neither uniform nor one-hot (`tests/architectures`). attnlens finds its attention sites
by a probe run, then the rows that it recomputes from q and k are compared with the weights that the
model's own eager attention returns in the same run, on plain inputs and, where the model takes a
mask, on inputs padded on the left and on the right.

- **sites**: attention sites by stack; `8 -> 4` means 8 query heads share 4 key heads.
- **float64, float32**: the largest difference of a weight from the model's own eager weight, over
  all sites and inputs. 0 means bit for bit. Required: 1e-12 and 2e-6. `f32 softmax` marks models
  that take the softmax in float32 whatever their dtype; their rows follow them in that, and their
  float64 rows beside padding are left out where the model itself gives NaN. Streamed in blocks that
  leave out hidden keys, such a row can differ in the last place of float32 (2.4e-7).
- **idle**: whether the model's output is bit for bit unchanged with the instrument attached and
  nothing asked.
- **output**: sites whose output projection was found, so that `result`, the output of one head, is
  defined. Elsewhere a gate or a norm stands between; `z` and all statistics work there too.
- **weights**: sites whose W_Q, W_K, W_V and W_O are found head by head (`lens.weights`). Elsewhere
  q, k or v is put together from several parts (latent attention) or transformed in between.
- **relevance**: the conservation check of relevance propagation in float32: the largest share of
  what was explained that its ledger does not account for. Required: 1e-4. Elsewhere the module that
  makes or loses relevance is named, and `al.attnlrp`, `al.cp_lrp` and `al.chefer_lrp` refuse the
  model.
"""
REFUSED = """\

# What is refused

A model is refused with an error that says why, never shown in part without a word.

| family | what happens | reason |
|---|---|---|
"""
OTHERS = (
    (
        "deepseek_v32, glm_moe_dsa and others with a sparse indexer",
        "refused when examined",
        "keys are picked outside the attention mask, by code that looks at the kernel's name",
    ),
    (
        "any model on a flash or flex kernel",
        "refused when examined",
        "their masks are no tensors of rows and keys; load with attn_implementation='sdpa'",
    ),
    (
        "TransformerLens' TransformerBridge",
        "refused",
        "it replaces the attention modules; open the transformers model before it is bridged",
    ),
    (
        "models with code of their own (`trust_remote_code`)",
        "refused",
        "attnlens runs no code from a model folder; load it yourself and give `al.load(model)`",
    ),
    (
        "checkpoints as pickle only",
        "refused",
        "a pickle can run any code; convert it to safetensors",
    ),
)


class Recorder(Observer):
    """Observer that compares each site's rows with the weights that its kernel returned."""

    def __init__(self, sites: tuple[Site, ...]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.error = 0.0

    def see(self, site: Site, call: Call) -> Call:
        rows = Rows.at(site, call).dense()
        assert call.weights is not None
        blind = rows.sum(-1, keepdim=True) == 0
        error = float((rows - call.weights).masked_fill(blind, 0).abs().max())
        self.error = max(self.error, error) if error == error else float("nan")
        return call


@dataclass(frozen=True)
class Line:
    """One architecture of the table."""

    name: str
    kind: str
    sites: str
    double: str
    single: str
    idle: bool
    output: str
    weights: str
    relevance: str
    notes: str

    def __str__(self) -> str:
        cells = [self.name, self.kind, self.sites, self.double, self.single]
        cells += ["unchanged" if self.idle else "CHANGED", self.output, self.weights]
        cells += [self.relevance, self.notes]
        return "| " + " | ".join(cells) + " |"


def describe(architecture: Architecture) -> Line:
    """Build, examine and check one architecture."""
    model: Any = architecture.build()
    inputs = architecture.inputs(model)
    anatomy = examine(model, inputs)
    outputs = sum(site.output is not None for site in anatomy.sites)
    modules = _with_weights(model, inputs)
    found = sum(site.module in modules for site in anatomy.sites)
    idle = _idle(model, anatomy, inputs)
    single = _error(model, anatomy, architecture)
    kept = check_conservation(model, anatomy, inputs)
    upcast = any(site.upcast for site in anatomy.sites)
    double = _error(model.double(), anatomy, architecture) if architecture.float64 else None
    return Line(
        architecture.name,
        architecture.kind,
        _sites(anatomy),
        "-" if double is None else _number(double) + (" (f32 softmax)" if upcast else ""),
        _number(single),
        idle,
        _share(outputs, len(anatomy.sites)),
        _share(found, len(anatomy.sites)),
        _number(kept.error) if kept.closes else f"refused: {kept.module}",
        architecture.notes.replace("|", "\\|"),
    )


def _cases(architecture: Architecture, model: Any) -> Iterator[Mapping[str, Tensor]]:
    yield architecture.inputs(model)
    if architecture.padded is not None:
        yield architecture.padded(model, "left")
        yield architecture.padded(model, "right")


def _error(model: nn.Module, anatomy: Anatomy, architecture: Architecture) -> float:
    """Largest error over all inputs; a padded input that is NaN in the model itself is left out."""
    errors: list[float] = []
    for inputs in _cases(architecture, model):
        recorder = Recorder(anatomy.sites)
        with torch.no_grad(), seam.kernel(model, "eager"), Session(model, anatomy, [recorder]):
            model(**inputs)
        errors.append(recorder.error)
    usable = [error for error in errors if error == error]
    if errors[0] != errors[0]:
        raise AssertionError(f"{architecture.name} is NaN without padding")
    return max(usable)


def _idle(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> bool:
    with torch.no_grad():
        plain = output_tensors(model(**inputs))
        with Session(model, anatomy, []):
            idle = output_tensors(model(**inputs))
    pairs = zip(plain, idle, strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _with_weights(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """Modules whose weights `lens.weights` gives, with its own example or with these inputs."""
    found: set[str] = set()
    for example in (None, inputs):
        try:
            lens = al.Lens(model, example=example)
        except UnsupportedModelError:
            continue
        for site in lens.anatomy.sites:
            weights = lens.weights(site.name)
            try:
                assert len(weights.query) == len(weights.output) == site.heads
                assert len(weights.key) == len(weights.value) == site.groups
            except UnsupportedModelError:
                continue
            found.add(site.module)
    return found


def _sites(anatomy: Anatomy) -> str:
    """`2 x 4 -> 2 heads`, stack by stack."""
    parts: list[str] = []
    for stack in anatomy.stacks:
        sites = [site for site in anatomy.sites if site.stack == stack]
        shapes = {(site.heads, site.groups) for site in sites}
        heads = ", ".join(f"{h} -> {g}" if h != g else str(h) for h, g in sorted(shapes))
        extras = ["window"] if any(site.window for site in sites) else []
        extras += ["sinks"] if any(site.sinks for site in sites) else []
        extra = f" ({', '.join(extras)})" if extras else ""
        parts.append(f"{stack + ' ' if stack else ''}{len(sites)} x {heads}{extra}")
    return "; ".join(parts)


def _number(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"


def _share(found: int, of: int) -> str:
    return "all" if found == of else f"{found} of {of}" if found else "none"


def _in_part() -> list[tuple[str, Architecture]]:
    """The architectures of which the instrument sees a part only."""
    found: list[tuple[str, Architecture]] = []
    for name, architecture in PARTIAL.items():
        model: Any = architecture.build()
        if examine(model, architecture.inputs(model)).unseen:
            found.append((name, architecture))
    return found


def refusals() -> Iterator[str]:
    """What happens to the models whose attention is not on the interface, or only in part."""
    for name, build in UNSUPPORTED.items():
        yield _refusal(name, build, lambda _: {"input_ids": torch.arange(4, 20)[None]})
    for name, architecture in _in_part():
        yield _refusal(name, architecture.build, architecture.inputs, architecture.notes)
    for cells in OTHERS:
        yield "| " + " | ".join(cells) + " |"


def _refusal(
    name: str, build: Callable[[], Any], inputs: Callable[[Any], Any], why: str = ""
) -> str:
    model = build()
    try:
        lens = al.Lens(model, example=inputs(model))
    except AttnlensError as error:
        reason = why or "its attention does not call transformers' attention interface"
        return f"| {name} | refused ({type(error).__name__}) | {reason} |"
    if not lens.anatomy.unseen:
        raise AssertionError(f"{name} is neither refused nor reported in part")
    seen = _sites(lens.anatomy)
    return f"| {name} | sites on the interface only ({seen}); the others are listed | {why} |"


def table(names: list[str]) -> Iterator[str]:
    """The lines of the table."""
    columns = ("architecture", "kind", "sites", "float64", "float32", "idle", "output", "weights")
    columns = (*columns, "relevance", "notes")
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for name in names:
        yield str(describe(ARCHITECTURES[name]))


def main(names: list[str]) -> None:
    logging.set_verbosity(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if names:
        print("\n".join(table(names)))
        return
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__)
    lines = list(table(list(ARCHITECTURES)))
    count = f"{len(ARCHITECTURES)} architectures:"
    text = "\n".join([head, count, "", *lines, REFUSED.rstrip("\n"), *refusals()]) + "\n"
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET}: {len(ARCHITECTURES)} architectures")


if __name__ == "__main__":
    main(sys.argv[1:])
