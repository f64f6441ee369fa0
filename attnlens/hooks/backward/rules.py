"""The backward rules of relevance propagation, a torch function at a time.

Relevance is `value x gradient` under changed gradients (Achtibat et al. 2024, AttnLRP):

    linear y = W x + b          plain; b keeps b x gradient
    product of two that depend on the input (A V, Q K^T, gate x up)     half to each
    softmax                     plain (AttnLRP), or a constant (CP-LRP, Ali et al. 2022)
    f(x) of one number          f(x) / x as a constant where f(0) = 0, else f(x) as a constant
    statistics of norms         constants; the mean that a LayerNorm takes off is linear
    sums, selections            plain

A rule is found by the function that a model's code calls, whatever its architecture. What is no
rule goes the plain way, and the ledger tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlens.hooks.backward.tally import Tally, alias, on_gradient, scaled

Function = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """Which rules a backward pass follows."""

    name: str
    through_patterns: bool
    """Whether relevance flows through softmaxes, to queries and keys, or they are constants."""


ATTNLRP = Rule("attnlrp", through_patterns=True)
CP_LRP = Rule("cp_lrp", through_patterns=False)


@dataclass(frozen=True)
class Asked:
    """One call of a torch function under a rule."""

    rule: Rule
    tally: Tally
    function: Function
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def plain(self) -> Any:
        """What the function returns."""
        return self.function(*self.args, **self.kwargs)

    def constant(self) -> Any:
        """What the function returns, cut off from the input."""
        with torch.no_grad():
            return self.plain()

    def argument(self, place: int, name: str) -> Any:
        """An argument by its place or name; None where it was not given."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name)


def depends(value: Any) -> bool:
    """Whether a value depends on the input of the model."""
    return isinstance(value, Tensor) and value.requires_grad


