import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.alignment import property_alignment
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.analyses.sentences import letter_tokenizer
from tests.architectures import ARCHITECTURES

# Two-sided, causal, windowed, window in one layer of two, learned sinks, encoder-decoder.
NAMES = ("bert", "gpt2", "mistral", "gemma2", "gpt_oss", "t5")
opened = cache(architecture)


def matching(ids: tuple[int, ...], tokens: tuple[str, ...]) -> Tensor:
    """Tokens that are both even or both odd."""
    odd = torch.tensor(ids) % 2
    return odd[:, None] == odd


def previous(ids: tuple[int, ...], tokens: tuple[str, ...]) -> Tensor:
    place = torch.arange(len(ids))
    return place[:, None] == place + 1


def by_hand(
    lens: Lens, prompts: list[list[int]], threshold: float
) -> tuple[list[float], list[int], list[float]]:
    """Aligned share, arcs and background of each head, one pair at a time."""
    sums: list[list[float]] = []
    for ids in prompts:
        trace = lens.run([ids], keep=("pattern", "scores"))
        holds = matching(tuple(ids), ())
        place = 0
        for site, pattern in trace.pattern.items():
            if site.startswith(("dec", "cross")):
                continue
            for head in range(pattern.shape[1]):
                if len(sums) <= place:
                    sums.append([0.0] * 4)
                for i in range(len(ids)):
                    for j in range(len(ids)):
                        if trace.scores[site][0, head, i, j] == -math.inf:
                            continue
                        arc = bool(pattern[0, head, i, j] >= threshold)
                        f = bool(holds[i, j])
                        for column, value in enumerate((arc and f, arc, f, True)):
                            sums[place][column] += value
                place += 1
    shares = [own[0] / own[1] if own[1] else math.nan for own in sums]
    return shares, [int(own[1]) for own in sums], [own[2] / own[3] for own in sums]


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(5, 40, (n,), generator=generator).tolist() for n in lengths]


def padded(texts: list[list[int]], left: bool) -> dict[str, Tensor]:
    longest = max(map(len, texts))
    rows = [([0] * (longest - len(t)), t) for t in texts]
    ids = [pad + own if left else own + pad for pad, own in rows]
    real = [[0] * len(p) + [1] * len(t) if left else [1] * len(t) + [0] * len(p) for p, t in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}


def same(found: list[float], wanted: list[float]) -> None:
    assert torch.allclose(
        torch.tensor(found).double(), torch.tensor(wanted).double(), atol=1e-10, equal_nan=True
    )


@pytest.mark.parametrize(
    ("name", "left"), [*((n, False) for n in NAMES), *((n, True) for n in NAMES if n != "t5")]
)
def test_against_a_count_of_pairs(name: str, left: bool) -> None:
    texts = prompts(7, 12, 9)
    found = property_alignment(opened(name), padded(texts, left), matching, 0.2, 1, batch_size=2)
    shares, arcs, background = by_hand(opened(name), texts, 0.2)
    assert found.arcs.tolist() == arcs
    same(found["aligned"].mean.tolist(), shares)
    same(found["background"].mean.tolist(), background)
    assert found.prompts == 3


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_small_blocks_change_nothing(name: str) -> None:
    test_against_a_count_of_pairs(name, False)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans(), st.floats(0.05, 0.9))
def test_any_lengths_on_either_side(lengths: list[int], left: bool, threshold: float) -> None:
    texts = prompts(*lengths)
    found = property_alignment(opened("gpt2"), padded(texts, left), matching, threshold, 1)
    shares, arcs, _ = by_hand(opened("gpt2"), texts, threshold)
    assert found.arcs.tolist() == arcs
    same(found["aligned"].mean.tolist(), shares)


