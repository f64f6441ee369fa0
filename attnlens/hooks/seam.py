"""The seam: one attention function between a model and the kernel it had.

transformers looks an attention function up by the name in a module's config at every forward.
While a model is switched, that name is ours: the function registered under it runs the kernel that
the model had before, and shows the call to whoever listens to the module. With no listener it only
passes the call on, so an idle seam costs one dictionary look-up a layer.

The name encodes the kernel (hexadecimal, because transformers dispatches specially on names that
contain "sdpa", "flash" or "flex"), so the kernel is known from the config alone, and a model that
shares the config of a switched one still gets its own kernel.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnlens.errors import SeamError, UnsupportedModelError

PREFIX = "attnlens-"
_LISTENERS = "_attnlens_listeners"

Kernel = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Asked:
    """One attention call as the kernel is going to get it.

    query is `batch head query d_qk`, key `batch group key d_qk`, value `batch group key d_v`; the
    mask is in the kernel's own form.
    """

    module: nn.Module
    kernel: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    arguments: dict[str, Any]


@dataclass(frozen=True)
class View:
    """Which part of a call a block of scores or weights is: its axes, as numbers of the call's."""

    prompts: slice
    heads: Int[Tensor, " head"]
    rows: slice
    keys: slice


# (scores block, where it is) -> scores block
ScoreEdit = Callable[[Tensor, View], Tensor]
# (pattern block, visible keys or None for all, where it is) -> pattern block
PatternEdit = Callable[[Tensor, Tensor | None, View], Tensor]


@dataclass(frozen=True)
class Call(Asked):
    """One attention call as the kernel got it, and what it returned: `batch query head d_v`.

    A listener that changes scores or pattern adds a function to the edits of either, so that those
    who listen after it see the rows it made.
    """

    output: Tensor
    weights: Tensor | None
    """The kernel's own weights, `batch head query key`, where it returns them (eager)."""
    score_edits: tuple[ScoreEdit, ...] = ()
    pattern_edits: tuple[PatternEdit, ...] = ()

    @classmethod
    def of(cls, asked: Asked) -> Call:
        """Run the kernel on what is asked."""
        output, weights = run_kernel(asked)
        own = {field.name: getattr(asked, field.name) for field in fields(Asked)}
        return cls(**own, output=output, weights=weights)


def run_kernel(asked: Asked) -> tuple[Tensor, Tensor | None]:
    """What the kernel that the model had returns for this call."""
    function = _kernel_function(asked.kernel, asked.module)
    return function(
        asked.module, asked.query, asked.key, asked.value, asked.mask, **asked.arguments
    )


class Listener(Protocol):
    """Somebody who sees the attention calls of a module."""

    def attending(self, asked: Asked) -> Asked:
        """See a call before the kernel runs; return it as it is, or with other inputs."""
        ...

    def attended(self, call: Call) -> Call:
        """See the call when the kernel has run; return it as it is, or with another output."""
        ...


def kernel_of(name: str | None) -> str:
    """The kernel behind an attention implementation's name, ours or not."""
    if name is None:
        return "sdpa"
    return bytes.fromhex(name[len(PREFIX) :]).decode() if name.startswith(PREFIX) else name


def eager_function(module: nn.Module) -> Kernel | None:
    """The eager attention of a module's own Python file: the oracle for our rows."""
    forward = inspect.unwrap(type(module).forward)
    return forward.__globals__.get("eager_attention_forward")


def _kernel_function(kernel: str, module: nn.Module) -> Kernel:
    found = ALL_ATTENTION_FUNCTIONS.get(kernel) if kernel != "eager" else None
    found = found or eager_function(module)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no {kernel} attention that attnlens can call. "
            "Load the model with attn_implementation='sdpa'."
        )
    return found


