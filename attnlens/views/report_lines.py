"""Results in a sentence or two, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnlens.analyses.layer_similarity import LayerSimilarity
from attnlens.analyses.massive_activations import MassiveActivations
from attnlens.analyses.massive_qk import MassiveQK
from attnlens.analyses.ranks import HeadRanks
from attnlens.analyses.retrieval import RetrievalHeads
from attnlens.analyses.syntax import SyntaxHeads
from attnlens.anatomy import Head
from attnlens.views.narrative import NAMED, plural
from attnlens.views.panels import interval_text, number_text
from attnlens.views.theme import visible

RELATIONS = 6
"""So many relations are told of."""


def retrieval_lines(result: RetrievalHeads) -> tuple[str, ...]:
    """How well the model answered, and which heads copied."""
    runs = len(result.runs)
    recall = sum(run.recall for run in result.runs) / runs
    line = (
        f"Needles: {result.prompts} of {plural(runs, 'run')} count (recall over "
        f"{result.settings.recall:g}); mean recall {number_text(recall)}."
    )
    if not result.prompts:
        return (line, *result.notes[1:])
    weak, strong = sorted(result.settings.thresholds)
    lines = [line, _over("strong retrieval head", result, result.strong, strong)]
    if len(result.weak) > len(result.strong):
        more = [head for head in result.weak if head not in result.strong]
        lines.append(_over("weak retrieval head", result, more, weak))
    return tuple(lines)


def _over(name: str, result: RetrievalHeads, heads: Sequence[Head], threshold: float) -> str:
    """`2 strong retrieval heads (score over 0.5): L2H0 (0.80), L3H1 (0.70).`"""
    score = result["score"].mean.tolist()
    place = {head: i for i, head in enumerate(result.heads)}
    if not heads:
        best = max(result.heads, key=lambda head: score[place[head]])
        return (
            f"No {name}: none scores over {threshold:g} (best {best}, "
            f"{number_text(score[place[best]])})."
        )
    named = [f"{head} ({number_text(score[place[head]])})" for head in heads[:NAMED]]
    more = len(heads) - len(named)
    rest = f" and {more} more" if more else ""
    return f"{plural(len(heads), name)} (score over {threshold:g}): {', '.join(named)}{rest}."


def syntax_lines(syntax: SyntaxHeads) -> tuple[str, ...]:
    """The relations whose best heads are clearly better than any fixed offset."""
    records: list[dict[str, Any]] = syntax.to_frame().to_dict("records")
    better = [record for record in records if record["gain_low"] > 0]
    better.sort(key=lambda record: -record["gain"])
    names = len({record["relation"] for record in records})
    line = (
        f"Syntax: {plural(names, 'relation')} over {plural(syntax.sentences, 'sentence')}; in "
        f"{len(better)} of {len(records)} pairs of relation and direction the best head finds "
        "clearly more arcs than the best fixed offset."
    )
    return (line, *(_relation(record) for record in better[:RELATIONS]))


def _relation(record: dict[str, Any]) -> str:
    way = "to the head" if record["direction"] == "to_head" else "to the dependent"
    offset = f"{record['offset']:+d}".replace("-", "\u2212")
    return (
        f"{record['relation']}, {way}: {record['head']} finds {_percent(record['accuracy'])} of "
        f"{record['arcs']:,} arcs ({100 * record['accuracy_low']:.0f} to "
        f"{_percent(record['accuracy_high'])}); offset {offset} finds "
        f"{_percent(record['baseline'])}."
    )


def massive_lines(massive: MassiveActivations) -> tuple[str, ...]:
    """Whether there are massive activations, how large and where."""
    rule = f"over {massive.threshold:,g} and over {massive.ratio:,g} times the median"
    if not massive.found:
        ratio = (massive.top.mean[:, 0] / massive.median.mean).nan_to_num(0.0)
        most = int(ratio.argmax())
        line = (
            f"No massive activation: no residual coordinate is {rule} (at most "
            f"{number_text(float(massive.top.mean[most, 0]))}, "
            f"{float(ratio[most]):.0f} times the median, in {massive.streams[most]})."
        )
        return (line,)
    first = massive.found[0]
    channels = massive.by_channel()
    prompts = len({one.prompt for one in massive.found})
    token = f" ({visible(first.token)!r})" if first.token else ""
    line = (
        f"Massive activations: {plural(len(channels), 'channel')} in {prompts} of "
        f"{plural(massive.prompts, 'text')}; the largest is {number_text(first.value)} in channel "
        f"{first.channel} of stream {first.stream}, at position {first.position}{token}."
    )
    return (line,)


def qk_lines(massive: MassiveQK) -> tuple[str, ...]:
    """The largest channels of queries and keys, and how many are massive."""
    parts: list[str] = []
    counts: list[int] = []
    for side, noun in (("query", "queries"), ("key", "keys")):
        peak = massive[f"{side}_peak"].mean.nan_to_num(-1.0)
        best = int(peak.argmax())
        many = int((massive[f"{side}_massive"].mean.nan_to_num(0.0) > 0).sum())
        most = f"up to {number_text(float(peak[best]))} times the median channel"
        where = f"{noun} of {plural(many, 'head')}" if many else noun
        parts.append(f"{where} ({most}, {massive.heads[best]})")
        counts.append(many)
    if not any(counts):
        return (f"No massive channel in {' or '.join(parts)}.",)
    return (f"Massive channels in {' and '.join(parts)}.",)


def rank_lines(ranks: HeadRanks) -> tuple[str, ...]:
    """The ranks of the weights beside random ones."""
    named = (("qk_rank", "W_Q W_K^T", ranks.d_qk), ("ov_rank", "W_V W_O", ranks.d_v))
    parts: list[str] = []
    for number, (column, name, widths) in enumerate(named):
        mean = ranks[column].mean
        known = ~mean.isnan()
        if not bool(known.any()):
            continue
        wide = torch.tensor(widths)[known]
        least = int(mean.nan_to_num(torch.inf).argmin())
        width = f"{int(wide.min())}" + (
            "" if wide.min() == wide.max() else f" to {int(wide.max())}"
        )
        parts.append(
            f"{name} {number_text(float(mean[known].mean()))} of {width} (random matrices "
            f"{number_text(float(ranks.random[known, number].mean()))}; least "
            f"{number_text(float(mean[least]))}, {ranks.heads[least]})"
        )
    return (f"Effective ranks, mean over heads: {'; '.join(parts)}.",) if parts else ()


def layer_lines(layers: LayerSimilarity) -> tuple[str, ...]:
    """The two layers that are most alike, beside the baseline."""
    frame = layers.to_frame()
    column = "matched" if bool(frame["matched"].notna().any()) else "head_mean"
    records: list[dict[str, Any]] = frame.to_dict("records")
    best = max((r for r in records if r[column] == r[column]), key=lambda r: r[column])
    how = "head by head" if column == "matched" else "of head means"
    line = (
        f"Most alike are {best['site']} and {best['other']}: cosine {number_text(best[column])} "
        f"{how} ({interval_text(best, column)})"
    )
    base = best["unmatched"]
    known = column == "matched" and base == base
    return (f"{line}; heads not matched {number_text(base)}." if known else f"{line}.",)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
