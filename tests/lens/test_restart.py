"""A run that goes on from a layer is the full run, with edits above it and without."""

from __future__ import annotations

import pytest
import torch

import attnlens as al
from attnlens.errors import BudgetError, InputError, SeamError, UnsupportedModelError
from attnlens.hooks.edits import Edit
from attnlens.hooks.residual import Residual, streams_of
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES

IDS = torch.arange(20, 32)[None].repeat(2, 1)


def lens(name: str) -> Lens:
    model = ARCHITECTURES[name].build()
    return Lens(model, example=ARCHITECTURES[name].inputs(model))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
def test_it_is_the_full_forward(name: str) -> None:
    subject = lens(name)
    trace = subject.record(IDS)
    for site in subject.anatomy.sites:
        again = subject.restart(trace, site.name)
        torch.testing.assert_close(again.logits, trace.output.logits, atol=1e-6, rtol=1e-6)


def test_edits_above_act() -> None:
    subject = lens("gpt2")
    trace = subject.record(IDS)
    with subject.edit(al.Zero("L2H1")):
        edited = subject.restart(trace, 1).logits
        full = subject.logits(IDS, torch.arange(12).repeat(2, 1))
    torch.testing.assert_close(edited, full, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(edited, trace.output.logits, atol=1e-4)


def test_an_edit_below_is_told() -> None:
    subject = lens("gpt2")
    trace = subject.record(IDS)
    with pytest.raises(SeamError, match="L0"), subject.edit(al.Zero("L0H1")):
        subject.restart(trace, 2)


@pytest.mark.parametrize(
    ("model", "edit", "layer"),
    [
        ("gpt2", al.Zero("L0H1"), "L2"),
        ("gpt2", al.SteerStream("L1", vectors={"L1": torch.linspace(-1, 1, 32)}), "L2"),
        (
            "gpt2",
            al.SteerStream("L1", vectors={"L1": torch.linspace(-1, 1, 32)}, stream="mlp"),
            "L2",
        ),
        ("t5", al.SteerStream("enc.L0", vectors={"enc.L0": torch.linspace(-1, 1, 32)}), "dec.L0"),
        ("t5", al.SteerStream("dec.L1", vectors={"dec.L1": torch.linspace(-1, 1, 32)}), "cross.L1"),
    ],
)
def test_no_edit_is_lost(model: str, edit: Edit, layer: str) -> None:
    """Not even where a full forward in the same block makes up for it."""
    subject = lens(model)
    trace = subject.record(IDS)
    with subject.edit(edit):
        with pytest.raises(SeamError, match=r"An edit is on at .*L[01], .* goes on from .*L[0-2]"):
            subject.restart(trace, layer)
        subject.record(IDS)
    assert not subject.edited


@pytest.mark.parametrize("stream", ["residual", "mlp"])
def test_edits_of_streams_act_from_their_layer_on(stream: str) -> None:
    subject = lens("gpt2")
    trace = subject.record(IDS)
    with subject.edit(
        al.SteerStream("L1", vectors={"L1": torch.linspace(-1, 1, 32)}, stream=stream)
    ):
        edited = subject.restart(trace, 1).logits
        full = subject.record(IDS).output.logits
    torch.testing.assert_close(edited, full, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(edited, trace.output.logits, atol=1e-4)


def test_streams_below_are_the_recorded_ones() -> None:
    subject = lens("gpt2")
    prompts = torch.stack([IDS[0], IDS[0].flip(0)])
    trace = subject.record(prompts)
    sites = subject.anatomy.sites
    found: dict[str, torch.Tensor] = {}
    look = Residual(
        subject.anatomy,
        streams_of(subject.anatomy, sites),
        lambda stream, tensor: found.update({stream.name: tensor}),
    )
    subject.restart(trace, 2, look)
    for name, wanted in subject.run(prompts, keep="residual").residual.items():
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-6)


def test_only_a_recorded_run_is_gone_on_from() -> None:
    subject = lens("gpt2")
    with pytest.raises(InputError, match=r"lens\.record.* not from Trace"):
        subject.restart(subject.run(IDS), 1)  # type: ignore[arg-type]


def test_a_run_of_another_kind_of_model_leaves_this_one_as_it_was() -> None:
    trace = lens("llama").record(IDS)
    subject = lens("gpt2")
    with pytest.raises(SeamError, match="another kind of model"):
        subject.restart(trace, 1)
    hooks = [
        (module._forward_hooks, module._forward_pre_hooks) for module in subject.model.modules()
    ]
    assert not any(map(any, hooks))
    assert all("forward" not in vars(module) for module in subject.model.modules())


def test_what_cannot_be_restarted_says_why() -> None:
    subject = lens("albert")
    trace = subject.record(IDS)
    with pytest.raises(UnsupportedModelError, match="more than once"):
        subject.restart(trace, 1)


def test_recording_is_priced() -> None:
    subject = lens("gpt2")
    with pytest.raises(BudgetError, match=r"Recording .* budget='"):
        subject.record(IDS, budget="1kB")
    trace = subject.record(IDS)
    assert f"{trace.recording.bytes / 1e6:.3g} MB" in repr(trace)
