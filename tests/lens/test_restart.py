"""A run that goes on from a layer is the full run, with edits above it and without."""

from __future__ import annotations

import pytest
import torch

import attnlens as al
from attnlens.errors import BudgetError, SeamError, UnsupportedModelError
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
