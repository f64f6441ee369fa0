"""Dense capture: q, k, v, scores, pattern, z, result, residual, at chosen sites, heads and rows.

A request is priced in bytes before the model runs and refused over its budget, with the narrower
request that would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.weights import output_weight
from attnlens.errors import BudgetError, InputError
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call

KINDS = ("q", "k", "v", "scores", "pattern", "z", "result", "residual")
FINAL = "final"
"""Name under which the residual stream before the final norm is kept."""


@dataclass(frozen=True)
class Request:
    """What to keep: kinds, sites, heads of each site (None for all), query rows of each prompt."""

    kinds: tuple[str, ...]
    sites: tuple[Site, ...]
    heads: Mapping[str, tuple[int, ...]]
    rows: tuple[tuple[int, ...], ...] | None = None
    """For each prompt the query rows, in positions of the padded batch; None for all."""
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise InputError(
                f"Cannot keep {', '.join(map(repr, unknown)) or 'nothing'}. "
                f"Choose from {', '.join(KINDS)}."
            )


@dataclass(frozen=True)
class Extent:
    """Sizes of one run at one site."""

    batch: int
    queries: int
    keys: int


def price(
    request: Request, extents: Mapping[str, Extent], d_model: int | None, element: int
) -> dict[str, int]:
    """Bytes that each kind will take; sites of unknown extent count nothing here."""
    size = request.dtype.itemsize if request.dtype is not None else element
    costs = dict.fromkeys(request.kinds, 0)
    for site in request.sites:
        if site.name not in extents:
            continue
        extent = extents[site.name]
        heads = len(request.heads[site.name])
        rows = len(request.rows[0]) if request.rows is not None else extent.queries
        groups = len({h // (site.heads // site.groups) for h in request.heads[site.name]})
        count = {
            "q": heads * rows * site.d_qk,
            "k": groups * extent.keys * site.d_qk,
            "v": groups * extent.keys * site.d_v,
            "scores": heads * rows * extent.keys,
            "pattern": heads * rows * extent.keys,
            "z": heads * rows * site.d_v,
            "result": heads * rows * (d_model or 0),
            "residual": rows * (d_model or 0),
        }
        for kind in request.kinds:
            costs[kind] += extent.batch * count[kind] * size
    return costs


def check_budget(
    request: Request,
    extents: Mapping[str, Extent],
    budget: int,
    d_model: int | None,
    element: int,
) -> None:
    """Raise if the request costs more than the budget, naming one that fits."""
    costs = price(request, extents, d_model, element)
    total = sum(costs.values())
    if total <= budget:
        return
    largest = max(costs, key=lambda kind: costs[kind])
    known = [site for site in request.sites if site.name in extents]
    shape = extents[known[0].name]
    rows = len(request.rows[0]) if request.rows is not None else shape.queries
    heads = len(request.heads[known[0].name])
    size = request.dtype.itemsize if request.dtype is not None else element
    product = f"{len(known)} layers x batch {shape.batch} x {heads} heads x {rows} rows"
    if largest in ("scores", "pattern"):
        product += f" x {shape.keys} keys"
    fits: list[str] = []
    layers = len(known) * budget // total
    if layers:
        fits.append(f"{layers} of the {len(known)} layers (layers=...)")
    fewer = rows * budget // total
    if fewer and largest not in ("k", "v"):
        fits.append(f"the last {fewer} rows (rows=slice(-{fewer}, None))")
    ways = " or ".join(fits) or "fewer prompts at a time"
    raise BudgetError(
        f"Keeping {largest} takes {product} x {size} bytes = {gigabytes(costs[largest])}; the whole "
        f"request takes {gigabytes(total)}, over the budget of {gigabytes(budget)}. Would fit: {ways}. "
        "Statistics of all rows need no dense maps: lens.measure(inputs, reducers). "
        "A larger budget is given as budget='8GB'."
    )


def gigabytes(count: int) -> str:
    """Bytes as people write them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


