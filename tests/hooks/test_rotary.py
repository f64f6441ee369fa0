"""Rotary frequencies of real models, against closed forms and against what turns in layer 0."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.anatomy.rotary import Rotary
from attnlens.hooks.rotary import find_rotary
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.architectures.base import builder
from tests.architectures.decoders import SIZES


def lens_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Lens, dict[str, Tensor]]:
    model = ARCHITECTURES[name].build().to(dtype)
    inputs = ARCHITECTURES[name].inputs(model)
    return al.load(model, example=inputs), inputs


def found_in(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Rotary]:
    lens, inputs = lens_of(name, dtype)
    return find_rotary(lens.model, lens.anatomy, lens.anatomy.sites, inputs)


def closed(theta: float, width: int) -> Tensor:
    return torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)]).double()


def half(frequencies: Tensor, width: int) -> Tensor:
    """Frequencies of each channel, half the rotary width apart; the rest of the head stays."""
    return torch.cat([frequencies, frequencies, torch.zeros(width - 2 * len(frequencies))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_llama_is_half_and_half(dtype: torch.dtype) -> None:
    for rotary in found_in("llama", dtype).values():
        assert rotary.layout == "half"
        rtol = 0.004 if dtype == torch.bfloat16 else 1e-6  # the table itself is cast
        torch.testing.assert_close(
            rotary.frequencies, half(closed(10000, 8), 8).double(), rtol=rtol, atol=0
        )
        assert rotary.partner.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize("name", ["phi", "gpt_neox", "stablelm", "persimmon", "nemotron"])
def test_partial_rotary_leaves_the_rest(name: str) -> None:
    for rotary in found_in(name).values():
        width = len(rotary.frequencies)
        turning = int((rotary.frequencies > 0).sum())
        assert 0 < turning < width
        wanted = half(closed(10000, turning), width)
        torch.testing.assert_close(rotary.frequencies, wanted.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["cohere", "glm", "helium", "llama4_text"])
def test_interleaved_pairs_are_neighbours(name: str) -> None:
    lens, inputs = lens_of(name)
    rotary = find_rotary(lens.model, lens.anatomy, lens.anatomy.sites, inputs)["L0"]
    config: Any = lens.model.config.get_text_config()
    theta = config.rope_parameters["rope_theta"]
    turning = int((rotary.frequencies > 0).sum())
    assert rotary.layout == "interleaved"
    assert rotary.partner[:turning].tolist() == [i ^ 1 for i in range(turning)]
    wanted = closed(theta, turning).repeat_interleave(2)
    torch.testing.assert_close(rotary.frequencies[:turning], wanted, rtol=1e-6, atol=0)


def test_latent_attention_turns_the_last_channels() -> None:
    for rotary in found_in("deepseek_v3").values():
        assert (rotary.frequencies > 0).nonzero()[:, 0].tolist() == [8, 9, 10, 11]


def test_layers_of_two_kinds_have_a_table_each() -> None:
    found = found_in("gemma3_text")
    tables = {site: rotary.table for site, rotary in found.items()}
    assert [str(name).rpartition(".")[2] for name in tables.values()] == [
        "sliding_attention_inv_freq",
        "full_attention_inv_freq",
    ]
    torch.testing.assert_close(
        found["L0"].frequencies, half(closed(10_000, 12), 12).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        found["L1"].frequencies, half(closed(1_000_000, 12), 12).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", ["cohere2", "smollm3", "llama4_text", "exaone4"])
def test_layers_without_rotary_among_others_do_not_turn(name: str) -> None:
    assert [rotary.layout == "none" for rotary in found_in(name).values()] == [False, True]


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "t5", "granitemoehybrid"])
def test_models_without_a_table_turn_nothing(name: str) -> None:
    found = found_in(name)
    assert {rotary.layout for rotary in found.values()} == {"none"}
    assert all(rotary.frequencies.eq(0).all() for rotary in found.values())


def test_cross_attention_does_not_turn() -> None:
    kinds = {site: rotary.layout for site, rotary in found_in("t5gemma").items()}
    assert {k for site, k in kinds.items() if site.startswith("cross")} == {"none"}
    assert {k for site, k in kinds.items() if not site.startswith("cross")} == {"half"}


@pytest.mark.parametrize("name", ["dinov3_vit", "qwen2_vl"])
def test_positions_of_two_coordinates_are_unknown(name: str) -> None:
    kinds = {site: rotary.layout for site, rotary in found_in(name).items()}
    tower = {k for site, k in kinds.items() if name == "dinov3_vit" or site.startswith("vision")}
    assert tower == {"unknown"}
    assert set(kinds.values()) <= {"unknown", "half"}


def llama(rope: dict[str, Any]) -> dict[str, Rotary]:
    build = builder("LlamaForCausalLM", "LlamaConfig", SIZES | {"rope_parameters": rope})
    lens = al.load(build())
    inputs = {"input_ids": torch.arange(4, 16)[None]}
    return find_rotary(lens.model, lens.anatomy, lens.anatomy.sites, inputs)


def test_llama3_scaling_against_its_formula() -> None:
    """Slow pairs are slowed by the factor, quick ones stay, those between are mixed."""
    factor, low, high, length, theta = 8.0, 1.0, 4.0, 32, 100.0
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    wanted: list[float] = []
    for f in closed(theta, 8).tolist():
        turns = length * f / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        wanted.append((1 - share) * f / factor + share * f)
    assert wanted[0] == 1.0
    assert wanted[-1] < closed(theta, 8)[-1] / 4
    for rotary in llama(rope).values():
        torch.testing.assert_close(
            rotary.frequencies, half(torch.tensor(wanted), 8).double(), rtol=1e-5, atol=0
        )


def test_linear_scaling_divides() -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    for rotary in llama(rope).values():
        wanted = half(closed(10000, 8) / 4, 8)
        torch.testing.assert_close(rotary.frequencies, wanted.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["llama", "phi", "cohere", "glm", "gemma3_text", "gpt_oss", "deepseek_v2", "esm"]
)
def test_equal_tokens_turn_by_the_frequency_from_one_to_the_next(name: str) -> None:
    """In layer 0 q of equal tokens differs by its position alone: the angle is read off it."""
    lens, inputs = lens_of(name, torch.float64)
    rotary = find_rotary(lens.model, lens.anatomy, lens.anatomy.sites, inputs)["L0"]
    q = lens.run([[7] * 12], keep=("q",), layers=0).q["L0"][0]
    for channel in range(q.shape[-1]):
        partner, f = int(rotary.partner[channel]), float(rotary.frequencies[channel])
        if partner == channel:
            assert (q[:, 1:, channel] - q[:, :-1, channel]).abs().max() < 1e-6
        elif channel < partner:
            z = torch.complex(q[..., channel], q[..., partner])
            step = (z[:, 1:] / z[:, :-1]).angle()
            torch.testing.assert_close(step, torch.full_like(step, f), rtol=0, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    lens, inputs = lens_of("gemma3_text")
    before = {name: b.clone() for name, b in lens.model.named_buffers()}
    logits = lens.model(**inputs).logits
    find_rotary(lens.model, lens.anatomy, lens.anatomy.sites, inputs)
    assert all(torch.equal(b, before[name]) for name, b in lens.model.named_buffers())
    assert torch.equal(lens.model(**inputs).logits, logits)
    assert not any(module._forward_pre_hooks for module in lens.model.modules())
