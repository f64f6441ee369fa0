"""Rotary rules recognised in channels that were turned by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnlens.anatomy.rotary import Rotary, Table, recognise, rules, still

SHIFTS = (3, 40)


def table(pairs: int, theta: float = 10000.0) -> Table:
    return Table(f"inv_freq_{theta}", theta ** -(torch.arange(pairs).double() / pairs))


def turned(x: Tensor, pairs: list[tuple[int, int]], frequencies: Tensor, shift: int) -> Tensor:
    """Complex multiplication, pair by pair."""
    y = x.clone()
    for (a, b), f in zip(pairs, frequencies.tolist(), strict=True):
        z = torch.complex(x[:, a], x[:, b]) * complex(math.cos(f * shift), math.sin(f * shift))
        y[:, a], y[:, b] = z.real, z.imag
    return y


def normal(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    pairs=st.integers(2, 8),
    rest=st.sampled_from([0, 1, 5]),
    layout=st.sampled_from(["half", "interleaved"]),
    last=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_rule_is_recognised(pairs: int, rest: int, layout: str, last: bool, seed: int) -> None:
    first = rest if last else 0
    if layout == "half":
        partners = [(first + i, first + pairs + i) for i in range(pairs)]
    else:
        partners = [(first + 2 * i, first + 2 * i + 1) for i in range(pairs)]
    x, used, other = normal(6, 2 * pairs + rest, seed), table(pairs), table(pairs, 300.0)
    shifted = {shift: turned(x, partners, used.frequencies, shift) for shift in SHIFTS}
    found = recognise(x, shifted, [other, used])
    assert (found.layout, found.table) == (layout, used.name)
    assert found.error < 1e-12
    wanted = dict.fromkeys(range(2 * pairs + rest), 0.0)
    for (a, b), f in zip(partners, used.frequencies.tolist(), strict=True):
        wanted[a] = wanted[b] = f
        assert (int(found.partner[a]), int(found.partner[b])) == (b, a)
    assert found.frequencies.tolist() == list(wanted.values())


def test_a_wavelength_is_a_full_turn() -> None:
    (rule, *_) = rules(8, [table(4)])
    x = normal(3, 8)
    assert rule.wavelengths[0] == pytest.approx(2 * math.pi)
    for channel in range(8):
        moved = rule.turn(x, float(rule.wavelengths[channel]))
        torch.testing.assert_close(moved[:, channel], x[:, channel], rtol=0, atol=1e-9)


def test_what_stays_does_not_turn() -> None:
    x = normal(4, 8)
    found = recognise(x, dict.fromkeys(SHIFTS, x), [table(4)])
    assert found.layout == "none"
    assert found.frequencies.eq(0).all()
    assert found.wavelengths.isinf().all()


def test_what_no_table_explains_is_unknown() -> None:
    x, pairs = normal(4, 8), [(0, 4), (1, 5), (2, 6), (3, 7)]
    other = table(4, 300.0).frequencies
    shifted = {shift: turned(x, pairs, other, shift) for shift in SHIFTS}
    found = recognise(x, shifted, [table(4)])
    assert found.layout == "unknown"
    assert found.frequencies.isnan().all()
    noise = {shift: normal(4, 8, seed=shift) for shift in SHIFTS}
    assert recognise(x, noise, [table(4)]).layout == "unknown"


def test_two_rules_that_say_the_same_are_told_apart_by_neither() -> None:
    """Tables too close to be told apart at these shifts: unknown, not a guess."""
    used = table(4)
    near = Table("near", used.frequencies * (1 + 1e-9))
    x, pairs = normal(4, 8), [(0, 4), (1, 5), (2, 6), (3, 7)]
    noise = 1e-3 * normal(4, 8, seed=5)
    shifted = {s: turned(x, pairs, used.frequencies, s) + noise for s in SHIFTS}
    assert recognise(x, shifted, [used]).layout == "half"
    assert recognise(x, shifted, [used, near]).layout == "unknown"


def test_a_table_wider_than_the_head_is_passed_over() -> None:
    assert list(rules(4, [table(4)])) == []
    assert isinstance(still(4, "unknown"), Rotary)