class Keep:
    """Observer that keeps what a request asks for: `kept[kind][site name]`."""

    def __init__(self, anatomy: Anatomy, request: Request, budget: int) -> None:
        self.sites = frozenset(site.name for site in request.sites)
        self.kept: dict[str, dict[str, Tensor]] = {kind: {} for kind in request.kinds}
        self._anatomy = anatomy
        self._request = request
        self._left = budget
        self._budget = budget
        self._model: nn.Module | None = None

    def attach(self, model: nn.Module) -> Sequence[RemovableHandle]:
        """Hooks on blocks, where the residual stream is asked for."""
        self._model = model
        if "residual" not in self._request.kinds:
            return ()
        handles: list[RemovableHandle] = []
        for name, sites in _sites_by_block(self._request.sites).items():
            hook = self._residual_hook(sites)
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            )
        if self._anatomy.final_norm is not None:
            hook = self._residual_hook([FINAL])
            norm = model.get_submodule(self._anatomy.final_norm)
            handles.append(norm.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _residual_hook(self, names: Sequence[str]) -> Callable[..., None]:
        calls = [0]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            name = names[calls[0] % len(names)]
            calls[0] += 1
            self._store("residual", name, self._rows(stream, axis=1))

        return hook

    @torch.no_grad()
    def see(self, site: Site, call: Call) -> Call:
        """Keep what is asked of one call; the call itself is left alone."""
        heads = torch.tensor(self._request.heads[site.name], device=call.query.device)
        groups = torch.unique(heads // (site.heads // site.groups))
        for kind in self._request.kinds:
            if kind in ("scores", "pattern"):
                self._store(kind, site.name, self._dense(site, call, heads, kind == "scores"))
            elif kind == "q":
                self._store(kind, site.name, self._rows(call.query[:, heads], axis=2))
            elif kind in ("k", "v"):
                tensor = call.key if kind == "k" else call.value
                self._store(kind, site.name, tensor[:, groups])
            elif kind == "z":
                z = call.output[:, :, heads].transpose(1, 2)
                self._store(kind, site.name, self._rows(z, axis=2))
            elif kind == "result":
                self._store(kind, site.name, self._result(site, call, heads))
        return call

    def _dense(self, site: Site, call: Call, heads: Tensor, scores: bool) -> Tensor:
        rows = Rows.at(site, call).select(heads)
        wanted = self._request.rows
        if wanted is None:
            return rows.dense(scores=scores)
        if len(set(wanted)) == 1:
            return rows.dense(wanted[0], scores)
        return torch.cat([rows.prompt(b).dense(own, scores) for b, own in enumerate(wanted)])

    def _result(self, site: Site, call: Call, heads: Tensor) -> Tensor:
        assert self._model is not None
        weight = output_weight(self._model, site)[heads]
        z = self._rows(call.output[:, :, heads].transpose(1, 2), axis=2)
        return torch.einsum("bhtv,hvd->bhtd", z, weight)

    def _rows(self, tensor: Tensor, axis: int) -> Tensor:
        """The asked rows of each prompt, along the axis of query positions."""
        wanted = self._request.rows
        if wanted is None:
            return tensor
        index = torch.tensor(wanted, device=tensor.device)
        shape = [index.shape[0]] + [1] * (tensor.ndim - 1)
        shape[axis] = index.shape[1]
        full = list(tensor.shape)
        full[axis] = index.shape[1]
        return tensor.gather(axis, index.view(shape).expand(full))

    def _store(self, kind: str, site: str, tensor: Tensor) -> None:
        request = self._request
        device = request.device or tensor.device
        kept = tensor.detach().to(device=device, dtype=request.dtype or tensor.dtype, copy=True)
        self._left -= kept.numel() * kept.element_size()
        if self._left < 0:
            raise BudgetError(
                f"Keeping {kind} at {site} passes the budget of {gigabytes(self._budget)} (the input "
                "is larger than its tokens tell). Keep fewer layers, heads or rows, or give "
                "budget='8GB'."
            )
        self.kept[kind][site] = kept


def _sites_by_block(sites: Sequence[Site]) -> dict[str, list[str]]:
    """Names of the sites that each block holds, in the order of their calls.

    A block with self- and cross-attention has one residual stream entering it, kept under the first.
    """
    found: dict[str, list[str]] = {}
    calls: dict[str, set[int]] = {}
    for site in sites:
        if site.block is not None and site.call not in calls.setdefault(site.block, set()):
            calls[site.block].add(site.call)
            found.setdefault(site.block, []).append(site.name)
    return found
