"""Attention from word to word: the pieces of a word are put together, special tokens left out.

Clark et al. 2019, What does BERT look at?: weights to the pieces of a word are summed, weights from
the pieces of a word are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnlens.anatomy import HeadSpec, Site
from attnlens.errors import InputError
from attnlens.hooks.block import Block
from attnlens.hooks.measure import Measure
from attnlens.hooks.reducers import Reducer
from attnlens.hooks.tokens import Layout
from attnlens.lens import Lens
from attnlens.lens.inputs import Batch
from attnlens.tasks import Sentence

KeyPieces = Literal["sum", "mean"]
Progress = Callable[[int, int], None]
"""Called with how many sentences are done and of how many."""


@dataclass(frozen=True)
class WordTokens:
    """A sentence as the model reads it.

    Attributes:
        ids: its token ids, special tokens among them.
        words: the word that each token is a piece of; -1 for special tokens.
        count: number of words.

    """

    ids: tuple[int, ...]
    words: tuple[int, ...]
    count: int

    @property
    def missing(self) -> frozenset[int]:
        """Words of which the tokenizer made nothing."""
        return frozenset(range(self.count)) - set(self.words)


def tokenise_words(lens: Lens, sentences: Sequence[Sequence[str]]) -> tuple[WordTokens, ...]:
    """Tokens of sentences and the word of each, by the tokenizer's character offsets.

    Words are joined by single spaces, so encoders and decoders read them as they read text. A piece
    that reaches over two words belongs to the first.

    Raises:
        InputError: no tokenizer, or one that does not say where its tokens come from.

    """
    tokenizer = lens.tokenizer
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        kind = "no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__}, a slow one"
        raise InputError(
            f"The words of a sentence are found by a tokenizer's character offsets, and the model "
            f"has {kind}. Open it with a fast one: al.load(model, tokenizer=...)."
        )
    texts = [" ".join(words) for words in sentences]
    read = tokenizer(texts, return_offsets_mapping=True, verbose=False)
    return tuple(
        WordTokens(tuple(ids), _owners(words, offsets), len(words))
        for words, ids, offsets in zip(
            sentences, read["input_ids"], read["offset_mapping"], strict=True
        )
    )


def check_key_pieces(given: str) -> None:
    """Raise InputError unless it says how weights to the pieces of a word are put together."""
    if given not in get_args(KeyPieces):
        raise InputError(f"key_pieces is 'sum' or 'mean', not {given!r}.")


def read_sentences(
    lens: Lens, sentences: Iterable[Sentence]
) -> tuple[list[Sentence], list[WordTokens], tuple[str, ...]]:
    """The sentences that fit into the model, their tokens, and notes on what is left out.

    Raises:
        InputError: no sentences, none that fits, or what `tokenise_words` raises.

    """
    sentences = tuple(sentences)
    if not sentences or not all(isinstance(sentence, Sentence) for sentence in sentences):
        raise InputError("Give sentences, one at least, as al.tasks.read_conllu(path) reads them.")
    read = tokenise_words(lens, [sentence.words for sentence in sentences])
    limit = lens.context or max(len(tokens.ids) for tokens in read)
    kept = [number for number, tokens in enumerate(read) if len(tokens.ids) <= limit]
    if not kept:
        raise InputError(
            f"No sentence fits: the model reads at most {limit} tokens, and the shortest of "
            f"{len(read)} has {min(len(tokens.ids) for tokens in read)}."
        )
    notes: list[str] = []
    if len(kept) < len(read):
        left = len(read) - len(kept)
        notes.append(f"Left out, of more than {limit} tokens: {left} of {len(read)} sentences.")
    missing = sum(len(read[number].missing) for number in kept)
    if missing:
        notes.append(
            f"Left out with their arcs, as the tokenizer makes nothing of them: {missing} words."
        )
    return [sentences[number] for number in kept], [read[number] for number in kept], tuple(notes)


def arcs_of(sentence: Sentence, tokens: WordTokens) -> tuple[tuple[int, int], ...]:
    """The (dependent, head) of each arc between words that have tokens."""
    missing = tokens.missing
    return tuple(
        (word, head)
        for word, head in enumerate(sentence.heads)
        if head >= 0 and not {word, head} & missing
    )


def _owners(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The word of each token; the space before a word is part of it, as it is in vocabularies."""
    owner = [n for n, word in enumerate(words) for _ in range(len(word) + (n > 0))]
    return tuple(owner[start] if end > start else -1 for start, end in offsets)


