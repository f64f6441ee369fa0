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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlens.hooks.backward.asked import Asked, Function
from attnlens.hooks.backward.norms import batch_norm, group_norm, layer_norm, normalize, rms_norm
from attnlens.hooks.backward.products import attention, gated, product, quotient, softmax
from attnlens.hooks.backward.ratios import elementwise, in_place, statistic
from attnlens.hooks.backward.sums import (
    added,
    addmm,
    chosen,
    convolution,
    functions,
    joined,
    linear,
    written,
)

_TABLE: list[tuple[Callable[[Asked], Any], list[Function]]] = [
    (elementwise, functions(
        "relu", "relu6", "gelu", "silu", "tanh", "erf", "sin", "cos", "exp", "exp2", "expm1", "log",
        "log1p", "sigmoid", "logsigmoid", "hardsigmoid", "hardswish", "hardtanh", "softplus",
        "softsign", "mish", "elu", "selu", "celu", "leaky_relu", "pow", "square", "abs", "tan",
        "asinh", "atan", "__pow__", "expit", "clamp", "clip", "clamp_min", "clamp_max",
    )),
    (in_place, functions(
        "relu_", "tanh_", "sigmoid_", "exp_", "pow_", "clamp_", "clip_", "clamp_min_",
        "clamp_max_",
    )),
    (statistic, functions(
        "rsqrt", "sqrt", "reciprocal", "var", "std", "var_mean", "std_mean", "norm", "vector_norm",
        "logsumexp", "log_softmax", "softmin", "cosine_similarity", "__rpow__", "__rtruediv__",
        "__rdiv__",
    )),
    (product, functions(
        "mul", "multiply", "__mul__", "__rmul__", "__imul__", "mul_", "matmul", "__matmul__",
        "__rmatmul__", "bmm", "mm", "mv", "dot", "inner", "outer", "einsum",
    )),
    (quotient, functions("div", "divide", "true_divide", "__truediv__", "__itruediv__", "div_")),
    (added, functions(
        "add", "__add__", "__radd__", "__iadd__", "add_", "sub", "subtract", "__sub__", "__isub__",
        "sub_", "__rsub__", "rsub",
    )),
    (linear, [F.linear]),
    (addmm, functions("addmm", "baddbmm")),
    (convolution, [F.conv1d, F.conv2d, F.conv3d]),
    (layer_norm, [F.layer_norm, torch.layer_norm]),
    (rms_norm, [F.rms_norm, torch.rms_norm]),
    (group_norm, [F.group_norm]),
    (batch_norm, [F.batch_norm]),
    (normalize, [F.normalize]),
    (softmax, functions("softmax")),
    (attention, [F.scaled_dot_product_attention]),
    (gated, [F.glu]),
    (joined, functions("cat", "concat", "concatenate")),
    (written, [Tensor.__setitem__]),
    (chosen, functions("where")),
]  # fmt: skip
RULES: dict[Function, Callable[[Asked], Any]] = {
    function: rule for rule, functions in _TABLE for function in functions
}
"""The rule of each torch function that has one."""
