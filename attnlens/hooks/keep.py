"""Dense capture: q k v scores pattern z result residual mlp, at chosen sites, heads and rows.

A request is priced in bytes before the model runs and refused over its budget, with the narrower
request that would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.weights import output_weight
from attnlens.errors import BudgetError, InputError
from attnlens.hooks.residual import FINAL, Passing, Stream
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer

KINDS = ("q", "k", "v", "scores", "pattern", "z", "result", "residual", "mlp")


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
    request: Request, extents: Mapping[str, Extent], anatomy: Anatomy, element: int
) -> dict[str, int]:
    """Bytes that each kind will take; sites of unknown extent count nothing here."""
    size = request.dtype.itemsize if request.dtype is not None else element
    d_model = anatomy.d_model or 0
    streams = {stream.name for stream in _streams(anatomy, request)}
    costs = dict.fromkeys(request.kinds, 0)
    last = 0
    for site in request.sites:
        if site.name not in extents:
            continue
        extent = extents[site.name]
        heads = len(request.heads[site.name])
        rows = len(request.rows[0]) if request.rows is not None else extent.queries
        groups = len({h // (site.heads // site.groups) for h in request.heads[site.name]})
        last = extent.batch * rows * d_model * size
        count = {
            "q": heads * rows * site.d_qk,
            "k": groups * extent.keys * site.d_qk,
            "v": groups * extent.keys * site.d_v,
            "scores": heads * rows * extent.keys,
            "pattern": heads * rows * extent.keys,
            "z": heads * rows * site.d_v,
            "result": heads * rows * d_model,
            "residual": rows * d_model if site.name in streams else 0,
            "mlp": rows * d_model if site.name in streams else 0,
        }
        for kind in request.kinds:
            costs[kind] += extent.batch * count[kind] * size
    if "residual" in costs and _last_block(anatomy, request) is not None:
        costs["residual"] += last
    return costs


def check_budget(
    request: Request, extents: Mapping[str, Extent], budget: int, anatomy: Anatomy, element: int
) -> None:
    """Raise if the request costs more than the budget, naming one that fits."""
    costs = price(request, extents, anatomy, element)
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

    def cost(narrower: Request) -> int:
        return sum(price(narrower, extents, anatomy, element).values())

    fits = " or ".join(_what_fits(request, known, budget, cost, shape.batch))
    ways = f"Would fit: {fits}." if fits else "No layer of it fits."
    raise BudgetError(
        f"Keeping {largest} takes {product} x {size} bytes = {gigabytes(costs[largest])}; the "
        f"whole request takes {gigabytes(total)}, over the budget of {gigabytes(budget)}. {ways} "
        "Statistics of all rows need no dense maps: lens.measure(inputs, reducers). "
        "A larger budget is given as budget='8GB'."
    )


def _what_fits(
    request: Request,
    known: Sequence[Site],
    budget: int,
    cost: Callable[[Request], int],
    batch: int,
) -> list[str]:
    """Narrower requests that the budget holds, as a sentence in parts."""

    def first_rows(count: int) -> Request:
        return replace(request, rows=(tuple(range(count)),))

    fits: list[str] = []
    layers = 0
    while (
        layers < len(known) and cost(replace(request, sites=tuple(known[: layers + 1]))) <= budget
    ):
        layers += 1
    if layers:
        fits.append(f"{layers} of the {len(known)} layers (layers={_spec(known[:layers])!r})")
    fixed = cost(first_rows(0))
    rows = (budget - fixed) // max(cost(first_rows(1)) - fixed, 1)
    if rows >= 1 and cost(first_rows(rows)) <= budget < cost(first_rows(rows + 1)):
        fits.append(f"the last {rows} rows (rows=slice(-{rows}, None))")
    prompts = batch * budget // cost(request)
    if not fits and prompts:
        fits.append(f"{prompts} prompts at a time")
    return fits


def _spec(sites: Sequence[Site]) -> str:
    """A specification of some layers."""
    numbers = [site.layer for site in sites]
    if not any(site.stack for site in sites) and numbers == list(range(len(sites))):
        return f"L0:{len(sites)}"
    return ",".join(site.name for site in sites)


def gigabytes(count: int) -> str:
    """Bytes as people write them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def check_recording(
    anatomy: Anatomy, extents: Mapping[str, Extent], budget: int, element: int
) -> None:
    """Refuse to record a run that passes the budget, before it begins."""
    total = 0
    for site in anatomy.sites:
        if site.name in extents:
            at = extents[site.name]
            row = (anatomy.d_model or 0) * 2 + site.heads * (site.d_qk + site.d_v)
            key = site.groups * (site.d_qk + site.d_v)
            total += at.batch * (at.queries * row + at.keys * key) * element
    if total > budget:
        raise BudgetError(
            f"Recording a run of these prompts takes about {gigabytes(total)}, over the budget of "
            f"{gigabytes(budget)}. Give fewer prompts at a time, or"
            f" budget='{gigabytes(int(total * 1.01))}'."
        )


