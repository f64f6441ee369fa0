"""The commands about circuits; `app` registers them."""

from __future__ import annotations

import sys

import typer

from attnlens.cli import circuit_options as ask
from attnlens.cli import options as common
from attnlens.cli.asked import CircuitAsked, ModelAsked
from attnlens.cli.loading import loaded
from attnlens.errors import InputError

FINDING = ("method", "steps", "ablation", "top", "threshold", "greedy", "granularity", "order",
           "resume")  # fmt: skip
"""Options that say how a circuit is found."""


def circuit(
    given: typer.Context,
    model: ask.Model,
    out: ask.Out,
    task: common.SweepTaskAsked = common.SweepTask.REPEAT,
    method: ask.Method = ask.CircuitMethod.EAP_IG,
    prompts: ask.Prompts = 16,
    seed: ask.Seed = 0,
    steps: ask.Steps = 10,
    ablation: ask.Ablation = ask.Cut.RESAMPLE,
    metric: common.Metric = None,
    graph: ask.Graphs = "graphml,cyjs",
    evaluate: ask.Evaluate = None,
    batch_size: ask.PromptBatch = 8,
    top: ask.Top = None,
    threshold: ask.Threshold = None,
    greedy: ask.Greedy = False,
    granularity: ask.By = ask.Granularity.EDGES,
    order: ask.Order = None,
    resume: ask.Resume = False,
    tokenizer: common.Tokenizer = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Find the edges between heads and MLPs that a task needs, and say if they are enough.

    Scores every edge, keeps the largest, runs them alone on other prompts of
    the task, and draws them. The page is DIR/index.html, and DIR/circuit.json
    holds the circuit.

    Example: attnlens circuit MODEL --task ioi --out DIR
    """
    if evaluate is not None:
        _check_as_it_is(given)
    asked = CircuitAsked(
        task, prompts, seed, method.value, steps, ablation.value, metric and metric.value, top,
        threshold, greedy, granularity.value, order and order.value, resume, batch_size, graph,
        evaluate,
    )  # fmt: skip
    _check(asked)
    job = loaded("attnlens.cli.circuit_job")
    opened = ModelAsked(model, tokenizer, device, dtype)
    job.find_circuit(opened, asked, out, given.obj or sys.argv[1:])


def compare(first: ask.First, second: ask.Second, out: ask.CompareOut = None) -> None:
    """Say what two saved circuits of one model share, beside chance; no model is loaded.

    Example: attnlens compare ioi/circuit.json copy/circuit.json --out both
    """
    loaded("attnlens.cli.compare_job").compare_circuits(first, second, out)


def _check_as_it_is(given: typer.Context) -> None:
    """A saved circuit is run as it is: how to find one would be passed over in silence."""
    for name in FINDING:
        source = given.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(
                f"--evaluate runs a circuit as it is: leave --{name.replace('_', '-')} out."
            )


def _check(asked: CircuitAsked) -> None:
    """Raise InputError for options that do not go together."""
    removal, by_nodes = asked.method == "removal", asked.granularity == "nodes"
    if removal:
        if asked.greedy or by_nodes:
            option = "--greedy" if asked.greedy else "--granularity nodes"
            raise InputError(f"A removal decides of each edge itself: leave {option} out.")
        if asked.threshold is not None and not asked.threshold > 0:
            raise InputError(
                f"--threshold {asked.threshold:g}: give the share of the task that an edge must "
                "cost to stay, over 0."
            )
        return
    for given, option in ((asked.order, "--order"), (asked.resume, "--resume")):
        if given:
            raise InputError(f"{option} is of --method removal: give that too, or leave it out.")
    if asked.top is not None and asked.threshold is not None:
        raise InputError("Give --top or --threshold, not both: each says how many edges are kept.")
    if by_nodes and (asked.greedy or asked.threshold is not None):
        option = "--greedy" if asked.greedy else "--threshold"
        raise InputError(f"{option} chooses edges; nodes are chosen by --top.")
    if asked.threshold is not None and not asked.threshold >= 0:
        raise InputError(f"--threshold {asked.threshold:g}: sizes of scores are 0 or more.")
