import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.long_context import LongContextHeads, estimated_log_sum, long_context_heads
from attnlens.errors import InputError
from attnlens.hooks.rows import Rows
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES

NUMBERS = ("local", "estimated", "accuracy", "false_local", "false_far", "far_mass",
           "estimated_far_mass")  # fmt: skip


def by_hand(
    lens: Lens, texts: list[Tensor], tau: float, window: int, first: int
) -> tuple[Tensor, Tensor]:
    """Counts and rates of every head, one query at a time, the estimate from the keys' moments."""
    found = torch.zeros(len(lens.anatomy.heads), 6, dtype=torch.float64)
    for text in texts:
        run = lens.run(text[None], keep=("pattern", "scores", "q", "k"))
        for number, head in enumerate(lens.anatomy.heads):
            site = lens.anatomy[head.site]
            group = head.head // (site.heads // site.groups)
            pattern, scores, q = (
                run[kind][head.site][0, head.head].double() for kind in ("pattern", "scores", "q")
            )
            k = run["k"][head.site][0, group].double()
            for t in range(len(text)):
                far = [s for s in range(first, len(text)) if s <= t - window
                       or (not site.causal and s >= t + window)]  # fmt: skip
                if not far:
                    continue
                seen = [s for s in far if scores[t, s] > -math.inf]
                mass = float(pattern[t, seen].sum())
                estimate = 0.0
                if seen:
                    scaling = scaling_of(scores[t], q[t], k)
                    mu, sigma = k[seen].mean(0), torch.cov(k[seen].T, correction=0)
                    log_sum = math.log(len(seen)) + scaling * float(q[t] @ mu)
                    log_sum += scaling**2 * float(q[t] @ sigma @ q[t]) / 2
                    near = [s for s in range(len(text)) if s not in seen]
                    log_near = float(scores[t, near].logsumexp(0))
                    if site.sinks:  # their logit, from the share that no key gets
                        known = pattern[t, near].sum()
                        log_near += float(((known + 1 - pattern[t].sum()) / known).log())
                    estimate = 1 / (1 + math.exp(log_near - log_sum))
                local, called = mass <= 1 - tau, estimate <= 1 - tau
                row = [1, local, called, local and called, mass, estimate]
                found[number] += torch.tensor(row, dtype=torch.float64)
    n, local, called, both, mass, estimate = found.unbind(-1)
    agree = n - local - called + 2 * both
    rates = [local / n, called / n, agree / n, (called - both) / (n - local),
             (local - both) / local, mass / n, estimate / n]  # fmt: skip
    return n, torch.stack(rates, -1)


def scaling_of(scores: Tensor, q: Tensor, k: Tensor) -> float:
    """The module's scaling, from the score that is largest in size."""
    products = k @ q
    known = int(products.abs().masked_fill(scores == -math.inf, 0).argmax())
    return float(scores[known] / products[known])


def assert_by_hand(
    found: LongContextHeads, lens: Lens, texts: list[Tensor], tolerance: float
) -> None:
    queries, rates = by_hand(lens, texts, found.tau, found.window, found.first)
    assert found.queries.tolist() == queries.tolist()
    assert found.names == NUMBERS
    torch.testing.assert_close(found.mean, rates, rtol=0, atol=tolerance, equal_nan=True)


def test_every_rate_is_the_dense_one(random_lens: Lens) -> None:
    ids = torch.randint(1, 40, (3, 24), generator=torch.Generator().manual_seed(5))
    found = long_context_heads(random_lens, ids, tau=0.6, window=6, first=2)
    assert_by_hand(found, random_lens, list(ids), 1e-10)
    assert found.queries.tolist() == [3 * (24 - 6 - 2)] * 12
    local = found["local"].mean
    assert local.min() < 0.5 < local.max()
    assert found["accuracy"].mean.min() < 0.9  # sharp scores are far from normal
    low, high = found["local"].low, found["local"].high
    assert ((low <= local) & (local <= high)).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_grouped_keys_windows_and_both_sides(name: str) -> None:
    lens = architecture(name)
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(2))
    found = long_context_heads(lens, ids, tau=0.7, window=4, first=1)
    assert_by_hand(found, lens, list(ids), 1e-10 if name == "bert" else 1e-7)  # float32 softmax


