"""One forward and one backward under the rules of relevance propagation, and what they found.

Relevance is read at any place as `value x gradient`: at the token embeddings, at every head's z, at
the residual stream that enters each block, at the weights of the attention maps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.backward.again import blocks_again
from attnlens.hooks.backward.asked import Rule
from attnlens.hooks.backward.mode import Rules, activations
from attnlens.hooks.backward.tally import MixedPromptsError, Tally, on_gradient
from attnlens.hooks.backward.within import mapped, tensors_in
from attnlens.hooks.edits.changes import Edited
from attnlens.hooks.embedded import Embedded, token_tables
from attnlens.hooks.gradients import MetricOf, usable
from attnlens.hooks.probe import evaluating
from attnlens.hooks.replaced import of_this_thread
from attnlens.hooks.residual import Passing, Stream, streams_of
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Handle, Observer, Session

_MIXED = 1e-2  # far over what rounding makes, in half types too


@dataclass(frozen=True)
class Relevances:
    """Where the explained value went, prompt by prompt; nothing of it has a graph."""

    value: Float[Tensor, " batch"]
    started: Float[Tensor, " batch"]
    """What the target hands to the model's outputs, `output x gradient`: the value itself where
    it is a sum of logits."""
    beyond: Float[Tensor, " batch"]
    """`value - started`, which a function that is no sum of logits keeps; 0 within rounding."""
    entries: Mapping[str, Float[Tensor, " batch"]]
    """Relevance by part: tokens, inputs that are no tokens, positions, biases, softmax."""
    text: Float[Tensor, "batch position"] | None
    """Relevance of the token embeddings of the text; None where the model reads no tokens."""
    decoder: Float[Tensor, "batch position"] | None
    """That of a decoder's own tokens."""
    heads: Mapping[str, Float[Tensor, "batch query head"]]
    """Relevance of each head's z at each position, by site."""
    streams: Mapping[str, Float[Tensor, "batch position"]]
    """Relevance of the stream that enters each block, by the name of its first site, and of what
    leaves a stack's last block: `final`, `enc.final`."""
    maps: Mapping[str, Float[Tensor, "batch head query key"]]
    """Relevance of attention weights, of the sites asked for."""

    @property
    def error(self) -> Float[Tensor, " batch"]:
        """What no part accounts for, against the larger of what was explained and the parts."""
        entries = torch.stack(list(self.entries.values()))
        largest = torch.stack([self.started.abs(), *entries.abs()]).amax(0)
        return (self.started - entries.sum(0)).abs() / torch.where(largest > 0, largest, 1)

    @property
    def mixed(self) -> bool:
        """Whether parts were counted to the wrong prompts: all together sum, each by itself not."""
        missing = self.started - torch.stack(list(self.entries.values())).sum(0)
        alone = float(missing.abs().sum())
        return float(self.error.max()) > _MIXED and abs(float(missing.sum())) < 0.1 * alone


def relevances(
    model: nn.Module,
    anatomy: Anatomy,
    inputs: Mapping[str, Any],
    metric: MetricOf,
    rule: Rule,
    observers: Sequence[Observer] = (),
    maps: Collection[str] = (),
    checkpoint: bool = False,
    tally: Tally | None = None,
) -> Relevances:
    """Propagate the metric's value down to the inputs by a rule.

    Sessions that are open act first. The model is left as it was: no weight gets a gradient, and
    rules hold for the forward of this call alone. With `checkpoint` each block's inner values are
    computed again in the backward pass instead of kept.

    Raises:
        InputError: a metric that does not depend on the input, or values that are not finite.
        MixedPromptsError: rows whose prompt is not known; run prompts one at a time.
        UnsupportedModelError: nothing to hand relevance to, or blocks that cannot be run again.

    """
    run = _Run(anatomy, rule, tally or Tally.of(model, inputs), frozenset(maps))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(model))
        rules = Rules(rule, run.tally)
        for handle in activations(model, rules):
            stack.callback(handle.remove)
        tokens = [Embedded(run.token_leaf)] if token_tables(model) else []
        session = stack.enter_context(Session(model, anatomy, [run, *tokens, *observers]))
        if checkpoint:
            for handle in blocks_again(model, anatomy, rules):
                stack.callback(handle.remove)
        given = run.with_leaves(usable(model, inputs))
        with rules:
            output = model(**given)
        session.check_fired()
        found = run.propagate(output, metric)
    if found.mixed:
        raise MixedPromptsError
    return found


