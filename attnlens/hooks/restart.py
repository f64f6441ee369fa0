"""A forward pass that goes on from a layer, with what is known below it from a clean run.

`Record` notes in one ordinary forward what every transformer block and every asked attention module
returned. `Restart` then runs the model with all that came before one site replaced by what it
returned, so none of it is computed; embeddings and masks are. Values keep the order in which
modules ran, not names of layers, so encoders, decoders, towers and layers without attention are
skipped by one rule: what was over before the site's module began.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import ref

from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import SeamError, UnsupportedModelError
from attnlens.hooks.replaced import Replaced, of_this_thread
from attnlens.hooks.returned import (
    first_tensor,
    put,
    same_numbers,
    tensors_of,
    widened,
    without_graph,
)
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer


@dataclass(frozen=True)
class Ran:
    """One module's run in a recorded forward: when, on what shape, and what it returned."""

    name: str
    began: int
    ended: int
    entered: tuple[int, ...] | None
    """Shape of the stream that entered it."""
    value: Any
    """The whole return value; its first tensor is a copy."""
    passed: bool = False
    """Whether the next block of its list took the stream as it was, and nobody else kept it."""


@dataclass(frozen=True)
class Attended:
    """One site of a recorded forward: its clean call, and its module's run."""

    call: Call
    ran: Ran
    projection: str | None
    """The output projection, where its output is what the module returned."""
    projected: tuple[int, ...] | None
    """Shape of what the projection, or else the module's caller, is given; None where unknown."""

    @property
    def takes_z(self) -> bool:
        """Whether a module's return value can be made from z, so that attention can be skipped."""
        return self.projected is not None

    def with_z(
        self, model: nn.Module, z: Float[Tensor, "rows query head d_v"], times: int = 1
    ) -> Any:
        """What the module returns with this z, of `times` copies of the recorded batch."""
        assert self.projected is not None
        first = z.reshape(times * self.projected[0], *self.projected[1:])
        if self.projection is not None:
            first = model.get_submodule(self.projection)(first)
        shape = first_tensor(self.ran.value).shape
        first = first.reshape(times * shape[0], *shape[1:])
        return put(self.ran.value, [first, *widened(self.ran.value, times)[1:]])


@dataclass(frozen=True)
class Recording:
    """What blocks and attention modules returned in one clean forward, in the order of their ends.

    Attributes:
        ran: runs of blocks and of the recorded sites' attention modules.
        attention: clean call and return value by site name.
        reason: why no forward of this model can go on from a layer; None where it can.

    """

    model: str
    ran: tuple[Ran, ...]
    attention: Mapping[str, Attended]
    reason: str | None = None

    @property
    def bytes(self) -> int:
        """Memory that it holds; what several values share is counted once."""
        held: dict[int, int] = {}
        values = [run.value for run in self.ran]
        calls = [attended.call for attended in self.attention.values()]
        values += [(call.query, call.key, call.value, call.output, call.mask) for call in calls]
        for tensor in (tensor for value in values for tensor in tensors_of(value)):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())

    def before(self, site: str) -> tuple[Ran, ...]:
        """The outermost runs that were over when the attention module of a site began."""
        own = self.of(site).ran
        over = [run for run in self.ran if run.ended < own.began]
        return tuple(
            run
            for run in over
            if not any(o.began < run.began and run.ended < o.ended for o in over)
        )

    def skips(self, site: str, module: str | None) -> bool:
        """Whether a forward that goes on from a site does not compute a module."""
        return any(f"{module}.".startswith(f"{run.name}.") for run in self.before(site))

    def of(self, site: str) -> Attended:
        """What was recorded of a site.

        Raises:
            UnsupportedModelError: the model cannot be restarted.
            SeamError: the site was not recorded.

        """
        if self.reason is not None:
            raise UnsupportedModelError(self.reason)
        if site not in self.attention:
            raise SeamError(
                f"{site} is not among the recorded sites ({', '.join(self.attention)}); "
                "name it when recording."
            )
        return self.attention[site]


