"""Relevance is conserved, family by family, or the module that breaks it is named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnlens as al
from attnlens.analyses.relevance import attnlrp, cp_lrp
from attnlens.analyses.target import Target
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.backward import ATTNLRP, CP_LRP, Relevances, Rule, relevances
from attnlens.hooks.backward.conservation import FLOAT_TOLERANCE
from attnlens.lens import Lens
from tests.analyses.test_relevance import exact
from tests.architectures import ARCHITECTURES, names

# Their norms go through float32 whatever the model's dtype, so float64 stops at its digits.
NORMS_IN_FLOAT32 = {
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo2", "cohere", "granite",
    "smollm3", "gemma2",
}  # fmt: skip
FAMILIES = sorted(
    NORMS_IN_FLOAT32 | {"phi", "gpt_neox", "stablelm", "starcoder2", "gpt2", "bert", "vit", "t5"}
)
NOT_CLOSED = {
    "olmo_hybrid": (
        "model.layers.0.linear_attn",
        "its gated delta net writes products into its state in place, row by row",
    ),
    "siglip": (
        "vision_model.head.attention",
        "a MultiheadAttention of torch's own is one function that has no rule",
    ),
}
"""Architectures of the catalogue in which the check does not close: the module, and why."""
RULES = pytest.mark.parametrize("rule", [CP_LRP, ATTNLRP], ids=lambda rule: rule.name)


def largest(output: Any) -> Tensor:
    """The largest number of each prompt's last row."""
    first = output[0]
    return first.reshape(first.shape[0], -1, first.shape[-1])[:, -1].amax(-1)


def handed(lens: Lens, name: str, rule: Rule, **more: Any) -> Relevances:
    dtype = next(lens.model.parameters()).dtype
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in ARCHITECTURES[name].inputs(lens.model).items()
    }
    batch = lens.encode(inputs)
    return relevances(lens.model, lens.anatomy_for(batch), batch.inputs, largest, rule, **more)


@pytest.mark.parametrize("name", FAMILIES)
@RULES
def test_every_family_closes_in_float32(name: str, rule: Rule) -> None:
    found = handed(al.load(ARCHITECTURES[name].build()), name, rule)
    assert found.error.max() < 1e-6
    assert ("softmax" in found.entries) == rule.through_patterns
    assert (found.value - found.started).abs().max() == 0


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NORMS_IN_FLOAT32))
@RULES
def test_families_of_whole_precision_close_in_float64(name: str, rule: Rule) -> None:
    found = handed(al.load(ARCHITECTURES[name].build().double()), name, rule)
    assert found.error.max() < 1e-13


@pytest.mark.parametrize("name", sorted(NORMS_IN_FLOAT32))
@RULES
def test_the_others_stop_at_the_digits_of_their_norms(name: str, rule: Rule) -> None:
    found = handed(al.load(ARCHITECTURES[name].build().double()), name, rule)
    assert 1e-12 < found.error.max() < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_the_whole_catalogue_closes_or_is_listed(name: str) -> None:
    model = ARCHITECTURES[name].build()
    lens = al.load(model, example=ARCHITECTURES[name].inputs(model))
    assert lens.conservation.closes == (name not in NOT_CLOSED), str(lens.conservation)
    assert lens.conservation.module == NOT_CLOSED.get(name, ("",))[0]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_attnlrp_keeps_is_what_dense_maps_say(name: str, kernel: str) -> None:
    """`logit - tokens - positions - biases = sum over layers and heads R(A) - R(scores)`."""
    lens = exact(name)
    lens.model.set_attn_implementation(kernel)
    ids = torch.randint(4, 90, (2, 11), generator=torch.Generator().manual_seed(2))
    found = attnlrp(lens, ids, Target(5, at=[-1, -3]), maps="L0:")
    assert found.ledger is not None
    assert found.maps is not None
    trace = lens.run(ids, keep=("pattern", "scores"))
    kept = torch.zeros(2).double()
    for name_of, edges in found.maps.items():
        pattern, scores = trace.pattern[name_of], trace.scores[name_of]
        back = edges - pattern * edges.sum(-1, keepdim=True)
        of_scores = torch.where(back == 0, 0, scores * back)
        kept += (edges - of_scores).flatten(1).sum(1)
    entries = found.ledger.entries
    others = sum(entries[part] for part in ("tokens", "positions", "biases") if part in entries)
    # Llama's maps are made again with the softmax of its eager code, which is in float32.
    tolerance = 1e-12 if name == "gpt2" else 1e-6
    assert torch.allclose(found.value - others, kept, rtol=0, atol=tolerance)
    assert torch.allclose(entries["softmax"], kept, rtol=0, atol=tolerance)


class _Cube(torch.autograd.Function):
    """`x^3`, with a gradient that no table of torch functions sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 3 * x**2


class Cubed(nn.Module):
    """An MLP that multiplies three ways where no rule sees it."""

    def __init__(self, mlp: Any, by: str) -> None:
        super().__init__()
        self.down_proj, self.gate_proj, self.up_proj = mlp.down_proj, mlp.gate_proj, mlp.up_proj
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.by == "a function of autograd":
            return self.down_proj(_Cube.apply(gate))
        return self.down_proj(torch.addcmul(torch.zeros_like(gate), gate, up))


@pytest.mark.parametrize("by", ["a function of autograd", "a torch function without a rule"])
def test_a_module_that_multiplies_unseen_is_refused_by_name(by: str) -> None:
    model = ARCHITECTURES["llama"].build()
    model.model.layers[1].mlp = Cubed(model.model.layers[1].mlp, by)
    lens = al.load(model)
    ids = torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    assert not lens.conservation.closes
    assert lens.conservation.module == "model.layers.1.mlp"
    assert lens.conservation.kind == "Cubed"
    for method in (attnlrp, cp_lrp):
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp \(Cubed\)"):
            method(lens, ids, 5)
        found = method(lens, ids, 5, strict=False)
        assert found.ledger is not None
        assert (found.ledger.error > FLOAT_TOLERANCE).all()
        assert "Not to be trusted" in found.notes[0]
        assert "model.layers.1.mlp" in found.notes[0]
        assert torch.isfinite(found.scores).all()
        sums = sum(found.ledger.entries.values()) + found.ledger.remainder
        assert torch.allclose(sums, found.value, atol=1e-9)


def test_a_gated_delta_net_is_refused_by_name() -> None:
    lens = al.load(ARCHITECTURES["olmo_hybrid"].build())
    with pytest.raises(UnsupportedModelError, match=r"not conserved .*linear_attn"):
        cp_lrp(lens, torch.arange(4, 12)[None], 5)
