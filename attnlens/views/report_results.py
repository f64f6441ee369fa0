"""Which part of a report each result makes: `part_of(result)`."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import pandas as pd

from attnlens.analyses.layer_similarity import LayerSimilarity
from attnlens.analyses.massive_activations import MassiveActivations
from attnlens.analyses.massive_qk import MassiveQK
from attnlens.analyses.ranks import HeadRanks
from attnlens.analyses.retrieval import RetrievalHeads
from attnlens.analyses.sinks import Sinks
from attnlens.analyses.syntax import SyntaxHeads
from attnlens.errors import InputError
from attnlens.views.grids import show_sink_positions
from attnlens.views.narrative import sink_line
from attnlens.views.report_lines import (
    layer_lines,
    massive_lines,
    qk_lines,
    rank_lines,
    retrieval_lines,
    syntax_lines,
)
from attnlens.views.report_parts import Drawn, Part, Table
from attnlens.views.shown import show

CELLS = "Each cell is a head: layers from top to bottom, heads from left to right."


@singledispatch
def part_of(result: Any, vocab: int | None = None) -> Part:
    """The part of a report that a result makes. Raises InputError for other results.

    `vocab`, the size of the model's vocabulary where it is known, tells what guessing would give.
    Parts of ablations take it.
    """
    raise InputError(f"There is no part of a report of a {type(result).__name__}.")


@part_of.register
def _(sinks: Sinks) -> Part:
    rule = "over 5 / length" if sinks.settings.rule == "paper" else "over 0.1"
    found = pd.DataFrame(
        [(str(s.head), s.prompt, s.position, s.token, s.share) for s in sinks.calibration],
        columns=["head", "text", "position", "token", "share"],
    )
    what = "keys that get far more than an even share of a head's attention in one text"
    if sinks.calibration_total > len(found):
        what += f" ({rule}), the largest {len(found)} of {sinks.calibration_total:,}"
    else:
        what += f" ({rule})"
    names = {
        "strongest": "strongest at", "strongest_mass": "mass there",
        "strongest_rate": "sink rate there", "strongest_token": "its token",
    }  # fmt: skip
    places = ("first_token", "sink_rate", "strongest", "strongest_token", "strongest_mass",
              "strongest_rate")  # fmt: skip
    return Part(
        title="Where attention gathers",
        lines=(sink_line(sinks),),
        prose=(
            "A sink is a key that draws attention whatever it says, most often the first token. "
            "The sink rate is the share of texts in which the key's mean weight, over the rows "
            f"that see it, exceeds {sinks.settings.epsilon}; a strongest sink is the position that "
            "gets most of a head's attention, counted over all rows. Positions count from 0."
        ),
        figures={
            "sinks": Drawn(show(sinks), CELLS),
            "sink-positions": Drawn(
                show_sink_positions(sinks),
                "Mean weight by position, from the rows that see the key. The last keys of a text "
                "are seen by few rows, which look at what is near: their means are high.",
            ),
        },
        tables={
            "sinks-by-layer": Table(
                sinks.by_layer(), "sinks by layer", ("site", *places), names,
                ("first_token", "sink_rate", "strongest_mass"),
            ),
            "sinks-by-head": Table(
                sinks.to_frame(), "sinks by head", ("head", *places), names,
                ("first_token", "sink_rate", "strongest_mass"),
            ),
            "sinks-by-position": Table(sinks.by_position(), "sinks by position", None),
            "calibration-sinks": Table(found, what, bars=("share",)),
        },
        notes=sinks.notes,
    )  # fmt: skip


@part_of.register
def _(result: RetrievalHeads) -> Part:
    weak, strong = sorted(result.settings.thresholds)
    frame = result.to_frame().sort_values("score", ascending=False, kind="stable")
    runs = pd.DataFrame(
        [
            (run.prompt.length, run.prompt.depth, len(run.prompt.ids), run.recall,
             run.recall > result.settings.recall, run.prompt.answer, run.text)
            for run in result.runs
        ],
        columns=["length", "depth", "tokens", "recall", "counts", "needle", "answer"],
    )  # fmt: skip
    share = "copies of it by the length of the needle" if result.settings.repeat else (
        "share of the needle's distinct tokens"
    )  # fmt: skip
    return Part(
        title="Retrieval heads",
        lines=retrieval_lines(result),
        prose=(
            "A needle stands in a text and is asked for. A head copies a token where, as the "
            "answer is written, its largest weight lies on that token inside the needle; its "
            f"score is the {share} that it copied, a mean over the runs that count: those whose "
            f"answer recalls more than {result.settings.recall:g} of the needle. Over {weak:g} a "
            f"head is a weak retrieval head, over {strong:g} a strong one (Wu et al. 2024)."
        ),
        figures={
            "retrieval": Drawn(
                show(result),
                (
                    "Left: the score of each head. "
                    if result.prompts
                    else "Left: no head has a score, since no run counts. "
                )
                + "Right: how much of the needle the answers hold.",
            )
        },
        tables={
            "retrieval-heads": Table(
                frame.reset_index(drop=True), "retrieval scores by head",
                ("head", "score", "score_low", "score_high", "active") if result.prompts else None,
                {"score_low": "from", "score_high": "to", "active": "copies in (share of runs)"},
                ("score",),
            ),
            "recall": Table(result.by_place(), "recall by length and depth", bars=("recall",)),
            "runs": Table(runs, "every run: what was asked for and what was answered",
                          bars=("recall",)),
        },
        notes=result.notes[1:] if result.prompts else (),  # the lines say the others
    )  # fmt: skip


@part_of.register
def _(syntax: SyntaxHeads) -> Part:
    headings = {
        "accuracy_low": "from", "accuracy_high": "to", "baseline": "offset's accuracy",
        "gain": "head over offset", "gain_low": "gain from", "gain_high": "gain to",
    }  # fmt: skip
    frame = syntax.to_frame()
    frame["direction"] = [str(name).replace("_", " ") for name in frame["direction"]]
    return Part(
        title="Heads that follow syntax",
        lines=syntax_lines(syntax),
        prose=(
            "For each word of a relation: is the word that a head looks at most, other than "
            "itself, the one that the tree joins it to? Direction to head: from a dependent to its "
            "head; to dependent: the other way. Beside each best head stands the best fixed "
            "offset, which always picks the word so many places after (+) or before. Clark et al. "
            "2019, section 4.2."
        ),
        figures={
            "syntax": Drawn(
                show(syntax), "Relations with most arcs first; lines are 95 % intervals."
            )
        },
        tables={
            "relations": Table(
                frame, "the best head and the best fixed offset of each relation",
                ("relation", "direction", "arcs", "head", "accuracy", "accuracy_low",
                 "accuracy_high", "offset", "baseline", "gain", "gain_low", "gain_high"),
                headings, ("accuracy", "baseline"),
            ),
            "relations-by-head": Table(
                syntax.all_heads(), "the accuracy of every head on every relation", None
            ),
        },
        notes=syntax.notes,
    )  # fmt: skip


@part_of.register
def _(massive: MassiveActivations) -> Part:
    return Part(
        title="Massive activations",
        lines=massive_lines(massive),
        prose=(
            "A few coordinates of the residual stream can be thousands of times the others, at few "
            "tokens and whatever the text; they go with attention sinks (Sun et al. 2024). A "
            f"coordinate counts as massive over {massive.threshold:,g} in size and over "
            f"{massive.ratio:,g} times the median of its text's stream."
        ),
        figures={
            "massive-activations": Drawn(
                show(massive), "The largest coordinates and the median of each stream."
            )
        },
        tables={
            "massive-activations": Table(massive.to_frame(), "magnitudes by stream", None),
            "massive-channels": Table(
                massive.by_channel(), "massive channels",
                ("channel", "first", "last", "prompts", "positions", "mean", "largest"),
                {"first": "first stream", "last": "last stream", "prompts": "texts"},
            ),
        },
        notes=massive.notes,
    )  # fmt: skip


@part_of.register
def _(massive: MassiveQK) -> Part:
    return Part(
        title="Channels of queries and keys",
        lines=qk_lines(massive),
        prose=(
            "How much larger than a head's median channel are the largest channels of its queries "
            "and keys? Under rotary embedding, large channels that turn slowly with the position "
            "carry content rather than place (Jin et al. 2025). A channel counts as massive from "
            f"{massive.threshold:g} times the median."
        ),
        figures={
            "massive-qk": Drawn(
                show(massive),
                "The layer with the largest ratio: each cell a channel, its norm over the median "
                "channel's of the head.",
            )
        },
        tables={
            "massive-qk": Table(massive.to_frame(), "queries and keys by head", None),
            "massive-qk-channels": Table(
                massive.channels(), "massive channels of queries and keys",
                ("head", "side", "channel", "ratio", "prompts", "wavelength"),
                {"prompts": "share of texts", "wavelength": "wavelength (tokens)"},
            ),
        },
        notes=massive.notes,
    )  # fmt: skip


@part_of.register
def _(ranks: HeadRanks) -> Part:
    return Part(
        title="Effective ranks",
        lines=rank_lines(ranks),
        prose=(
            "How many directions does a head really use to compare tokens (W_Q W_K^T) and to write "
            "(W_V W_O)? The exponential of the entropy of the singular values; norms and biases "
            "are left out."
        ),
        figures={"ranks": Drawn(show(ranks), CELLS)},
        tables={"ranks": Table(ranks.to_frame(), "effective ranks by head", None)},
        notes=ranks.notes,
    )


@part_of.register
def _(layers: LayerSimilarity) -> Part:
    rows = "all rows" if layers.rows_a_prompt is None else f"{layers.rows_a_prompt} rows a text"
    return Part(
        title="How alike the layers are",
        lines=layer_lines(layers),
        prose=(
            "The cosine of the attention maps of two layers, head by head, over "
            f"{rows} of {layers.prompts} text{'s' * (layers.prompts != 1)}. Heads that are not "
            "matched by number are the baseline: what all maps share is in it too."
        ),
        figures={
            "layer-similarity": Drawn(
                show(layers), "Left: all pairs of layers. Right: neighbours beside the baseline."
            )
        },
        tables={"layer-similarity": Table(layers.to_frame(), "cosines by pair of layers", None)},
        notes=layers.notes,
    )
