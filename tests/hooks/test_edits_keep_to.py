"""What every edit keeps to: past, padding, its heads, its dtype; gradients flow through it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.hooks.edits import Edit, HeadEdit, StreamEdit
from attnlens.hooks.rows import Rows
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.hooks.editing import (
    COUNT,
    IDS,
    OTHER,
    every_edit,
    every_edit_of,
    lens,
    logits,
    new_lens,
)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_uniform_leaks_nothing_from_the_future(name: str, kernel: str) -> None:
    subject = lens(name, kernel)
    later = IDS.clone()
    later[0, 8:] = 50
    with subject.edit(al.Uniform("all")):
        one, other = logits(subject), logits(subject, later)
    assert torch.equal(one[:, :8], other[:, :8])
    assert not torch.equal(one[:, 8:], other[:, 8:])


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*product(["gpt2", "llama", "mistral"], ["sdpa", "eager"]), ("gpt_oss", None)],
)
def test_no_edit_leaks_the_future(name: str, kernel: str | None) -> None:
    """What is kept of another text, its pattern of all ones included, is the same in both runs."""
    subject = lens(name, kernel)
    later = IDS.clone()
    later[0, 8:] = 50
    ones = {"L0": torch.ones(1, 4, 12, 12)}
    edits = [*every_edit(subject), al.Patch("L0", "pattern", ones)]
    assert len(edits) == COUNT + 1
    plain = logits(subject)
    for edit in edits:
        with subject.edit(edit):
            one, other = logits(subject), logits(subject, later)
        torch.testing.assert_close(one[:, :8], other[:, :8], msg=str(edit))
        if not isinstance(edit, al.PatchStream):  # of this text nothing is left
            assert not torch.equal(one[:, 8:], other[:, 8:]), str(edit)
        assert not torch.equal(one, plain), str(edit)


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bert"])
def test_padding_is_left_alone_and_changes_nothing(name: str, side: str) -> None:
    """A padded prompt is edited as alone; its padded rows keep what the model made of them.

    What is kept of another text is given at the places of the padded input, so it is padded, too.
    """
    subject = lens(name)
    pad = (5, 0) if side == "left" else (0, 5)
    mask = torch.nn.functional.pad(torch.ones(1, 7, dtype=torch.long), pad)
    real = mask[0].bool()
    masks = torch.cat([torch.ones_like(mask), mask])
    places = (masks.cumsum(-1) - 1).clamp_min(0)

    def padded(ids: Tensor) -> Tensor:
        return torch.nn.functional.pad(ids, pad, value=1)

    short = IDS[:, :7].roll(3, 1)
    ids = torch.cat([IDS, padded(short)])
    given = {"attention_mask": masks, "position_ids": places}
    of_other = {name: value[1:] for name, value in given.items()}
    alone_edits = every_edit_of(subject, OTHER[:, :7], {})
    batch_edits = every_edit_of(subject, padded(OTHER[:, :7]), of_other)
    plain = subject.run({"input_ids": ids, **given}, keep=("z", "residual"))
    for alone_edit, edit in zip(alone_edits, batch_edits, strict=True):
        with subject.edit(alone_edit):
            alone = logits(subject, short)
        with subject.edit(edit):
            together = logits(subject, ids, **given)
            found = subject.run({"input_ids": ids, **given}, keep=("z", "residual"))
        assert together.isfinite().all()
        torch.testing.assert_close(together[1:, real], alone, atol=1e-4, rtol=1e-4, msg=str(edit))
        if isinstance(edit, al.Patch | al.Steer) and edit.kind in ("k", "v"):
            continue  # padded rows see the keys of real ones
        kind = "residual" if isinstance(edit, StreamEdit) else "z"
        site = "L1" if getattr(edit, "stream", None) == "mlp" else "L0"
        now, before = found[kind][site][1], plain[kind][site][1]
        if kind == "z":
            now, before = now.swapaxes(0, 1), before.swapaxes(0, 1)
        # What the first layer's MLP writes at padded rows is not all that the second gets there.
        if site == "L0":
            assert torch.equal(now[~real], before[~real]), str(edit)


@pytest.mark.parametrize("edit", [al.Zero("L0H1"), al.Scale("L0H1", 0.5), al.Uniform("L0H1")])
def test_gradients_flow_through_edits(edit: Edit) -> None:
    """Against finite differences of the edited model, in float64."""
    subject = new_lens("gpt2")
    model: Any = subject.model.double()
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


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("number", range(COUNT))
def test_gradients_flow_through_every_edit(name: str, number: int) -> None:
    """Against finite differences of the edited model in float64; gemma2 caps its scores."""
    model = ARCHITECTURES[name].build().double()
    subject = Lens(model, example=ARCHITECTURES[name].inputs(model))
    edit = every_edit(subject)[number]
    embedding: Tensor = model.get_input_embeddings().weight
    direction = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.randn(12, 96, generator=torch.Generator().manual_seed(1)).double()

    def loss() -> Tensor:
        return (model(input_ids=IDS).logits[0] * weights).sum()

    with subject.edit(edit):
        loss().backward()
        assert embedding.grad is not None
        slope = float((embedding.grad * direction).sum())
        # gemma2 takes its softmax in float32: its loss moves in steps, and small ones are noise.
        step, close = (1e-6, 1e-6) if name == "gpt2" else (1e-4, 1e-3)
        with torch.no_grad():
            embedding += step * direction
            above = loss()
            embedding -= 2 * step * direction
            below = loss()
    assert slope == pytest.approx(float(above - below) / (2 * step), rel=close, abs=close)


class Asking:
    """Whether rows of scores are asked for while the model runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        plain = Rows.scores

        def scores(rows: Rows, *args: Any) -> Tensor:
            self.count += 1
            return plain(rows, *args)

        monkeypatch.setattr(Rows, "scores", scores)


