"""Find a model's attention sites by running it once on a small input, not by a table of names.

The probe listens at every module, so whatever reaches transformers' attention interface is a site.
The output projection is the linear module that is fed exactly what a site returned; the block is
the nearest member of a list of equal modules around the site; causality, windows and learned sinks
are read off the call. The probe also checks that the seam alone changes nothing: the model's output
with and without it must agree bit for bit.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import UnsupportedModelError
from attnlens.hooks import seam
from attnlens.hooks.naming import name_sites
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Asked, Call, eager_function

OUTSIDE = (
    "Bloom, Falcon, GPT-J, GPT-Neo, MPT, CodeGen, DeBERTa, XLNet and Longformer do not use it. "
    "A model of another family works (Llama, Qwen, Mistral, Gemma, GPT-2, GPT-NeoX, BERT, T5, "
    "Whisper, ViT and most others; docs/models.md lists those that are tested)."
)


OTHER_STREAMS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""What transformers calls the stream that cross-attention reads."""


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Run in eval mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def examine(model: nn.Module, inputs: Mapping[str, Any]) -> Anatomy:
    """The anatomy of a model, from one run with and one without the seam on `inputs`."""
    refuse_bridge(model)
    seam.restore(seam.switch(model))  # a kernel that cannot be read is refused before anything runs
    with torch.no_grad(), evaluating(model):
        plain = output_tensors(model(**inputs))
        with _Probe(model) as probe:
            probed = output_tensors(model(**inputs))
    if not probe.calls:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not call transformers' attention interface, so attnlens "
            f"cannot see its attention. {OUTSIDE}"
        )
    same = len(plain) == len(probed) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain, probed, strict=True)
    )
    if not same:
        raise UnsupportedModelError(
            f"The output of {type(model).__name__} changes when its attention passes through the "
            "seam, before anything is asked: its code treats attention kernels by name, or a "
            "forward pass is random. Its figures would not be the model's own."
        )
    with torch.no_grad():
        return _anatomy(model, probe, inputs)


def refuse_bridge(model: nn.Module) -> None:
    """TransformerLens replaces attention modules, of the user's model too; refuse it by name."""
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a TransformerLens model, or has its bridge around it: the "
            "bridge replaces the attention modules, so attnlens cannot see through it. Load the "
            "transformers model anew (AutoModelForCausalLM.from_pretrained, before a bridge is put "
            "around it)."
        )


@dataclass
class _Seen:
    """One call in the probe run."""

    module: str
    index: int
    call: Call
    elsewhere: bool
    """Whether the module was given another stream to read its keys from."""
    output: str | None = None


