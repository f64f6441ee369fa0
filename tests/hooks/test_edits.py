"""Edits do what their formula says, to the named heads alone, and gradients flow through them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.errors import HeadError, InputError
from attnlens.hooks.edits import Edit, HeadEdit, StreamEdit
from attnlens.hooks.rows import Rows
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


# --- patches, knock-outs, biases: the answers of test_edits_everywhere.py under padding, in other
# kernels, with gradients, together


OTHER = torch.arange(40, 52)[None]


def kept(subject: Lens, *kinds: str, ids: Tensor = OTHER) -> al.Trace:
    return subject.run(ids, keep=kinds)


def every_edit(subject: Lens, at: str = "L0H1") -> list[Edit]:
    """One edit of each kind, of one head (or of its layer's stream)."""
    site = subject.anatomy[at.partition("H")[0]]
    theirs = kept(subject, "q", "k", "v", "z", "pattern", "residual")
    dtype = theirs.z[site.name].dtype
    q, k, v, z = (
        {site.name: torch.linspace(-1, 1, heads * size).view(heads, size).to(dtype)}
        for heads, size in (
            (site.heads, site.d_qk),
            (site.groups, site.d_qk),
            (site.groups, site.d_v),
            (site.heads, site.d_v),
        )
    )
    patches = [al.Patch(at, kind, theirs[kind]) for kind in ("q", "k", "v", "z", "pattern")]
    return [
        al.Zero(at),
        al.Scale(at, 0.5),
        al.Mean(at, subject.mean_z(OTHER)),
        al.Uniform(at),
        al.Identity(at),
        al.Identity(at, 0.25),
        al.Bias(at, 0.7, keys=[0, 2]),
        al.Hide(at, keys=slice(1, 4)),
        al.Drop(at, keys=slice(1, 4)),
        *patches,
        al.Steer(at, "q", q),
        al.Steer(at, "k", k),
        al.Steer(at, "v", v),
        al.Steer(at, "z", z),
        al.PatchStream(site.name, values=theirs.residual),
        al.SteerStream(site.name, vectors={site.name: torch.ones(32).to(dtype)}),
        al.SteerStream(site.name, stream="mlp", vectors={site.name: torch.ones(32).to(dtype)}),
    ]


COUNT = 21


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_oss"])
def test_no_edit_leaks_the_future(name: str, kernel: str) -> None:
    """What is kept of another text, its pattern of all ones included, is the same in both runs."""
    subject = lens(name)
    if name != "gpt_oss":
        subject.model.set_attn_implementation(kernel)
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


def every_edit_of(subject: Lens, other: Tensor, inputs: dict[str, Tensor]) -> list[Edit]:
    """As `every_edit`, with what is kept of a text of its own length."""
    edits = every_edit(subject)
    kinds = ("q", "k", "v", "z", "pattern", "residual")
    theirs = subject.run({"input_ids": other, **inputs}, keep=kinds)
    found: list[Edit] = []
    for edit in edits:
        if isinstance(edit, al.Patch):
            edit = replace(edit, values=theirs[edit.kind])
        elif isinstance(edit, al.PatchStream):
            edit = replace(edit, values=theirs.residual)
        found.append(edit)
    return found


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
    subject = lens("gpt2")
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


def test_means_by_position_reach_as_far_as_they_are_asked() -> None:
    subject = lens("gpt2")
    means = subject.mean_z(OTHER[:, :6], by_position=True)
    with subject.edit(al.Mean("L0H1", means, queries=slice(0, 6))):
        found = subject.run(IDS, keep="z").z["L0"][0, 1]
    torch.testing.assert_close(found[:6], means["L0"][:, 1])
    says = "cover 6 positions and the edit reaches position 11"
    with pytest.raises(InputError, match=says), subject.edit(al.Mean("L0H1", means)):
        logits(subject)


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


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            al.Zero("L3H5", queries=slice(0, 5), phase="decode"),
            "Zero of L3H5 at queries 0:5 in decode",
        ),
        (al.Zero(["L3H5", (4, 0)]), "Zero of L3H5,L4H0"),
        (al.Zero((4, 0)), "Zero of L4H0"),
        (al.Zero("all", queries=-1), "Zero of all at queries -1"),
        (al.Scale("L3", 2), "Scale 2 of L3"),
        (al.Mean("L3", {}), "Mean of L3"),
        (al.Uniform("cross.L1H2"), "Uniform of cross.L1H2"),
        (al.Identity("L0", 0.25), "Identity 0.25 of L0"),
        (al.Bias("L0H1", 0.5, keys=0), "Bias 0.5 of L0H1 at keys 0"),
        (
            al.Hide("L0", keys=slice(None, -1, 2), queries=[3, 4]),
            "Hide of L0 at queries [3, 4] at keys :-1:2",
        ),
        (al.Drop("L0", keys=torch.ones(7).bool()), "Drop of L0 at keys of a mask [7]"),
        (al.Patch("L0H1", "q", {}), "Patch q of L0H1"),
        (al.Patch("L0H1", "k", {}), "Patch k of L0H1 and all heads that share it"),
        (al.Steer("L0H1", "z", {}, 2.0, phase="prefill"), "Steer z 2 of L0H1 in prefill"),
        (al.PatchStream(3, values={}), "PatchStream of residual L3"),
        (al.SteerStream([0, 3], stream="mlp", vectors={}), "SteerStream 1 of mlp L0,L3"),
    ],
)  # fmt: skip
def test_edits_read_as_people_write(edit: Edit, text: str) -> None:
    assert str(edit) == text


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: al.Patch("L0", "w", {}), "There is no 'w'; choose q, k, v, z, pattern"),
        (lambda: al.Patch("L0", "k", {}, queries=3), "k has no queries: choose its positions as"),
        (lambda: al.Patch("L0", "z", {}, keys=3), "z has no keys: choose its positions as queries"),
        (lambda: al.Steer("L0", "q", {}, keys=3), "q has no keys"),
        (lambda: al.Steer("L0", "pattern", {}), "A pattern has no direction"),
        (lambda: al.Identity("L0", 1.5), "share=1.5 is no share"),
        (lambda: al.PatchStream("L0", stream="mpl", values={}), "no stream 'mpl'; choose residual"),
    ],
)  # fmt: skip
def test_edits_that_mean_nothing_are_refused(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (al.Patch("L0", "q", {}), r"no q for L0; the edit covers nothing.*keep='q'"),
        (al.Patch("L0", "k", {"L0": torch.ones(1, 4, 12, 8)}), r"must be \[any, 2, any, 8\]"),
        (al.Steer("L0", "z", {"L0": torch.ones(4, 7)}), r"has shape \[4, 7\]; it must be \[4, 8\]"),
        (al.Mean("L0", {"L0": torch.ones(4, 9)}), r"mean z for L0 has shape \[4, 9\]; it must be"),
        (al.SteerStream("L0", vectors={"L0": torch.ones(7)}), r"it must be \[32\]"),
        (al.Patch("L0", "z", {"L0": torch.ones(1, 4, 9, 8)}), "covers 9 positions and the"),
        (al.Patch("L0", "z", {"L0": torch.ones(3, 4, 12, 8)}), "of 3 prompts and the input has 1"),
        (al.Steer("L0", "q", {"L1": torch.ones(4, 8)}), "no vector for L0; the edit covers L1"),
        (al.PatchStream("L0", values={"L0": torch.ones(1, 5, 32)}), "covers 5 positions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_input_is_refused(edit: Edit, says: str) -> None:
    subject = lens("llama")
    with pytest.raises(InputError, match=says), subject.edit(edit):
        logits(subject)


def test_what_was_kept_of_other_layers_is_told() -> None:
    subject = lens("llama")
    kept_below = subject.run(IDS, keep="q", layers="L0").q
    says = "There is no q for L1; the edit covers L0"
    with pytest.raises(InputError, match=says), subject.edit(al.Patch("L1", "q", kept_below)):
        logits(subject)


def test_identity_is_refused_where_rows_and_keys_are_different_texts() -> None:
    subject = lens("t5")
    inputs = ARCHITECTURES["t5"].inputs(subject.model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"cross-attention.*no identity"):  # noqa: SIM117
        with subject.edit(al.Identity("cross.L0H1")):
            subject.model(**inputs)
