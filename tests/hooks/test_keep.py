"""What is kept is what plain transformers shows; requests are priced and narrowed as they say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.errors import BudgetError, InputError
from attnlens.hooks.keep import KINDS, Extent, Request, price
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES, Inputs
from tests.oracles.attention import record


def opened(name: str) -> tuple[Lens, Inputs]:
    model = ARCHITECTURES[name].build()
    inputs = ARCHITECTURES[name].inputs(model)
    return Lens(model, example=inputs), inputs


def module_output(model: Any, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What a module was given and what it returned."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, output: found.extend([args[0], output])
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found[-2], found[-1]


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "bert", "deepseek_v3", "bart", "vit"])
def test_every_kind_is_what_hooks_see(name: str) -> None:
    lens, inputs = opened(name)
    model: Any = lens.model
    trace = lens.run(inputs, keep=("q", "k", "v", "scores", "pattern", "z", "result"))
    plain = record(model, lens.anatomy, inputs)
    for site in lens.anatomy.sites:
        at, call = site.name, plain.calls[site.name]
        assert torch.equal(trace.q[at], call.query)
        assert torch.equal(trace.k[at], call.key)
        assert torch.equal(trace.v[at], call.value)
        assert trace.scores[at].softmax(-1).sub(trace.pattern[at]).abs().max() < 1e-6
        assert trace.scores[at].isneginf().eq(trace.pattern[at] == 0).all()
        assert site.output is not None
        given, returned = module_output(model, site.output, inputs)
        z = trace.z[at].transpose(1, 2)
        assert torch.equal(z.reshape(given.shape), given)
        bias = model.get_submodule(site.output).bias
        total = trace.result[at].sum(1) + (0 if bias is None else bias)
        torch.testing.assert_close(total.view(returned.shape), returned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "albert", "gemma2", "qwen2_moe", "bert"])
def test_the_residual_stream_is_the_hidden_states(name: str) -> None:
    lens, inputs = opened(name)
    trace = lens.run(inputs, keep="residual")
    with torch.no_grad():
        states = lens.model(**inputs, output_hidden_states=True).hidden_states
    for layer, site in enumerate(lens.anatomy.sites):
        assert torch.equal(trace.residual[site.name], states[layer]), site.name
    final = trace.residual["final"]
    if name in ("gpt2", "llama", "gemma2", "qwen2_moe"):
        final = lens.model.get_submodule(lens.anatomy.final_norm or "")(final)
    torch.testing.assert_close(final, states[-1])


def test_the_residual_stream_of_a_hybrid() -> None:
    """Blocks of different classes in one list; two of four hold attention."""
    lens, inputs = opened("jamba")
    residual = lens.run(inputs, keep="residual").residual
    with torch.no_grad():
        states = lens.model(**inputs, output_hidden_states=True).hidden_states
    assert list(residual) == ["L1", "L3", "final"]
    for layer in (1, 3):
        assert torch.equal(residual[f"L{layer}"], states[layer])


def test_a_block_that_attends_twice_has_one_stream() -> None:
    lens, inputs = opened("diffllama")
    residual = lens.run(inputs, keep="residual").residual
    with torch.no_grad():
        states = lens.model(**inputs, output_hidden_states=True).hidden_states
    assert list(residual) == ["L0", "L2", "final"]
    assert torch.equal(residual["L2"], states[1])


def test_the_residual_stream_of_a_decoder_is_kept_once_a_block() -> None:
    lens, inputs = opened("bart")
    with torch.no_grad():
        output = lens.model(**inputs, output_hidden_states=True)
    residual = lens.run(inputs, keep="residual").residual
    assert sorted(residual) == ["dec.L0", "dec.L1", "enc.L0", "enc.L1", "final"]
    assert torch.equal(residual["final"], output.decoder_hidden_states[-1])
    for layer in (0, 1):
        assert torch.equal(residual[f"enc.L{layer}"], output.encoder_hidden_states[layer])
        assert torch.equal(residual[f"dec.L{layer}"], output.decoder_hidden_states[layer])
    cross = lens.run(inputs, keep="residual", layers="cross.L1").residual
    assert torch.equal(cross["cross.L1"], output.decoder_hidden_states[1])
    encoder = lens.run(inputs, keep="residual", layers="enc.L0", rows=-1).residual
    assert list(encoder) == ["enc.L0"]


def test_one_layer_of_a_shared_block() -> None:
    """Albert runs one block for all its layers."""
    lens, inputs = opened("albert")
    whole = lens.run(inputs, keep=("residual", "z", "pattern"))
    one = lens.run(inputs, keep=("residual", "z", "pattern"), layers="L1")
    for kind in ("residual", "z", "pattern"):
        assert torch.equal(one[kind]["L1"], whole[kind]["L1"]), kind
        assert set(one[kind]) - {"final"} == {"L1"}


def test_selections_are_slices_of_the_whole() -> None:
    lens, _ = opened("llama")
    ids = torch.arange(20, 44).view(2, 12)
    kinds = ("q", "k", "v", "scores", "pattern", "z", "result", "residual")
    whole = lens.run(ids, keep=kinds)
    some = lens.run(ids, keep=kinds, layers="L1:", heads="L1H2,L1H1,L0H2", rows=[0, -1, 4])
    assert some.heads == {"L1": (2, 1)}
    rows, heads = [0, 11, 4], [2, 1]
    for kind in ("q", "scores", "pattern", "z", "result"):
        wanted = whole[kind]["L1"][:, heads][:, :, rows]
        torch.testing.assert_close(some[kind]["L1"], wanted, atol=1e-6, rtol=1e-5)
        assert list(some[kind]) == ["L1"]
    for kind in ("k", "v"):  # heads 2 and 1 read both groups, head 0 the first one
        assert torch.equal(some[kind]["L1"], whole[kind]["L1"])
        one = lens.run(ids, keep=kind, heads="L1H0")
        assert torch.equal(one[kind]["L1"], whole[kind]["L1"][:, :1])
    assert torch.equal(some.residual["L1"], whole.residual["L1"][:, rows])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_count_over_real_tokens(side: str) -> None:
    lens, _ = opened("llama")
    padded = ARCHITECTURES["llama"].padded
    assert padded is not None
    inputs = padded(lens.model, side)  # type: ignore[arg-type]
    whole = lens.run(inputs, keep=("pattern", "z"))
    last = lens.run(inputs, keep=("pattern", "z"), rows=-1)
    places = [15, 15] if side == "left" else [15, 9]
    for prompt, row in enumerate(places):
        for kind in ("pattern", "z"):
            wanted = whole[kind]["L1"][prompt, :, row]
            torch.testing.assert_close(last[kind]["L1"][prompt, :, 0], wanted)
    with pytest.raises(InputError, match="prompt 1 with its 10 tokens"):
        lens.run(inputs, rows=10)
    with pytest.raises(InputError, match="picks 10 rows of one prompt and 16"):
        lens.run(inputs, rows=slice(None))


@pytest.mark.parametrize("stack", ["enc", "dec", "cross"])
def test_rows_of_an_encoder_decoder_count_over_their_own_side(stack: str) -> None:
    lens, inputs = opened("bart")
    whole = lens.run(inputs, layers=f"{stack}.L1")
    last = lens.run(inputs, layers=f"{stack}.L1", rows=-1)
    for kind in ("pattern", "z"):
        wanted = whole[kind][f"{stack}.L1"][:, :, -1:]
        torch.testing.assert_close(last[kind][f"{stack}.L1"], wanted)


def test_rows_of_both_sides_at_once_are_refused() -> None:
    lens, inputs = opened("bart")
    with pytest.raises(InputError, match="Name the layers"):
        lens.run(inputs, rows=12)


def test_dtype_and_device_of_what_is_kept() -> None:
    lens, inputs = opened("gpt2")
    trace = lens.run(inputs, keep=KINDS, dtype=torch.bfloat16, device="cpu")
    for kind in KINDS:
        for tensor in trace[kind].values():
            assert (tensor.dtype, tensor.device.type) == (torch.bfloat16, "cpu")
            assert not tensor.requires_grad


def test_what_is_kept_holds_no_other_memory() -> None:
    """GPT-2's values are a view of a fused map: a view kept would keep three times its price."""
    lens, inputs = opened("gpt2")
    trace = lens.run(inputs, keep=KINDS)
    for kind in KINDS:
        for tensor in trace[kind].values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, kind
    shown = lens.run({**inputs, "output_hidden_states": True}, keep="residual")
    stream = shown.output.hidden_states[0]
    assert torch.equal(shown.residual["L0"], stream)
    assert shown.residual["L0"].data_ptr() != stream.data_ptr()