def is_constant(value: Any) -> bool:
    """Whether a value is a number, or numbers, that no input changes."""
    if isinstance(value, Tensor):
        return not value.requires_grad and (value.is_floating_point() or value.is_complex())
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Ratio(torch.autograd.Function):
    """`f(x)`, in whose gradient `f(x) / x` stands for the slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function, at_zero: float) -> Tensor:
        y = function(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        above = y if wide == x.dtype else function(x.to(wide))
        ratio = torch.where(x == 0, at_zero, above / x.to(wide)).to(x.dtype)
        ctx.save_for_backward(ratio)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return gradients[0] * ratio, None, None


def ratio(function: Function, x: Tensor) -> Tensor:
    """`f(x)` of each number with `f(x) / x` as a constant; a constant where `f(0)` is not 0."""
    with torch.enable_grad():
        zero = torch.zeros(1, dtype=torch.float32, device=x.device, requires_grad=True)
        at_zero = function(zero)
        if float(at_zero.detach()) != 0:
            return function(x.detach())
        (slope,) = torch.autograd.grad(at_zero.sum(), zero)
    return _Ratio.apply(x, function, float(slope))


class _LayerNorm(torch.autograd.Function):
    """LayerNorm whose standard deviation is a constant; the mean that it takes off is linear."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        y, _, inverse = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.axes = tuple(range(-len(shape), 0))
        ctx.save_for_backward(inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        inverse, weight = ctx.saved_tensors
        gradient = gradients[0] if weight is None else gradients[0] * weight
        gradient = gradient - gradient.mean(ctx.axes, keepdim=True)
        return (gradient * inverse).to(gradients[0].dtype), None, None, None, None


def _elementwise(asked: Asked) -> Any:
    x = asked.args[0] if asked.args else asked.kwargs["input"]
    rest = {name: value for name, value in asked.kwargs.items() if name not in ("input", "inplace")}
    return ratio(lambda value: asked.function(value, *asked.args[1:], **rest), x)


def _statistic(asked: Asked) -> Any:
    return asked.constant()


def _product(asked: Asked) -> Any:
    """Each of n factors that depend on the input gets 1/n."""
    given = asked.args if len(asked.args) > 1 else [*asked.args, *asked.kwargs.values()]
    factors = [
        part for each in given for part in (each if isinstance(each, (list, tuple)) else [each])
    ]
    count = sum(map(depends, factors))
    found = asked.plain()
    return scaled(found, 1 / count) if count > 1 else found


def _quotient(asked: Asked) -> Any:
    """What divides is a statistic."""
    args = [
        arg.detach() if place == 1 and depends(arg) else arg for place, arg in enumerate(asked.args)
    ]
    kwargs = {n: v.detach() if n == "other" and depends(v) else v for n, v in asked.kwargs.items()}
    return asked.function(*args, **kwargs)


def _sum(asked: Asked) -> Any:
    """A constant that is added keeps its share."""
    found = asked.plain()
    if not depends(found):
        return found
    terms = [*asked.args[:2], *(asked.kwargs[n] for n in ("input", "other") if n in asked.kwargs)]
    sign = -1.0 if asked.function in _DIFFERENCES else 1.0
    for place, term in enumerate(terms):
        if is_constant(term) and not _hides(term):
            signed = term if place == 0 and asked.function not in _REVERSED else sign * term
            on_gradient(found, asked.tally.constant(_kind(term), signed))
    return found


def _hides(constant: Tensor | float) -> bool:
    """Whether a constant is a mask of scores, whose hidden places no gradient reaches."""
    if not isinstance(constant, Tensor) or constant.ndim < 4:
        return False
    return bool(((constant == 0) | (constant < _HIDDEN)).all())


def _kind(constant: Tensor | float) -> str:
    """Constants that differ from position to position are positions, others biases."""
    if not isinstance(constant, Tensor) or constant.ndim < 2:
        return "biases"
    return "positions" if constant.shape[-2] > 1 else "biases"


def _linear(asked: Asked) -> Any:
    return _with_bias(asked, asked.argument(2, "bias"))


def _addmm(asked: Asked) -> Any:
    return _with_bias(asked, asked.argument(0, "input"))


def _convolution(asked: Asked) -> Any:
    bias = asked.argument(2, "bias")
    return _with_bias(
        asked, None if bias is None else bias.reshape(-1, *[1] * _SPACE[asked.function])
    )


def _with_bias(asked: Asked, bias: Tensor | None) -> Any:
    found = asked.plain()
    if depends(found) and bias is not None and not depends(bias):
        on_gradient(found, asked.tally.constant("biases", bias))
    return found


def _layer_norm(asked: Asked) -> Any:
    x, shape = asked.argument(0, "input"), asked.argument(1, "normalized_shape")
    weight, bias = asked.argument(2, "weight"), asked.argument(3, "bias")
    eps = asked.argument(4, "eps")
    found = _LayerNorm.apply(x, tuple(shape), weight, bias, 1e-5 if eps is None else eps)
    if bias is not None:
        on_gradient(found, asked.tally.constant("biases", bias))
    return found


def _rms_norm(asked: Asked) -> Any:
    x, shape = asked.argument(0, "input"), asked.argument(1, "normalized_shape")
    weight, eps = asked.argument(2, "weight"), asked.argument(3, "eps")
    wide = torch.promote_types(x.dtype, torch.float32)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    axes = tuple(range(-len(shape), 0))
    inverse = (x.detach().to(wide).pow(2).mean(axes, keepdim=True) + eps).rsqrt()
    normed = x * inverse if weight is None else x * inverse * weight
    return normed.to(x.dtype)


def _normalize(asked: Asked) -> Any:
    """A vector over its length: the length is a statistic."""
    x = asked.argument(0, "input")
    found = asked.constant()
    inverse = torch.where(x == 0, 0, found / x).detach().nan_to_num(0, 0, 0)
    return x * inverse


def _softmax(asked: Asked) -> Any:
    if not asked.rule.through_patterns:
        return asked.constant()
    scores = alias(asked.argument(0, "input"))
    rest = {name: value for name, value in asked.kwargs.items() if name != "input"}
    found = asked.function(scores, *asked.args[1:], **rest)
    on_gradient(scores, asked.tally.share("softmax", scores, -1.0))
    on_gradient(found, asked.tally.share("softmax", found, 1.0))
    return found


def _attention(asked: Asked) -> Any:
    """A fused kernel: half to the values, a quarter to queries and keys each."""
    names = ("query", "key", "value", "attn_mask")
    query, key, value, mask = (asked.argument(place, name) for place, name in enumerate(names))
    rest = {name: given for name, given in asked.kwargs.items() if name not in names}
    rest |= dict(zip(("dropout_p", "is_causal"), asked.args[4:], strict=False))
    if not asked.rule.through_patterns:
        query, key = query.detach(), key.detach()
        mask = mask.detach() if isinstance(mask, Tensor) else mask
    elif depends(query) or depends(key):
        return _through_pattern(asked, query, key, value, mask, rest)
    return asked.function(query, key, value, mask, **rest)


def _through_pattern(
    asked: Asked, query: Tensor, key: Tensor, value: Tensor, mask: Any, rest: dict[str, Any]
) -> Tensor:
    tally = asked.tally
    query, key = alias(query), alias(key)
    mask = alias(mask) if depends(mask) else mask
    found = asked.function(query, key, value, mask, **rest)
    both, values = sum(map(depends, (query, key))), depends(value)
    for part in (query, key, mask):
        if depends(part):
            if part is not mask:
                scaled(part, 1 / both)
            on_gradient(part, tally.share("softmax", part, -1.0))
    share = 0.5 if values else 1.0
    on_gradient(found, tally.share("softmax", found, share))
    return scaled(found, share)


def _gated(asked: Asked) -> Any:
    """`a x sigmoid(b)`: the gate is a constant."""
    x, axis = asked.argument(0, "input"), asked.argument(1, "dim")
    value, gate = x.chunk(2, -1 if axis is None else axis)
    return value * gate.detach().sigmoid()


def _joined(asked: Asked) -> Any:
    """Constants between what depends on the input (a class token) keep their share."""
    found = asked.plain()
    parts, axis = asked.argument(0, "tensors"), asked.argument(1, "dim") or 0
    if not depends(found):
        return found
    start = 0
    for part in parts:
        if is_constant(part) and part.numel():
            on_gradient(found, _within(asked.tally, part, axis, start))
        start += part.shape[axis]
    return found


def _within(tally: Tally, part: Tensor, axis: int, start: int) -> Callable[[Tensor], None]:
    seen, length = tally.constant("positions", part), part.shape[axis]
    return lambda gradient: seen(gradient.narrow(axis, start, length))


def _methods(*names: str) -> list[Function]:
    """Functions of these names, wherever torch has them."""
    homes = (torch, Tensor, F, torch.linalg, torch.special)
    return [getattr(home, name) for home in homes for name in names if hasattr(home, name)]


_HIDDEN = -1e4  # no score bias is as low
_DIFFERENCES = frozenset(
    _methods("sub", "subtract", "__sub__", "__isub__", "sub_", "__rsub__", "rsub")
)
_REVERSED = frozenset(_methods("__rsub__", "rsub"))
_SPACE = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}

