"""The Triton kernels compiled, at sizes that the interpreter has no time for.

tests/kernels/test_triton_rows.py and tests/hooks/test_fused.py run on the GPU too where there is
one; what is here needs it. Run with `pytest -m gpu -s tests/gpu` to see the times.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU", allow_module_level=True)

import torch.nn.functional as F

from attnlens.kernels.triton_columns import column_sums
from attnlens.kernels.triton_rows import row_statistics
from attnlens.kernels.triton_scores import prepared
from tests.gpu.dense import DEVICE, Case, check

pytestmark = pytest.mark.gpu
ROWS = 1000


def spans(form: str, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.arange(ROWS, device=DEVICE).expand(batch, -1)
    start = torch.tensor([[100], [0]], device=DEVICE)
    stop = torch.tensor([[ROWS], [ROWS - 70]], device=DEVICE)
    if form == "two-sided":
        return start.expand(-1, ROWS), stop.expand(-1, ROWS)
    first = start.expand(-1, ROWS)
    if form == "window":
        first = torch.maximum(first, t - 300)
    return first, torch.minimum(t + 1, stop).clamp_min(0)


@pytest.mark.parametrize("form", ["causal", "window", "two-sided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
def test_kernels_are_their_definition(form: str, dtype: torch.dtype, width: int) -> None:
    """With the default tiles; padding, grouped heads."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, ROWS, width, device=DEVICE).to(dtype)
    key = torch.randn(2, 2, ROWS, width, device=DEVICE).to(dtype)
    # Sums over a thousand weights: the column sums and distances carry the most rounding.
    check(Case(query, key, *spans(form), width**-0.5), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cap_and_sinks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, ROWS, 128, device=DEVICE).to(dtype) * 3
    key = torch.randn(2, 1, ROWS, 128, device=DEVICE).to(dtype)
    sinks = torch.randn(4, device=DEVICE)
    check(Case(query, key, *spans("window"), 128**-0.5, 5.0, sinks), 1e-5)


def milliseconds(work: Callable[[], object], times: int = 5) -> float:
    """The median, by the GPU's own clock, after one run that compiles."""
    work()
    found: list[float] = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return sorted(found)[times // 2]


def test_a_long_context() -> None:
    """32,768 tokens in the shape of a layer of Llama 8B: some rows exactly, all by an identity."""
    torch.manual_seed(0)
    rows, width = 32_768, 128
    query = torch.randn(1, 32, rows, width, device=DEVICE, dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, 8, rows, width, device=DEVICE, dtype=torch.bfloat16)
    t = torch.arange(rows, device=DEVICE)[None]
    call = prepared(query, key, width**-0.5, None, torch.zeros_like(t), t + 1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = row_statistics(call, None, t)
    sums = column_sums(call, found.lse)
    used = torch.cuda.max_memory_allocated() - before

    assert found.entropy is not None
    few = torch.randint(0, rows, (64,), device=DEVICE)
    head = 13
    scores = query[0, head, few].double() @ key[0, head // 4].double().T * width**-0.5
    scores = scores.masked_fill(t > few[:, None], -torch.inf)
    pattern = scores.softmax(-1)
    entropy = torch.special.entr(pattern).sum(-1)
    torch.testing.assert_close(found.entropy[0, head, few].double(), entropy, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        found.peak[0, head, few].double(), pattern.amax(-1), rtol=1e-4, atol=0
    )
    # Every row sums to 1, so all columns together hold as much as there are rows.
    totals = sums.double().sum(-1)
    torch.testing.assert_close(totals, torch.full_like(totals, rows), rtol=1e-5, atol=0)

    plain = milliseconds(
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    )
    row = milliseconds(lambda: row_statistics(call, None, t))
    least = milliseconds(lambda: row_statistics(call, entropy=False, largest=False))
    column = milliseconds(lambda: column_sums(call, found.lse))
    print(  # noqa: T201
        f"\n{torch.cuda.get_device_name()}, a layer of Llama 8B at T {rows}: attention "
        f"{plain:.2f} ms, row kernel {row:.2f} (lse alone {least:.2f}), column kernel "
        f"{column:.2f}; {used / 2**20:.0f} MiB extra"
    )