def test_only_edits_of_the_map_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = lens("llama")
    edits = every_edit(subject)
    asking = Asking(monkeypatch)
    for edit in edits:
        asking.count = 0
        with subject.edit(edit):
            logits(subject)
        of_maps = isinstance(edit, al.Bias | al.Hide | al.Drop)
        of_maps |= isinstance(edit, al.Patch) and edit.kind == "pattern"
        assert (asking.count > 0) == of_maps, str(edit)


def test_heads_that_share_keys_move_together() -> None:
    """Of a layer with 4 heads and 2 groups."""
    subject = lens("llama")
    plain = subject.run(IDS, keep="z").z["L1"]
    for edit in every_edit(subject, "L1H2"):
        if not isinstance(edit, HeadEdit):
            continue
        with subject.edit(edit):
            moved = (subject.run(IDS, keep="z").z["L1"] != plain).any(-1).any(-1)[0]
        found = [str(head) for head in edit.moved(subject.anatomy)]
        assert found == [f"L1H{head}" for head in moved.nonzero()[:, 0].tolist()], str(edit)
        shared = isinstance(edit, al.Patch | al.Steer) and edit.kind in ("k", "v")
        assert found == (["L1H2", "L1H3"] if shared else ["L1H2"])
        assert ("all heads that share it" in str(edit)) == shared


def test_bfloat16() -> None:
    """Every edit, in the model's own dtype: as in float32 but for rounding."""
    half = ARCHITECTURES["llama"].build().to(torch.bfloat16)
    whole = ARCHITECTURES["llama"].build().to(torch.bfloat16).float()
    inputs = ARCHITECTURES["llama"].inputs(half)
    one, two = Lens(half, example=inputs), Lens(whole, example=inputs)
    for edit, exact in zip(every_edit(one, "L1H1"), every_edit(two, "L1H1"), strict=True):
        with one.edit(edit):
            found = one.run(IDS, keep="z")
        with two.edit(exact):
            wanted = two.run(IDS, keep="z")
        assert found.z["L1"].dtype == torch.bfloat16
        # bfloat16 holds 8 bits; z is of size 1 and made in some ten steps.
        error = (found.z["L1"].float() - wanted.z["L1"]).abs().mean()
        assert error < 0.03 * wanted.z["L1"].abs().mean(), str(edit)
