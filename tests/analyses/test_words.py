from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

import attnlens as al
from attnlens.analyses.words import (
    LargestWord,
    WordMap,
    WordTokens,
    measure_words,
    read_sentences,
    tokenise_words,
)
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.zoo import small_path
from tests.analyses.conftest import tiny_gpt2
from tests.analyses.sentences import LETTERS, chain, letter_tokenizer
from tests.architectures import ARCHITECTURES

# Two-sided, causal with grouped keys, windowed, learned sinks, an encoder with a decoder.
NAMES = ("bert", "llama", "mistral", "gpt_oss", "t5")
WORDS = ("abc", "d", "efa", "b", "ij")
LENSES: dict[str, Lens] = {}


def opened(name: str) -> Lens:
    if name not in LENSES:
        model = ARCHITECTURES[name].build().double()
        LENSES[name] = al.load(model, tokenizer=letter_tokenizer())
    return LENSES[name]


def by_hand(pattern: Tensor, words: tuple[int, ...], count: int, mean: bool = False) -> Tensor:
    """The map of one head, one weight at a time; the mean or sum over the pieces of key words."""
    own = [[t for t, word in enumerate(words) if word == v] for v in range(count)]
    found = torch.zeros(count, count, dtype=torch.float64)
    for v in range(count):
        for w in range(count):
            for t in own[v]:
                for s in own[w]:
                    share = len(own[v]) * (len(own[w]) if mean else 1)
                    found[v, w] += pattern[t, s].double() / share
    return found


def dense(lens: Lens, tokens: WordTokens) -> dict[str, Tensor]:
    trace = lens.run([list(tokens.ids)], keep="pattern")
    return {site: own[0] for site, own in trace.pattern.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mean", [False, True])
def test_maps_are_those_of_the_dense_pattern(name: str, mean: bool) -> None:
    lens = opened(name)
    tokens = tokenise_words(lens, [WORDS, WORDS[2:], ("c",)])
    reducer = partial(WordMap, key_pieces="mean" if mean else "sum")
    seen: set[int] = set()
    for number, found in measure_words(lens, tokens, reducer):
        seen.add(number)
        count = tokens[number].count
        pattern = dense(lens, tokens[number])
        assert found
        assert all(not site.startswith(("dec", "cross")) for site in found)
        for site, own in found.items():
            for head, one in enumerate(own):
                wanted = by_hand(pattern[site][head], tokens[number].words, count, mean)
                assert torch.allclose(one[:count, :count], wanted, atol=1e-10)
                assert (one[count:] == 0).all()
                assert (one[:, count:] == 0).all()
    assert seen == {0, 1, 2}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_small_blocks_change_nothing(name: str) -> None:
    test_maps_are_those_of_the_dense_pattern(name, False)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_word_is_never_the_word_itself(name: str) -> None:
    lens = opened(name)
    tokens = tokenise_words(lens, [WORDS, WORDS[1:4]])
    maps = dict(measure_words(lens, tokens, WordMap))
    for number, found in measure_words(lens, tokens, LargestWord):
        for site, largest in found.items():
            for head, own in enumerate(largest.tolist()):
                for word in range(tokens[number].count):
                    row = maps[number][site][head, word].tolist()
                    others = [w for w in range(len(row)) if w != word and row[w] > 0]
                    best = max(others, key=lambda w: row[w]) if others else -1
                    assert own[word] == best
    if name in ("llama", "mistral", "gpt_oss"):  # the first word sees no other
        assert all((found[site][:, 0] == -1).all() for site in found)


@settings(max_examples=10)
@given(
    st.lists(
        st.lists(st.text(LETTERS, min_size=1, max_size=3), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_sentences_that_run_together_do_not_touch(sentences: list[list[str]]) -> None:
    lens = al.load(tiny_gpt2(layers=1), tokenizer=letter_tokenizer())
    tokens = tokenise_words(lens, sentences)
    together = dict(measure_words(lens, tokens, WordMap, batch_size=3))
    alone = dict(measure_words(lens, tokens, WordMap, batch_size=1))
    for number, own in enumerate(tokens):
        cut = (slice(None), slice(own.count), slice(own.count))
        assert torch.allclose(together[number]["L0"][cut], alone[number]["L0"], atol=1e-10)


def test_progress_counts_sentences() -> None:
    lens = opened("bert")
    said: list[tuple[int, int]] = []
    tokens = tokenise_words(lens, [WORDS] * 5)
    list(measure_words(lens, tokens, LargestWord, batch_size=2, progress=lambda *s: said.append(s)))
    assert said == [(2, 5), (4, 5), (5, 5)]


# Tokens and words


def test_pieces_know_their_word() -> None:
    (tokens,) = tokenise_words(opened("bert"), [("ab", "7", "c")])
    assert tokens.ids == (2, 8, 9, 10, 3)
    assert tokens.words == (-1, 0, 0, 2, -1)
    assert tokens.missing == {1}


@pytest.mark.parametrize(
    "words", [("What", "light", "thro'", "yonder", "café", "𝒳", "breaks"), ("a",)]
)
def test_every_vocabulary_finds_the_same_words(words: tuple[str, ...], shared_data: Path) -> None:
    for folder in (small_path(), shared_data / "stories260K"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        lens = al.load(tiny_gpt2(), tokenizer=tokenizer)
        (tokens,) = tokenise_words(lens, [words])
        assert tokens.missing == frozenset()
        assert list(tokens.words) == sorted(tokens.words)
        for word, text in enumerate(words):
            ids = [i for i, own in zip(tokens.ids, tokens.words, strict=True) if own == word]
            assert tokenizer.decode(ids).strip() == text


def test_tokenizers_without_offsets_are_refused(random_lens: Lens) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        tokenise_words(random_lens, [WORDS])


def test_sentences_that_do_not_fit_are_left_out_and_told() -> None:
    lens = al.load(tiny_gpt2(), tokenizer=letter_tokenizer())  # 48 positions
    long, short = chain(["abcd"] * 12), chain(["ab", "3", "c"])
    sentences, tokens, notes = read_sentences(lens, [long, short])
    assert sentences == [short]
    assert len(tokens) == 1
    assert notes[0] == "Left out, of more than 48 tokens: 1 of 2 sentences."
    assert notes[1].endswith("nothing of them: 1 words.")
    with pytest.raises(InputError, match="at most 48 tokens, and the shortest of 1 has 50"):
        read_sentences(lens, [long])
    for nothing in ([], "trees.conllu", [("a", "b")]):
        with pytest.raises(InputError, match="read_conllu"):
            read_sentences(lens, nothing)  # type: ignore[arg-type]


def test_layers_without_text_are_refused() -> None:
    lens = opened("t5")
    tokens = tokenise_words(lens, [WORDS])
    with pytest.raises(InputError, match="text stack"):
        list(measure_words(lens, tokens, WordMap, layers="cross.L0"))


def test_sentences_may_be_read_once() -> None:
    sentences, _, _ = read_sentences(opened("bert"), iter([chain(["a", "b"])]))  # type: ignore[arg-type]
    assert len(sentences) == 1


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing_are_refused(size: int) -> None:
    lens = opened("bert")
    with pytest.raises(InputError, match=f"batch_size={size}"):
        list(measure_words(lens, tokenise_words(lens, [WORDS]), WordMap, batch_size=size))