@pytest.mark.parametrize("name", ["gpt2", "llama", "albert", "bart", "deepseek_v3", "gemma3"])
@pytest.mark.parametrize("rows", [None, -1])
def test_the_price_is_the_bytes_that_are_kept(name: str, rows: int | None) -> None:
    lens, inputs = opened(name)
    layers = "dec" if name == "bart" else None
    sites = [s for s in lens.anatomy.sites if layers is None or s.stack in ("dec", "cross")]
    spec = ",".join(site.name for site in sites if site.stack != "vision")
    for kind in KINDS if all(site.output for site in sites) else KINDS[:6]:
        trace = lens.run(inputs, keep=kind, layers=spec, rows=rows)
        size = sum(tensor.nbytes for tensor in trace[kind].values())
        batch = lens.encode(inputs)
        request = Request(
            (kind,),
            trace.anatomy.layers(spec),
            trace.heads,
            None if rows is None else ((0,),),
        )
        found = price(request, batch.extents(trace.anatomy), trace.anatomy, 4)
        assert found == {kind: size}
        lens.run(inputs, keep=kind, layers=spec, rows=rows, budget=size)
        with pytest.raises(BudgetError):
            lens.run(inputs, keep=kind, layers=spec, rows=rows, budget=size - 1)


def test_a_price_by_hand() -> None:
    lens, _ = opened("llama")
    anatomy = lens.anatomy
    heads = {site.name: tuple(range(4)) for site in anatomy.sites}
    request = Request(("pattern", "k", "z"), anatomy.sites, heads)
    extents = {site.name: Extent(3, 100, 100) for site in anatomy.sites}
    layers = len(anatomy.sites)
    assert price(request, extents, anatomy, 2) == {
        "pattern": layers * 3 * 4 * 100 * 100 * 2,
        "k": layers * 3 * 2 * 100 * 8 * 2,
        "z": layers * 3 * 4 * 100 * 8 * 2,
    }


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bart", "deepseek_v3"])
@pytest.mark.parametrize("keep", ["pattern", "k", "residual", ("pattern", "z", "q", "k")])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_what_would_fit_fits(name: str, keep: Any, share: float) -> None:
    lens, inputs = opened(name)
    layers = "dec.L0,dec.L1" if name == "bart" else None
    kinds = (keep,) if isinstance(keep, str) else keep
    trace = lens.run(inputs, keep=kinds, layers=layers)
    total = sum(tensor.nbytes for kind in kinds for tensor in trace[kind].values())
    budget = int(total * share)
    with pytest.raises(BudgetError) as refused:
        lens.run(inputs, keep=kinds, layers=layers, budget=budget)
    text = str(refused.value)
    named = re.search(r"layers='([^']+)'", text)
    if named:
        lens.run(inputs, keep=kinds, layers=named[1], budget=budget)
    rows = re.search(r"rows=slice\(-(\d+), None\)", text)
    if rows:
        count = int(rows[1])
        lens.run(inputs, keep=kinds, layers=layers, rows=slice(-count, None), budget=budget)
        with pytest.raises(BudgetError):
            lens.run(inputs, keep=kinds, layers=layers, rows=slice(-count - 1, None), budget=budget)
    assert named or rows or share < 0.6
    assert rows or share < 0.6 or keep == "k"


