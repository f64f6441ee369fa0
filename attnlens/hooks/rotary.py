"""Recognise each site's rotary embedding by shifting all positions and looking at q and k.

The positions are shifted where the model looks its frequencies up, and nowhere else: masks and
learned positions stay, and since scores depend on distances alone, all else in the model stays too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.rotary import Rotary, recognise, still, tables
from attnlens.hooks.probe import evaluating
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer, Session

ROWS = 16
"""Positions of each prompt that are compared."""
FARTHEST = 997
"""The larger shift: slow pairs turn too, and scaled tables keep their short form."""


def find_rotary(
    model: nn.Module, anatomy: Anatomy, sites: Sequence[Site], inputs: Mapping[str, Any]
) -> dict[str, Rotary]:
    """How q and k of each site turn with the position, from three short runs on `inputs`.

    A model without a table of frequencies turns none; a site whose table cannot be shifted is
    `unknown`.
    """
    found = tables(model)
    if not found:
        return {site.name: still(site.d_qk) for site in sites}
    far = min(FARTHEST, (anatomy.context or 2 * FARTHEST) // 2)
    before = _heads(model, anatomy, sites, inputs, 0)
    shifted = {shift: _heads(model, anatomy, sites, inputs, shift) for shift in (3, far)}
    blind = any(_place(module) is None for module in _owners(model))
    rules: dict[str, Rotary] = {}
    for site in sites:
        after = {shift: heads[site.name] for shift, heads in shifted.items()}
        rule = recognise(before[site.name], after, found)
        # What stayed may belong to a table whose positions could not be shifted.
        rules[site.name] = still(site.d_qk, "unknown") if blind and rule.table is None else rule
    return rules


def _heads(
    model: nn.Module,
    anatomy: Anatomy,
    sites: Sequence[Site],
    inputs: Mapping[str, Any],
    shift: int,
) -> dict[str, Float[Tensor, "n channel"]]:
    """q and k of some positions with all positions shifted, heads and positions together."""
    spy = _Spy(sites, shift)
    with torch.no_grad(), evaluating(model), Session(model, anatomy, [spy]):
        model(**inputs)
    return spy.heads


class _Spy(Observer):
    """Observer that notes q and k, and shifts the positions of every rotary table."""

    def __init__(self, sites: Sequence[Site], shift: int) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.heads: dict[str, Tensor] = {}
        self._shift = shift

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Shift the positions given to the modules that hold a table."""
        return [
            module.register_forward_pre_hook(self._shifted(place), with_kwargs=True)
            for module in _owners(model)
            if (place := _place(module)) is not None
        ]

    def _shifted(self, place: int) -> Callable[..., Any]:
        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if len(args) > place:
                moved = args[place] + self._shift
                return (*args[:place], moved, *args[place + 1 :]), kwargs
            return args, {**kwargs, "position_ids": kwargs["position_ids"] + self._shift}

        return hook

    def see(self, site: Site, call: Call) -> Call:
        """Note q and k of the first positions."""
        parts = [x[:, :, :ROWS].flatten(0, 2).double().cpu() for x in (call.query, call.key)]
        self.heads[site.name] = torch.cat(parts)
        return call


def _owners(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    ]


def _place(module: nn.Module) -> int | None:
    """Which argument of a module is the positions; None where it takes none."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index("position_ids") if "position_ids" in names else None
