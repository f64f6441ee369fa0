"""Runs with edges cut: all edges are the model, none the reference, some what an oracle says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.hooks import edge_run
from attnlens.hooks.edge_run import Activations, EdgeRun, Listen, as_reference
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.hooks.tiny import Tiny, wide_norms
from tests.hooks.wired import WIRED, cut, forward, heard, lens_of, others, prompts

FLOAT32_NORMS = 2e-5
"""Where norms or routers compute in float32 though the model is float64, sums rounded apart."""
LAYER_NORMS = (
    "gpt2", "gpt_bigcode", "opt", "biogpt", "gpt_neox", "phi", "persimmon", "stablelm",
    "starcoder2", "nemotron", "mbart", "pegasus", "m2m_100", "blenderbot", "whisper",
)  # fmt: skip
"""Architectures whose norms are torch's, in the dtype of the stream."""


def near(found: Tensor, wanted: Tensor, name: str) -> bool:
    limit = 1e-10 if name in LAYER_NORMS else FLOAT32_NORMS
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max()) < limit * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", WIRED)
def test_all_edges_are_the_model_and_none_the_reference(name: str) -> None:
    lens = lens_of(name)
    network, inputs = lens.wiring.network, prompts(lens)
    clean, logits = heard(lens, inputs)
    other, wanted = heard(lens, others(inputs))
    none = torch.zeros_like(network.exists)
    both = torch.stack([network.exists, none])
    whole, nothing = cut(lens, inputs, other.written, both)
    assert near(whole, logits, name)
    assert near(nothing, wanted, name)
    assert (wanted - logits).abs().max() > 0.1
    # A reference that never was is, of what a run wrote, that run.
    reference = as_reference(lens.wiring, clean, other.written)
    assert reference.streams.keys() == other.streams.keys() == lens.wiring.places.keys()
    for place, stream in other.streams.items():
        assert near(reference.streams[place], stream, name), place
    zeros = {key: torch.zeros_like(written) for key, written in clean.written.items()}
    assert near(cut(lens, inputs, zeros, network.exists[None])[0], logits, name)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        wide_norms(patch)
        yield Tiny(request.param)


def some(own: Tiny, share: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    exists = own.network.exists
    return exists & (torch.rand(exists.shape, generator=draw) < share)


def test_the_oracle_is_the_model(tiny: Tiny) -> None:
    assert torch.allclose(tiny.wanted, tiny.logits, atol=1e-10, rtol=0)
    senders = [sender.name for sender in tiny.network.senders]
    assert list(tiny.written) == senders
    for writer in tiny.lens.wiring.writers:
        own = tiny.lens.wiring.added(writer, tiny.other.written[writer.name])
        for number, row in enumerate(senders[tiny.lens.wiring.rows[writer.name]]):
            assert torch.allclose(own[:, number], tiny.written[row], atol=1e-10, rtol=0)


@given(share=st.sampled_from([0.1, 0.5, 0.9]), seed=st.integers(0, 2**20))
@settings(max_examples=15)
def test_some_edges_are_what_the_oracle_says(tiny: Tiny, share: float, seed: int) -> None:
    kept = torch.stack([some(tiny, share, seed), some(tiny, share, seed + 1)])
    found = tiny.run(kept)
    for own, choice in zip(found, kept, strict=True):
        assert torch.allclose(own, tiny.by_oracle(choice), atol=1e-9, rtol=0)


def test_every_edge_alone_is_what_the_oracle_says(tiny: Tiny) -> None:
    """Cut alone, and kept alone; those of one kind of input are not taken for another's."""
    network = tiny.network
    picked = range(0, len(network), 5)
    only = torch.stack([network.mask([number]) for number in picked])
    without = network.exists & ~only
    for kept in (only, without):
        found = tiny.run(kept)
        wanted = torch.stack([tiny.by_oracle(choice) for choice in kept])
        assert torch.allclose(found, wanted, atol=1e-9, rtol=0)
    changed = (tiny.run(without) - tiny.logits).abs().amax((1, 2, 3))
    assert (changed > 1e-6).all()


def test_a_reference_of_zeros_is_what_the_oracle_says(tiny: Tiny) -> None:
    kept = some(tiny, 0.5, 3)
    zeros = {name: torch.zeros_like(own) for name, own in tiny.clean.written.items()}
    found = cut(tiny.lens, tiny.inputs, zeros, kept[None])[0]
    nothing = {name: torch.zeros_like(own) for name, own in tiny.written.items()}
    assert torch.allclose(found, tiny.by_oracle(kept, nothing), atol=1e-9, rtol=0)


def test_what_is_no_edge_does_not_matter(tiny: Tiny) -> None:
    kept = some(tiny, 0.5, 4)
    assert torch.allclose(
        tiny.run(kept[None]), tiny.run((kept | ~tiny.network.exists)[None]), atol=1e-12, rtol=0
    )


def test_inputs_in_parts_are_those_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.stack([some(tiny, 0.5, seed) for seed in range(3)])
    wanted = tiny.run(kept)
    monkeypatch.setattr(edge_run, "_SPACE", 1)
    assert torch.allclose(tiny.run(kept), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "phi", "gpt_neox", "opt", "mbart"])
