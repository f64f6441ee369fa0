"""One door to every attribution method."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

from attnlens.analyses.attribution import Attribution
from attnlens.analyses.target import TargetSpec
from attnlens.errors import InputError
from attnlens.lens import Inputs, Lens

# Where each method's function `(lens, inputs, target, **settings) -> Attribution` lives.
_METHODS = {
    "attnlrp": "attnlens.analyses.relevance.attnlrp",
    "cp_lrp": "attnlens.analyses.relevance.cp_lrp",
    "input_gradient": "attnlens.analyses.input_gradient.input_gradient",
    "integrated_gradients": "attnlens.analyses.input_gradient.integrated_gradients",
    "attention_gradient": "attnlens.analyses.attention_gradient.attention_gradient",
    "attention_saliency": "attnlens.analyses.attention_gradient.attention_saliency",
    "chefer": "attnlens.analyses.chefer.chefer",
    "chefer_lrp": "attnlens.analyses.chefer_lrp.chefer_lrp",
    "rollout": "attnlens.analyses.rollout_attribution.rollout_attribution",
    "attention_flow": "attnlens.analyses.flow_attribution.flow_attribution",
    "gradient_rollout": "attnlens.analyses.gradient_rollout.gradient_rollout",
    "routes": "attnlens.analyses.routes.route_scores",
    "value_norms": "attnlens.analyses.value_norms.value_norms",
    "logit_flow": "attnlens.analyses.logit_flow.logit_flow",
    "leave_one_out": "attnlens.analyses.erasure.leave_one_out",
    "random": "attnlens.analyses.erasure.random_attribution",
}
METHODS = tuple(_METHODS)
"""Names of the methods that `attribute` knows."""


def attribute(
    lens: Lens,
    inputs: Inputs,
    target: TargetSpec = None,
    method: str = "attnlrp",
    **settings: Any,
) -> Attribution:
    """Score the input tokens for a target: a token, a pair of tokens, a `Target`, a function.

    `settings` are those of the method's own function, which `METHODS` names.

    Raises:
        InputError: no such method, or a setting that it does not have.

    """
    function = method_of(method)
    known = list(signature(function).parameters)[3:]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise InputError(
            f"The method {method} has another signature: there is no {', '.join(unknown)}. Its "
            f"settings are: {', '.join(known) or 'none'}."
        )
    return function(lens, inputs, target, **settings)


def method_of(name: str) -> Callable[..., Attribution]:
    """The function of a method; InputError where there is none of that name."""
    if name not in _METHODS:
        raise InputError(f"There is no attribution method {name!r}; there is {', '.join(METHODS)}.")
    module, _, function = _METHODS[name].rpartition(".")
    return getattr(import_module(module), function)
