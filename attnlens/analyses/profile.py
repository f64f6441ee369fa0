"""What each head looks at on given texts, in a few numbers with intervals over the texts.

Clark et al. 2019, What does BERT look at?
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attnlens.analyses.per_head import (
    HeadTable,
    Where,
    heads_of,
    over_tokens,
    side_by_side,
    table_of,
    within_sequence,
)
from attnlens.anatomy import HeadSpec
from attnlens.hooks.reducers import (
    Entropy,
    FirstTokenMass,
    MeanDistance,
    OffsetMass,
    Reducer,
    TokenMass,
)
from attnlens.hooks.tokens import Layout
from attnlens.lens import Inputs, Lens


@dataclass(frozen=True)
class Profile(HeadTable):
    """Per head: entropy (nats), distance (tokens), and mean weight by offset and kind of token.

    `offset_1` is the previous token, `offset_0` the token itself, `offset_-1` the next one;
    `first_token`, `special` and `punctuation` are weights on those tokens, and `special_<text>` on
    each special token by itself. A number that makes no sense at a site is NaN (a distance in
    cross-attention).
    """

    prompts: int
    """Number of texts."""
    special: tuple[str, ...]
    """Special tokens that the texts hold."""
    notes: tuple[str, ...]


def profile(
    lens: Lens,
    texts: Inputs,
    layers: HeadSpec | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Profile:
    """Profile every head over texts: each number is a mean over a text's rows, then over texts.

    Offsets are 0, 1 and 2 back in causal models, and -1, 0 and 1 where heads see both sides.
    """
    special, punctuation = _kinds_of_token(lens, texts)
    offsets = _offsets(lens)
    reducers: list[Reducer] = [
        Entropy(),
        FirstTokenMass(),
        Where(MeanDistance(), within_sequence),
        *(Where(OffsetMass((o,), f"back_{o}"), _at_offset(o)) for o in offsets),
    ]
    kinds = [
        Where(TokenMass(ids, name), over_tokens)
        for name, ids in _sets_of_tokens(special, punctuation).items()
    ]
    measured = lens.measure(texts, [*reducers, *kinds], layers, batch_size)
    values = {
        "entropy": side_by_side(measured, "entropy"),
        "distance": side_by_side(measured, "distance"),
        **{f"offset_{o}": side_by_side(measured, f"back_{o}")[..., 0] for o in offsets},
        "first_token": side_by_side(measured, "first_token"),
    }
    values |= {reducer.name: side_by_side(measured, reducer.name) for reducer in kinds}
    names, interval = table_of(values, resamples, confidence, seed)
    prompts = len(measured.lengths)
    return Profile(
        heads_of(measured),
        names,
        *interval,
        prompts=prompts,
        special=tuple(special.values()),
        notes=_notes(prompts, lens),
    )


def _notes(prompts: int, lens: Lens) -> tuple[str, ...]:
    notes: list[str] = []
    if prompts < 2:
        notes.append("One text gives no interval over texts; give several.")
    if any(site.sinks for site in lens.anatomy.sites):
        notes.append("Learned sinks take a share of each row: its weights sum to less than 1.")
    return tuple(notes)


def _offsets(lens: Lens) -> tuple[int, ...]:
    causal = {site.causal for site in lens.anatomy.sites if site.kind != "cross"}
    wanted = {True: (0, 1, 2), False: (-1, 0, 1)}
    return tuple(sorted({offset for mask in causal for offset in wanted[mask]}))


def _at_offset(offset: int) -> Callable[[Layout], bool]:
    """Whether a site has rows that may look `offset` back."""
    return lambda layout: (
        within_sequence(layout) and (offset in (0, 1) or (offset > 0) == layout.site.causal)
    )


def _sets_of_tokens(
    special: Mapping[int, str], punctuation: frozenset[int] | None
) -> dict[str, frozenset[int]]:
    """The sets of ids to measure, by name; special tokens one by one where there are more."""
    sets = {"special": frozenset(special)} if special else {}
    if len(special) > 1:
        sets |= {f"special_{text}": frozenset([i]) for i, text in special.items()}
    return sets if punctuation is None else sets | {"punctuation": punctuation}


def _kinds_of_token(lens: Lens, texts: Inputs) -> tuple[dict[int, str], frozenset[int] | None]:
    """Of the ids in the texts the special ones with their text, and those that are punctuation.

    Without a tokenizer nobody knows what is punctuation: None.
    """
    ids = lens.encode(texts).ids
    found: list[int] = [] if ids is None else ids.unique().tolist()
    words = dict(zip(found, lens.token_texts(found), strict=True))
    special = {i: text for i, text in words.items() if i in lens.special_ids}
    if lens.tokenizer is None:
        return special, None
    marks = (i for i, text in words.items() if i not in special and is_punctuation(text))
    return special, frozenset(marks)


def is_punctuation(text: str) -> bool:
    """Whether a token is punctuation and nothing else, spaces around it aside."""
    stripped = text.strip()
    return bool(stripped) and all(unicodedata.category(c).startswith("P") for c in stripped)