def test_over_budget_says_the_sum() -> None:
    lens, _ = opened("gpt2")
    ids = torch.full((8, 60), 20)
    with pytest.raises(BudgetError) as refused:
        lens.run(ids, keep="pattern", budget="900kB")
    message = str(refused.value)
    assert "3 layers x batch 8 x 4 heads x 60 rows x 60 keys x 4 bytes = 1.38 MB" in message
    assert "budget of 900 kB" in message
    assert "layers='L0:1'" in message
    assert "lens.measure" in message


def test_images_have_no_tokens_to_price_but_a_budget() -> None:
    lens, inputs = opened("vit")
    with pytest.raises(BudgetError, match="passes the budget"):
        lens.run(inputs, keep="pattern", budget=1000)
    with pytest.raises(InputError, match="no token ids"):
        lens.run(inputs, rows=-1)


def test_unknown_kinds_are_refused() -> None:
    lens, inputs = opened("gpt2")
    with pytest.raises(InputError, match=r"Cannot keep 'patern'.*pattern"):
        lens.run(inputs, keep="patern")
    with pytest.raises(InputError, match="nothing"):
        lens.run(inputs, keep=())


def test_a_gated_output_has_no_result() -> None:
    lens, inputs = opened("bitnet")
    with pytest.raises(al.errors.UnsupportedModelError, match="no output projection"):
        lens.run(inputs, keep="result")


MLPS = {
    "gpt2": "transformer.h.1.mlp",
    "llama": "model.layers.1.mlp",
    "gemma2": "model.layers.1.post_feedforward_layernorm",
    "opt": "model.decoder.layers.1.fc2",
    "bart": "model.decoder.layers.1.fc2",
}


@pytest.mark.parametrize("name", MLPS)
def test_what_an_mlp_adds_is_what_its_module_returns(name: str) -> None:
    lens, inputs = opened(name)
    returned: list[torch.Tensor] = []
    module = lens.model.get_submodule(MLPS[name])
    handle = module.register_forward_hook(lambda _, __, out: returned.append(out))
    kept = lens.run(inputs, keep="mlp").mlp
    handle.remove()
    site = "dec.L1" if name == "bart" else "L1"
    torch.testing.assert_close(kept[site], returned[-1].reshape(kept[site].shape))
    assert kept[site].any()
    last = lens.run(inputs, keep="mlp", layers=site, rows=-1).mlp
    assert list(last) == [site]
    assert last[site].shape[1] == 1
