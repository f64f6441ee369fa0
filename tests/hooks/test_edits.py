"""Edits do what their formula says, to the named heads alone, and gradients flow through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.errors import HeadError, InputError
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.oracles.attention import record

IDS = torch.arange(20, 32)[None]


def lens(name: str) -> Lens:
    model = ARCHITECTURES[name].build()
    return Lens(model, example=ARCHITECTURES[name].inputs(model))


def logits(subject: Lens, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.model(input_ids=ids, **inputs).logits


def scaled_by_hook(subject: Lens, head: str, factor: float) -> Tensor:
    """The same by a plain hook: the head's slice of the output projection's input."""
    (found,) = subject.anatomy.find(head)
    site = subject.anatomy[found.site]
    part = slice(found.head * site.d_v, (found.head + 1) * site.d_v)

    def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        (z,) = args
        z = z.clone()
        z[..., part] *= factor
        return (z,)

    assert site.output is not None
    handle = subject.model.get_submodule(site.output).register_forward_pre_hook(hook)
    try:
        return logits(subject)
    finally:
        handle.remove()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "bert", "gemma2", "deepseek_v3"])
def test_zero_and_scale_are_a_hook_on_the_projection(name: str, kernel: str) -> None:
    subject = lens(name)
    if name != "gemma2":
        subject.model.set_attn_implementation(kernel)
    plain = logits(subject)
    with subject.edit(al.Zero("L1H2")):
        zeroed = logits(subject)
    with subject.edit(al.Scale("L1H2", -0.5)):
        scaled = logits(subject)
    assert torch.equal(zeroed, scaled_by_hook(subject, "L1H2", 0.0))
    assert torch.equal(scaled, scaled_by_hook(subject, "L1H2", -0.5))
    assert not torch.equal(zeroed, plain)
    with subject.edit(al.Scale("all", 1.0)):
        assert torch.equal(logits(subject), plain)


def test_mean_puts_the_mean_of_the_reference() -> None:
    subject = lens("gpt2")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    reference = {"input_ids": torch.arange(24).view(2, 12) + 20, "attention_mask": mask}
    means = subject.mean_z(reference)
    z = subject.run(reference, keep="z").z["L1"]
    wanted = torch.cat([z[0], z[1, :, :7]], dim=1).mean(1)
    torch.testing.assert_close(means["L1"], wanted)
    with subject.edit(al.Mean("L1H0,L1H3", means)):
        edited = subject.run(IDS, keep="z").z["L1"]
    for head in (0, 3):
        torch.testing.assert_close(edited[0, head], means["L1"][head].expand(12, -1))
    untouched = subject.run(IDS, keep="z").z["L1"]
    assert torch.equal(edited[:, 1:3], untouched[:, 1:3])


def test_mean_without_the_site_is_refused() -> None:
    subject = lens("gpt2")
    edit = al.Mean("L1H0", {"L0": torch.zeros(4, 8)})
    with pytest.raises(InputError, match=r"no mean z for L1.*lens.mean_z"), subject.edit(edit):
        logits(subject)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert", "gpt_oss", "t5", "swin"])
def test_uniform_is_the_mean_of_the_visible_values(name: str) -> None:
    """Dense recomputation: the visible keys are those with weight in the model's own rows."""
    subject = lens(name)
    inputs = ARCHITECTURES[name].inputs(subject.model)  # type: ignore[arg-type]
    stack = "enc." if name == "t5" else ""
    first = subject.anatomy[f"{stack}L0"]
    plain = record(subject.model, subject.anatomy, inputs)
    with subject.edit(al.Uniform(f"{stack}L0H1")):
        edited = record(subject.model, subject.anatomy, inputs)
    call = plain.calls[first.name]
    value = call.value.repeat_interleave(first.heads // first.groups, dim=1)[:, 1]
    seen = (plain.rows[first.name][:, 1] > 0).to(value.dtype)
    wanted = seen / seen.sum(-1, keepdim=True) @ value
    found = edited.calls[first.name].output
    torch.testing.assert_close(found[:, :, 1], wanted)
    others = [head for head in range(first.heads) if head != 1]
    assert torch.equal(found[:, :, others], call.output[:, :, others])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_uniform_leaks_nothing_from_the_future(name: str, kernel: str) -> None:
    subject = lens(name)
    subject.model.set_attn_implementation(kernel)
    later = IDS.clone()
    later[0, 8:] = 50
    with subject.edit(al.Uniform("all")):
        one, other = logits(subject), logits(subject, later)
    assert torch.equal(one[:, :8], other[:, :8])
    assert not torch.equal(one[:, 8:], other[:, 8:])


def test_uniform_rows_show_in_the_pattern() -> None:
    subject = lens("llama")
    plain = subject.run(IDS, keep="pattern").pattern["L1"]
    with subject.edit(al.Uniform("L1H1")):
        rows = subject.run(IDS, keep="pattern").pattern["L1"]
        last = subject.run(IDS, keep="pattern", heads="L1H1,L1H0", rows=-1).pattern["L1"]
        entropy = subject.measure(IDS, al.Entropy())["entropy"]["L1"]
    even = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
    torch.testing.assert_close(rows[0, 1], even)
    assert torch.equal(rows[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    torch.testing.assert_close(last[0, 0], even[-1:])
    torch.testing.assert_close(last[0, 1], plain[0, 0, -1:])
    torch.testing.assert_close(entropy[0, 1], torch.arange(1, 13).log().mean())


def test_edits_act_in_their_order() -> None:
    subject = lens("gpt2")
    means = subject.mean_z(IDS)

    def z(*edits: Edit) -> Tensor:
        with subject.edit(*edits):
            return subject.run(IDS, keep="z").z["L0"][0, 1]

    mean, half, zero = al.Mean("L0H1", means), al.Scale("L0H1", 0.5), al.Zero("L0H1")
    torch.testing.assert_close(z(mean, half), means["L0"][1].expand(12, -1) / 2)
    torch.testing.assert_close(z(half, mean), means["L0"][1].expand(12, -1))
    assert z(mean, zero).eq(0).all()
    torch.testing.assert_close(z(zero, mean), means["L0"][1].expand(12, -1))
    even = z(al.Uniform("L0H1"))
    torch.testing.assert_close(z(al.Uniform("L0H1"), half), even / 2)
    with subject.edit(half), subject.edit(half):
        twice = subject.run(IDS, keep="z").z["L0"][0, 1]
    assert torch.equal(twice, z(al.Scale("L0H1", 0.25)))


@pytest.mark.parametrize("edit", [al.Zero("L0H1"), al.Uniform("all"), al.Scale("L1", 2.0)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_padded_prompt_is_edited_as_it_is_alone(name: str, edit: Edit) -> None:
    subject = lens(name)
    ids = torch.cat([IDS, IDS.roll(3, 1)])
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with subject.edit(edit):
        together = logits(subject, ids, attention_mask=mask)
        alone = logits(subject, ids[1:, :7])
    torch.testing.assert_close(together[1:, :7], alone, atol=1e-4, rtol=1e-4)
    assert together.isfinite().all()


@pytest.mark.parametrize("edit", [al.Zero("L0H1"), al.Scale("L0H1", 0.5), al.Uniform("L0H1")])
def test_gradients_flow_through_edits(edit: Edit) -> None:
    """Against finite differences of the edited model, in float64."""
    subject = lens("gpt2")
    model = subject.model.double()
    weight = model.transformer.h[0].attn.c_attn.weight
    direction = torch.randn_like(weight)

    def loss() -> Tensor:
        return model(input_ids=IDS).logits.logsumexp(-1).sum()  # a loss is taken in float32

    with subject.edit(edit):
        loss().backward()
        assert weight.grad is not None
        slope, step = float((weight.grad * direction).sum()), 1e-6
        with torch.no_grad():
            weight += step * direction
            above = loss()
            weight -= 2 * step * direction
            below = loss()
    assert slope == pytest.approx(float(above - below) / (2 * step), rel=1e-6)
    if isinstance(edit, al.Zero):
        value = weight.grad[:, 2 * 32 + 8 : 2 * 32 + 16]
        assert value.eq(0).all()


def test_bad_edits_are_refused() -> None:
    subject = lens("gpt2")
    with pytest.raises(InputError, match="No edit was given"), subject.edit():
        pass
    with pytest.raises(HeadError, match="L0H9"), subject.edit(al.Zero("L0H9")):
        pass
