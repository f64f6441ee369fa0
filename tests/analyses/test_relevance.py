"""AttnLRP and CP-LRP against relevance handed down by hand, and what must hold on any model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import attnlens as al
from attnlens.analyses.relevance import attnlrp, cp_lrp
from attnlens.analyses.target import Target
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.oracles.relevance import Oracle

METHODS = pytest.mark.parametrize("method", [attnlrp, cp_lrp])


class ExactNorm(LlamaRMSNorm):
    """Llama's norm in the model's own dtype: the original goes through float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def exact(name: str) -> Lens:
    """A model of the catalogue in float64, whose norms are in float64 too."""
    model = ARCHITECTURES[name].build()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = ExactNorm
    return al.load(model.double())


def close(found: Tensor, expected: Tensor, atol: float = 1e-11) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("against", [None, 9])
@METHODS
def test_relevance_is_what_the_papers_rules_hand_down(
    name: str, method: Any, against: int | None
) -> None:
    lens = exact(name)
    ids = torch.randint(4, 90, (9,), generator=torch.Generator().manual_seed(4))
    expected = Oracle(lens.model, method is attnlrp).explain(ids, 7, 5, against)
    found = method(lens, ids[None], Target(5, against, at=-2), maps="L0,L1")
    assert float(found.value) == pytest.approx(expected.value, rel=1e-12)
    assert close(found.of(0), expected.tokens)
    assert found.heads is not None
    assert close(found.heads[0], torch.cat([z.sum(0) for z in expected.heads]))
    assert found.layers is not None
    assert close(found.layers[0], torch.stack(expected.streams))
    assert found.maps is not None
    for own, layer in zip(found.maps.values(), expected.maps, strict=False):
        assert close(own[0], layer)
    assert found.ledger is not None
    for part, value in expected.entries.items():
        assert float(found.ledger.entries.get(part, 0.0)) == pytest.approx(value, abs=1e-11)
