"""Attention basin: how much of a question's attention each slot of a row of documents gets.

Yi et al. 2025, Attention basin: why contextual position matters in large language models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.per_head import head_frame
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch
from attnlens.tasks.needle import token_offsets
from attnlens.tasks.prompts import encode

Span = tuple[int, int]


@dataclass(frozen=True)
class DocumentPrompt:
    """Token ids of documents and a query, with where each lies: first and one past the last.

    Raises:
        InputError: no slot, or spans that are empty, out of order, overlapping or outside the ids.

    """

    ids: tuple[int, ...]
    slots: tuple[Span, ...]
    query: Span

    def __post_init__(self) -> None:
        spans = [*self.slots, self.query]
        ends = [0, *(stop for _, stop in spans)]
        apart = all(end <= start < stop for end, (start, stop) in zip(ends, spans, strict=False))
        if not self.slots or not apart or ends[-1] > len(self.ids):
            raise InputError(
                f"The slots {list(self.slots)} and the query {self.query} do not lie in a prompt "
                f"of {len(self.ids)} tokens one after the other: give spans (first, one past the "
                "last), none empty, none with a token of another, the query last."
            )


Example = DocumentPrompt | tuple[Sequence[str], str]
"""A prompt with its spans, or documents and a query."""


def pack_documents(
    lens: Lens, documents: Sequence[str], query: str, opening: str = "", joint: str = "\n\n"
) -> DocumentPrompt:
    """Opening, documents and query as one prompt, joined by `joint`; spans by token offsets.

    A token belongs to the part of which it holds a character.

    Raises:
        InputError: an empty part, or a token that holds characters of two.
        TaskError: no tokenizer, or one without offsets.

    """
    parts = [*documents, query]
    if len(parts) < 2 or not all(part.strip() for part in parts):
        raise InputError("Give one document at least and a query, none of them empty.")
    text, places = opening, list[Span]()
    for number, part in enumerate(parts):
        text += (joint if number else "") + part
        places.append((len(text) - len(part), len(text)))
    offsets = token_offsets(lens, text, "attention basin")
    ids = encode(lens, text, "attention basin")
    spans = [_covering(offsets, *place) for place in places]
    return DocumentPrompt(tuple(ids), tuple(spans[:-1]), spans[-1])


@dataclass(frozen=True)
class SlotMass:
    """Mean weight that the query's rows give each slot, `... slot`, over examples."""

    total: Interval
    per_token: Interval
    """The same over the slot's number of tokens."""


@dataclass(frozen=True)
class AttentionBasin:
    """Attention by document slot, with intervals over examples.

    Attributes:
        heads: the heads, in the order of `per_head`.
        sites: the layers, in the order of `per_layer`.
        per_head, per_layer, mean: `head slot`, `layer slot` (mean of its heads) and `slot` (mean of
            all heads).
        tokens: mean number of tokens in each slot.
        prompts: number of examples.
        rotated: whether each document stood in each slot once.
        notes: what a reader should know.

    """

    heads: tuple[Head, ...]
    sites: tuple[str, ...]
    per_head: SlotMass
    per_layer: SlotMass
    mean: SlotMass
    tokens: Float[Tensor, " slot"]
    prompts: int
    rotated: bool
    notes: tuple[str, ...]

    @property
    def slots(self) -> int:
        """Number of documents in a prompt."""
        return len(self.tokens)

    def reorder(self, relevance: Sequence[float], per_token: bool = False) -> tuple[int, ...]:
        """The document for each slot: the more relevant, the more mass its slot gets.

        Ties keep their order. For documents of very different lengths take mass `per_token`.

        Raises:
            InputError: not one finite relevance a slot.

        """
        try:
            scores = torch.tensor(relevance, dtype=torch.float64)
        except (TypeError, ValueError):
            scores = torch.tensor(torch.nan)
        if scores.shape != (self.slots,) or not scores.isfinite().all():
            raise InputError(
                f"relevance={list(relevance)} is no finite number for each of {self.slots} "
                "documents: measure the basin with as many slots as there are documents."
            )
        mass = self.mean.per_token if per_token else self.mean.total
        best = scores.argsort(descending=True, stable=True).tolist()
        slots = mass.mean.argsort(descending=True, stable=True).tolist()
        placed = dict(zip(slots, best, strict=True))
        return tuple(placed[slot] for slot in range(self.slots))

    def to_frame(self) -> pd.DataFrame:
        """One row a head and slot: mass and mass per token, with bounds."""
        heads = [head for head in self.heads for _ in range(self.slots)]
        slots = list(range(self.slots)) * len(self.heads)
        return head_frame(heads, {"slot": slots, **_columns(self.per_head)})

    def by_layer(self) -> pd.DataFrame:
        """One row a layer and slot."""
        sites = [site for site in self.sites for _ in range(self.slots)]
        slots = list(range(self.slots)) * len(self.sites)
        return pd.DataFrame({"site": sites, "slot": slots, **_columns(self.per_layer)})

    def by_slot(self) -> pd.DataFrame:
        """One row a slot, over all heads."""
        first = {"slot": range(self.slots), "tokens": self.tokens.tolist()}
        return pd.DataFrame(first | _columns(self.mean))


