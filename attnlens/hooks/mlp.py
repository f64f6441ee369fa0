"""Find the MLP of each transformer block by running it, not by a table of names.

What an MLP adds to the residual stream is the output of the last module, outside attention, with
`t = a s + b m`: `s` a stream seen before the module ran, `m` its output and `t` a stream seen
afterwards (`a` and `b` are 1 in most models). A module that adds the residual itself fits no such
sum. Streams are compared on a sample of their numbers, through the products of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import SeamError
from attnlens.hooks.probe import evaluating
from attnlens.hooks.replaced import Replaced
from attnlens.hooks.returned import first_tensor, tensors_of
from attnlens.hooks.session import Handle, Observer

_SAMPLE = 4096


@dataclass(frozen=True)
class Mlp:
    """Where a block's MLP is."""

    name: str
    """Module whose output is what the MLP adds to the stream (its first tensor)."""
    computed: str | None
    """Module that maps a stream to it in one call, but for a norm or a scale that `name` is.

    None where several modules do, or where rows cannot be computed alone.
    """

    @property
    def whole(self) -> bool:
        """Whether it can be computed at some rows only."""
        return self.computed is not None


@torch.no_grad()
def find_mlps(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any]) -> dict[str, Mlp]:
    """The MLP of each block that holds a site, by the block's name; blocks without one are left."""
    blocks = {site.block for site in anatomy.sites if site.block is not None}
    finders = [_Finder(model, anatomy, block) for block in sorted(blocks)]
    try:
        with evaluating(model):
            for finder in finders:
                finder.attach()
            model(**inputs)
    finally:
        for finder in finders:
            finder.remove()
    return {finder.block: finder.found for finder in finders if finder.found is not None}


