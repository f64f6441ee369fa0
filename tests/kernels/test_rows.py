"""The arithmetic of rows against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlens.kernels.rows import (
    hidden_value,
    hide,
    hide_future,
    scaled_products,
    soft_cap,
    softmax_rows,
)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    rows=st.integers(1, 5),
    keys=st.integers(1, 6),
    width=st.integers(1, 4),
)
def test_products_of_grouped_heads(
    batch: int, groups: int, share: int, rows: int, keys: int, width: int
) -> None:
    heads = groups * share
    query = torch.randn(batch, heads, rows, width, dtype=torch.float64)
    key = torch.randn(batch, groups, keys, width, dtype=torch.float64)
    found = scaled_products(query, key, 0.3)
    assert found.shape == (batch, heads, rows, keys)
    for b in range(batch):
        for h in range(heads):
            wanted = query[b, h] @ key[b, h // share].T * 0.3
            torch.testing.assert_close(found[b, h], wanted)


def test_products_leave_q_and_k_alone() -> None:
    query, key = torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3)
    scaled_products(query, key, 5.0)
    assert query.eq(1).all()
    assert key.eq(1).all()


def test_a_view_with_strides_of_its_own() -> None:
    query = torch.randn(2, 5, 4, 3).transpose(1, 2)
    key = torch.randn(2, 6, 2, 3).transpose(1, 2)
    wanted = scaled_products(query.contiguous(), key.contiguous(), 1.0)
    assert torch.equal(scaled_products(query, key, 1.0), wanted)


def test_soft_cap() -> None:
    scores = torch.tensor([0.0, 1.0, -50.0, 1e9])
    found = soft_cap(scores.clone(), 3.0)
    wanted = [3 * math.tanh(value / 3) for value in scores.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted))


@given(rows=st.integers(1, 6), keys=st.integers(1, 8), offset=st.integers(-3, 8))
def test_the_future_is_hidden(rows: int, keys: int, offset: int) -> None:
    found = hide_future(torch.ones(1, 1, rows, keys), offset)[0, 0]
    for t in range(rows):
        for s in range(keys):
            assert found[t, s] == (hidden_value(torch.float32) if s > t + offset else 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_hidden_key_has_no_weight_at_all(dtype: torch.dtype) -> None:
    seen = torch.tensor([[[[True, False, True]]]])
    pattern = softmax_rows(hide(torch.randn(1, 1, 1, 3).to(dtype), seen), None, None)
    assert pattern[0, 0, 0, 1] == 0
    assert pattern.dtype == dtype
    assert math.isfinite(hidden_value(dtype))
    assert 0.0 * hidden_value(dtype) == 0


@given(rows=st.integers(1, 4), keys=st.integers(1, 5), seed=st.integers(0, 99))
def test_softmax_with_sinks(rows: int, keys: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(1, 2, rows, keys, generator=generator, dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    found = softmax_rows(scores, sinks, None)
    for h in range(2):
        for t in range(rows):
            weights = scores[0, h, t].exp()
            wanted = weights / (weights.sum() + sinks[h].exp())
            torch.testing.assert_close(found[0, h, t], wanted)
    assert (found.sum(-1) < 1).all()


def test_softmax_in_another_precision() -> None:
    scores = torch.randn(1, 1, 4, 50, dtype=torch.float64)
    exact, single = softmax_rows(scores, None, None), softmax_rows(scores, None, torch.float32)
    assert single.dtype == torch.float64
    assert torch.equal(single, scores.softmax(-1, dtype=torch.float32).double())
    assert 0 < (exact - single).abs().max() < 1e-7
    half = softmax_rows(scores.bfloat16(), None, torch.float32)
    assert torch.equal(half, scores.bfloat16().float().softmax(-1).bfloat16())


def test_no_function_overflows_at_large_scores() -> None:
    scores = torch.tensor([[[[1e30, 1e30, -1e30]]]])
    torch.testing.assert_close(
        softmax_rows(scores, None, None), torch.tensor([[[[0.5, 0.5, 0.0]]]])
    )
    assert softmax_rows(scores, torch.tensor([0.0]), None).isfinite().all()
