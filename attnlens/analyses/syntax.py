"""Heads that follow syntax: their largest weight goes from a word to its head, or the other way.

Clark et al. 2019, What does BERT look at? An analysis of BERT's attention, section 4.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlens.analyses.per_head import head_frame
from attnlens.analyses.uncertainty import Interval, bootstrap_ratio, check_bootstrap
from attnlens.analyses.words import (
    KeyPieces,
    LargestWord,
    Progress,
    WordTokens,
    arcs_of,
    check_key_pieces,
    measure_words,
    read_sentences,
)
from attnlens.anatomy import Head, HeadSpec
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.tasks import Sentence

Direction = Literal["to_head", "to_dependent"]
DIRECTIONS: tuple[Direction, ...] = ("to_head", "to_dependent")


@dataclass(frozen=True)
class SyntaxSettings:
    """What changes the answer.

    Attributes:
        layers: the layers to measure; all where None.
        key_pieces: weights to the pieces of a word are summed ("sum", the paper) or averaged
            ("mean").
        least: fewest arcs of a relation in a direction, where no relations are asked for.
        split: choose heads and offsets on every other sentence and report them on the rest.
        batch_size: sentences that run together.
        resamples, confidence, seed: of the bootstrap over sentences.

    Raises:
        InputError: key_pieces that is neither.

    """

    layers: HeadSpec | int | None = None
    key_pieces: KeyPieces = "sum"
    least: int = 50
    split: bool = False
    batch_size: int = 16
    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_key_pieces(self.key_pieces)
        check_bootstrap(self.resamples, self.confidence)


@dataclass(frozen=True)
class RelationHeads:
    """How well each head finds one relation in one direction.

    Attributes:
        relation: name of the relation (`obj`).
        direction: "to_head" where the rows are dependents and a hit is their head, "to_dependent"
            the other way round.
        arcs: number of arcs that are reported on.
        accuracy: share of the arcs at which a head's largest weight is a hit, a head.
        best: number of the head that was chosen, in the order of `SyntaxHeads.heads`.
        offset: the best fixed offset: a hit lies this many words after the row.
        baseline: share of the arcs at that offset.
        gain: accuracy of the chosen head less the baseline, over the same sentences.

    """

    relation: str
    direction: Direction
    arcs: int
    accuracy: Interval
    best: int
    offset: int
    baseline: Interval
    gain: Interval


@dataclass(frozen=True)
class SyntaxHeads:
    """Dependency relations and the heads that follow them, relations with most arcs first.

    Attributes:
        heads: the heads, in the order of every `head` axis.
        found: one entry a relation and direction.
        sentences: number of sentences that are reported on.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    found: tuple[RelationHeads, ...]
    sentences: int
    settings: SyntaxSettings
    notes: tuple[str, ...]

    def __getitem__(self, name: tuple[str, Direction]) -> RelationHeads:
        """One relation in one direction: `found["obj", "to_head"]`."""
        for entry in self.found:
            if (entry.relation, entry.direction) == name:
                return entry
        there = ", ".join(dict.fromkeys(entry.relation for entry in self.found))
        raise InputError(
            f"There is no {name!r} here. There is {there}, each with {' or '.join(DIRECTIONS)}."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row a relation and direction: its best head and its best fixed offset."""
        rows: list[dict[str, object]] = []
        for entry in self.found:
            best = Interval(*(bound[entry.best] for bound in entry.accuracy))
            row: dict[str, object] = {"relation": entry.relation, "direction": entry.direction}
            row |= {"arcs": entry.arcs, "head": str(self.heads[entry.best])}
            row |= _bounds("accuracy", best) | {"offset": entry.offset}
            row |= _bounds("baseline", entry.baseline) | _bounds("gain", entry.gain)
            rows.append(row)
        return pd.DataFrame(rows)

    def all_heads(self) -> pd.DataFrame:
        """One row a relation, direction and head: the accuracy of each head."""
        frames: list[pd.DataFrame] = []
        for entry in self.found:
            names = ("accuracy", "accuracy_low", "accuracy_high")
            frame = head_frame(self.heads, dict(zip(names, entry.accuracy, strict=True)))
            frame.insert(0, "relation", entry.relation)
            frame.insert(1, "direction", entry.direction)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)


def syntax_heads(
    lens: Lens,
    sentences: Iterable[Sentence],
    relations: Sequence[str] | None = None,
    settings: SyntaxSettings | None = None,
    progress: Progress | None = None,
) -> SyntaxHeads:
    """Find the heads whose largest weight follows a dependency relation.

    `accuracy = (arcs with argmax_{w != v} W[v, w] = the word sought) / arcs`, over maps from word
    to word (`analyses.words`), beside the best fixed offset. Relations are named as in the trees;
    where none are asked for, all with `settings.least` arcs. Where heads see earlier words alone,
    the arcs are those whose word sought comes earlier. `progress` is told of sentences done.

    Raises:
        InputError: no tokenizer with offsets, no sentences, none that fit, unknown relations.

    """
    settings = settings or SyntaxSettings()
    kept, tokens, notes = read_sentences(lens, sentences)
    least = settings.least if relations is None else 1
    names = _relations(kept, relations, least)
    heads, arcs = _collect(lens, kept, tokens, settings, progress)
    earlier = any(lens.anatomy[site].causal for site in {head.site for head in heads})
    entries = [
        _score(arcs, name, direction, earlier, least, settings)
        for name in names
        for direction in DIRECTIONS
    ]
    return SyntaxHeads(
        heads=heads,
        found=tuple(entry for entry in entries if entry is not None),
        sentences=len(kept) // 2 if settings.split else len(kept),
        settings=settings,
        notes=(*notes, *_notes(len(heads), earlier, settings)),
    )


@dataclass(frozen=True)
class _Arcs:
    """The arcs of all sentences, and which heads find them."""

    sentence: Int[Tensor, " arc"]
    relation: tuple[str, ...]
    offset: Int[Tensor, " arc"]
    """How many words after its dependent the head stands."""
    hits: Bool[Tensor, "arc direction head"]


def _relations(
    sentences: Sequence[Sentence], asked: Sequence[str] | None, least: int
) -> tuple[str, ...]:
    """The relations to report, those with most arcs first."""
    counts = Counter(
        relation
        for sentence in sentences
        for relation, head in zip(sentence.relations, sentence.heads, strict=True)
        if head >= 0
    )
    names = [name for name, count in counts.most_common() if count >= least]
    if asked is not None:
        asked = (asked,) if isinstance(asked, str) else tuple(asked)
        names = [name for name in counts if name in asked]
        names.sort(key=lambda name: -counts[name])
        unknown = sorted(set(asked) - set(names))
        if unknown:
            raise InputError(
                f"No arc of these sentences is a {', '.join(map(repr, unknown))}; there is "
                f"{', '.join(name for name, _ in counts.most_common())}."
            )
    if not names:
        raise InputError(
            f"No relation has {least} arcs in these {len(sentences)} sentences. Give more of them, "
            "or a lower `least`."
        )
    return tuple(names)


def _collect(
    lens: Lens,
    sentences: Sequence[Sentence],
    tokens: Sequence[WordTokens],
    settings: SyntaxSettings,
    progress: Progress | None,
) -> tuple[tuple[Head, ...], _Arcs]:
    """Run the sentences, and keep of every arc which heads find it."""
    reducer = partial(LargestWord, key_pieces=settings.key_pieces)
    places: list[tuple[int, str, int]] = []
    hits: list[Bool[Tensor, "arc direction head"]] = []
    sites: tuple[str, ...] = ()
    measured = measure_words(lens, tokens, reducer, settings.layers, settings.batch_size, progress)
    for number, found in measured:
        own = sentences[number]
        arcs = arcs_of(own, tokens[number])
        if not arcs:
            continue
        sites = tuple(found)
        largest = torch.cat(list(found.values()))
        word, head = torch.tensor(arcs).unbind(-1)
        both = torch.stack([largest[:, word] == head, largest[:, head] == word])
        hits.append(both.permute(2, 0, 1))
        places += [(number, own.relations[w], h - w) for w, h in arcs]
    if not places:
        raise InputError("No sentence has an arc: give sentences of two words at least.")
    heads = tuple(
        lens.anatomy[site].head(h) for site in sites for h in range(lens.anatomy[site].heads)
    )
    number, relation, offset = zip(*places, strict=True)
    return heads, _Arcs(torch.tensor(number), relation, torch.tensor(offset), torch.cat(hits))


def _score(
    arcs: _Arcs,
    name: str,
    direction: Direction,
    earlier: bool,
    least: int,
    settings: SyntaxSettings,
) -> RelationHeads | None:
    """One relation in one direction; None where it has too few arcs that can be found."""
    picked = torch.tensor([relation == name for relation in arcs.relation])
    offset = arcs.offset if direction == "to_head" else -arcs.offset
    if earlier:
        picked &= offset < 0
    hits = arcs.hits[:, DIRECTIONS.index(direction)]
    odd = (arcs.sentence % 2).bool()
    chosen, reported = (picked & ~odd, picked & odd) if settings.split else (picked, picked)
    if int(picked.sum()) < least or not chosen.any() or not reported.any():
        return None
    best = int(hits[chosen].sum(0).argmax())
    common = Counter(offset[chosen].tolist()).most_common(1)[0][0]
    at_offset = (offset == common)[:, None]
    columns = torch.cat([hits, at_offset, hits[:, best : best + 1].int() - at_offset.int()], 1)
    rates = _rates(columns[reported].double(), arcs.sentence[reported], settings)
    return RelationHeads(
        relation=name,
        direction=direction,
        arcs=int(reported.sum()),
        accuracy=Interval(*(bound[:-2] for bound in rates)),
        best=best,
        offset=common,
        baseline=Interval(*(bound[-2] for bound in rates)),
        gain=Interval(*(bound[-1] for bound in rates)),
    )


def _rates(
    values: Float[Tensor, "arc column"], sentence: Int[Tensor, " arc"], settings: SyntaxSettings
) -> Interval:
    """Means over arcs, with intervals over the sentences that hold them."""
    own, place = sentence.unique(return_inverse=True)
    sums = values.new_zeros(len(own), values.shape[1]).index_add_(0, place, values)
    arcs = place.bincount()[:, None]
    return bootstrap_ratio(sums, arcs, settings.resamples, settings.confidence, settings.seed)


def _bounds(name: str, interval: Interval) -> dict[str, float]:
    """A number and its bounds as columns of a table."""
    names = (name, f"{name}_low", f"{name}_high")
    return {column: float(bound) for column, bound in zip(names, interval, strict=True)}


def _notes(heads: int, earlier: bool, settings: SyntaxSettings) -> tuple[str, ...]:
    if settings.split:
        chosen = "Heads and offsets are chosen on every other sentence, and reported on the rest."
    else:
        chosen = (
            f"Each best head is the best of {heads} on the very sentences that it is reported on, "
            "and each offset the best of all: both flatter, the head more. With split=True they "
            "are chosen on one half and reported on the other."
        )
    if not earlier:
        return (chosen,)
    return chosen, "Words see earlier words alone: only arcs to earlier words are counted."
