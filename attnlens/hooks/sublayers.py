"""The sums that a block's residual stream goes through, found in the numbers of a run.

A block adds what attention and the MLP wrote to the stream: each in a sum of its own, both in one
(parallel blocks), through norms of what is written (Gemma 2, OLMo 2), with factors (Granite), or
with a norm of the sum (BERT). Which it is, is found by least squares over the streams that its
modules are given and return, as `mlp.py` finds the MLP; no class is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.mlp import Mlp
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.returned import first_tensor, tensors_of
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer

_SAMPLE = 4096
# Of what is added, and of the sum: what rounding may leave of the first and of the second.
_TOLERANCE = {torch.float16: (5e-2, 2e-3), torch.bfloat16: (5e-2, 1e-2)}
_FINE = (1e-3, 2e-6)


@dataclass(frozen=True)
class Sum:
    """`norm(kept * stream + attention * steps(W_O z + b) + mlp * m)`; factors of 0 leave out."""

    kept: float
    attention: float = 0.0
    mlp: float = 0.0
    steps: tuple[str, ...] = ()
    """Modules between the output projection and the sum: norms, scales of channels."""
    norm: str | None = None
    """The norm that the sum itself goes through, in blocks that have it after the sum."""


@dataclass(frozen=True)
class BlockRun:
    """What one run of a block was given and made, and the sums that lead from one to the other."""

    site: Site
    rows: Rows
    value: Float[Tensor, "batch group key d_v"]
    entering: Float[Tensor, "batch position d_model"]
    leaving: Float[Tensor, "batch position d_model"]
    mlp: Float[Tensor, "batch position d_model"] | None
    sums: tuple[Sum, ...]
    """In the order of the forward."""


class Sublayers(Observer):
    """Observer that holds a `BlockRun` of each site, by name; sites are one a block.

    Raises:
        UnsupportedModelError: the sums of a block cannot be told.

    """

    def __init__(self, anatomy: Anatomy, sites: Sequence[Site], mlps: Mapping[str, Mlp]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.runs: dict[str, BlockRun] = {}
        self._anatomy = anatomy
        self._mlps = mlps
        self._wanted = tuple(sites)
        self._calls: dict[str, Call] = {}
        self._watches: dict[str, _Watch] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Watch every module of the blocks."""
        handles: list[Handle] = []
        for block in dict.fromkeys(site.block for site in self._wanted):
            if block is None:
                raise UnsupportedModelError(
                    f"{self._anatomy.model} holds attention in no list of blocks, so the sums of "
                    "its residual stream cannot be told."
                )
            watch = self._watches[block] = _Watch(block, self._conclude)
            handles += watch.hooks(model)
        return handles

    def see(self, site: Site, call: Call) -> Call:
        """Note the call; its block is still running."""
        assert site.block is not None
        if site.block in self._calls:
            raise UnsupportedModelError(
                f"{site.block} of {self._anatomy.model} attends more than once ({site.name}), and "
                "its stream is taken apart for blocks that attend once."
            )
        self._calls[site.block] = call
        self._watches[site.block].site = site
        return call

    def _conclude(self, watch: _Watch) -> None:
        call, site = self._calls.pop(watch.block, None), watch.site
        if call is None:
            return
        found = self._mlps.get(watch.block)
        mlp = None if found is None else watch.last(found.name)
        sums = _sums(watch, site, mlp)
        if sums is None:
            raise UnsupportedModelError(
                f"The stream that leaves {site.name} of {self._anatomy.model} is not the stream "
                f"that enters it plus what attention ({site.output}) and the MLP "
                f"({found.name if found else 'none found'}) write, not through norms and factors "
                "either; so its parts cannot be told. Gradient methods need no such sum: "
                'al.attribute(lens, inputs, method="input_x_gradient").'
            )
        entering = watch.entering
        self.runs[site.name] = BlockRun(
            site,
            Rows.at(site, call),
            call.value,
            entering,
            watch.leaving.reshape(entering.shape),
            None if mlp is None else mlp.output.reshape(entering.shape),
            sums,
        )


@dataclass
class _Ran:
    """One run of a module that returned a stream: samples of what it was given and returned."""

    name: str
    began: int
    given: list[Tensor]
    ended: int = 0
    made: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))