def _register(kernel: str) -> str:
    """Register the seam over a kernel, with the kernel's own mask, and return its name."""
    name = PREFIX + kernel.encode().hex()
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        asked = Asked(module, kernel, query, key, value, attention_mask, kwargs)
        listeners = tuple(module.__dict__.get(_LISTENERS, ()))
        if not listeners:
            return run_kernel(asked)
        for listener in listeners:
            asked = listener.attending(asked)
        call = Call.of(asked)
        for listener in listeners:
            call = listener.attended(call)
        return call.output, call.weights

    # Without a mask function under the same name the mask is silently None and causality is lost;
    # rows can be read off masks of eager's and sdpa's form only.
    if ALL_MASK_ATTENTION_FUNCTIONS.get(kernel) not in (eager_mask, sdpa_mask):
        raise UnsupportedModelError(
            f"attnlens cannot read the masks of the attention kernel {kernel!r}. Load the model "
            "with attn_implementation='sdpa' or 'eager'."
        )
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    AttentionInterface.register(name, attend)
    return name


# The public property of a config refuses names that transformers does not ship.
_SWITCH = "_attn_implementation_internal"


def _get(config: PretrainedConfig) -> str | None:
    return getattr(config, _SWITCH)


def _set(config: PretrainedConfig, name: str | None) -> None:
    setattr(config, _SWITCH, name)


class _Switched:
    """Which configs are switched to the seam, and how often: the last one out restores.

    A config belongs to whoever holds it, several models and threads perhaps, and transformers reads
    the switch from there; so the count is kept for the whole process, under a lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[PretrainedConfig, str | None, int]] = {}

    def holds(self, configs: Iterable[PretrainedConfig]) -> bool:
        with self._lock:
            return any(id(config) in self._held for config in configs)

    def acquire(self, configs: Iterable[PretrainedConfig]) -> None:
        with self._lock:
            for config in configs:
                _, original, count = self._held.get(id(config), (config, _get(config), 0))
                _set(config, _register(kernel_of(original)))
                self._held[id(config)] = (config, original, count + 1)

    def release(self, configs: Iterable[PretrainedConfig]) -> None:
        with self._lock:
            for config in configs:
                _, original, count = self._held[id(config)]
                if count > 1:
                    self._held[id(config)] = (config, original, count - 1)
                else:
                    del self._held[id(config)]
                    _set(config, original)


_switched = _Switched()


@contextmanager
def kernel(model: nn.Module, name: str) -> Generator[None]:
    """Run a model on another attention kernel for a while; no session may be open on it."""
    configs = attention_configs(model)
    if _switched.holds(configs):
        raise SeamError(
            f"{type(model).__name__}, or a model of the same config, is attached to a session now, "
            "so its attention kernel cannot be changed. Close the session (leave `with "
            "lens.edit(...)`) first."
        )
    before = [_get(config) for config in configs]
    try:
        for config in configs:
            _set(config, name)
        yield
    finally:
        for config, original in zip(configs, before, strict=True):
            _set(config, original)


def attention_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every config object that the model's modules read their attention implementation from."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())


def switch(model: nn.Module) -> list[PretrainedConfig]:
    """Put the seam under a model; give the returned configs to `restore` afterwards."""
    configs = attention_configs(model)
    taken: list[PretrainedConfig] = []
    try:
        for config in configs:
            _switched.acquire([config])
            taken.append(config)
    except BaseException:
        _switched.release(taken)
        raise
    return configs


def restore(configs: Iterable[PretrainedConfig]) -> None:
    """Undo one `switch`."""
    _switched.release(configs)


def listen(module: nn.Module, listener: Listener) -> None:
    """Show the module's attention calls to the listener, after those who listen already."""
    module.__dict__.setdefault(_LISTENERS, []).append(listener)


def unlisten(module: nn.Module, listener: Listener) -> None:
    """Undo one `listen`; a module nobody listens to is as it was."""
    listeners = module.__dict__[_LISTENERS]
    listeners.remove(listener)
    if not listeners:
        del module.__dict__[_LISTENERS]
