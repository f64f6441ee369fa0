"""Edits do what their formula says, to the named heads and places alone, in their order."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.errors import InputError
from attnlens.hooks.edits import Edit
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.hooks.editing import IDS, OTHER, kept, lens, logits, new_lens
from tests.oracles.attention import record


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


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *product(["gpt2", "llama", "phi3", "bert", "deepseek_v3"], ["sdpa", "eager"]),
        ("gemma2", None),  # caps its scores: eager alone
    ],
)
def test_zero_and_scale_are_a_hook_on_the_projection(name: str, kernel: str | None) -> None:
    subject = lens(name, kernel)
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


def test_means_by_position_reach_as_far_as_they_are_asked() -> None:
    subject = lens("gpt2")
    means = subject.mean_z(OTHER[:, :6], by_position=True)
    with subject.edit(al.Mean("L0H1", means, queries=slice(0, 6))):
        found = subject.run(IDS, keep="z").z["L0"][0, 1]
    torch.testing.assert_close(found[:6], means["L0"][:, 1])
    says = "cover 6 positions and the edit reaches position 11"
    with pytest.raises(InputError, match=says), subject.edit(al.Mean("L0H1", means)):
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


def test_edits_of_weights_undo_no_edit_of_z() -> None:
    """Whatever the order given, and in blocks within blocks: weights come first, then z."""
    subject = lens("llama")
    hide, half = al.Hide("L0H1", keys=[0, 3]), al.Scale("L0H1", 0.5)
    even, mix, zero = al.Uniform("L0H1"), al.Identity("L0H1", 0.3), al.Zero("L0H1", queries=4)

    def z(*edits: Edit) -> Tensor:
        with subject.edit(*edits):
            return subject.run(IDS, keep="z").z["L0"][0, 1]

    for weights in (hide, even, mix, al.Drop("L0H1", keys=1)):
        assert torch.equal(z(weights, half), z(weights) / 2)
        assert torch.equal(z(half, weights), z(weights, half))
        together = z(weights, half, zero)
        with subject.edit(half, zero):
            assert torch.equal(z(weights), together)
    assert z(zero, hide, half)[4].eq(0).all()
    # Edits of scores come before those of weights; of one tensor, the order given counts.
    torch.testing.assert_close(z(even, hide), z(hide, even))
    assert torch.equal(z(hide, even), z(even))
    assert not torch.equal(z(even, mix), z(mix, even))
    assert torch.equal(z(mix, even), z(even))
    torch.testing.assert_close(z(mix, al.Drop("L0H1", keys=slice(0, None))), torch.zeros(12, 8))


def test_two_biases_add_and_a_large_one_hides() -> None:
    subject = new_lens("gpt2")
    subject.model.double()

    def pattern(*edits: Edit) -> Tensor:
        with subject.edit(*edits):
            return subject.run(IDS, keep="pattern").pattern["L0"]

    plain = subject.run(IDS, keep="pattern").pattern["L0"]
    one = al.Bias("L0H1", 0.25, keys=[1])
    torch.testing.assert_close(pattern(one, one), pattern(al.Bias("L0H1", 0.5, keys=[1])))
    torch.testing.assert_close(pattern(one, al.Bias("L0H1", -0.25, keys=1)), plain)
    torch.testing.assert_close(pattern(al.Bias("L0H1", 5.0)), plain)
    away = al.Bias("L0H1", -1e4, keys=slice(1, 4))
    assert torch.equal(
        pattern(away)[:, :, 4:], pattern(al.Hide("L0H1", keys=slice(1, 4)))[:, :, 4:]
    )
    never = pattern(al.Bias("L0H1", -math.inf, keys=slice(1, 4)))
    assert torch.equal(never, pattern(al.Hide("L0H1", keys=slice(1, 4))))
    doubled = pattern(al.Bias("L0H1", math.log(2), keys=0))[0, 1]
    odds = plain[0, 1, 1:, 0] / (1 - plain[0, 1, 1:, 0])
    torch.testing.assert_close(doubled[1:, 0] / (1 - doubled[1:, 0]), 2 * odds)


@pytest.mark.parametrize("kind", ["q", "k", "v", "z"])
def test_only_the_named_heads_and_places_are_patched(kind: str) -> None:
    """Of a padded prompt; its padding stays, also where all places are named."""
    subject = lens("llama")
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 9:] = 0
    given = {"input_ids": IDS, "attention_mask": mask}
    mine, theirs = subject.run(given, keep=kind)[kind]["L1"], kept(subject, kind)[kind]
    own = 1 if kind in ("k", "v") else 3
    for places, chosen in (([1, -1], [1, 8]), (None, list(range(9)))):
        at = {"keys" if kind in ("k", "v") else "queries": places}
        with subject.edit(al.Patch("L1H3", kind, theirs, **at)):  # type: ignore[arg-type]
            found = subject.run(given, keep=kind)[kind]["L1"]
        wanted = mine.clone()
        wanted[:, own, chosen] = theirs["L1"][:, own, chosen]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["q", "k", "v", "z"])
def test_steering_adds_the_vector_of_each_head(kind: str) -> None:
    subject = lens("llama")
    mine = subject.run(IDS, keep=kind)[kind]["L1"]
    vectors = torch.randn(mine.shape[1], 8, generator=torch.Generator().manual_seed(0))
    own = [1] if kind in ("k", "v") else [2, 3]
    at = {"keys" if kind in ("k", "v") else "queries": slice(3, 5)}
    edit = al.Steer("L1H2,L1H3", kind, {"L1": vectors}, -2.0, **at)  # type: ignore[arg-type]
    with subject.edit(edit):
        found = subject.run(IDS, keep=kind)[kind]["L1"]
    wanted = mine.clone()
    wanted[:, own, 3:5] -= 2 * vectors[own][:, None]
    torch.testing.assert_close(found, wanted)


def test_columns_of_a_pattern_are_patched_alone() -> None:
    subject = lens("llama")
    mine, theirs = kept(subject, "pattern", ids=IDS).pattern, kept(subject, "pattern").pattern
    with subject.edit(al.Patch("L1H1", "pattern", theirs, keys=[0, 2], queries=slice(5, None))):
        found = subject.run(IDS, keep="pattern").pattern["L1"]
    wanted = mine["L1"].clone()
    wanted[:, 1, 5:, [0, 2]] = theirs["L1"][:, 1, 5:, [0, 2]]
    assert torch.equal(found, wanted)


def test_measure_sees_what_is_edited() -> None:
    subject = lens("llama")
    for edit in (
        al.Hide("L1H1", keys=0),
        al.Drop("L1H1", keys=0),
        al.Steer("L0H1", "z", {"L0": torch.ones(4, 8)}),
    ):
        with subject.edit(edit):
            found = subject.measure(IDS, al.Entropy())["entropy"]["L1"]
            rows = subject.run(IDS, keep="pattern").pattern["L1"]
        wanted = torch.special.entr(rows).sum(-1).mean(-1)
        if not isinstance(edit, al.Drop):  # a row that sums to less has no entropy of its own
            torch.testing.assert_close(found, wanted)