_TABLE: list[tuple[Callable[[Asked], Any], list[Function]]] = [
    (_elementwise, _methods(
        "relu", "relu6", "gelu", "silu", "tanh", "erf", "sin", "cos", "exp", "exp2", "expm1", "log",
        "log1p", "sigmoid", "logsigmoid", "hardsigmoid", "hardswish", "hardtanh", "softplus",
        "softsign", "mish", "elu", "selu", "celu", "leaky_relu", "pow", "square", "abs", "tan",
        "asinh", "atan", "__pow__", "relu_", "tanh_", "sigmoid_", "expit",
    )),
    (_statistic, _methods(
        "rsqrt", "sqrt", "reciprocal", "var", "std", "var_mean", "std_mean", "norm", "vector_norm",
        "logsumexp", "log_softmax", "softmin", "cosine_similarity", "__rpow__", "__rtruediv__",
        "__rdiv__",
    )),
    (_product, _methods(
        "mul", "multiply", "__mul__", "__rmul__", "__imul__", "mul_", "matmul", "__matmul__",
        "__rmatmul__", "bmm", "mm", "mv", "dot", "inner", "outer", "einsum",
    )),
    (_quotient, _methods("div", "divide", "true_divide", "__truediv__", "__itruediv__", "div_")),
    (_sum, _methods(
        "add", "__add__", "__radd__", "__iadd__", "add_", "sub", "subtract", "__sub__", "__isub__",
        "sub_", "__rsub__", "rsub",
    )),
    (_linear, [F.linear]),
    (_addmm, _methods("addmm", "baddbmm")),
    (_convolution, list(_SPACE)),
    (_layer_norm, [F.layer_norm, torch.layer_norm]),
    (_rms_norm, [F.rms_norm, torch.rms_norm]),
    (_normalize, [F.normalize]),
    (_softmax, _methods("softmax")),
    (_attention, [F.scaled_dot_product_attention]),
    (_gated, [F.glu]),
    (_joined, _methods("cat", "concat", "concatenate")),
]  # fmt: skip
RULES: dict[Function, Callable[[Asked], Any]] = {
    function: rule for rule, functions in _TABLE for function in functions
}
"""The rule of each torch function that has one."""
