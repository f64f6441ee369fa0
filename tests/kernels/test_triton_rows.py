"""The Triton kernels against dense float64 maps, on a GPU or through the interpreter."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_triton_interpreter.py", allow_module_level=True)

from attnlens.kernels.triton_columns import column_sums, row_limits
from attnlens.kernels.triton_rows import row_statistics
from attnlens.kernels.triton_scores import Tile
from tests.gpu.dense import DEVICE, Case, assert_near, check

TILE = Tile(16, 16, 4)
# float32 scores up to 8 or so: a weight is known to 2^-22 of its score.
TOLERANCE = 2e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def causal(rows: int, keys: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows at the end of the keys, as while decoding."""
    t = torch.arange(rows, device=DEVICE) + ((keys or rows) - rows)
    return torch.zeros_like(t)[None], t[None] + 1


def windowed(rows: int, window: int) -> tuple[Tensor, Tensor]:
    t = torch.arange(rows, device=DEVICE)[None]
    return (t - window + 1).clamp_min(0), t + 1


def padded(rows: int) -> tuple[Tensor, Tensor]:
    """Causal; the first prompt lacks 5 keys on the left, the second 7 on the right."""
    t = torch.arange(rows, device=DEVICE)
    left = torch.full_like(t, 5), (t + 1).clamp_min(5)
    right = torch.zeros_like(t), (t + 1).clamp_max(rows - 7)
    return torch.stack([left[0], right[0]]), torch.stack([left[1], right[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_causal_groups(dtype: torch.dtype) -> None:
    first, stop = causal(35)
    query, key = normal(1, 4, 35, 24, dtype=dtype), normal(1, 2, 35, 24, dtype=dtype)
    check(Case(query, key, first, stop), TOLERANCE, TILE)


def test_two_sided_with_more_keys_than_rows() -> None:
    first = torch.zeros(1, 20, dtype=torch.long, device=DEVICE)
    positions = torch.randint(0, 45, (2, 20), device=DEVICE)
    case = Case(normal(2, 2, 20, 8), normal(2, 1, 45, 8), first, first + 45, positions=positions)
    check(case, TOLERANCE, TILE)


def test_window() -> None:
    first, stop = windowed(60, 20)
    check(Case(normal(1, 2, 60, 16), normal(1, 2, 60, 16), first, stop), TOLERANCE, TILE)


@pytest.mark.parametrize("cap", [None, 1.0, 30.0])
def test_padding_cap_and_sinks(cap: float | None) -> None:
    first, stop = padded(33)
    case = Case(normal(2, 1, 33, 40), normal(2, 1, 33, 40), first, stop, 0.5, cap, normal(1))
    check(case, 2 * TOLERANCE, TILE)


def test_one_decoded_row_and_a_chunk() -> None:
    for rows in (1, 5):
        first, stop = causal(rows, 50)
        case = Case(normal(1, 2, rows, 8), normal(1, 1, 50, 8), first, stop)
        check(case, TOLERANCE, TILE)


def test_tiles_of_any_size_and_their_default() -> None:
    first, stop = causal(50)
    case = Case(normal(1, 1, 50, 12), normal(1, 1, 50, 12), first, stop)
    for tile in (None, Tile(32, 16, 4), Tile(16, 64, 4)):
        check(case, TOLERANCE, tile)


def test_tensors_of_a_model_are_read_where_they_are() -> None:
    """Heads between rows and channels, channels far apart, a cache longer than its keys."""
    first, stop = causal(12)
    query = normal(2, 12, 2, 8).transpose(1, 2)
    for key in (normal(2, 1, 8, 12).transpose(2, 3), normal(2, 1, 30, 8)[:, :, :12]):
        check(Case(query, key, first, stop), TOLERANCE, TILE)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    rows=st.integers(1, 36),
    keys=st.integers(1, 36),
    width=st.sampled_from([1, 3, 16, 20]),
    shared=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_spans(
    batch: int,
    heads: tuple[int, int],
    rows: int,
    keys: int,
    width: int,
    shared: bool,
    seed: int,
) -> None:
    """Spans in any order, empty ones among them, for each prompt or for all."""
    torch.manual_seed(seed)
    ends = torch.randint(0, keys + 1, (2, 1 if shared else batch, rows), device=DEVICE)
    first, stop = ends[0], torch.where(torch.rand(rows, device=DEVICE) < 0.8, ends.amax(0), 0)
    groups, share = heads
    query, key = normal(batch, groups * share, rows, width), normal(batch, groups, keys, width)
    check(Case(query, key, first, stop), TOLERANCE, TILE)


def test_even_attention_in_closed_form() -> None:
    rows = 40
    query, key = torch.zeros(1, 1, rows, 4, device=DEVICE), normal(1, 1, rows, 4)
    case = Case(query, key, *causal(rows))
    found = row_statistics(case.spans, None, case.near, tile=TILE)
    n = torch.arange(1, rows + 1, device=DEVICE).double()[None, None]
    assert found.entropy is not None
    assert found.distance is not None
    assert found.largest is not None
    assert_near(found.lse, n.log(), 1e-6, "lse")
    assert_near(found.entropy, n.log(), 1e-6, "entropy")
    assert_near(found.distance, (n - 1) / 2, 1e-6, "distance")
    assert_near(found.peak, 1 / n, 1e-6, "peak")
    assert found.largest.eq(0).all()
    later = (1 / n).flip(-1).cumsum(-1).flip(-1)
    assert_near(column_sums(case.spans, found.lse, TILE), later, 1e-6, "columns")


def test_ties_go_to_the_first_key() -> None:
    """Of equal keys in one tile and in two; a larger one that comes later wins."""
    key = torch.zeros(1, 1, 40, 2, device=DEVICE)
    key[0, 0, [5, 9, 30], 0] = 1.0
    key[0, 0, 35, 0] = 2.0
    case = Case(torch.ones(1, 1, 40, 2, device=DEVICE), key, *causal(40))
    found = row_statistics(case.spans, tile=TILE).largest
    assert found is not None
    wanted = [0] * 5 + [5] * 30 + [35] * 5
    assert found[0, 0].tolist() == wanted


def test_a_learned_sink_takes_its_share() -> None:
    rows, logit = 20, 1.5
    query, key = torch.zeros(1, 2, rows, 4, device=DEVICE), normal(1, 2, rows, 4)
    case = Case(query, key, *causal(rows))
    sinks = torch.tensor([logit, -1e4], device=DEVICE)
    found = row_statistics(case.spans, sinks, case.near, tile=TILE)
    n = torch.arange(1, rows + 1, device=DEVICE).double()
    wanted = torch.stack([n / (n + math.exp(logit)), torch.ones_like(n)])[None]
    assert_near(found.row_sums, wanted, 1e-6, "row sums")
    assert_near(found.peak, wanted / n, 1e-6, "peak")
    # A sink above every score by hundreds leaves nothing, and nothing overflows.
    found = row_statistics(case.spans, torch.tensor([500.0, 500.0], device=DEVICE), tile=TILE)
    assert found.row_sums.eq(0).all()
    assert found.entropy is not None
    assert found.entropy.eq(0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_large_scores_and_rubbish_in_hidden_keys() -> None:
    first, stop = padded(33)
    query, key = normal(2, 1, 33, 8) * 300, normal(2, 1, 33, 8)
    key[0, :, :5] = torch.nan
    key[1, :, 26:] = torch.inf
    case = Case(query, key, first, stop)
    # Scores reach 1,000, so a weight is known to 1,000 * 2^-22.
    check(case, 3e-4, TILE)


def test_what_is_not_asked_is_not_there() -> None:
    case = Case(normal(1, 1, 9, 4), normal(1, 1, 9, 4), *causal(9))
    found = row_statistics(case.spans, entropy=False, largest=False, tile=TILE)
    assert (found.entropy, found.distance, found.largest) == (None, None, None)
    assert_near(found.lse, case.lse(), TOLERANCE, "lse")


@settings(max_examples=60)
@given(
    rows=st.integers(1, 12),
    keys=st.integers(1, 20),
    size=st.integers(1, 8),
    seed=st.integers(0, 10_000),
)
def test_row_limits_cover(rows: int, keys: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, keys + 1, (1, rows), generator=generator).int()
    stop = torch.randint(0, keys + 1, (1, rows), generator=generator).int()
    if seed % 2:
        first, stop = first.sort().values, stop.sort().values
    for place, (low, high, whole_low, whole_high) in enumerate(
        row_limits(first, stop, keys, size)[0].tolist()
    ):
        own = range(place * size, min((place + 1) * size, keys))
        for t, (a, b) in enumerate(zip(first[0].tolist(), stop[0].tolist(), strict=True)):
            seen = [a <= s < b for s in own]
            assert low <= t < high or not any(seen)
            assert not whole_low <= t < whole_high or all(seen)


def test_limits_of_a_causal_map_are_tight() -> None:
    t = torch.arange(12).int()[None]
    found = row_limits(torch.zeros_like(t), t + 1, 12, 4)[0].tolist()
    assert found == [[0, 12, 3, 12], [4, 12, 7, 12], [8, 12, 11, 12]]