def test_blocks_of_one_row_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of windowed layers begin after the first key, and some hold no far key."""
    whole = Rows.tiles
    monkeypatch.setattr(Rows, "tiles", lambda self, budget: whole(self, 1))
    lens = architecture("mistral")
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(2))
    found = long_context_heads(lens, ids, tau=0.7, window=4, first=1)
    assert_by_hand(found, lens, list(ids), 1e-7)  # the model's softmax is float32


def test_half_precision_is_near_float64() -> None:
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(2))
    model = ARCHITECTURES["llama"].build()
    exact, half = (
        long_context_heads(al.load(model.to(dtype)), ids, tau=0.7, window=4, first=1)
        for dtype in (torch.float64, torch.bfloat16)
    )
    for name, tolerance in (("far_mass", 0.02), ("estimated_far_mass", 0.05), ("local", 0.1)):
        assert torch.allclose(exact[name].mean, half[name].mean, atol=tolerance), name


def test_a_learned_sink_counts_as_near() -> None:
    lens = architecture("gpt_oss")
    ids = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(2))
    found = long_context_heads(lens, ids, tau=0.7, window=4, first=1)
    assert_by_hand(found, lens, list(ids), 1e-6)
    assert any("sinks" in note for note in found.notes)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    side=st.sampled_from(["left", "right"]),
    window=st.integers(1, 5),
    first=st.integers(0, 3),
)
def test_padding_on_either_side_changes_nothing(
    lengths: list[int], side: str, window: int, first: int
) -> None:
    lens = _llama()
    generator = torch.Generator().manual_seed(sum(lengths))
    texts = [torch.randint(20, 60, (n,), generator=generator) for n in [*lengths, 12]]
    width = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = long_context_heads(lens, inputs, 0.713, window, first, batch_size=2)
    assert_by_hand(found, lens, texts, 1e-6)  # rotary angles are float32


def _llama(cache: list[Lens] = []) -> Lens:  # noqa: B006
    if not cache:
        cache.append(al.load(ARCHITECTURES["llama"].build().double()))
    return cache[0]


def test_even_attention_in_closed_form(even_lens: Lens) -> None:
    """Row t has t - 5 far keys of t + 1, and equal scores make the estimate exact."""
    ids = torch.randint(1, 40, (2, 30), generator=torch.Generator().manual_seed(1))
    found = long_context_heads(even_lens, ids, tau=0.55, window=4, first=2)
    far = [(t - 5) / (t + 1) for t in range(6, 30)]
    local = sum(mass <= 0.45 for mass in far) / len(far)
    assert 0 < local < 1
    for name, wanted in (("local", local), ("estimated", local), ("accuracy", 1.0),
                         ("false_local", 0.0), ("false_far", 0.0)):  # fmt: skip
        assert found[name].mean.tolist() == pytest.approx([wanted] * 12), name
    for name in ("far_mass", "estimated_far_mass"):
        assert found[name].mean.tolist() == pytest.approx([sum(far) / len(far)] * 12), name


def test_a_head_whose_own_window_hides_the_rest_is_local() -> None:
    lens = architecture("mistral")
    own = lens.anatomy.sites[0].window
    assert own is not None
    ids = torch.randint(5, 60, (2, 30), generator=torch.Generator().manual_seed(2))
    found = long_context_heads(lens, ids, tau=0.99, window=own, first=0)
    assert (found["local"].mean == 1).all()
    assert (found["estimated"].mean == 1).all()
    assert (found["far_mass"].mean == 0).all()
    assert (found.queries == 2 * (30 - own)).all()
    narrower = long_context_heads(lens, ids, tau=0.99, window=1, first=0)
    assert narrower["local"].mean.max() < 1


def test_a_position_bias_makes_a_head_local() -> None:
    """ALiBi by hand: keys that grow with their position, beside heads that look everywhere."""
    model = tiny_gpt2(sharp=0.0)
    with torch.no_grad():
        model.transformer.wte.weight[:, 3:5] = 0
        model.transformer.wpe.weight.zero_()
        model.transformer.wpe.weight[:, 3] = torch.arange(48).double()  # a ramp before the norm
        model.transformer.wpe.weight[:, 4] = 48.0
        block = model.transformer.h[0]
        block.attn.c_attn.bias[8] = 100.0  # the query of head 1
        block.attn.c_attn.weight[3, 32 + 8] = 10.0
    lens = al.load(model)
    ids = torch.randint(1, 40, (2, 40), generator=torch.Generator().manual_seed(1))
    found = long_context_heads(lens, ids, tau=0.9, window=12, first=4, layers="L0")
    assert found["local"].mean.tolist() == [pytest.approx(far) for far in (0, 1, 0, 0)] or (
        found["local"].mean[1] == 1 and found["local"].mean[[0, 2, 3]].max() < 0.2
    )
    assert found["far_mass"].mean[1] < 1e-3


def test_the_estimate_is_exact_for_equal_keys_and_in_the_limit_for_normal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    count, width, scaling = 200_000, 8, 0.5
    query = torch.randn(width, generator=generator, dtype=torch.float64) * 0.2
    key = torch.randn(width, generator=generator, dtype=torch.float64)
    equal = (scaling * key @ query).expand(7)
    found = estimated_log_sum(torch.tensor(7), equal.mean(), equal.var(correction=0))
    assert float(found) == pytest.approx(float(equal.logsumexp(0)), abs=1e-12)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    keys = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + key
    scores = scaling * keys @ query
    found = estimated_log_sum(torch.tensor(count), scores.mean(), scores.var(correction=0))
    # The mean of n log-normal factors has relative error sqrt((e^v - 1) / n): .01 for v = 3 here.
    assert 0.3 < float(scores.var()) < 3
    assert float(found) == pytest.approx(float(scores.logsumexp(0)), abs=0.03)
    # Keys of which one is sought and the others are not are far from normal.
    sought = torch.cat([torch.zeros(99), torch.tensor([10.0])]).double()
    found = estimated_log_sum(torch.tensor(100), sought.mean(), sought.var(correction=0))
    assert abs(float(found - sought.logsumexp(0))) > 1


def test_texts_that_are_too_short_say_so(random_lens: Lens, ids: Tensor) -> None:
    with pytest.raises(InputError, match="the longest text has 12 tokens"):
        long_context_heads(random_lens, ids)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = long_context_heads(random_lens, inputs, window=8, first=1)
    assert found.notes[0] == "1 of 2 texts are too short to have a query that counts."
    assert found["local"].low.isnan().all()
    for settings_, text in (({"tau": 1.0}, "tau=1.0"), ({"window": 0}, "window=0")):
        with pytest.raises(InputError, match=text):
            long_context_heads(random_lens, ids, **settings_)


def test_heads_whose_weights_are_nan_have_no_rates(ids: Tensor) -> None:
    lens = al.load(tiny_gpt2())
    with torch.no_grad():  # as after an overflow: L1H0 and all of the layers above are NaN
        lens.model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan  # type: ignore[union-attr,index]
    found = long_context_heads(lens, ids, window=3, first=1)
    broken = torch.tensor([False] * 4 + [True] + [False] * 3 + [True] * 4)
    for name in ("local", "accuracy", "far_mass", "estimated_far_mass"):
        assert torch.equal(found[name].mean.isnan(), broken), name


@pytest.mark.parametrize("changed", [{"window": 2.5}, {"first": 1.5}])
def test_numbers_of_keys_are_whole(
    random_lens: Lens, ids: Tensor, changed: dict[str, float]
) -> None:
    with pytest.raises(InputError, match="whole numbers"):
        long_context_heads(random_lens, ids, **changed)  # type: ignore[arg-type]


def test_rows_that_round_to_more_than_one_leave_a_sink_nothing() -> None:
    lens = al.load(ARCHITECTURES["gpt_oss"].build().bfloat16())
    ids = torch.randint(20, 60, (2, 15), generator=torch.Generator().manual_seed(0))
    found = long_context_heads(lens, ids, window=3, first=1)
    run = lens.run(ids, keep="pattern", dtype=torch.float64).pattern
    assert any((own.sum(-1) > 1).any() for own in run.values())
    estimated = found["estimated_far_mass"].mean
    assert ((estimated >= 0) & (estimated <= 1)).all()