@dataclass
class _Leaf:
    """Where relevance ends: token embeddings (with their ids), or inputs that are numbers."""

    ids: Tensor | None
    values: Tensor


class _Run(Observer):
    """Observer of one run that hooks what relevance is read at."""

    def __init__(self, anatomy: Anatomy, rule: Rule, tally: Tally, maps: frozenset[str]) -> None:
        self.sites = frozenset(site.name for site in anatomy.sites)
        self.tally = tally
        self._anatomy = anatomy
        self._rule = rule
        self._wanted = maps
        self._ids: Mapping[str, Any] = {}
        self._leaves: list[_Leaf] = []
        self._heads: dict[str, Tensor] = {}
        self._streams: dict[str, Tensor] = {}
        self._maps: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> Sequence[Handle]:
        """Hooks on the streams that enter blocks, where the model has a list of blocks."""
        blocks = [site for site in self._anatomy.sites if site.block is not None]
        if not blocks:
            return ()
        streams = streams_of(self._anatomy, blocks)
        entering = [stream for stream in streams if not stream.final]
        handles: list[Handle] = [Passing(model, self._anatomy, entering, self._stream)]
        for stream in streams:
            if stream.final and stream.site.block is not None:
                block = model.get_submodule(stream.site.block)
                handles.append(block.register_forward_hook(of_this_thread(self._leaving(stream))))
        return handles

    def _leaving(self, stream: Stream) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._stream(stream, output if isinstance(output, Tensor) else output[0])

        return hook

    def with_leaves(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs, in which numbers (pixels, sounds) are leaves."""
        self._ids = inputs
        given = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name:
                leaf = value.detach().clone().requires_grad_()
                self._leaves.append(_Leaf(None, leaf))
                given[name] = leaf.clone()  # which the model may change in place
        return given

    def token_leaf(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Embeddings as a leaf; the model gets a copy, which it may change in place."""
        leaf = embeddings.detach().clone().requires_grad_()
        self._leaves.append(_Leaf(ids, leaf))
        return leaf.clone()

    def see(self, site: Site, call: Call) -> Call:
        """Hook a head's z, and where they are asked for the weights of its map."""
        if not call.output.requires_grad:
            return call

        def seen(gradient: Tensor) -> None:
            self._heads[site.name] = self._relevance(call.output, gradient)

        def made(gradient: Tensor) -> None:
            self._maps[site.name] = self._edges(site, call, gradient)

        on_gradient(call.output, seen)
        if site.name in self._wanted:
            on_gradient(call.made if isinstance(call, Edited) else call.output, made)
        return call

    def _stream(self, stream: Stream, tensor: Tensor) -> None:
        if tensor.requires_grad:

            def seen(gradient: Tensor) -> None:
                # Of a block that serves several layers the last run's gradient comes first.
                self._streams.setdefault(stream.name, self._relevance(tensor, gradient))

            on_gradient(tensor, seen)

    def _relevance(self, values: Tensor, gradient: Tensor) -> Tensor:
        """`value x gradient`, summed over the width, in float32 at least."""
        wide = torch.promote_types(values.dtype, torch.float32)
        return (values.to(wide) * gradient.to(wide)).sum(-1) / self.tally.scale

    def _edges(self, site: Site, call: Call, gradient: Tensor) -> Tensor:
        """`A x dM/dA` of one call, where A and V share what their product gets."""
        both = self._rule.through_patterns and call.value.requires_grad
        wide = torch.promote_types(gradient.dtype, torch.float32)
        rows = Rows.summing(site, call)
        size = call.query.shape[1] // call.value.shape[1]
        value = call.value.to(wide).repeat_interleave(size, 1)
        heads = (gradient.to(wide) * ((0.5 if both else 1.0) / self.tally.scale)).transpose(1, 2)
        found = torch.zeros(rows.shape, dtype=wide, device=value.device)
        for block in rows.blocks():
            keys = rows.keys_seen(block)
            pattern = rows.pattern(rows.scores(block, keys), block, keys)
            slopes = heads[:, :, block] @ value[:, :, keys].transpose(-1, -2)
            found[:, :, block, keys] = pattern.to(wide) * slopes
        return found

    def propagate(self, output: Any, metric: MetricOf) -> Relevances:
        """The backward pass from the explained value, and what its hooks found."""
        value, ends, slopes = self._explained(output, metric)
        if not self._leaves:
            raise UnsupportedModelError(
                f"{self._anatomy.model} looked up no tokens in this run and was given no numbers, "
                "so there is nothing to hand relevance to."
            )
        wanted = [leaf.values for leaf in self._leaves]
        found = torch.autograd.grad(ends, wanted, slopes, allow_unused=True)
        given = list(map(self._started, ends, slopes))
        started = torch.stack([handed for handed, _ in given]).sum(0)
        rounding = (
            2 * torch.finfo(value.dtype).eps * torch.stack([size for _, size in given]).sum(0)
        )
        beyond = value.detach().double().cpu() - started
        sides: dict[str, Tensor] = {}
        for leaf, gradient in zip(self._leaves, found, strict=False):
            self._end(leaf, gradient, sides)
        order = [site.name for site in self._anatomy.sites]
        return Relevances(
            value.detach().double().cpu(),
            started,
            torch.where(beyond.abs() > rounding, beyond, 0),
            dict(self.tally.sums),
            sides.get("input_ids"),
            sides.get("decoder_input_ids"),
            {name: self._heads[name] for name in order if name in self._heads},
            {name: self._streams[name] for name in sorted(self._streams, key=_place(order))},
            {name: self._maps[name] for name in order if name in self._maps},
        )

    def _explained(
        self, output: Any, metric: MetricOf
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The value, the model's outputs that it depends on, and its gradients there."""
        given = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        of = dict(zip(map(id, given), leaves, strict=True))
        value = metric(mapped(output, lambda tensor: of.get(id(tensor), tensor)))
        _check_value(value)
        total = value.sum() * self.tally.scale
        slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return value, given, list(slopes)

    def _started(self, end: Tensor, slope: Tensor) -> Float[Tensor, "2 batch"]:
        """What the target hands to one of the model's outputs, signed and in size."""
        wide = torch.promote_types(end.dtype, torch.float32)
        products = end.detach().to(wide) * slope.to(wide)
        return torch.stack([self.tally.by_prompt(products), self.tally.by_prompt(products.abs())])

    def _end(self, leaf: _Leaf, gradient: Tensor | None, sides: dict[str, Tensor]) -> None:
        """Count what a leaf got, and keep that of tokens by position."""
        own = torch.zeros_like(leaf.values) if gradient is None else gradient
        if not bool(own.isfinite().all()):
            raise InputError(
                "The relevance of the inputs is not finite: the model's dtype overflows, or it "
                "divides by 0 in its backward pass. Load it in float32 or bfloat16."
            )
        wide = torch.promote_types(own.dtype, torch.float32)
        products = leaf.values.detach().to(wide) * own.to(wide)
        self.tally.add("inputs" if leaf.ids is None else "tokens", products)
        if leaf.ids is not None:
            sides.setdefault(self._side(leaf.ids, sides), products.sum(-1) / self.tally.scale)

    def _side(self, ids: Tensor, taken: Mapping[str, Tensor]) -> str:
        """Which of the model's inputs these ids are; an encoder reads its text first."""
        for name in ("input_ids", "decoder_input_ids"):
            given = self._ids.get(name)
            if name not in taken and isinstance(given, Tensor) and torch.equal(given, ids):
                return name
        return "input_ids"


def _place(order: Sequence[str]) -> Callable[[str], int]:
    """Where a stream comes: those that enter sites in their order, then those that leave stacks."""
    return lambda name: order.index(name) if name in order else len(order)


def _check_value(value: Tensor) -> None:
    if not value.requires_grad:
        raise InputError(
            "The target has no gradient: it does not depend on the input by differentiable steps. "
            "Take a logit, a contrast of two, or a smooth function of the output."
        )
    if value.ndim != 1 or not bool(value.isfinite().all()):
        raise InputError(
            f"The target gives values of shape {list(value.shape)}, finite or not: it has to give "
            "one finite number a prompt. NaN weights or an overflow give others; look at the "
            "logits (lens.logits)."
        )
