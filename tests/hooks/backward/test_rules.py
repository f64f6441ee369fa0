"""The rules, a torch function at a time: input and constants sum to the value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from attnlens.hooks.backward import ATTNLRP, CP_LRP, MixedPromptsError, Rule
from attnlens.hooks.backward.mode import Rules, activations
from attnlens.hooks.backward.tally import Tally

WIDTH = 6
CONSTANT = torch.linspace(-2, 3, WIDTH, dtype=torch.float64)
SQUARE = torch.linspace(-1, 2, WIDTH * WIDTH, dtype=torch.float64).view(WIDTH, WIDTH)


def propagated(
    run: Callable[[Tensor], Tensor], x: Tensor, rule: Rule = ATTNLRP
) -> tuple[float, Tensor, dict[str, float]]:
    """The sum of what a function returns, the relevance of its input, and the tally."""
    tally = Tally(1, frozenset())
    x = x.detach().clone().requires_grad_()
    with Rules(rule, tally):
        y = run(x * 1)  # which functions may write over
    (gradient,) = torch.autograd.grad(y.sum(), x)
    sums = {name: float(total) for name, total in tally.sums.items()}
    return float(y.detach().sum()), (x * gradient).detach(), sums


def numbers(seed: int, rows: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=draw, dtype=torch.float64)


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, SQUARE, CONSTANT),
    "addmm": lambda x: torch.addmm(CONSTANT, x, SQUARE, beta=3, alpha=2),
    "baddbmm": lambda x: torch.baddbmm(
        SQUARE[:1, :1], x[None], (x.mT @ x)[None], beta=2, alpha=0.1
    )[0],
    "convolution": lambda x: F.conv1d(x[:, None], SQUARE[:2, None, :3], CONSTANT[:2]).flatten(1)[
        :, :WIDTH
    ],
    "product": lambda x: x * (x @ SQUARE),
    "three factors": lambda x: torch.einsum("ij,kj,kl->il", x, x, x),
    "square": lambda x: x**2,
    "cube": lambda x: torch.pow(x, 3),
    "in place": lambda x: x.mul_(x @ SQUARE) + 0,
    "quotient": lambda x: x / (x.square().mean(-1, keepdim=True) + 1),
    "by a constant": lambda x: torch.div(input=x, other=CONSTANT + 3),
    "plus": lambda x: x + CONSTANT,
    "alpha": lambda x: torch.add(x, CONSTANT, alpha=3),
    "minus": lambda x: x - CONSTANT,
    "less alpha": lambda x: torch.sub(x, CONSTANT, alpha=0.5),
    "from": lambda x: CONSTANT - x,
    "from a number": lambda x: 1 - x,
    "reversed": lambda x: torch.rsub(x, CONSTANT, alpha=2),
    "named": lambda x: torch.sub(input=CONSTANT, other=x),
    "written over": lambda x: x.add_(2.0).sub_(CONSTANT),
    "joined": lambda x: torch.cat([SQUARE[:2], x, SQUARE[2:3]], dim=0)[1:5],
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,), CONSTANT, CONSTANT),
    "rms norm": lambda x: F.rms_norm(x, (WIDTH,), CONSTANT),
    "norm by hand": lambda x: CONSTANT * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "group norm": lambda x: F.group_norm(x, 2, CONSTANT, CONSTANT),
    "batch norm": lambda x: F.batch_norm(x, CONSTANT, CONSTANT.abs() + 1, CONSTANT, CONSTANT),
    "length": lambda x: F.normalize(x, dim=-1),
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu by hand": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: F.silu(x),
    "tanh": torch.tanh,
    "sigmoid gate": lambda x: x * torch.sigmoid(x @ SQUARE),
    "gated": lambda x: F.glu(torch.cat([x, x @ SQUARE], -1), -1),
    "bounds": lambda x: x.clamp(-CONSTANT.abs(), CONSTANT.abs()),
    "soft cap": lambda x: 3 * torch.tanh(x / 3),
    "shifted": lambda x: x.roll(1, 0).flip(-1) + x,
    "in float32": lambda x: x.float().double(),
}


@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    rule=st.sampled_from([ATTNLRP, CP_LRP]),
)
def test_chains_of_steps_conserve(names: list[str], seed: int, rule: Rule) -> None:
    def chain(x: Tensor) -> Tensor:
        for name in names:
            y = STEPS[name](x)
            x = x + y / (1 + y.detach().abs().max())  # a residual sum of bounded steps
        return x

    value, relevance, sums = propagated(chain, numbers(seed), rule)
    parts = [float(relevance.sum()), *sums.values()]
    # What goes through float32 keeps its digits.
    digits = 1e-6 if "in float32" in names else 1e-12
    assert value == pytest.approx(sum(parts), abs=digits * (1 + max(map(abs, parts))))


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_conserves(name: str) -> None:
    value, relevance, sums = propagated(STEPS[name], numbers(1))
    parts = [float(relevance.sum()), *sums.values()]
    digits = 1e-6 if "float32" in name else 1e-12
    assert value == pytest.approx(sum(parts), abs=digits * (1 + max(map(abs, parts))))


@pytest.mark.parametrize("name", ["from", "alpha", "less alpha", "from a number"])
def test_a_constant_keeps_what_it_adds(name: str) -> None:
    x = numbers(2)
    _, relevance, sums = propagated(STEPS[name], x)
    linear = x if "alpha" in name else -x
    assert torch.allclose(relevance, linear)
    added = {"from": 4 * CONSTANT.sum(), "alpha": 12 * CONSTANT.sum(),
             "less alpha": -2 * CONSTANT.sum(), "from a number": 4 * WIDTH}  # fmt: skip
    assert sums == {"biases": pytest.approx(float(added[name]))}


def test_factors_share_evenly() -> None:
    x, parts = numbers(3), {}

    def run(x: Tensor) -> Tensor:
        a, b = x[:2] * 1, x[2:] * 1
        a.register_hook(lambda g: parts.update(a=float((g * a).sum().detach())))
        b.register_hook(lambda g: parts.update(b=float((g * b).sum().detach())))
        return a @ b.mT

    value, _, _ = propagated(run, x)
    assert parts == {"a": pytest.approx(value / 2), "b": pytest.approx(value / 2)}


def test_a_softmax_is_a_constant_under_cp_lrp_alone() -> None:
    value, relevance, sums = propagated(lambda x: x.softmax(-1) * CONSTANT, numbers(4))
    assert value == pytest.approx(float(relevance.sum()) + sums["softmax"])
    assert relevance.abs().max() > 1e-3
    both: Callable[[Tensor], Tensor] = lambda x: x.softmax(-1) * x  # noqa: E731
    value, relevance, sums = propagated(both, numbers(4), CP_LRP)
    assert torch.allclose(relevance, (numbers(4).softmax(-1) * numbers(4)))
    assert sums == {}
    value, relevance, sums = propagated(both, numbers(4))
    # Taylor at the softmax: R_i = x_i (R_i - s_i sum_j R_j), with half of the product each.
    s, x = numbers(4).softmax(-1), numbers(4)
    half = s * x / 2
    expected = half + x * (half - s * half.sum(-1, keepdim=True))
    assert torch.allclose(relevance, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_fused_kernel_shares_as_its_steps_do(causal: bool, grouped: bool) -> None:
    draw = torch.Generator().manual_seed(5)
    maps = [torch.randn(3, 8, size, generator=draw).double() for size in (4, 4, 5)]
    if grouped:
        maps[1], maps[2] = maps[1][:1], maps[2][:1]
        maps[0] = maps[0][:2]
    x = torch.randn(1, 1, 7, 8, generator=draw).double()

    def fused(x: Tensor) -> Tensor:
        q, k, v = (x @ weight for weight in maps)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    def steps(x: Tensor) -> Tensor:
        q, k, v = (x @ weight for weight in maps)
        if grouped:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.mT / 2
        if causal:
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ v

    for rule in (ATTNLRP, CP_LRP):
        expected, found = propagated(steps, x, rule), propagated(fused, x, rule)
        assert torch.allclose(found[1], expected[1], atol=1e-12)
        assert found[2] == pytest.approx(expected[2], abs=1e-12)
        assert found[0] == pytest.approx(float(found[1].sum()) + sum(found[2].values()))


ZERO = {F.silu: 0.5, F.gelu: 0.5, torch.tanh: 1.0, F.relu: 0.0, F.mish: 0.6}


@pytest.mark.parametrize("function", ZERO, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_f_of_x_over_x_has_its_limit_at_zero(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    kind = torch.finfo(dtype)
    # Numbers below the normal ones; in half types 3 steps from 0, where f(x) itself has no digit.
    smallest = kind.smallest_normal * (3 * kind.eps if kind.bits == 16 else 0.125)
    values = torch.tensor([0.0, -0.0, smallest, -smallest, 1e-3, -1e-3, 4.0, -4.0], dtype=dtype)
    x = values.clone().requires_grad_()
    with Rules(ATTNLRP, Tally(1, frozenset())):
        y = function(x)
    (ratio,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, function(values))
    assert torch.isfinite(ratio).all()
    # As many digits as the dtype has, and float32's zero limit for float64.
    rough = max(2 * torch.finfo(dtype).eps, 1e-7)
    assert ratio[:2].double().tolist() == pytest.approx([ZERO[function]] * 2, abs=rough)
    exact = (function(values[4:].double()) / values[4:].double()).tolist()
    assert ratio[4:].double().tolist() == pytest.approx(exact, abs=2 * rough)
    if function is not F.relu:  # whose two sides differ
        assert ratio[2:4].double().tolist() == pytest.approx([ZERO[function]] * 2, abs=2 * rough)


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_activation_modules_are_one_function_of_a_number(name: str) -> None:
    module = nn.Sequential(ACT2FN[name]).double().eval()
    x = numbers(7, rows=1)
    x[0, 0] = 0
    rules = Rules(ATTNLRP, Tally(1, frozenset()))
    before = [vars(each).get("forward") for each in module.modules()]
    handles = activations(module, rules)
    leaf = x.clone().requires_grad_()
    with rules:
        y = module(leaf * 1)
    for handle in handles:
        handle.remove()
    assert [vars(each).get("forward") for each in module.modules()] == before
    assert torch.allclose(y, module(x))
    if not y.requires_grad:  # f(0) is not 0
        assert module(torch.zeros(1).double()).abs() > 1e-4
        return
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.allclose(gradient[0, 1:] * x[0, 1:], y[0, 1:], atol=1e-12)
    assert gradient.abs().max() < 10


def test_a_function_that_misses_zero_by_its_epsilon_has_its_slope_there() -> None:
    x = torch.tensor([0.0, 2.0]).requires_grad_()
    with Rules(ATTNLRP, Tally(1, frozenset())):
        y = torch.clamp(x, min=1e-5)
    (ratio,) = torch.autograd.grad(y.sum(), x)
    assert ratio.tolist() == [0.0, 1.0]


def test_what_has_no_zero_at_zero_is_a_constant() -> None:
    for function in (torch.sigmoid, torch.exp, torch.cos, lambda x: 2.0**x, lambda x: 1 / (x + 5)):
        value, relevance, _ = propagated(lambda x, f=function: f(x) * x, numbers(6))
        assert float(relevance.sum()) == pytest.approx(value)
        assert torch.allclose(relevance, function(numbers(6)) * numbers(6))


def test_numbers_and_bounds_that_are_tensors_are_no_error() -> None:
    for function in (
        lambda x: torch.pow(2.0, x),
        lambda x: x.clamp(min=CONSTANT),
        lambda x: torch.pow(x.abs(), CONSTANT.abs()),
    ):
        value, relevance, _ = propagated(lambda x, f=function: f(x) * x, numbers(6))
        assert torch.isfinite(relevance).all()
        assert float(relevance.sum()) == pytest.approx(value)


def test_rules_hold_inside_their_block_alone() -> None:
    x = numbers(8).requires_grad_()
    plain = torch.autograd.grad((F.silu(x) * x).sum(), x)[0]
    rules = Rules(ATTNLRP, Tally(1, frozenset()))
    with rules:
        changed = torch.autograd.grad((F.silu(x) * x).sum(), x)[0]
        with rules.paused():
            paused = torch.autograd.grad((F.silu(x) * x).sum(), x)[0]
    after = torch.autograd.grad((F.silu(x) * x).sum(), x)[0]
    assert torch.equal(paused, plain)
    assert torch.equal(after, plain)
    assert not torch.allclose(changed, plain)


def test_parameters_are_constants() -> None:
    linear = nn.Linear(WIDTH, WIDTH).double()
    x = numbers(9).requires_grad_()
    with Rules(ATTNLRP, Tally(1, frozenset())):
        assert not linear(numbers(9)).requires_grad
        linear(x).sum().backward()
    assert linear.weight.grad is None
    assert linear.weight.requires_grad


def test_rows_of_several_prompts_are_told_apart_or_refused() -> None:
    tally = Tally(2, frozenset({3}))
    rows = torch.arange(12.0).reshape(2, 3, 2)
    expected = rows.double().sum((1, 2))
    assert torch.equal(tally.by_prompt(rows), expected)
    assert torch.equal(tally.by_prompt(rows.flatten(0, 1)), expected)
    with pytest.raises(MixedPromptsError):
        tally.by_prompt(rows.flatten(0, 1)[:5])
    assert Tally(1, frozenset()).by_prompt(rows.flatten(0, 1)[:5]) == rows.flatten(0, 1)[:5].sum()
