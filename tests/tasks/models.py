"""Small models of the builders' kind: a tokenizer and limits, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from attnlens.tasks import words
from attnlens.tasks.templates import INDIRECT_OBJECT, NEEDLE_QUESTION, NEEDLE_TEXT

POOLS = (words.NAMES, words.PLACES, words.OBJECTS, words.KEYS, words.VALUES)
CORPUS = [
    *words.FILLER,
    *INDIRECT_OBJECT,
    NEEDLE_TEXT,
    NEEDLE_QUESTION,
    *(" ".join(["a", *pool]) for pool in POOLS for _ in range(3)),
]


@dataclass(frozen=True)
class Model:
    tokenizer: Any = None
    vocab_size: int = 40
    context: int | None = 512
    special_ids: frozenset[int] = frozenset({0, 1})
    bos_id: int | None = 1


def of(tokenizer: Any, context: int | None = 512) -> Model:
    special = frozenset(tokenizer.all_special_ids)
    return Model(tokenizer, len(tokenizer), context, special, tokenizer.bos_token_id)


def gpt2_like(vocab: int = 900) -> Model:
    """Byte-level BPE, no start token of its own; an end token that ends no prompt."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return of(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>"))


def two_digits(vocab: int = 1400) -> Model:
    """Byte-level BPE that writes a year as its century and two digits, as GPT-2 mostly does.

    Two exceptions, also as in GPT-2: 1776 is one token, and 1401 another.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?(1776|1401|\d\d?)"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Often enough that each number becomes one token.
    years = [f" {n:02d}{year:02d}" for n in range(11, 18) for year in range(100)]
    core.train_from_iterator([*CORPUS, *years * 3, *[" 1776", " 1401"] * 9], trainer)
    return of(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>"))


def of_words(known: list[str]) -> Model:
    """Byte-level: the words that are given are one token each, all else is bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, initial_alphabet=letters, min_frequency=1, show_progress=False
    )
    core.train_from_iterator(known, trainer)
    return of(PreTrainedTokenizerFast(tokenizer_object=core))


def characters() -> Model:
    """Every character is a token, the space too: a word's first token is a space."""
    letters = "".join(sorted({letter for text in CORPUS for letter in text} | set("0123456789\n")))
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    return of(PreTrainedTokenizerFast(tokenizer_object=core))


def metaspace(vocab: int = 160) -> Model:
    """Pieces in the manner of sentencepiece, too few for most words to be one token."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return of(
        PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


def one_token() -> Model:
    """Every word is unknown: no task of words can be expressed."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return of(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))


def ids_of(model: Model, text: str) -> list[int]:
    """A text's tokens without an end token."""
    ids = model.tokenizer(text)["input_ids"]
    while ids[-1] in model.special_ids:
        ids.pop()
    return ids


def first_of(model: Model, text: str, word: str) -> int:
    """The word's first token after the text, by encoding both together."""
    return ids_of(model, f"{text} {word}")[len(ids_of(model, text))]
