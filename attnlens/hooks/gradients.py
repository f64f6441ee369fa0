"""The gradient of a metric at every head's output: one forward and one backward.

The calls of all sites stay in one autograd graph, which begins at the first site: its z becomes a
leaf where the model's own weights ask for no gradient. So frozen models work, and no weight's
gradient is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.probe import evaluating
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Observer, Session

MetricOf = Callable[[Any], Tensor]
"""The metric of each prompt of a batch, from the model's output; prompts are summed."""


@dataclass(frozen=True)
class ZGradient:
    """One attention call and how the metric changes with its output; nothing of it has a graph."""

    call: Call
    gradient: Float[Tensor, "batch query head d_v"]
    """dM/dz; each prompt's own, since prompts of a batch do not see each other."""

    @property
    def z(self) -> Float[Tensor, "batch query head d_v"]:
        """The heads' outputs."""
        return self.call.output


def z_gradients(
    model: nn.Module,
    anatomy: Anatomy,
    inputs: Mapping[str, Any],
    metric: MetricOf,
    sites: Iterable[Site] | None = None,
    observers: Sequence[Observer] = (),
) -> dict[str, ZGradient]:
    """z and dM/dz at each site (all where not given), in the order of the anatomy.

    Sessions that are open act first: under `lens.edit` z is that of the edited heads. Other
    `observers` join the run. Neither `.grad`, `requires_grad` nor the training mode of the model
    changes; it runs in evaluation mode, where transformers leaves gradient checkpointing off. A
    site on which the metric does not depend has a gradient of 0.

    Raises:
        InputError: a metric without a gradient, or with one that is not finite.
        SeamError: a site did not run.
        UnsupportedModelError: a part of the model runs without gradients.

    """
    wanted = tuple(anatomy.sites if sites is None else sites)
    graph = _Graph(wanted)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model),
        Session(model, anatomy, [graph, *observers]) as session,
    ):
        output = model(**usable(model, inputs))
        session.check_fired()
        value = metric(output).sum()
        if not value.requires_grad:
            raise InputError(
                "The metric has no gradient: it does not depend on any head's output by "
                "differentiable steps (accuracy does not). Take a loss or a logit difference."
            )
        calls = [graph.calls[site.name] for site in wanted]
        found = torch.autograd.grad(value, [call.output for call in calls], allow_unused=True)
    _check_reached(anatomy.model, wanted, found)
    return {
        site.name: _with_gradient(site, call, gradient)
        for site, call, gradient in zip(wanted, calls, found, strict=True)
    }


class _Graph(Observer):
    """Observer that keeps the calls of some sites within one autograd graph."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = frozenset(site.name for site in sites)
        self.calls: dict[str, Call] = {}

    def see(self, site: Site, call: Call) -> Call:
        """Keep the call; where nothing asks for a gradient yet, its output begins the graph."""
        if not torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{site.name} runs without gradients, inside reentrant checkpointing or "
                "torch.no_grad, so that a metric's gradient cannot be read there. Turn "
                "checkpointing off, or checkpoint with use_reentrant=False."
            )
        output = call.output if call.output.requires_grad else call.output.detach().requires_grad_()
        self.calls[site.name] = replace(call, output=output)
        # The model gets a copy: what it does to z in place must not change what was kept.
        return replace(call, output=output.clone())


def usable(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs that can be saved for a backward pass, which tensors of inference mode cannot."""
    usable = {
        name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
        for name, value in inputs.items()
    }
    if "use_cache" in inspect.signature(model.forward).parameters:
        usable.setdefault("use_cache", False)
    return usable


def _check_reached(model: str, sites: Sequence[Site], gradients: Sequence[Tensor | None]) -> None:
    """Raise where a site without a gradient comes before one of its stack that has one.

    A stack's residual stream carries what earlier layers wrote to later ones, so there something
    cut the graph. Sites after all that the metric reads have none by right.
    """
    later: set[str] = set()
    for site, gradient in reversed(list(zip(sites, gradients, strict=True))):
        if gradient is not None:
            later.add(site.stack)
        elif site.stack in later:
            raise UnsupportedModelError(
                f"No gradient comes back to {site.name} of {model}, though one comes to a later "
                "layer: a step in between has none (detached or rounded values). Ablate its heads "
                "one by one instead: al.ablate(lens, task)."
            )


def _detached(call: Call) -> Call:
    """The call without its graph."""
    free = {
        name: value.detach()
        for name in ("query", "key", "value", "mask", "output", "weights")
        if isinstance(value := getattr(call, name), Tensor)
    }
    arguments = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in call.arguments.items()
    }
    return replace(call, **free, arguments=arguments)


def _with_gradient(site: Site, call: Call, gradient: Tensor | None) -> ZGradient:
    if gradient is None:
        return ZGradient(_detached(call), torch.zeros_like(call.output).detach())
    if not bool(gradient.isfinite().all()):
        raise InputError(
            f"The metric's gradient at {site.name} is not finite: the logits hold NaN or infinity, "
            "or the model's dtype overflows. Load it in float32 or bfloat16, and look at its "
            "logits (lens.logits)."
        )
    return ZGradient(_detached(call), gradient)