def test_the_previous_token_head_has_no_other_arcs(induction_lens: Lens) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [[0, *torch.randperm(31, generator=generator).add(1).tolist()] for _ in range(4)]
    found = property_alignment(induction_lens, texts, previous)
    frame = found.to_frame().set_index("head")
    assert frame.loc["L0H1", "arcs"] == 4 * 32
    assert frame.loc["L0H1", "aligned"] == pytest.approx(31 / 32)  # the first token sees itself
    assert frame.loc["L0H1", "background"] == pytest.approx(31 / (32 * 33 / 2))
    assert frame.loc["L0H1", "gain"] == pytest.approx(31 / 32 - 31 / 528)
    assert frame.loc["L0H1", "aligned_low"] == frame.loc["L0H1", "aligned_high"]
    assert frame.loc["L1H2", "arcs"] == 4 * 32  # all on the start token
    assert frame.loc["L1H2", "aligned"] == pytest.approx(1 / 32)
    assert math.isnan(frame.loc["L0H0", "aligned"])  # even rows: arcs in the first three alone
    assert frame.loc["L0H0", "arcs"] == 4 * (1 + 2 + 3)
    assert any("fewer than 100 arcs" in note for note in found.notes)


def test_intervals_are_of_ratios_over_prompts(random_lens: Lens) -> None:
    texts = prompts(20, 4, 11)
    found = property_alignment(random_lens, padded(texts, False), matching, 0.2, 1, resamples=300)
    alone = [by_hand(random_lens, [text], 0.2)[0] for text in texts]
    for head in range(len(found.heads)):
        own = [shares[head] for shares in alone if not math.isnan(shares[head])]
        low, mean, high = (float(found["aligned"][i][head]) for i in (1, 0, 2))
        assert min(own) - 1e-12 <= low <= mean <= high <= max(own) + 1e-12


def test_a_property_of_keys_or_queries_alone(random_lens: Lens) -> None:
    texts = prompts(9, 9)
    wide = [matching(tuple(text), ())[:1].expand(9, 9) for text in texts]
    narrow = [own[:1] for own in wide]
    for full, thin in ((wide, narrow), ([w.T for w in wide], [n.T for n in narrow])):
        one = property_alignment(random_lens, texts, full, 0.2, 1)
        other = property_alignment(random_lens, texts, thin, 0.2, 1)
        assert torch.equal(one.mean.nan_to_num(-1), other.mean.nan_to_num(-1))


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    lens = al.load(ARCHITECTURES["bert"].build().double(), tokenizer=letter_tokenizer())
    texts = ["abc de", "fghi"]
    ids = [lens.tokenizer(text)["input_ids"] for text in texts]

    def ends(own: tuple[int, ...], tokens: tuple[str, ...]) -> Tensor:
        return torch.tensor([[token in (2, 3) for token in own]])

    every = property_alignment(lens, texts, ends, 0.1, 1, special=True)
    fewer = property_alignment(lens, texts, ends, 0.1, 1)
    size = [len(own) for own in ids]
    assert float(every["background"].mean[0]) == pytest.approx(
        sum(2 * n for n in size) / sum(n * n for n in size)
    )
    # [CLS] alone is special to this tokenizer: [SEP] counts
    assert float(fewer["background"].mean[0]) == pytest.approx(
        sum(n - 1 for n in size) / sum((n - 1) ** 2 for n in size)
    )
    assert (fewer.arcs <= every.arcs).all()


def test_what_is_refused(random_lens: Lens) -> None:
    texts = prompts(5, 5)
    with pytest.raises(InputError, match="threshold=0"):
        property_alignment(random_lens, texts, matching, 0.0)
    with pytest.raises(InputError, match="property is NoneType"):
        property_alignment(random_lens, texts, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 properties and 2 prompts"):
        property_alignment(random_lens, texts, [torch.ones(5, 5).bool()])
    with pytest.raises(InputError, match=r"prompt 0 is torch.float32"):
        property_alignment(random_lens, texts, lambda ids, tokens: torch.ones(5, 5))
    with pytest.raises(InputError, match=r"prompt 1 has shape \[4, 5\].*5 tokens"):
        property_alignment(random_lens, texts, [torch.ones(5, 5).bool(), torch.ones(4, 5).bool()])


def test_no_arcs_at_all_are_told() -> None:
    lens = al.load(tiny_gpt2(sharp=0.0))
    found = property_alignment(lens, prompts(9), previous, 0.99)
    assert found["aligned"].mean.isnan().all()
    assert len(found.notes) == 2
