"""Query-focused retrieval heads: heads whose attention goes from a query to the document it needs.

Zhang et al. 2025, Query-focused retrieval heads improve long-context reasoning and re-ranking
(QRHead); the null query is that of Chen et al. 2025, Attention in large language models yields
efficient zero-shot re-rankers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attnlens.analyses.basin import DocumentPrompt, SlotObserver, pack_documents
from attnlens.analyses.needle_runs import padded
from attnlens.analyses.per_head import HeadTable
from attnlens.analyses.uncertainty import Interval, bootstrap_mean, check_bootstrap
from attnlens.anatomy import Head, HeadSpec, Site
from attnlens.errors import InputError
from attnlens.lens import Lens

NULL_QUERY = "N/A"


@dataclass(frozen=True)
class QueryExample:
    """Documents under a query and under one that asks for nothing, and which answer the query.

    Raises:
        InputError: prompts of different numbers of documents, or a gold document that is none or is
            named twice.

    """

    prompt: DocumentPrompt
    null: DocumentPrompt
    gold: tuple[int, ...]

    def __post_init__(self) -> None:
        documents = len(self.prompt.slots)
        if documents != len(self.null.slots):
            raise InputError(
                f"The query's prompt has {documents} documents and the null query's "
                f"{len(self.null.slots)}: give both the same."
            )
        if not self.gold or not all(0 <= number < documents for number in self.gold):
            raise InputError(
                f"gold={list(self.gold)}: name documents by number, from 0 to {documents - 1}."
            )
        if len(set(self.gold)) < len(self.gold):
            raise InputError(f"gold={list(self.gold)}: name each document once.")


Example = QueryExample | tuple[Sequence[str], str, int | Sequence[int]]
"""Prompts with their spans, or documents, query and the numbers of the gold documents."""


@dataclass(frozen=True)
class QueryFocusedHeads(HeadTable):
    """Scores of every head, with intervals over examples, and how well the best ones rank.

    Numbers a head: `gold`, mean weight that a row of the query gives the gold documents; `null`,
    the same for the null query; `score`, their difference.

    Attributes:
        documents: weight of each document less its weight under the null query; NaN past an
            example's last document.
        gold: numbers of each example's gold documents.
        top: number of heads that rank the documents.
        accuracy: share of the examples in which a gold document gets most weight from the `top`
            heads with the highest scores on the other examples.
        accuracy_all: the same by all heads.
        chance: the same by no knowledge: mean share of gold documents.
        prompts: number of examples.
        notes: what a reader should know.

    """

    documents: Float[Tensor, "example head document"]
    gold: tuple[tuple[int, ...], ...]
    top: int
    accuracy: Interval
    accuracy_all: Interval
    chance: float
    prompts: int
    seed: int
    notes: tuple[str, ...]

    def best(self, count: int | None = None) -> tuple[Head, ...]:
        """The heads with the highest scores, `top` of them where no count is given."""
        order = self["score"].mean.argsort(descending=True, stable=True).tolist()
        return tuple(self.heads[number] for number in order[: count or self.top])


def query_focused_heads(
    lens: Lens,
    examples: Sequence[Example],
    top: int = 16,
    null_query: str = NULL_QUERY,
    opening: str = "",
    joint: str = "\n\n",
    layers: HeadSpec | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> QueryFocusedHeads:
    """`score = mean_t sum_{s in gold} A[t, s]` over the query's rows t, less that of a null query.

    An example is (documents, query, numbers of the gold documents), packed one after another with
    `joint` between them, the query last; or a `QueryExample` of token ids with spans. An example
    and its null query run together; only the query's rows are computed.

    Raises:
        InputError: no examples, a gold document that is none, or an empty part.
        TaskError: texts without a tokenizer, or one without offsets.

    """
    check_bootstrap(resamples, confidence)
    packed = [_packed(lens, example, null_query, opening, joint) for example in examples]
    if not packed or top < 1:
        raise InputError(f"{len(packed)} examples and top={top}: give 1 of each at least.")
    sites = _sites(lens, layers)
    asked, null = _masses(lens, packed, sites)
    golds = tuple(example.gold for example in packed)
    gold, none = _summed(asked, golds), _summed(null, golds)
    heads = tuple(site.head(number) for site in sites for number in range(site.heads))
    top = min(top, len(heads))
    sure = partial(bootstrap_mean, resamples=resamples, confidence=confidence, seed=seed)
    return QueryFocusedHeads(
        heads,
        ("score", "gold", "null"),
        *sure(torch.stack([gold - none, gold, none], dim=-1)),
        documents=asked - null,
        gold=golds,
        top=top,
        accuracy=sure(_hits(asked - null, golds, _held_out(gold - none, top))),
        accuracy_all=sure(_hits(asked - null, golds, torch.ones_like(gold).bool())),
        chance=sum(len(e.gold) / len(e.prompt.slots) for e in packed) / len(packed),
        prompts=len(packed),
        seed=seed,
        notes=_notes(sites, len(packed)),
    )


def query_example(
    lens: Lens,
    documents: Sequence[str],
    query: str,
    gold: int | Sequence[int],
    null_query: str = NULL_QUERY,
    opening: str = "",
    joint: str = "\n\n",
) -> QueryExample:
    """Documents packed before a query, and before the null query (`pack_documents`)."""
    asked, null = (
        pack_documents(lens, documents, text, opening, joint) for text in (query, null_query)
    )
    return QueryExample(asked, null, tuple(gold) if isinstance(gold, Sequence) else (int(gold),))


def _packed(
    lens: Lens, example: Example, null_query: str, opening: str, joint: str
) -> QueryExample:
    if isinstance(example, QueryExample):
        return example
    if not isinstance(example, Sequence) or len(example) != 3 or isinstance(example[0], str):
        raise InputError(
            f"{str(example)[:60]!r} is no example: give (documents, query, gold), where documents "
            "is a list of texts and gold the number, or numbers, of those that answer the query."
        )
    return query_example(lens, *example, null_query, opening, joint)


def _sites(lens: Lens, layers: HeadSpec | None) -> tuple[Site, ...]:
    """The sites at which the text attends to itself."""
    found = tuple(
        site
        for site in lens.anatomy.layers(layers)
        if site.kind != "cross" and site.stack in ("", "enc")
    )
    if not found:
        raise InputError("The documents' text does not attend to itself there; name other layers.")
    return found


def _masses(
    lens: Lens, examples: Sequence[QueryExample], sites: Sequence[Site]
) -> tuple[Float[Tensor, "example head document"], Float[Tensor, "example head document"]]:
    """Weight of every document under the query, and under the null query; NaN past the last."""
    most = max(len(example.prompt.slots) for example in examples)
    heads = sum(site.heads for site in sites)
    found = torch.full((2, len(examples), heads, most), torch.nan, dtype=torch.float64)
    for number, example in enumerate(examples):
        both = (example.prompt, example.null)
        batch = lens.encode(padded([prompt.ids for prompt in both]))
        observer = SlotObserver(sites, both)
        lens.observe(batch, observer)
        mass = torch.cat([observer.mass[site.name] for site in sites], dim=1)
        found[:, number, :, : mass.shape[-1]] = mass
    return found[0], found[1]


def _summed(
    masses: Float[Tensor, "example head document"], gold: Sequence[Sequence[int]]
) -> Float[Tensor, "example head"]:
    """Weight of the gold documents together."""
    return torch.stack(
        [own[:, list(which)].sum(-1) for own, which in zip(masses, gold, strict=True)]
    )


def _held_out(scores: Float[Tensor, "example head"], top: int) -> Tensor:
    """For each example the `top` heads by mean score over the others; none where it is alone."""
    others = scores.sum(0) - scores
    chosen = torch.zeros_like(scores).bool()
    if len(scores) == 1:
        return chosen
    return chosen.scatter_(1, others.topk(top, dim=1).indices, True)


def _hits(
    documents: Float[Tensor, "example head document"],
    gold: Sequence[Sequence[int]],
    chosen: Tensor,
) -> Float[Tensor, " example"]:
    """1 where a gold document gets the largest sum over the chosen heads; NaN where none is."""
    summed = (documents * chosen[..., None]).sum(1).nan_to_num(-torch.inf)
    first = summed.argmax(-1).tolist()
    hits = torch.tensor([float(best in own) for best, own in zip(first, gold, strict=True)])
    return hits.masked_fill(~chosen.any(-1), torch.nan)


def _notes(sites: Sequence[Site], examples: int) -> tuple[str, ...]:
    notes: list[str] = []
    if examples < 2:
        notes.append(
            "One example gives no interval, and the heads that rank it are not chosen by others."
        )
    if any(site.sinks for site in sites):
        notes.append("Learned sinks take a share of each row, which no document gets.")
    return tuple(notes)