class Keep(Observer):
    """Observer that keeps what a request asks for: `kept[kind][site name]`."""

    def __init__(
        self,
        anatomy: Anatomy,
        request: Request,
        budget: int,
        find_mlps: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        self.sites = frozenset(site.name for site in request.sites)
        self.kept: dict[str, dict[str, Tensor]] = {kind: {} for kind in request.kinds}
        self._anatomy = anatomy
        self._request = request
        self._left = budget
        self._budget = budget
        self._model: nn.Module | None = None
        # The model runs once to find them: before a session listens.
        self._mlps: Mapping[str, str] = {}
        if "mlp" in request.kinds and find_mlps is not None:
            self._mlps = find_mlps()

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on blocks, where the residual stream or what MLPs write is asked for."""
        self._model = model
        asked = self._request.kinds
        residual = self._attach_residual(model) if "residual" in asked else []
        return [*residual, *(self._attach_mlps(model) if "mlp" in asked else [])]

    def _attach_residual(self, model: nn.Module) -> list[Handle]:
        streams = _streams(self._anatomy, self._request)
        if not streams:
            raise InputError(
                f"{self._anatomy.model} holds these sites in no list of blocks, so there is no "
                "residual stream to keep. Leave 'residual' out."
            )
        handles: list[Handle] = [Passing(model, self._anatomy, streams, self._shown("residual"))]
        last = _last_block(self._anatomy, self._request)
        if last is not None:
            block = model.get_submodule(last)
            handles.append(block.register_forward_hook(self._leave))
        return handles

    def _attach_mlps(self, model: nn.Module) -> list[Handle]:
        streams = [s for s in _streams(self._anatomy, self._request) if s.site.block in self._mlps]
        if not streams:
            raise InputError(
                f"No MLP was found in {self._anatomy.model}, at these layers, whose output is "
                "added to the residual stream. Leave 'mlp' out."
            )
        return [Passing(model, self._anatomy, streams, self._shown("mlp"), self._mlps)]

    def _shown(self, kind: str) -> Callable[[Stream, Tensor], None]:
        def keep(stream: Stream, tensor: Tensor) -> None:
            self._store(kind, stream.name, self._rows(tensor, axis=1))

        return keep

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Keep what the last block returns; of a block that layers share, the last call."""
        stream = output if isinstance(output, Tensor) else output[0]
        self._store("residual", FINAL, self._rows(stream, axis=1))

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
        replaced = self.kept[kind].get(site)
        self._left -= kept.nbytes - (0 if replaced is None else replaced.nbytes)
        if self._left < 0:
            raise BudgetError(
                f"Keeping {kind} at {site} passes the budget of {gigabytes(self._budget)} (the "
                "input is larger than its tokens tell). Keep fewer layers, heads or rows, or give "
                "budget='8GB'."
            )
        self.kept[kind][site] = kept


def _streams(anatomy: Anatomy, request: Request) -> tuple[Stream, ...]:
    """The streams that enter blocks, each of the first of the block's sites asked for."""
    wanted = {site.name for site in request.sites}
    found: dict[tuple[str, int], Stream] = {}
    for site in anatomy.sites:
        if site.block is not None and site.name in wanted:
            found.setdefault((site.block, site.call), Stream(site))
    return tuple(found.values())


def _last_block(anatomy: Anatomy, request: Request) -> str | None:
    """The block that the model ends with, if sites in its list of blocks are asked for."""
    blocks = [site.block for site in anatomy.sites if site.block is not None]
    if not blocks:
        return None
    stack = blocks[-1].rpartition(".")[0]
    asked = any(site.block and site.block.rpartition(".")[0] == stack for site in request.sites)
    return blocks[-1] if asked else None
