"""Whether relevance is conserved in a model, and where it is not.

Under CP-LRP what the parts of the ledger took sums to what was explained, in any model whose steps
all have their rule. A step without one (a product in a fused kernel, a function nobody knows) makes
or loses relevance; then every module is watched, and the one where it happens is named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.hooks.backward.asked import CP_LRP
from attnlens.hooks.backward.relevances import relevances
from attnlens.hooks.backward.tally import Tally, alias, on_gradient
from attnlens.hooks.backward.within import mapped, tensors_in
from attnlens.hooks.session import Handle, Observer

TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.2}
"""Errors that rounding alone may make in the half types, whose sums of thousands lose digits."""
FLOAT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Conservation:
    """The conservation check of one model, made on one input."""

    error: float
    """Largest difference between what was explained and the ledger's sum, against the larger of
    what was explained and the parts."""
    tolerance: float
    module: str
    """The module in which most relevance is made or lost; "" where the check closes."""
    kind: str
    """The class of that module."""

    @property
    def closes(self) -> bool:
        """Whether the ledger sums to what was explained."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        if self.closes:
            return f"relevance is conserved (error {self.error:.1e})"
        return (
            f"relevance is not conserved (error {self.error:.1e}): {self.module} "
            f"({self.kind}) makes or loses it"
        )


def check_conservation(
    model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any]
) -> Conservation:
    """Propagate the model's largest output on an input by CP-LRP and compare the sums."""
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, FLOAT_TOLERANCE)
    inputs = _one_prompt(inputs)
    # Prompts that cannot be told apart (images of any number of patches) are summed.
    together = replace(Tally.of(model, inputs), batch=1)
    error = relevances(model, anatomy, inputs, _largest, CP_LRP, tally=together).error
    if float(error.max()) <= tolerance:
        return Conservation(float(error.max()), tolerance, "", "")
    tally = replace(together, sums={})
    balance = _Balance(tally)
    relevances(model, anatomy, inputs, _largest, CP_LRP, [balance], tally=tally)
    name = balance.worst()
    kind = type(model.get_submodule(name)).__name__
    return Conservation(float(error.max()), tolerance, name or "the model itself", kind)


def _one_prompt(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first prompt, where every tensor has a row for each."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    if len({value.shape[0] for value in tensors}) != 1:
        return dict(inputs)
    return {n: v[:1] if isinstance(v, Tensor) and v.ndim else v for n, v in inputs.items()}


def _largest(output: Any) -> Tensor:
    """The largest number of each prompt's last row of output."""
    first = tensors_in(output)[0]
    return first.reshape(first.shape[0], -1, first.shape[-1])[:, -1].amax(-1)


class _Balance(Observer):
    """Observer that compares what every module is handed with what it hands on."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._within: dict[str, str] = {}
        self._sums: dict[str, float] = defaultdict(float)
        """Relevance of a module's outputs less that of its inputs."""
        self._tables: set[str] = set()

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks before and after every module."""
        handles: list[Handle] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                self._tables.add(name)  # relevance ends there
            handles += [
                module.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                module.register_forward_hook(self._leave(name)),
            ]
        return handles

    def _enter(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            running = self._tally.modules
            if running:
                self._within[name] = running[-1]
            running.append(name)
            return mapped(args, lambda x: self._own(name, x)), mapped(
                kwargs, lambda x: self._own(name, x)
            )

        return hook

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """An input for this module alone, whose relevance is what the module hands down."""
        if not tensor.requires_grad:
            return tensor
        own = alias(tensor)
        on_gradient(own, self._count(name, own, -1.0))
        return own

    def _leave(self, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            self._tally.modules.pop()
            return mapped(output, lambda x: self._handed(name, x))

        return hook

    def _handed(self, name: str, tensor: Tensor) -> Tensor:
        """An output for those outside alone: the module may use what it returns itself."""
        if not tensor.requires_grad:
            return tensor
        handed = alias(tensor)
        on_gradient(handed, self._count(name, handed, 1.0))
        return handed

    def _count(self, name: str, tensor: Tensor, sign: float) -> Callable[[Tensor], None]:
        values = tensor.detach()

        def seen(gradient: Tensor) -> None:
            self._sums[name] += sign * float((values.double() * gradient.double()).sum())

        return seen

    def worst(self) -> str:
        """The module that by itself, without those inside it, makes or loses most."""
        kept = {name: float(values.sum()) for name, values in self._tally.inside.items()}
        scale = self._tally.scale
        lost = {name: total / scale - kept.get(name, 0.0) for name, total in self._sums.items()}
        own = dict(lost)
        for name, around in self._within.items():
            own[around] = own.get(around, 0.0) - lost.get(name, 0.0)
        candidates = [name for name in own if name not in self._tables]
        return max(candidates, key=lambda name: abs(own[name]))
