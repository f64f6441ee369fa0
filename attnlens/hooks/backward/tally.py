"""Sums of relevance by prompt, taken from gradients as the backward pass comes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

HALF_SCALE = 256.0
"""What gradients are multiplied by in float16, where small ones would be 0."""

Seen = Callable[[Tensor], None]


class MixedPromptsError(Exception):
    """Rows of a batch stand in an order in which prompts cannot be told apart (experts)."""


@dataclass
class Tally:
    """What each part took of the explained value, `batch` in float64, by the part's name."""

    batch: int
    positions: frozenset[int]
    """Positions of each side; a tensor of `batch x positions` rows holds prompts one by one."""
    scale: float = 1.0
    """What gradients are multiplied by on their way."""
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    inside: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The same for each module, of what was added while it ran; kept when `modules` is watched."""
    modules: list[str] = field(default_factory=list[str])
    """The modules that run now, the outermost first; filled by who wants `inside`."""

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any]) -> Tally:
        """An empty one for these inputs of a model."""
        tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
        lengths = frozenset(value.shape[1] for value in tensors if value.ndim > 1)
        half = next(model.parameters()).dtype == torch.float16
        return cls(tensors[0].shape[0], lengths, HALF_SCALE if half else 1.0)

    def add(self, name: str, products: Tensor, modules: Sequence[str] = ()) -> None:
        """Add products of values and gradients, of any shape that begins with prompts."""
        own = self.by_prompt(products)
        self.sums[name] = self.sums[name] + own if name in self.sums else own
        for module in modules:
            self.inside[module] = self.inside[module] + own if module in self.inside else own

    def by_prompt(self, products: Tensor) -> Float[Tensor, " batch"]:
        """Products summed over all but the prompts, in float64 and without the scale.

        Raises:
            MixedPromptsError: there are several prompts, and rows of them are not in order.

        """
        rows = products.shape[0] if products.ndim else 1
        alone = self.batch == 1
        in_order = rows == self.batch or rows in {self.batch * n for n in self.positions}
        windows = products.ndim > 2 and rows % self.batch == 0
        if not (alone or in_order or windows):
            raise MixedPromptsError
        wide = torch.promote_types(products.dtype, torch.float32)
        total = products.reshape(self.batch, -1).sum(1, dtype=wide)
        return total.double().cpu() / self.scale

    def constant(self, kind: str, value: Tensor | float) -> Seen:
        """A gradient hook for a sum to which a constant was added: it takes `value x gradient`."""
        modules = tuple(self.modules)

        def seen(gradient: Tensor) -> None:
            self.add(kind, _products(gradient, value), modules)

        return seen

    def share(self, name: str, value: Tensor, sign: float) -> Seen:
        """A gradient hook that adds `sign x value x gradient` to a part."""
        value, modules = value.detach(), tuple(self.modules)

        def seen(gradient: Tensor) -> None:
            self.add(name, sign * _products(gradient, value), modules)

        return seen


def _products(gradient: Tensor, value: Tensor | float) -> Tensor:
    """`value x gradient` in float32 at least; 0 where no gradient comes, infinite values too."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    vector = isinstance(value, Tensor) and value.ndim == 1 and value.shape == gradient.shape[-1:]
    if isinstance(value, Tensor) and vector and gradient.ndim > 1:
        return gradient.to(wide) @ value.to(wide)
    if isinstance(value, Tensor):
        products = gradient.to(wide) * value.to(wide)
        return products if value.isfinite().all() else products.masked_fill(gradient == 0, 0)
    return gradient.to(wide) * value


def on_gradient(tensor: Tensor, seen: Seen) -> None:
    """Call `seen(gradient)` when the gradient of a tensor is known; it goes on unchanged."""

    def hook(gradient: Tensor) -> None:
        with torch.no_grad():
            seen(gradient)

    tensor.register_hook(hook)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The same values; their gradient goes on multiplied, after all hooks on what is returned."""
    tensor.register_hook(lambda gradient: gradient * factor)
    return alias(tensor)


def alias(tensor: Tensor) -> Tensor:
    """The same values for one use, so that a hook sees the gradient of this use alone."""
    return tensor.view_as(tensor)
