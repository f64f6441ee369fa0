"""Attention x gradient against plain autograd on eager attention, and the identities it obeys."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attnlens as al
from attnlens.analyses.attention_gradient import attention_gradient, attention_saliency
from attnlens.analyses.attribute import attribute
from attnlens.analyses.target import Target, settle
from attnlens.analyses.weight_gradients import weight_gradients
from attnlens.errors import BudgetError, InputError
from attnlens.hooks.gradients import z_gradients
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.analyses.test_importance import linear_readout
from tests.architectures import ARCHITECTURES
from tests.oracles.attention_gradients import eager_gradients, logit

# GPT-2; grouped keys; windows and soft caps; learned sinks; an encoder; an encoder-decoder.
NAMES = ["gpt2", "llama", "gemma2", "gpt_oss", "bert", "t5", "bart"]
# These models take softmaxes in float32, whatever their weights are. They run in float32: the
# least float64 number, with which their eager kernel hides keys, is minus infinity there, and rows
# of padding NaN.
NARROW = {"llama", "gemma2", "gpt_oss"}


def opened(name: str) -> Lens:
    return al.load(ARCHITECTURES[name].build()) if name in NARROW else architecture(name)


def padded(lens: Lens, name: str, side: str) -> dict[str, Tensor]:
    """The catalogue's padded inputs: a whole prompt, and a shorter one padded on a side."""
    found = ARCHITECTURES[name].padded
    assert found is not None
    return dict(found(lens.model, side))