class Record(Observer):
    """Observer that makes a `Recording` of a forward with these sites; the last forward counts."""

    def __init__(self, anatomy: Anatomy, sites: Sequence[Site] | None = None) -> None:
        self._anatomy = anatomy
        self._asked = tuple(anatomy.sites if sites is None else sites)
        self.sites = frozenset(site.name for site in self._asked)
        self._forget()

    @property
    def recording(self) -> Recording:
        """What was recorded.

        Raises:
            SeamError: no forward has run, or a site did not.

        """
        missing = [site.name for site in self._asked if site.name not in self._attention]
        if missing:
            raise SeamError(f"No forward was recorded that attends at {', '.join(missing)}.")
        ran = tuple(replace(run, passed=run.name in self._passed) for run in self._ran)
        return Recording(self._anatomy.model, ran, self._attention, self._reason())

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on blocks, on attention modules, and on their projections."""
        handles: list[Handle] = [model.register_forward_pre_hook(of_this_thread(self._forget))]
        names = [*block_names(model, self._anatomy), *(site.module for site in self._asked)]
        for name in dict.fromkeys(names):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._begin(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._end(name)))
        for name in {site.output for site in self._asked if site.output is not None}:
            handles.append(model.get_submodule(name).register_forward_hook(self._project(name)))
        return handles

    def see(self, site: Site, call: Call) -> Call:
        """Keep a copy of the call; the call itself is left alone."""
        copies = {part: getattr(call, part).detach().clone() for part in _PARTS}
        self._calls[site.name] = replace(call, weights=None, **copies)
        self._weights.append(call.weights)
        self._inside[site.name] = tuple(name for name, _, _ in self._open)
        return call

    def _forget(self, *_: object) -> None:
        self._clock = 0
        self._open: list[tuple[str, int, tuple[int, ...] | None]] = []
        self._ran: list[Ran] = []
        self._calls: dict[str, Call] = {}
        self._inside: dict[str, tuple[str, ...]] = {}
        self._weights: list[Tensor | None] = []
        self._projected: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self._attention: dict[str, Attended] = {}
        self._left: dict[str, list[_Left]] = {}
        self._passed: set[str] = set()

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _begin(self, name: str) -> Callable[..., None]:
        @of_this_thread
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            entering = _entering(args, kwargs)
            self._pass(_list_of(name), entering)
            self._open.append((name, self._tick(), None if entering is None else entering.shape))

        return hook

    def _end(self, name: str) -> Callable[..., None]:
        @of_this_thread
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            own, began, entered = self._open.pop()
            assert own == name
            run = Ran(name, began, self._tick(), entered, self._copied(output))
            self._ran.append(run)
            self._left.setdefault(_list_of(name), []).append(_Left(name, first_tensor(output)))
            for site in self._asked:
                if site.module == name and site.name in self._calls:
                    self._attention.setdefault(site.name, self._attended(site, run))
            self._weights.clear()

        return hook

    def _pass(self, blocks: str, entering: Tensor | None) -> None:
        """Tell, when a block begins, what became of the streams that the two before it left."""
        left = self._left.get(blocks, [])
        if left:
            left[-1].taken = left[-1].is_still(entering)
        if len(left) > 1 and left[-2].taken and left[-2].stream() is None:
            self._passed.add(left[-2].name)

    def _project(self, name: str) -> Callable[..., None]:
        @of_this_thread
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self._projected[name] = tuple(args[0].shape), output

        return hook

    def _attended(self, site: Site, run: Ran) -> Attended:
        """Where z goes in what the module returned, told by its numbers."""
        call = self._calls[site.name]
        returned = first_tensor(run.value)
        if site.output in self._projected:
            shape, output = self._projected.pop(site.output)
            if same_numbers(returned, output):
                return Attended(call, run, site.output, shape)
        shape = tuple(returned.shape) if same_numbers(returned, call.output) else None
        return Attended(call, run, None, shape)

    def _copied(self, output: Any) -> Any:
        """The value with its stream copied, since later steps may write to it, without weights."""
        first, *others = tensors_of(output)
        weights = [id(tensor) for tensor in self._weights if tensor is not None]
        kept = [None if id(tensor) in weights else without_graph(tensor) for tensor in others]
        return put(output, [without_graph(first).clone(), *kept])

    def _reason(self) -> str | None:
        """Why what comes after cannot be told from what came before."""
        names = [run.name for run in self._ran]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is None:
            return None
        return (
            f"{self._anatomy.model} runs {twice} more than once in a forward pass, so its later "
            "runs cannot be told from the skipped ones and no forward can go on from a layer. "
            "Run full forwards."
        )


class Restart(Observer):
    """Observer under which a forward goes on from a site: what came before is not computed.

    The inputs of the run are `times` copies of the recorded batch, copy by copy: rows `i B` to
    `(i + 1) B` are copy `i`. With `z`, of all copies, the site's own queries, keys and attention
    are not computed either. A site whose attention is skipped makes no call, so no other observer
    may ask for it.

    Raises:
        UnsupportedModelError: the model cannot be restarted, or takes no z at this site.

    """

    def __init__(
        self,
        recording: Recording,
        site: Site,
        times: int = 1,
        z: Float[Tensor, "rows query head d_v"] | None = None,
    ) -> None:
        own = recording.of(site.name)
        if z is not None and not own.takes_z:
            raise UnsupportedModelError(
                f"What {site.module} of {recording.model} returns is not z through its output "
                "projection (a gate or a norm stands between): restart it without z."
            )
        self._site = site
        self._own = own
        self._times = times
        self._z = z
        self._skipped = recording.before(site.name)
        self._reached: set[str] = set()
        self._wide: dict[int, Tensor] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Replace, for this thread, what came before, and the site's module where z is given."""
        try:  # all modules are found before any is changed
            modules = [model.get_submodule(run.name) for run in self._skipped]
            attention = model.get_submodule(self._site.module)
        except AttributeError as error:
            raise SeamError(f"The recorded run is of another kind of model: {error}.") from error
        handles: list[Handle] = [
            model.register_forward_pre_hook(of_this_thread(self._begin)),
            model.register_forward_hook(of_this_thread(self._check)),
            *map(Replaced, modules, map(self._returning, self._skipped)),
        ]
        z = self._z
        if z is not None:
            made = partial(self._own.with_z, model, z, self._times)
            handles.append(Replaced(attention, lambda *_, **__: made()))
        return handles

    def _returning(self, run: Ran) -> Callable[..., Any]:
        later = [r for r in self._skipped if r.began > run.ended]
        follows = any(_list_of(r.name) == _list_of(run.name) for r in later)
        unread = run.passed and follows and self._times > 1  # one copy costs nothing

        def forward(*args: Any, **kwargs: Any) -> Any:
            entering = _entering(args, kwargs)
            entered = None if entering is None else entering.shape
            wide = run.entered and (self._times * run.entered[0], *run.entered[1:])
            if entered != wide:
                raise SeamError(
                    f"What enters {run.name} has shape {entered}, and {self._times} copies of the "
                    f"recorded batch have {wide}: restart with copies of the batch recorded."
                )
            self._reached.add(run.name)
            return put(run.value, widened(run.value, self._times, self._wide, unread))

        return forward

    def _begin(self, *_: object) -> None:
        self._reached.clear()

    def _check(self, *_: object) -> None:
        """Raise where the model did not come by a skipped module: something else was computed."""
        missed = [run.name for run in self._skipped if run.name not in self._reached]
        if missed:
            raise SeamError(
                f"The model did not run {', '.join(missed)} in this forward, as it did in the "
                "recorded one: give it the recorded inputs."
            )


class _Left:
    """A stream as a block left it, held only as long as the model holds it."""

    def __init__(self, name: str, stream: Tensor) -> None:
        self.name = name
        self.stream = ref(stream)
        self.taken = False
        self._version = 0 if stream.is_inference() else stream._version

    def is_still(self, tensor: Tensor | None) -> bool:
        """Whether this is the stream, and nobody has written to it."""
        if tensor is None or tensor is not self.stream() or tensor.is_inference():
            return False
        return tensor._version == self._version


_PARTS = ("query", "key", "value", "output")


def block_names(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Members of the lists of blocks that hold the sites, those without attention among them.

    Where lists are nested (stages of blocks), the outermost and the one that `Site.block` names.
    """
    lists: dict[str, None] = {}
    for site in anatomy.sites:
        if site.block is None:
            continue
        parts = site.block.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts))]
        found = [name for name in around if isinstance(model.get_submodule(name), nn.ModuleList)]
        lists.update(dict.fromkeys([found[0], found[-1]]))
    return [
        f"{name}.{child}"
        for name in lists
        for child, _ in model.get_submodule(name).named_children()
    ]


def _entering(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module is given."""
    return next((part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)), None)


def _list_of(name: str) -> str:
    return name.rpartition(".")[0]