def test_copies_side_by_side_are_those_one_by_one(name: str) -> None:
    lens = lens_of(name)
    exists, inputs = lens.wiring.network.exists, prompts(lens)
    other, _ = heard(lens, others(inputs))
    draw = torch.Generator().manual_seed(0)
    kept = exists & (torch.rand(4, *exists.shape, generator=draw) < 0.6)
    together = cut(lens, inputs, other.written, kept)
    alone = torch.cat([cut(lens, inputs, other.written, own[None]) for own in kept])
    assert near(together, alone, name)
    assert (together[0] - together[1]).abs().max() > 1e-3
    # And prompts beside each other are those alone.
    first = {key: tensor[:1] for key, tensor in inputs.items()}
    written = {key: tensor[:1] for key, tensor in other.written.items()}
    assert near(cut(lens, first, written, kept), together[:, :1], name)


@torch.no_grad()
def test_a_factor_is_as_if_in_the_weights() -> None:
    """Half of what blocks write is what blocks of half the weights write."""
    found: list[Tensor] = []
    for factor in (1.0, 0.5):
        model: Any = ARCHITECTURES["granite"].build().double()
        for layer in model.model.layers:
            layer.residual_multiplier = factor
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight *= 0.5 / factor
        lens = al.load(model)
        exists, inputs = lens.wiring.network.exists, prompts(lens)
        other, _ = heard(lens, others(inputs))
        draw = torch.Generator().manual_seed(0)
        kept = exists & (torch.rand(6, *exists.shape, generator=draw) < 0.5)
        found.append(cut(lens, inputs, other.written, kept))
    assert near(*found, "granite")


def test_known_writers_are_those_that_do_not_run() -> None:
    lens = lens_of("gpt2")
    network, inputs = lens.wiring.network, prompts(lens)
    clean, logits = heard(lens, inputs)
    other, _ = heard(lens, others(inputs))
    listen = Listen(lens.wiring)
    forward(lens, inputs, listen)
    reference = as_reference(lens.wiring, clean, other.written)
    run = EdgeRun(lens.wiring, reference, network.exists[None], {"L0": clean.written["L0"]})
    assert run.sites == {"L1", "L2"}
    assert near(forward(lens, inputs, run), logits, "gpt2")


def test_what_was_heard_is_kept_apart_from_the_run() -> None:
    lens: Lens = lens_of("gpt2")
    inputs = prompts(lens)
    heard_first: Activations = heard(lens, inputs)[0]
    before = {name: tensor.clone() for name, tensor in heard_first.streams.items()}
    other, _ = heard(lens, others(inputs))
    cut(lens, inputs, other.written, lens.wiring.network.exists[None])
    as_reference(lens.wiring, heard_first, other.written)
    for name, tensor in heard_first.streams.items():
        assert tensor.equal(before[name])
