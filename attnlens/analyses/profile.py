"""What each head looks at on given texts, in a few numbers with intervals over the texts.

Clark et al. 2019, What does BERT look at?
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attnlens.analyses.per_head import (
    HeadTable,
    Where,
    heads_of,
    over_tokens,
    side_by_side,
    within_sequence,
)
from attnlens.analyses.reading import Progress, Reading, Texts, Window
from attnlens.analyses.running import Method, RunningMean, method_note
from attnlens.analyses.streaming import Counted, fold, heads_named
from attnlens.anatomy import Head, HeadSpec
from attnlens.hooks.reducers import (
    Entropy,
    FirstTokenMass,
    MeanDistance,
    OffsetMass,
    Reducer,
    TokenMass,
)
from attnlens.hooks.tokens import Layout
from attnlens.lens import Lens, Statistics


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
    method: Method
    """How the intervals were made; "poisson bootstrap" where the texts are many."""
    notes: tuple[str, ...]


def profile(
    lens: Lens,
    texts: Texts,
    layers: HeadSpec | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    *,
    max_tokens: int | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Profile every head over texts: each number is a mean over a text's rows, then over texts.

    Offsets are 0, 1 and 2 back in causal models, and -1, 0 and 1 where heads see both sides.

    `texts` may be an iterator of any length (`al.open_texts`): memory does not grow with it. A text
    over the model's context is refused, or cut to its first `max_tokens` tokens. Where a `state`
    file is named, what was counted is saved there, and a later call with the same texts goes on
    from it to the very numbers that one call would have given. `progress(done, total)` is called
    after every batch; `total` is None where it is not known.

    Raises:
        InputError: no text, an empty one, one over the context; a state of other texts, another
            model or other settings.
        FileError: a state that is damaged or cannot be written.

    """
    tally = _Tally(lens, RunningMean(resamples, confidence, seed))
    counted = fold(lens, texts, tally, layers, Reading(batch_size, max_tokens, state, progress))
    return Profile(
        tally.heads,
        tuple(tally.names),
        *tally.mean.interval(),
        prompts=counted.prompts,
        special=tuple(tally.special.values()),
        method=tally.mean.method,
        notes=_notes(counted, lens, tally.mean, max_tokens),
    )


class _Tally:
    """Values of every head and number, text by text."""

    name = "profile"

    def __init__(self, lens: Lens, mean: RunningMean) -> None:
        self.mean = mean
        self.names: list[str] = []
        self.heads: tuple[Head, ...] = ()
        self.special: dict[int, str] = {}
        """Special tokens that were met, by id."""
        self._lens = lens
        self._offsets = _offsets(lens)
        self._is_mark: dict[int, bool] = {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """What has to be the same to go on."""
        mean = self.mean
        return {"resamples": mean.resamples, "confidence": mean.confidence, "seed": mean.seed}

    def begin(self, window: Window) -> Sequence[Reducer]:
        """The statistics of a window, for the special tokens and punctuation that it holds."""
        ids = sorted({token for row in window.ids for token in row})
        before = tuple(self.special.values())
        marks = self._learn(ids)
        sets = _sets_of_tokens(self.special, marks)
        self._widen(sets, before)
        found = {name: own for name, own in sets.items() if own & set(ids) or name == "punctuation"}
        return [
            Entropy(),
            FirstTokenMass(),
            Where(MeanDistance(), within_sequence),
            *(Where(OffsetMass((o,), f"back_{o}"), _at_offset(o)) for o in self._offsets),
            *(Where(TokenMass(own, name), over_tokens) for name, own in found.items()),
        ]

    def add(self, measured: Statistics, prompts: Int[Tensor, " prompt"]) -> None:
        """Add the values of one batch."""
        self.heads = heads_of(measured)
        values: list[Tensor] = []
        for name in self.names:
            if name.startswith("offset_"):
                own = side_by_side(measured, f"back_{name.removeprefix('offset_')}")[..., 0]
            elif name in measured.values:
                own = side_by_side(measured, name)
            else:  # a special token that no text of the window holds
                own = side_by_side(measured, "punctuation") * 0
            values.append(own)
        self.mean.add(torch.stack(values, -1), prompts)

    def _learn(self, ids: Sequence[int]) -> frozenset[int] | None:
        """Note the special tokens; of the others the punctuation, None without a tokenizer."""
        if self._lens.tokenizer is None:
            return None
        new = [token for token in ids if token not in self._is_mark]
        for token, text in zip(new, self._lens.token_texts(new), strict=True):
            special = token in self._lens.special_ids
            self._is_mark[token] = not special and is_punctuation(text)
            if special:
                self.special[token] = text
        self.special = dict(sorted(self.special.items()))
        return frozenset(token for token in ids if self._is_mark[token])

    def _widen(self, sets: Mapping[str, frozenset[int]], before: tuple[str, ...]) -> None:
        """Room for special tokens that were not met before: their weight was 0 until now.

        An only special token had no number of its own, which was that of all of them.
        """
        base = ["entropy", "distance", *(f"offset_{o}" for o in self._offsets), "first_token"]
        wanted = [*base, *sets]
        if not self.names:
            self.names = wanted
        for place, name in enumerate(wanted):
            if name not in self.names:
                copied = len(before) == 1 and name == f"special_{before[0]}"
                like = self.names.index("special" if copied else "punctuation")
                self.mean.insert(place, like, float(copied))
                self.names.insert(place, name)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is kept."""
        heads = [str(head) for head in self.heads]
        special = [[token, text] for token, text in self.special.items()]
        return self.mean.tensors(), {"names": self.names, "heads": heads, "special": special}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self.mean.restore(tensors)
        self.names = list(values["names"])
        self.heads = heads_named(self._lens, values["heads"])
        self.special = dict(values["special"])


def _notes(
    counted: Counted, lens: Lens, mean: RunningMean, max_tokens: int | None
) -> tuple[str, ...]:
    notes: list[str] = []
    if counted.prompts < 2:
        notes.append("One text gives no interval over texts; give several.")
    if any(site.sinks for site in lens.anatomy.sites):
        notes.append("Learned sinks take a share of each row: its weights sum to less than 1.")
    return (*notes, *counted.notes(max_tokens), *method_note(mean))


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


def is_punctuation(text: str) -> bool:
    """Whether a token is punctuation and nothing else, spaces around it aside."""
    stripped = text.strip()
    return bool(stripped) and all(unicodedata.category(c).startswith("P") for c in stripped)
