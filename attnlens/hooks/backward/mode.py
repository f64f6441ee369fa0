"""The rules of a backward pass, in force for the code that runs inside a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnlens.hooks.backward.asked import Asked, Rule, depends
from attnlens.hooks.backward.ratios import ratio
from attnlens.hooks.backward.rules import RULES
from attnlens.hooks.backward.tally import Tally
from attnlens.hooks.replaced import Replaced


class Rules(TorchFunctionMode):
    """A forward inside is recorded so that its backward pass propagates relevance.

    Every torch function that the code of this thread calls is looked up in the table of rules. The
    model's parameters are constants, so no gradient of theirs is computed or stored. Nothing of the
    model changes; what runs outside is as ever.
    """

    def __init__(self, rule: Rule, tally: Tally) -> None:
        super().__init__()
        self._rule = rule
        self._tally = tally
        self._paused = False

    @contextmanager
    def paused(self) -> Generator[None]:
        """A block in which torch's own backward rules hold."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one torch function by its rule."""
        kwargs = kwargs or {}
        if self._paused or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        args = [_frozen(arg) for arg in args]
        kwargs = {name: _frozen(value) for name, value in kwargs.items()}
        rule = RULES.get(func)
        if rule is None or not (_any_depends(args) or _any_depends(kwargs.values())):
            return func(*args, **kwargs)
        return rule(Asked(self._rule, self._tally, func, args, kwargs))


def _frozen(value: Any) -> Any:
    """Parameters as constants, in lists too."""
    if isinstance(value, nn.Parameter):
        return value.detach()
    if isinstance(value, (list, tuple)) and any(isinstance(part, nn.Parameter) for part in value):
        return [_frozen(part) for part in value]
    return value


def _any_depends(values: Iterable[Any]) -> bool:
    return any(
        depends(value) or (isinstance(value, (list, tuple)) and any(map(depends, value)))
        for value in values
    )


_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
# No functions of one number; a PReLU, whose slopes are weights, is linear on either side of 0.
_PLAIN = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.GLU, nn.PReLU)


def activations(model: nn.Module, rules: Rules) -> list[Replaced]:
    """Handles of a model's activation modules, each run as one function `f(x)` of a number.

    Their code may be written out in products and powers, for which the rules are others.
    """
    return [
        Replaced(module, _as_one(module, rules))
        for module in model.modules()
        if type(module).__module__ in _ACTIVATIONS and not isinstance(module, _PLAIN)
    ]


def _as_one(module: nn.Module, rules: Rules) -> Callable[[Tensor], Tensor]:
    own: Callable[[Tensor], Tensor] = module.forward
    inplace = bool(getattr(module, "inplace", False))

    def forward(x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and depends(x)):
            return own(x)
        with rules.paused():
            return ratio((lambda value: own(value.clone())) if inplace else own, x)

    return forward