@dataclass(frozen=True)
class WordMap:
    """Weights from word to word: `W[v, w] = mean_{t in v} sum_{s in w} A[t, s]`.

    Rows sum to less than 1 by what special tokens get. State is one site's map; words past a
    sentence's end are 0.
    """

    words: Int[Tensor, "batch position"]
    """The word of each token; -1 for special tokens and padding."""
    key_pieces: KeyPieces = "sum"
    """Weights to the pieces of a word are summed (the paper), or averaged."""
    name: str = "words"
    columns: tuple[str, ...] = ()

    def start(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """An empty map, and what each token gives to its word as a row and as a key."""
        words = self.words.to(layout.device)
        count = int(words.max()) + 1
        pieces = (words[..., None] == torch.arange(count, device=layout.device)).double()
        shared = pieces / pieces.sum(1, keepdim=True).clamp_min(1)
        found = pieces.new_zeros(layout.batch, layout.heads, count, count)
        return found, shared, pieces if self.key_pieces == "sum" else shared

    def update(self, state: tuple[Tensor, Tensor, Tensor], block: Block) -> None:
        """Add the weights of some rows, put together by words."""
        found, rows, keys = state
        dtype = block.pattern.dtype
        weights = block.pattern @ keys[:, None, block.keys].to(dtype)
        found[:, block.heads] += rows[:, None, block.rows].to(dtype).transpose(-1, -2) @ weights

    def finish(self, state: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "batch head word word"]:
        """The map, rows first."""
        return state[0]


@dataclass(frozen=True)
class LargestWord(WordMap):
    """The other word that each word gives most weight; -1 where it gives none to any."""

    def finish(self, state: tuple[Tensor, Tensor, Tensor]) -> Int[Tensor, "batch head word"]:
        """The arg-max of each row, the word itself left out."""
        found = state[0]
        found.diagonal(dim1=-2, dim2=-1).fill_(0)
        largest = found.max(-1)
        return largest.indices.masked_fill(largest.values == 0, -1)


def measure_words(
    lens: Lens,
    sentences: Sequence[WordTokens],
    reducer: Callable[[Int[Tensor, "batch position"]], Reducer],
    layers: HeadSpec | int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
    """The numbers of sentences, and what a reducer of words makes of each at every site.

    The reducer is made for each batch from the word of each token. Sentences of similar length run
    together, so they come in another order.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: give 1 or more.")
    order = sorted(range(len(sentences)), key=lambda number: len(sentences[number].ids))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch, words = batch_of(lens, [sentences[number] for number in numbers])
        own = reducer(words)
        observer = Measure(text_sites(lens, batch, layers), [own], batch.sides)
        lens.observe(batch, observer)
        found = {site: values.cpu() for site, values in observer.results[own.name].items()}
        for place, number in enumerate(numbers):
            yield number, {site: values[place] for site, values in found.items()}
        if progress is not None:
            progress(start + len(numbers), len(order))


def text_sites(lens: Lens, batch: Batch, layers: HeadSpec | int | None) -> tuple[Site, ...]:
    """The chosen sites at which the tokens of the text attend to each other.

    Raises:
        InputError: there is none.

    """
    sites = tuple(
        site
        for site in lens.anatomy.layers(layers)
        if site.kind != "cross"
        and batch.ids is not None
        and batch.sides.queries(site).ids is batch.ids
    )
    if not sites:
        raise InputError(
            f"No chosen layer of {lens.anatomy.model} lets the tokens of a text attend to each "
            f"other (layers={layers!r}). Choose layers of its text stack."
        )
    return sites


def batch_of(
    lens: Lens, sentences: Sequence[WordTokens]
) -> tuple[Batch, Int[Tensor, "batch position"]]:
    """Sentences as a batch padded on the right, and the word of each token."""
    length = max(len(sentence.ids) for sentence in sentences)
    padding = getattr(lens.tokenizer, "pad_token_id", None) or 0

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])

    ids = padded([sentence.ids for sentence in sentences], padding)
    real = padded([[1] * len(sentence.ids) for sentence in sentences], 0)
    words = padded([sentence.words for sentence in sentences], -1)
    return lens.encode({"input_ids": ids, "attention_mask": real}), words