def tolerance(name: str) -> float:
    return 1e-5 if name in NARROW else 1e-11


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_autograd_on_eager_weights(name: str, side: str) -> None:
    lens = opened(name)
    batch = lens.encode(padded(lens, name, side))
    target = Target(5, at=-2)
    explained = settle(lens, batch, target)
    assert explained.reads is not None
    wanted = eager_gradients(lens, batch, logit(5, explained.reads[:, 0]))
    found = attention_gradient(lens, batch.inputs, target, maps=True)
    saliency = attention_saliency(lens, batch.inputs, target, maps=True)
    assert found.maps is not None
    assert saliency.maps is not None
    for site, (weights, gradient) in wanted.items():
        products = weights * gradient
        atol = tolerance(name) * float(products.abs().max().clamp_min(1))
        assert torch.allclose(found.maps[site], products, atol=atol)
        assert torch.allclose(saliency.maps[site], products.abs(), atol=atol)
    _, edges = weight_gradients(lens, batch, explained)
    for own in edges:
        gradient = wanted[own.site.name][1]
        for block in own.blocks():
            seen = block.pattern > 0  # autograd has a gradient at keys that a row cannot see, too
            part = gradient[:, :, block.rows, block.keys]
            assert torch.allclose(block.gradient[seen], part[seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_heads_sum_is_z_times_its_gradient(name: str) -> None:
    lens = opened(name)
    batch = lens.encode(padded(lens, name, "left"))
    explained = settle(lens, batch, 5)
    found = attention_gradient(lens, batch.inputs, 5)
    observers = explained.observers(lens, batch)
    anatomy = lens.anatomy_for(batch)
    zs = z_gradients(lens.model, anatomy, batch.inputs, explained.metric, None, observers)
    sums = torch.cat([(own.z * own.gradient).sum((1, 3)) for own in zs.values()], 1)
    assert found.heads is not None
    # float32 softmaxes of some models
    assert torch.allclose(found.heads, sums, rtol=1e-5, atol=tolerance(name) * 10)
    assert found.head_names == anatomy.heads
    assert torch.allclose(found.scores.sum(-1), found.heads.sum(-1), atol=tolerance(name))
    assert found.layers is not None
    for number, site in enumerate(anatomy.sites):
        own = [head.site == site.name for head in found.head_names]
        assert torch.allclose(
            found.layers[:, number].sum(-1), found.heads[:, own].sum(-1), atol=1e-6
        )


def test_with_a_linear_readout_a_head_is_the_drop_when_it_is_zeroed() -> None:
    lens = al.load(linear_readout())
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(5))
    target = Target(7, 11)
    found = attention_gradient(lens, ids, target)
    assert found.heads is not None
    batch = lens.encode(ids)
    explained = settle(lens, batch, target)
    assert explained.reads is not None

    def value() -> Tensor:
        logits = lens.logits(ids, explained.reads)[:, 0]
        return logits[:, 7] - logits[:, 11]

    clean = value()
    assert torch.allclose(found.value, clean, atol=1e-12)
    for head in range(4):
        with lens.edit(al.Zero(f"L2H{head}")):
            drop = clean - value()
        assert torch.allclose(found.heads[:, 8 + head], drop, atol=1e-12)
        assert drop.abs().max() > 1e-4


@given(seed=st.integers(0, 1000), length=st.integers(1, 10), prompts=st.integers(1, 3))
def test_saliency_is_never_less(random_lens: Lens, seed: int, length: int, prompts: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (prompts, length), generator=draw)
    signed, absolute = attention_gradient(random_lens, ids), attention_saliency(random_lens, ids)
    for name in ("scores", "layers", "heads"):
        assert (getattr(absolute, name) >= getattr(signed, name).abs() - 1e-14).all()
    assert (absolute.scores >= 0).all()
    assert (signed.scores[0] < 0).any() or length < 6


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "bert", "bart"])
def test_padding_and_batches_change_nothing(name: str) -> None:
    lens = opened(name)
    for side in ("left", "right"):
        inputs = padded(lens, name, side)
        real = inputs["attention_mask"][1].bool()
        alone = {"input_ids": inputs["input_ids"][1:, real]}
        if "decoder_input_ids" in inputs:
            own = inputs["decoder_attention_mask"][1].bool()
            alone["decoder_input_ids"] = inputs["decoder_input_ids"][1:, own]
        if side == "left" and name in ("bert", "bart"):
            continue  # these count positions over padding, so that the model's output differs
        for method in (attention_gradient, attention_saliency):
            both, one = method(lens, inputs, 5), method(lens, alone, 5)
            assert both.tokens[1] == one.tokens[0]
            assert torch.allclose(both.of(1), one.of(0), atol=tolerance(name), rtol=1e-5)
            length = len(one.tokens[0])
            assert (both.scores[1, length:] == 0).all()
            assert both.heads is not None
            assert one.heads is not None
            assert torch.allclose(both.heads[1], one.heads[0], atol=tolerance(name), rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_rows_of_padding_count_for_nothing(name: str) -> None:
    lens = opened(name)
    inputs = padded(lens, name, "right")

    def everywhere(output: Any) -> Tensor:
        return output.logits[:, :, 5].sum(1)  # at padding, too

    found = attention_gradient(lens, inputs, everywhere, maps=True)
    assert found.maps is not None
    for edges in found.maps.values():
        assert (edges[1, :, 10:] == 0).all()
        assert (edges[1, :, :10, :10] != 0).any()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_blocks_of_one_row(name: str, request: pytest.FixtureRequest) -> None:
    lens = opened(name)
    whole = attention_gradient(lens, padded(lens, name, "left"), 5, maps=True)
    request.getfixturevalue("small_blocks")
    rows = attention_gradient(lens, padded(lens, name, "left"), 5, maps=True)
    assert torch.allclose(whole.scores, rows.scores, atol=1e-6)
    assert whole.maps is not None
    assert rows.maps is not None
    for site in whole.maps:
        assert torch.allclose(whole.maps[site], rows.maps[site], atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_heads_and_layers_are_chosen(name: str) -> None:
    lens = opened(name)
    inputs = padded(lens, name, "right")
    whole = attention_gradient(lens, inputs, 5, maps=True)
    some = attention_gradient(lens, inputs, 5, layers="L1:", heads="L0H0,L1H3,L1H1", maps=True)
    assert [str(head) for head in some.head_names] == ["L1H3", "L1H1"]
    assert some.layer_names == ("L1",)
    assert whole.maps is not None
    assert some.maps is not None
    assert torch.allclose(some.maps[1], whole.maps[1][:, [3, 1]], atol=1e-12)
    assert some.settings == {"layers": "L1:", "heads": "L0H0,L1H3,L1H1"}
    assert whole.settings == {}


def test_the_attended_source_gets_the_score(induction_lens: Lens) -> None:
    # START a b c d | a b c: the induction head answers d, which stands at position 4.
    ids = [0, 5, 9, 3, 7, 5, 9, 3]
    for method in (attention_gradient, attention_saliency):
        found = method(induction_lens, ids, 7, layers="L1")
        assert int(found.of(0).argmax()) == 4
        assert found.of(0)[4] > 100 * found.of(0)[[0, 1, 2, 3, 5, 6, 7]].abs().sum()
        heads = found.heads_frame().set_index("head")["score"]
        assert heads.abs().idxmax() == "L1H2"
        assert (heads.drop("L1H2") == 0).all()
    frame = attribute(induction_lens, ids, 7, method="attention_saliency").layers_frame()
    assert set(frame["layer"]) == {"L0", "L1"}


def test_sides_of_models_that_read_more_than_text() -> None:
    t5 = architecture("t5")
    found = attention_gradient(t5, padded(t5, "t5", "right"), 5)
    assert found.layers is not None
    text = len(t5.encode(padded(t5, "t5", "right")).tokens[0])
    decoder = [name.startswith("dec") for name in found.layer_names]
    assert (found.layers[0, decoder, :text] == 0).all()
    assert (found.layers[0, [not d for d in decoder], text:] == 0).all()
    alone = attention_gradient(t5, padded(t5, "t5", "right"), 5, layers="dec.L0")
    assert len(alone.tokens[0]) == len(found.tokens[0]) - text

    mllama = ARCHITECTURES["mllama"]
    model = mllama.build().double()
    inputs = mllama.inputs(model)
    lens = al.load(model, example=inputs)
    note = attention_gradient(lens, inputs, 5).notes[0]
    assert "outside the text" in note
    tower = attention_gradient(lens, inputs, 5, layers="vision.L0")
    assert tower.tokens[0][:2] == ("0", "1")
    with pytest.raises(InputError, match="text, vision, whose"):
        attention_gradient(lens, inputs, 5, layers="vision.L0,L0")


def test_windows_of_an_image_are_refused() -> None:
    swin = ARCHITECTURES["swin"]
    model = swin.build()
    lens = al.load(model, example=swin.inputs(model))

    def first(output: Any) -> Tensor:
        return output.last_hidden_state[:, 0, 0]

    with pytest.raises(InputError, match="pieces"):
        attention_gradient(lens, swin.inputs(model), first)


def test_maps_are_priced_before_the_model_runs(random_lens: Lens) -> None:
    ids = torch.ones(2, 20, dtype=torch.long)
    runs: list[int] = []
    handle = random_lens.model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(BudgetError, match=r"76\.8 kB, .* budget of 20 kB.*77\.6 kB"):
        attention_gradient(random_lens, ids, 5, maps=True, budget=20_000)
    handle.remove()
    assert runs == []
    assert attention_gradient(random_lens, ids, 5, budget=20_000).maps is None


def test_edits_act_and_those_of_z_are_refused(random_lens: Lens, ids: Tensor) -> None:
    with random_lens.edit(al.Zero("L0H1")), pytest.raises(InputError, match=r"z at L0 .*Hide"):
        attention_gradient(random_lens, ids, 5)
    with random_lens.edit(al.Hide("L1H2", keys=0)):
        found = attention_gradient(random_lens, ids, 5, maps=True)
    assert found.maps is not None
    assert (found.maps[1][:, 2, 1:, 0] == 0).all()
    assert (found.maps[1][:, 1, 1:, 0] != 0).all()
    with random_lens.edit(al.Zero("L0H1")):
        above = attention_gradient(random_lens, ids, 5, layers="L1:")
    model = copy.deepcopy(random_lens.model)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight[8:16] = 0
    wanted = attention_gradient(al.load(model), ids, 5, layers="L1:")
    assert torch.allclose(above.scores, wanted.scores, atol=1e-12)


def test_the_model_is_left_as_it_was(random_lens: Lens, ids: Tensor) -> None:
    model = al.load(tiny_gpt2().train()).model
    lens = al.load(model)
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    def broken(output: Any) -> Tensor:
        raise RuntimeError("no metric")

    with pytest.raises(RuntimeError, match="no metric"):
        attention_gradient(lens, ids, broken)
    attention_gradient(lens, ids, 5)
    assert isinstance(model, nn.Module)
    assert model.training
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.grad is None
        assert weight.requires_grad


def test_a_sink_that_scales_z_takes_its_share_of_the_weights() -> None:
    """GraniteSWA: the sums of a head's edges stay `z . dM/dz`."""
    lens = architecture("granite_swa")
    batch = lens.encode(torch.tensor([[5, 9, 13, 7, 21, 4]]))
    found = attention_gradient(lens, batch.inputs, 5)
    explained = settle(lens, batch, 5)
    observers = explained.observers(lens, batch)
    known = z_gradients(
        lens.model, lens.anatomy, batch.inputs, explained.metric, observers=observers
    )
    heads = torch.cat([(own.z * own.gradient).sum((1, 3)) for own in known.values()], 1)
    assert found.heads is not None
    assert torch.allclose(found.heads, heads, atol=1e-5)  # a softmax in float32


@pytest.mark.parametrize(
    "method",
    ["attention_gradient", "gradient_rollout", "chefer", "value_norms", "attnlrp", "chefer_lrp"],
)
def test_maps_are_kept_of_the_layers_named(random_lens: Lens, ids: Tensor, method: str) -> None:
    every = al.attribute(random_lens, ids, 5, method, maps=True)
    some = al.attribute(random_lens, ids, 5, method, maps="L1:")
    assert every.maps is not None
    assert some.maps is not None
    assert (set(every.maps), set(some.maps)) == ({"L0", "L1", "L2"}, {"L1", "L2"})
    assert all(torch.equal(some.maps[name], every.maps[name]) for name in some.maps)
    assert al.attribute(random_lens, ids, 5, method).maps is None