def attention_basin(
    lens: Lens,
    examples: Iterable[Example],
    rotate: bool = False,
    opening: str = "",
    joint: str = "\n\n",
    layers: HeadSpec | int | None = None,
    batch_size: int = 8,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> AttentionBasin:
    """`mean_t sum_{s in slot} A[t, s]` over the rows t of the query, a head and document slot.

    Examples are documents and a query, packed by `pack_documents`, or prompts with their spans; all
    have equally many slots. With `rotate` each example is run once a slot with its documents moved
    on by one, so that what a slot gets is owed to the place and not to what stands there. Only the
    query's rows are computed (Yi et al. 2025).

    Raises:
        InputError: no examples, unequal numbers of slots, or `rotate` without texts.

    """
    check_bootstrap(resamples, confidence)
    examples = tuple(examples)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give 1 or more.")
    prompts = [
        prompt for example in examples for prompt in _prompts(lens, example, rotate, opening, joint)
    ]
    counts = sorted({len(prompt.slots) for prompt in prompts})
    if len(counts) != 1:
        raise InputError(
            f"The examples have {counts[0]} to {counts[-1]} documents; slots compare only where "
            "all have equally many."
            if counts
            else "There is no example: give documents and a query."
        )
    sites, mass = _measure(lens, prompts, layers, batch_size)
    tokens = torch.tensor([[stop - start for start, stop in p.slots] for p in prompts]).double()
    each = counts[0] if rotate else 1  # prompts an example

    def over_examples(values: Tensor) -> Interval:
        own = values.unflatten(0, (-1, each)).mean(1)
        return bootstrap_mean(own, resamples, confidence, seed)

    def summed(values: Float[Tensor, "prompt ... slot"]) -> SlotMass:
        lengths = tokens.view(len(tokens), *[1] * (values.ndim - 2), -1)
        return SlotMass(over_examples(values), over_examples(values / lengths))

    heads = tuple(site.head(head) for site in sites for head in range(site.heads))
    layered = [own.mean(1) for own in mass.split([site.heads for site in sites], dim=1)]
    return AttentionBasin(
        heads=heads,
        sites=tuple(site.name for site in sites),
        per_head=summed(mass),
        per_layer=summed(torch.stack(layered, dim=1)),
        mean=summed(mass.mean(1)),
        tokens=tokens.mean(0),
        prompts=len(examples),
        rotated=rotate,
        notes=_notes(sites, len(examples), tokens, rotate),
    )


class SlotObserver(Observer):
    """Observer that sums the weights of each prompt's query rows by slot: `batch head slot`."""

    def __init__(self, sites: Sequence[Site], prompts: Sequence[DocumentPrompt]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.mass: dict[str, Float[Tensor, "batch head slot"]] = {}
        width = max(len(prompt.ids) for prompt in prompts)
        starts, stops = zip(*(prompt.query for prompt in prompts), strict=True)
        self._rows = slice(min(starts), max(stops))
        self._asked = torch.zeros(len(prompts), width, dtype=torch.float64)
        self._members = self._asked.new_zeros(len(prompts), width, len(prompts[0].slots))
        for number, prompt in enumerate(prompts):
            start, stop = prompt.query
            self._asked[number, start:stop] = 1 / (stop - start)
            for slot, (start, stop) in enumerate(prompt.slots):
                self._members[number, start:stop, slot] = 1

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Reduce the query's rows of one call; the call itself is left alone."""
        rows = Rows.at(site, call)
        batch, heads, _, _ = rows.shape
        # A model may lie on several devices; a site's rows are where its queries are.
        asked, members = (each.to(rows.query.device) for each in (self._asked, self._members))
        mass = members.new_zeros(batch, heads, members.shape[-1])
        for part in rows.blocks(rows=self._rows):
            pattern, keys = rows.block(slice(0, heads), part)
            wide = torch.promote_types(pattern.dtype, torch.float32)
            weights = asked[:, None, None, part].to(wide)
            # A model may make NaN of the rows of padding, and 0 * NaN is NaN.
            pattern = pattern.masked_fill((weights == 0).transpose(-1, -2), 0)
            drawn = (weights @ pattern.to(wide))[..., 0, :].double()
            mass += drawn @ members[:, keys]
        self.mass[site.name] = mass.cpu()
        return call


def _measure(
    lens: Lens, prompts: Sequence[DocumentPrompt], layers: HeadSpec | int | None, batch_size: int
) -> tuple[tuple[Site, ...], Float[Tensor, "prompt head slot"]]:
    """The text's own sites and the mass of all their heads, prompts of similar length together."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
    sites: tuple[Site, ...] = ()
    parts: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        own = [prompts[number] for number in order[start : start + batch_size]]
        batch = lens.encode(_padded(own))
        sites = _text_sites(lens.anatomy.layers(layers), batch)
        observer = SlotObserver(sites, own)
        lens.observe(batch, observer)
        parts.append(torch.cat([observer.mass[site.name] for site in sites], dim=1))
    return sites, torch.cat(parts)[torch.tensor(order).argsort()]


def _prompts(
    lens: Lens, example: Example, rotate: bool, opening: str, joint: str
) -> list[DocumentPrompt]:
    """The prompts of an example: itself, or one a slot with the documents moved on."""
    if isinstance(example, DocumentPrompt):
        if rotate:
            raise InputError("rotate=True moves documents, so it needs them as texts, not as ids.")
        return [example]
    match example:
        case (Sequence() as given, str() as query) if not isinstance(given, str):
            documents = list(given)
        case _:
            raise InputError(
                f"An example is a list of documents and a query, (['...', '...'], '...'), or a "
                f"DocumentPrompt; not {example!r:.80}."
            )
    turns = range(len(documents)) if rotate else range(1)
    return [
        pack_documents(lens, documents[turn:] + documents[:turn], query, opening, joint)
        for turn in turns
    ]


def _padded(prompts: Sequence[DocumentPrompt]) -> dict[str, Any]:
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        ids[number, : len(prompt.ids)] = torch.tensor(prompt.ids)
        mask[number, : len(prompt.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _text_sites(sites: Sequence[Site], batch: Batch) -> tuple[Site, ...]:
    """The sites at which the text attends to itself."""
    found = tuple(
        site
        for site in sites
        if site.kind != "cross" and batch.sides.queries(site) is batch.sides.text
    )
    if not found:
        raise InputError(
            f"At {', '.join(site.name for site in sites)} the documents' text does not attend to "
            "itself; name layers of the stack that reads the text."
        )
    return found


def _covering(offsets: Sequence[Span], begin: int, end: int) -> Span:
    """First and one past the last token that holds one of the characters."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > begin]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _columns(mass: SlotMass) -> dict[str, Any]:
    named = {"mass": mass.total, "per_token": mass.per_token}
    return {
        f"{name}{end}": bound.flatten().tolist()
        for name, interval in named.items()
        for end, bound in zip(("", "_low", "_high"), interval, strict=True)
    }


def _notes(
    sites: Sequence[Site], examples: int, tokens: Float[Tensor, "prompt slot"], rotate: bool
) -> tuple[str, ...]:
    notes: list[str] = []
    if not rotate:
        notes.append("What stands in a slot counts too; rotate=True evens it out.")
    if float(tokens.max() / tokens.min()) > 1.5:
        notes.append("Documents differ in length: compare mass per token.")
    if any(site.sinks for site in sites):
        notes.append("Learned sinks take a share of each row, which no slot gets.")
    if examples < 2:
        notes.append("One example gives no interval over examples; give several.")
    return tuple(notes)