class OnlyRows(Observer):
    """Observer under which a whole MLP computes the rows read alone, and returns 0 at all others.

    For the last MLP before a metric that reads some positions only. Rows of `reads` are the prompts
    of the run, or fewer, of which the run is whole copies.
    """

    def __init__(self, mlp: Mlp, reads: Int[Tensor, "batch read"]) -> None:
        if mlp.computed is None:
            raise SeamError(
                f"{mlp.name} is not the whole MLP, or its positions depend on each other, so it "
                "cannot be computed at some rows only. Ask Mlp.whole first."
            )
        self._name = mlp.computed
        self._reads = reads

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Replace the MLP's forward."""
        module = model.get_submodule(self._name)
        full = module.forward

        def forward(stream: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._spread(full(self._rows(stream), *args, **kwargs), stream)

        return [Replaced(module, forward)]

    def _index(self, stream: Tensor) -> Int[Tensor, "batch read 1"]:
        times, rest = divmod(stream.shape[0], self._reads.shape[0])
        if rest or int(self._reads.max()) >= stream.shape[1]:
            raise SeamError(
                f"{self._name} is given {list(stream.shape)}, in which the rows read, "
                f"{list(self._reads.shape)}, cannot be found."
            )
        return self._reads.to(stream.device).repeat(times, 1)[..., None]

    def _rows(self, stream: Float[Tensor, "batch position d"]) -> Float[Tensor, "batch read d"]:
        return stream.gather(1, self._index(stream).expand(-1, -1, stream.shape[2]))

    def _spread(self, output: Any, stream: Tensor) -> Any:
        rows = first_tensor(output)
        index = self._index(stream).expand(-1, -1, stream.shape[2])
        spread = rows.new_zeros(stream.shape).scatter(1, index, rows.reshape(index.shape))
        # Some modules of experts return positions of all prompts in one row.
        spread = spread if rows.ndim == 3 else spread.flatten(0, 1)
        return spread if isinstance(output, Tensor) else (spread, *output[1:])


@dataclass
class _Ran:
    """One run of a module inside a block."""

    name: str
    began: int
    given: tuple[Any, ...]
    options: Mapping[str, Any]
    entered: list[int]
    """Numbers of the streams among what it was given."""
    ended: int = 0
    made: int = -1
    """Number of the stream that it returned."""
    output: Tensor = field(default_factory=lambda: torch.empty(0))


class _Finder:
    """Watches one block and finds its MLP when the block has run."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, block: str) -> None:
        self.model = model
        self.anatomy = anatomy
        self.block = block
        self.found: Mlp | None = None
        self._clock = 0
        self._idle = False
        self._shape = torch.Size()
        self._dtype = torch.float32
        self._streams: list[_Stream] = []
        self._ran: list[_Ran] = []
        self._open: list[_Ran] = []
        self._handles: list[Handle] = []

    def attach(self) -> None:
        """Watch every module of the block."""
        for name, module in self.model.get_submodule(self.block).named_modules(prefix=self.block):
            begin, end = self._begin(name), self._end(name)
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(end))

    def remove(self) -> None:
        """Watch no more."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self._idle:
                return
            given = (*args, *kwargs.values())
            if name == self.block:
                self._clear()
                stream = tensors_of(given)[0]
                self._shape, self._dtype = stream.shape, stream.dtype
            self._clock += 1
            self._open.append(_Ran(name, self._clock, args, kwargs, self._noted(given)))

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if self._idle:
                return
            run = self._open.pop()
            self._clock += 1
            run.ended = self._clock
            tensors = tensors_of(output)[:1]
            if made := self._noted(tensors):
                run.made, run.output = made[0], tensors[0]
                self._ran.append(run)
            if name == self.block:
                self._conclude()

        return hook

    def _noted(self, values: Sequence[Any]) -> list[int]:
        """Numbers of the streams among some values; a sample of each is kept."""
        numbers: list[int] = []
        for value in values:
            if isinstance(value, Tensor) and value.numel() == self._shape.numel():
                flat = value.detach().flatten()
                sample = flat[:: max(1, len(flat) // _SAMPLE)].double().cpu()
                numbers.append(len(self._streams))
                self._streams.append(_Stream(self._clock, sample))
        return numbers

    def _clear(self) -> None:
        self._clock = 0
        for held in (self._streams, self._ran, self._open):
            held.clear()

    def _conclude(self) -> None:
        """Find the MLP in what ran, and let go of all that was held."""
        if self.found is not None:
            # A module of several layers must not be computed at the rows of one.
            self.found = replace(self.found, computed=None)
        else:
            self.found = self._mlp()
        self._clear()

    def _mlp(self) -> Mlp | None:
        """The run that made the last `m` of a sum; of runs with equal outputs the outermost."""
        sites = [site for site in self.anatomy.sites if site.block == self.block]
        around = [run for run in self._ran if any(_within(s.module, run.name) for s in sites)]
        attention = [
            run
            for run in self._ran
            if any(run.name == s.output or _within(run.name, s.module) for s in sites)
        ]
        theirs = [self._streams[run.made].sample for run in attention]
        entered = self._streams[0].sample
        # Blocks with parallel attention never show the stream without the MLP.
        sums = _Sums([*self._streams, *(_Stream(0, entered + own) for own in theirs)], self._dtype)
        others = [run for run in self._ran if run not in around and run not in attention]
        for run in sorted(others, key=lambda run: -run.ended):
            if self._passes_on(run, theirs) or not sums.adds(run.made, run.began, run.ended):
                continue
            made = self._streams[run.made].sample
            if not made.any():  # what adds nothing cannot be told from others that add nothing
                continue
            equal = [run for run in others if torch.equal(self._streams[run.made].sample, made)]
            found = min(equal, key=lambda run: (run.name.count("."), run.ended))
            mlp = Mlp(found.name, self._computed(found, others))
            if not any(map(self._has_matrix, (mlp.name, mlp.computed))):
                continue  # a norm by itself, of streams that differ by a factor
            return mlp if self._local(found) else None
        return None

    def _passes_on(self, run: _Ran, theirs: Sequence[Tensor]) -> bool:
        """Whether a module passes attention's output on (dropout, a norm, YOLOS's projection)."""
        samples = [self._streams[number].sample for number in (run.made, *run.entered)]
        return any(torch.equal(sample, own) for sample in samples for own in theirs)

    def _computed(self, run: _Ran, others: Sequence[_Ran]) -> str | None:
        """Of this run and those that feed it, each whole, the one with the most weights."""
        chain: list[_Ran] = []
        feeding: _Ran | None = run
        while feeding is not None and self._is_whole(feeding):
            chain.append(feeding)
            given = self._streams[feeding.entered[0]].sample
            before = [
                other
                for other in others
                if other.ended < feeding.began
                and torch.equal(self._streams[other.made].sample, given)
            ]
            feeding = min(before, key=lambda run: run.name.count("."), default=None)
        return max(chain, key=self._weights).name if chain else None

    def _has_matrix(self, name: str | None) -> bool:
        module = self.model.get_submodule(name) if name is not None else nn.Module()
        return any(weight.ndim > 1 for weight in module.parameters())

    def _weights(self, run: _Ran) -> int:
        return sum(weight.numel() for weight in self.model.get_submodule(run.name).parameters())

    def _local(self, run: _Ran) -> bool:
        """Whether each position of what is made depends on the same position of what was given."""
        given, *others = run.given or (None,)
        length = self._shape[-2] if len(self._shape) > 1 else 0
        if not isinstance(given, Tensor) or length < 3 or given.numel() % length:
            return False
        other = given.reshape(-1, length, given.shape[-1]).clone()
        other[:, length // 2] = other[:, 0]
        made = self._again(run, other.reshape(given.shape), *others)
        if made is None:
            return False
        gap = (made - run.output).reshape(-1, length, self._shape[-1]).abs().amax((0, 2))
        gap[length // 2] = 0
        return bool((gap <= self._rounding(run.output)).all())

    def _is_whole(self, run: _Ran) -> bool:
        """Whether some rows of the stream alone give the same rows of what is made."""
        tensors = tensors_of(run.given)
        if len(tensors) != 1 or tensors[0] is not run.given[0] or len(self._shape) != 3:
            return False
        if tensors[0].shape != self._shape:
            return False
        some = self._again(run, tensors[0][:, ::2].contiguous(), *run.given[1:])
        wanted = run.output.reshape(self._shape)[:, ::2]
        if some is None or some.numel() != wanted.numel():
            return False
        return bool(((some.reshape(wanted.shape) - wanted).abs() <= self._rounding(wanted)).all())

    def _again(self, run: _Ran, *given: Any) -> Tensor | None:
        """What a module makes of other tensors; None where it does not take them."""
        self._idle = True
        try:
            made = self.model.get_submodule(run.name).forward(*given, **run.options)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return None
        finally:
            self._idle = False
        return tensors_of(made)[0]

    def _rounding(self, made: Tensor) -> Tensor:
        return _TOLERANCE.get(self._dtype, 1e-3) * 1e-2 * made.abs().max()


_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Of a sum's remainder, as a share of the part added: rounding of streams much larger than it."""


@dataclass(frozen=True)
class _Stream:
    """What was seen of a stream, and when."""

    time: int
    sample: Float[Tensor, " number"]


class _Sums:
    """Tells which streams are sums of two others, `t = a s + b m`, by least squares."""

    def __init__(self, streams: Sequence[_Stream], dtype: torch.dtype) -> None:
        samples = torch.stack([stream.sample for stream in streams])
        self._dots = samples @ samples.T
        self._times = torch.tensor([stream.time for stream in streams])
        self._tolerance = _TOLERANCE.get(dtype, 1e-3)

    def adds(self, m: int, began: int, ended: int) -> bool:
        """Whether a stream seen from `ended` on is one seen before `began` plus stream `m`."""
        s, t = (self._times < began).nonzero()[:, 0], (self._times >= ended).nonzero()[:, 0]
        dots = self._dots
        ss, mm, tt = dots.diagonal()[s][:, None], dots[m, m], dots.diagonal()[t][None]
        sm, st, mt = dots[s, m][:, None], dots[s][:, t], dots[m, t][None]
        determinant = ss * mm - sm**2
        a, b = (st * mm - mt * sm) / determinant, (mt * ss - st * sm) / determinant
        remainder = tt - a * st - b * mt
        added = b**2 * mm
        # Below 1e-8 the sums of products cannot tell an addition from rounding.
        fits = (remainder <= self._tolerance**2 * added) & (added > 1e-8 * tt)
        # Where t is m alone, any s would do.
        needs_s = tt - mt**2 / mm > 100 * self._tolerance**2 * added
        return bool((fits & needs_s & (determinant > 1e-9 * ss * mm)).any())


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")
