"""Views of a head's weights: W_Q, W_K, W_V, W_O, whatever way the model stores them.

A projection is a linear module and, for each head and channel, the output feature of that module
which becomes this channel. So fused and interleaved layouts need no table of names; the probe finds
the features by matching what the module returned with what attention received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlens.anatomy.placed import weight_of
from attnlens.anatomy.sites import Site
from attnlens.errors import UnsupportedModelError


@dataclass(frozen=True)
class Projection:
    """The part of a linear module that makes q, k or v."""

    module: str
    features: Int[Tensor, "head d_head"]
    """Output feature of the module for each head (or group) and channel."""
    scale: float = 1.0
    """Factor between the module's output and what attention receives (some models scale q)."""


@dataclass(frozen=True)
class HeadWeights:
    """Weights of all heads of one site; a query head h reads group h // (heads / groups).

    A part that the model does not have as one matrix a head raises UnsupportedModelError when it is
    asked for.
    """

    model: nn.Module
    site: Site
    projections: Mapping[str, Projection]
    """`query`, `key` and `value`, as far as one linear module makes them."""

    @property
    def query(self) -> Float[Tensor, "head d_model d_qk"]:
        """W_Q of each head."""
        return self._of("query")

    @property
    def key(self) -> Float[Tensor, "group d_model d_qk"]:
        """W_K of each key/value head."""
        return self._of("key")

    @property
    def value(self) -> Float[Tensor, "group d_model d_v"]:
        """W_V of each key/value head."""
        return self._of("value")

    @property
    def output(self) -> Float[Tensor, "head d_v d_model"]:
        """W_O of each head."""
        return output_weight(self.model, self.site)

    def _of(self, name: str) -> Tensor:
        if name not in self.projections:
            raise UnsupportedModelError(
                f"The {name} of {self.site.name} comes from no single linear module of "
                f"{self.site.module} (it is put together from several, as in latent attention), so "
                "its weights per head are not defined."
            )
        return projection_weight(self.model, self.projections[name])


def input_major(module: nn.Module) -> Float[Tensor, "d_in d_out"]:
    """The weight of a linear module as `input output`: Conv1D stores it so, Linear transposed."""
    weight = weight_of(module, "weight")
    return weight if type(module).__name__ == "Conv1D" else weight.T


def projection_weight(
    model: nn.Module, projection: Projection
) -> Float[Tensor, "head d_model d_head"]:
    """The weights of a projection, head by head."""
    weight = input_major(model.get_submodule(projection.module))
    features = projection.features.to(weight.device)
    picked = weight[:, features.flatten()].view(weight.shape[0], *features.shape)
    return picked.permute(1, 0, 2) * projection.scale


def output_weight(model: nn.Module, site: Site) -> Float[Tensor, "head d_v d_model"]:
    """W_O of each head of a site, a view on the module's weight."""
    if site.output is None:
        raise UnsupportedModelError(
            f"{site.name} has no output projection that is fed the heads directly (a gate or a "
            "norm stands between), so a head's result and its W_O are not defined. Use z instead."
        )
    weight = input_major(model.get_submodule(site.output))
    return weight.view(site.heads, site.d_v, -1) if weight.is_contiguous() else _split(weight, site)


def _split(weight: Float[Tensor, "d_in d_model"], site: Site) -> Float[Tensor, "head d_v d_model"]:
    return weight.T.view(-1, site.heads, site.d_v).permute(1, 2, 0)