class _Watch:
    """Notes what the modules of one block are given and return, anew in each of its runs."""

    def __init__(self, block: str, conclude: Callable[[_Watch], None]) -> None:
        self.block = block
        self.site: Site
        self.ran: list[_Ran] = []
        self.entering = torch.empty(0)
        self.leaving = torch.empty(0)
        self._conclude = conclude
        self._open: list[_Ran] = []
        self._clock = 0

    def hooks(self, model: nn.Module) -> Iterator[Handle]:
        """Hooks on the block and all within."""
        for name, module in model.get_submodule(self.block).named_modules(prefix=self.block):
            begin, end = of_this_thread(self._begin(name)), of_this_thread(self._end(name))
            yield module.register_forward_pre_hook(begin, with_kwargs=True)
            yield module.register_forward_hook(end)

    def last(self, name: str) -> _Ran | None:
        """The latest run of a module."""
        return next((run for run in reversed(self.ran) if run.name == name), None)

    def sample(self, stream: Tensor) -> Float[Tensor, " number"]:
        """Some numbers of a stream, the same of each."""
        flat = stream.detach().flatten()
        return flat[:: max(1, len(flat) // _SAMPLE)].double().cpu()

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = tensors_of((*args, *kwargs.values()))
            if name == self.block:
                self._clock, self.ran, self._open = 0, [], []
                self.entering = given[0].detach()
            self._clock += 1
            self._open.append(_Ran(name, self._clock, self._samples(given)))

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            run = self._open.pop()
            self._clock += 1
            run.ended = self._clock
            made = self._samples(tensors_of(output)[:1])
            if made:
                run.made, run.output = made[0], first_tensor(output).detach()
                self.ran.append(run)
            if name == self.block:
                self.leaving = first_tensor(output).detach()
                self._conclude(self)
                self.ran = []

        return hook

    def _samples(self, given: Sequence[Tensor]) -> list[Tensor]:
        count = self.entering.numel()
        return [self.sample(stream) for stream in given if stream.numel() == count]


def _sums(watch: _Watch, site: Site, mlp: _Ran | None) -> tuple[Sum, ...] | None:
    """The sums of a block that has just run; None where none fit."""
    projected = watch.last(site.output or "")
    if projected is None:
        return None
    fit = _Fit(watch)
    entered, left = watch.sample(watch.entering), watch.sample(watch.leaving)
    written = _stepped(watch, projected, mlp)
    ends: list[tuple[str | None, Tensor]] = [(None, left)]
    for run in watch.ran:
        if run.name != watch.block and torch.equal(run.made, left):
            ends += [(run.name, given) for given in run.given if not torch.equal(given, left)]
    later = [given for run in watch.ran if run.began > projected.ended for given in run.given]
    for middle in [*later, left]:
        for steps, attention in written:
            factors = fit(middle, entered, attention)
            if factors is None:
                continue
            normed = [(r.name, r.made) for r in watch.ran if _only(r.given, middle)]
            for norm, base in [(None, middle), *normed]:
                own = Sum(factors[0], factors[1], steps=steps, norm=norm)
                if mlp is None:
                    if torch.equal(base, left):
                        return (own,)
                    continue
                for last_norm, end in ends:
                    second = fit(end, base, mlp.made)
                    if second is not None:
                        return own, Sum(second[0], mlp=second[1], norm=last_norm)
    return None if mlp is None else _parallel(fit, entered, written, mlp.made, ends)


def _parallel(
    fit: _Fit,
    entered: Tensor,
    written: Sequence[tuple[tuple[str, ...], Tensor]],
    mlp: Tensor,
    ends: Sequence[tuple[str | None, Tensor]],
) -> tuple[Sum, ...] | None:
    """One sum of stream, attention and MLP."""
    for norm, end in ends:
        for steps, attention in written:
            found = fit(end, entered, attention, mlp)
            if found is not None:
                return (Sum(found[0], found[1], found[2], steps, norm),)
    return None


def _stepped(
    watch: _Watch, projected: _Ran, mlp: _Ran | None
) -> list[tuple[tuple[str, ...], Tensor]]:
    """What the output projection wrote, and what later modules made of that alone."""
    found: list[tuple[tuple[str, ...], Tensor]] = [((), projected.made)]
    for run in watch.ran:
        if run.began < projected.ended or (mlp is not None and run.name == mlp.name):
            continue
        for steps, before in list(found):
            if _only(run.given, before) and not any(torch.equal(run.made, s) for _, s in found):
                found.append(((*steps, run.name), run.made))
    return found


def _only(given: Sequence[Tensor], stream: Tensor) -> bool:
    return len(given) == 1 and torch.equal(given[0], stream)


class _Fit:
    """Factors of the streams whose sum a stream is, by least squares; None where it is none."""

    def __init__(self, watch: _Watch) -> None:
        self._added, self._rounding = _TOLERANCE.get(watch.entering.dtype, _FINE)

    def __call__(self, whole: Tensor, *parts: Tensor) -> tuple[float, ...] | None:
        there = torch.stack([whole, *parts]).isfinite().all(0)
        matrix = torch.stack([part[there] for part in parts], dim=1)
        # Rounding goes with each number's size, and a few numbers may dwarf all others.
        size = whole[there].abs()
        size = (size + size.mean()).clamp_min(1e-30)
        matrix, whole = matrix / size[:, None], whole[there] / size
        silent = matrix.abs().amax(0) == 0
        factors = torch.ones(len(parts), dtype=matrix.dtype)
        if bool(silent.all()):
            return None if bool(whole.any()) else tuple(factors.tolist())
        factors[~silent] = torch.linalg.lstsq(matrix[:, ~silent], whole).solution
        remainder = (whole - matrix @ factors).norm()
        smallest, rounding = (matrix * factors)[:, ~silent].norm(dim=0).amin(), whole.norm()
        rounding = rounding * self._rounding
        if smallest < rounding / 10 or remainder > torch.maximum(self._added * smallest, rounding):
            return None
        near = (factors - 1).abs() < 5 * self._rounding
        return tuple(factors.where(~near, 1.0).tolist())


@dataclass(frozen=True)
class Frozen:
    """A module as the linear map that it is at some rows: `rate * gain * (x - mean) + shift`.

    Norms with their statistics held, and scales of channels; `mean` is 0 where not `centred`.
    """

    gain: Float[Tensor, " d_model"]
    shift: Float[Tensor, " d_model"]
    rate: Float[Tensor, " row"]
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, name: str, given: Float[Tensor, "row d_model"]) -> Frozen:
        """The map of a module at the rows that it is given; UnsupportedModelError if it is none."""
        module = model.get_submodule(name)
        weight = next(module.parameters(), given)

        def run(rows: Tensor) -> Tensor:
            return module(rows.to(weight.dtype)[None])[0].to(given.dtype)

        probe = _probe(given.shape[-1]).to(given)[None]
        shift = (run(probe) + run(-probe)) / 2
        gain = (run(probe) - run(-probe)) / (2 * probe)
        for centred in (False, True):
            body = given - given.mean(-1, keepdim=True) if centred else given
            size = body.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-10)
            at = (run(size * probe) - run(-size * probe)) / 2
            base = size * probe * gain
            power = base.pow(2).sum(-1)
            rate = (at * base).sum(-1) / power.where(power > 0, 1)
            made = rate[:, None] * gain * body + shift
            own = run(given)
            rough = 3e-2 if weight.dtype in _TOLERANCE else 1e-4
            if bool(((made - own).norm(dim=-1) <= rough * (own.norm(dim=-1) + 1e-6)).all()):
                return cls(gain[0], shift[0], rate, centred)
        raise UnsupportedModelError(
            f"What attention writes goes through {name} ({type(module).__name__}), which is "
            "neither a norm nor a scale of channels, so that its parts cannot be told apart."
        )

    def fixed(self, part: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """What the map makes of a part, but for the rate, which is the row's."""
        return self.gain * (part - part.mean(-1, keepdim=True) if self.centred else part)


def _probe(width: int) -> Float[Tensor, " d_model"]:
    """A vector of mean 0 and mean square 1, without a 0."""
    probe = torch.ones(width, dtype=torch.float64)
    probe[1::2] = -1
    if width % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0]) if width > 1 else 1.0
    return probe / probe.pow(2).mean().sqrt()