@dataclass
class _Probe:
    """Listens at every module of a model for one forward pass."""

    model: nn.Module
    calls: list[_Seen] = field(default_factory=list)
    unembedding_input: Tensor | None = None
    final_norm: str | None = None
    unseen: tuple[str, ...] = ()
    _ran: list[str] = field(default_factory=list)
    _elsewhere: set[int] = field(default_factory=set)
    _norms: list[tuple[str, Tensor]] = field(default_factory=list)
    _names: dict[int, str] = field(default_factory=dict)
    _undo: list[Any] = field(default_factory=list)

    def __enter__(self) -> _Probe:
        try:
            configs = seam.switch(self.model)
            self._undo.append(lambda: seam.restore(configs))
            for name, module in self.model.named_modules():
                self._names[id(module)] = name
                seam.listen(module, self)
                self._undo.append(lambda module=module: seam.unlisten(module, self))
                self._hook(name, module)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _hook(self, name: str, module: nn.Module) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):

            def projected(module: nn.Module, args: tuple[Any, ...]) -> None:
                self._projected(name, module, args)

            self._undo.append(module.register_forward_pre_hook(projected).remove)
        if _is_attention(module) and not any(map(_is_attention, list(module.modules())[1:])):
            handle = module.register_forward_hook(lambda *_, name=name: self._ran.append(name))
            self._undo.append(handle.remove)
        if _is_attention(module):
            handle = module.register_forward_pre_hook(self._note_streams, with_kwargs=True)
            self._undo.append(handle.remove)
        if "norm" in type(module).__name__.lower():

            def normed(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                self._norms.append((name, output))

            self._undo.append(module.register_forward_hook(normed).remove)

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        if self.unembedding_input is not None:
            for name, output in reversed(self._norms):
                if isinstance(output, Tensor) and _same(output, self.unembedding_input):
                    self.final_norm = name
                    break
        self._norms.clear()
        seen = [seen.module for seen in self.calls]
        self.unseen = tuple(
            name
            for name in dict.fromkeys(self._ran)
            if not any(
                s == name or s.startswith(name + ".") or name.startswith(s + ".") for s in seen
            )
        )

    def attending(self, asked: Asked) -> Asked:
        return asked

    def attended(self, call: Call) -> Call:
        name = self._names[id(call.module)]
        index = sum(seen.module == name for seen in self.calls)
        self.calls.append(_Seen(name, index, call, id(call.module) in self._elsewhere))
        return call

    def _note_streams(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if any(isinstance(given.get(name), Tensor) for name in OTHER_STREAMS):
            self._elsewhere.add(id(module))

    def _projected(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        if module is _unembedding(self.model):
            self.unembedding_input = args[0]
        if self.calls and self.calls[-1].output is None:
            seen = self.calls[-1]
            if _same(args[0], seen.call.output):
                seen.output = name


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes."""
    return a.numel() == b.numel() and a.dtype == b.dtype and torch.equal(a.flatten(), b.flatten())


def output_tensors(output: Any) -> list[Tensor]:
    """The floating tensors in a model's output, nested ones too."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in output_tensors(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in output_tensors(value)]
    return []


def _unembedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    try:
        return find() if find is not None else None
    except (AttributeError, NotImplementedError):
        return None


def _anatomy(model: nn.Module, probe: _Probe, inputs: Mapping[str, Any]) -> Anatomy:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = {id(module): name for name, module in model.named_modules()}
    unembedding = _unembedding(model)
    sites = [_site(model, seen) for seen in probe.calls]
    return Anatomy(
        model=type(model).__name__,
        sites=tuple(name_sites(sites, bool(getattr(config, "is_encoder_decoder", False)))),
        d_model=getattr(text, "hidden_size", None) or getattr(text, "d_model", None),
        vocab=getattr(text, "vocab_size", None) if "input_ids" in inputs else None,
        context=_context(model, text),
        final_norm=probe.final_norm,
        unembedding=names.get(id(unembedding)) if unembedding is not None else None,
        unseen=probe.unseen,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _context(model: nn.Module, text: Any) -> int | None:
    """How many positions the model takes: its learned positions, or what its config says."""
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    reserved = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"position", name):
            # RoBERTa starts counting after its padding id.
            reserved = (module.padding_idx + 1) if module.padding_idx is not None else 0
    return limit - reserved


def _site(model: nn.Module, seen: _Seen) -> Site:
    call = seen.call
    queries, keys = call.query.shape[2], call.key.shape[2]
    upcast, sinks = softmax_rule(call)
    rows = Rows.of(call, upcast, sinks)
    cross = seen.elsewhere or queries != keys
    causal = False
    if not cross and queries > 1:
        above = torch.ones(queries, keys, dtype=torch.bool, device=call.query.device).triu(1)
        causal = not bool(rows.dense()[..., above].any())
    window = call.arguments.get("sliding_window") or getattr(call.module, "sliding_window", None)
    return Site(
        module=seen.module,
        call=seen.index,
        stack="",
        layer=0,
        kind="cross" if cross else "self" if causal else "encoder",
        heads=call.query.shape[1],
        groups=call.key.shape[1],
        d_qk=call.query.shape[3],
        d_v=call.value.shape[3],
        causal=causal,
        window=window if isinstance(window, int) else None,
        sinks=rows.sinks is not None,
        upcast=upcast,
        block=_block(model, seen.module),
        output=seen.output,
    )


def _block(model: nn.Module, module: str) -> str | None:
    """The nearest enclosing member of a list whose members are all of one class.

    Hybrid models mix classes of blocks in one list: there the outermost member of a list.
    """
    parts = module.split(".")
    outermost = None
    for end in range(len(parts), 0, -1):
        siblings = model.get_submodule(".".join(parts[: end - 1]))
        if parts[end - 1].isdigit() and isinstance(siblings, nn.ModuleList):
            outermost = ".".join(parts[:end])
            if len({type(child) for child in siblings.children()}) == 1:
                return outermost
    return outermost


def softmax_rule(call: Call) -> tuple[bool, bool]:
    """How a module's eager attention takes its softmax: (in float32, with learned sinks).

    Its eager function is run in float64 on the call's own q and k and compared with the rows of
    each rule; a float32 softmax leaves errors near 6e-8 there, a float64 one near 1e-16.
    """
    usual = (call.query.dtype != torch.float64, True)
    eager = eager_function(call.module)
    if eager is None:
        return usual
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.arguments.items()
    }
    wide["dropout"] = 0.0
    query, key, value = call.query.double(), call.key.double(), call.value.double()
    mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    try:
        _, weights = eager(call.module, query, key, value, mask, **wide)
    except (TypeError, RuntimeError, ValueError):
        return usual
    if weights is None:
        return usual
    exact = replace(
        call, kernel="eager", query=query, key=key, value=value, mask=mask, arguments=wide
    )
    rules = [(upcast, sinks) for upcast in (False, True) for sinks in (True, False)]
    errors = [float((weights - Rows.of(exact, *rule).dense()).abs().max()) for rule in rules]
    return rules[errors.index(min(errors))]
