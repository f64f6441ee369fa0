"""Find the linear modules that make q, k and v of a site, by matching numbers, not names.

The model runs once on a few prompts; what the site's linear modules return is compared with what
attention receives, channel by channel. Position 0 is compared first, where a rotary embedding turns
nothing; a norm between the projection and attention (QK-norm) is undone by comparing directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnlens.anatomy import Anatomy, Site
from attnlens.anatomy.weights import HeadWeights, Projection, output_weight, projection_weight
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.probe import evaluating
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Session

# Cosine of two channels over the prompts that are the same but for rounding.
_SAME = {torch.float64: 1 - 1e-9, torch.float32: 1 - 1e-5}


def head_weights(
    model: nn.Module, anatomy: Anatomy, site: Site, example: Mapping[str, Any]
) -> HeadWeights:
    """W_Q, W_K, W_V and W_O of a site, head by head, without biases and norms."""
    found = find_projections(model, anatomy, site, example)
    return HeadWeights(
        query=projection_weight(model, found["query"]),
        key=projection_weight(model, found["key"]),
        value=projection_weight(model, found["value"]),
        output=output_weight(model, site),
    )


def find_projections(
    model: nn.Module, anatomy: Anatomy, site: Site, example: Mapping[str, Any]
) -> dict[str, Projection]:
    """The projections `query`, `key` and `value` of a site."""
    spy = _Spy(site)
    with torch.no_grad(), evaluating(model), Session(model, anatomy, [spy]):
        model(**example)
    assert spy.call is not None
    found: dict[str, Projection] = {}
    for name in ("query", "key", "value"):
        received = getattr(spy.call, name)
        projection = _match(received, spy.outputs)
        if projection is None:
            raise UnsupportedModelError(
                f"The {name} of {site.name} comes from no single linear module of {site.module} (it "
                "is put together from several, as in latent attention), so its weights per head are "
                "not defined."
            )
        found[name] = projection
    return found


class _Spy:
    """Observer of one site that also notes what the module's linear parts returned before the call."""

    def __init__(self, site: Site) -> None:
        self.sites = frozenset([site.name])
        self.call: Call | None = None
        self.outputs: dict[str, Tensor] = {}
        self._module = site.module
        self._latest: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> list[Any]:
        """Note the output of every linear module inside the attention module."""
        handles: list[Any] = []
        for name, module in model.get_submodule(self._module).named_modules(prefix=self._module):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2:
                handles.append(module.register_forward_hook(self._note(name)))
        return handles

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._latest[name] = output

        return hook

    def see(self, site: Site, call: Call) -> Call:
        """Freeze what was noted when the site is called."""
        self.call, self.outputs = call, dict(self._latest)
        return call


def _match(received: Float[Tensor, "b n s d"], outputs: Mapping[str, Tensor]) -> Projection | None:
    """The module and features whose outputs are the received channels, up to one positive scale."""
    batch, heads, length, width = received.shape
    candidates = {
        name: output.reshape(batch, length, -1).double()
        for name, output in outputs.items()
        if output.numel() % (batch * length) == 0 and output.shape[0] == batch
    }
    threshold = _SAME.get(received.dtype, 1 - 1e-3)
    for positions in (slice(None), slice(0, 1)):
        wanted = received[:, :, positions].double().permute(1, 3, 0, 2).reshape(heads * width, -1)
        for name, output in candidates.items():
            for normalise in (_plain, _rms(width), _rms(None), _layer_norm(width)):
                given = normalise(output)
                if given is None:
                    continue
                features = given[:, positions].permute(2, 0, 1).reshape(given.shape[2], -1)
                matched = _best(wanted, features, threshold)
                if matched is not None:
                    index, scales = matched
                    scale = float(scales.median()) if normalise is _plain else 1.0
                    return Projection(name, index.view(heads, width), _clean(scale))
    return None


def _best(
    wanted: Float[Tensor, "channel n"], given: Float[Tensor, "feature n"], threshold: float
) -> tuple[Tensor, Tensor] | None:
    """For each wanted channel the feature that points the same way; None if one has none."""
    if wanted.shape[1] < 4:
        return None
    # Without their means over the prompts, so that a bias on either side does not matter.
    wanted = wanted - wanted.mean(1, keepdim=True)
    given = given - given.mean(1, keepdim=True)
    unit = wanted / wanted.norm(dim=1, keepdim=True).clamp_min(1e-30)
    norms = given.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosine, index = (unit @ (given / norms).T).max(1)
    if bool((cosine < threshold).any()) or len(torch.unique(index)) < len(index):
        return None
    return index, wanted.norm(dim=1) / norms[index, 0]


def _plain(output: Tensor) -> Tensor:
    return output


def _rms(width: int | None) -> Callable[[Tensor], Tensor | None]:
    """Divide by the root mean square of each head, or of the whole output."""

    def normalise(output: Tensor) -> Tensor | None:
        size = width or output.shape[-1]
        if output.shape[-1] % size:
            return None
        parts = output.unflatten(-1, (-1, size))
        return (parts / parts.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)).flatten(-2)

    return normalise


def _layer_norm(width: int) -> Callable[[Tensor], Tensor | None]:
    """Centre and divide by the standard deviation of each head."""
    scale = _rms(width)

    def normalise(output: Tensor) -> Tensor | None:
        if output.shape[-1] % width:
            return None
        parts = output.unflatten(-1, (-1, width))
        return scale((parts - parts.mean(-1, keepdim=True)).flatten(-2))

    return normalise


def _clean(scale: float) -> float:
    """1 where the scale is 1 but for rounding."""
    return 1.0 if abs(scale - 1) < 1e-4 else scale
