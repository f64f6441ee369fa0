"""Wiring is found by runs: who writes, who reads where, by what factor, and which models have none.

The edges that a model should have are written down here from its equations: serial blocks, parallel
ones, and an encoder with a decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import attnlens as al
from attnlens.anatomy.network import Network
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks import seam, stream_factors
from attnlens.hooks.examples import example_inputs
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.hooks.test_session import condition
from tests.hooks.wired import ENCODER_DECODERS, PARALLEL, WIRED, lens_of, new_lens, prompts
from tests.networks import network

REFUSED = {
    "gemma2": "norm or another step stands between",
    "gemma3_text": "norm or another step stands between",
    "olmo2": "norm or another step stands between",
    "olmo3": "norm or another step stands between",
    "glm4": "norm or another step stands between",
    "exaone4": "norm or another step stands between",
    "modernbert_decoder": "norm or another step stands between",
    "bert_decoder": "norm or another step stands between",
    "bert": "norm or another step stands between",
    "bart": "norm or another step stands between",
    "marian": "norm or another step stands between",
    "jamba": "not simply added",  # layers without attention stand between those with it
    "falcon_h1": "not simply added",  # a state-space layer writes beside the heads
    "bitnet": "gate or a norm stands between the heads",
    "qwen3_next": "gate or a norm stands between the heads",
    "moonshine": "gate or a norm stands between the heads",
    "deepseek_v2": "no single linear module",
    "minicpm3": "no single linear module",
    "diffllama": "one block for several layers",
    "albert": "one block for several layers",
    "vit": "no logits",
}


def names_of(own: Network) -> set[str]:
    return set(own.edge_names)


def parallel(own: Network) -> set[str]:
    """The edges of a decoder less those from heads to the MLP of their own layer."""
    within = re.compile(r"(L\d)H\d->\1\.mlp")
    return {name for name in names_of(own) if not within.fullmatch(name)}


def renamed(own: Network, layers: list[int]) -> set[str]:
    """The edges where the layers have other numbers."""
    return {re.sub(r"L(\d)", lambda m: f"L{layers[int(m[1])]}", name) for name in names_of(own)}


@pytest.mark.parametrize("name", sorted(set(WIRED) - set(ENCODER_DECODERS) - set(PARALLEL)))
def test_serial_blocks(name: str) -> None:
    lens = lens_of(name)
    sites = [site for site in lens.anatomy.sites if not site.stack]
    # Layers without attention to the text have no nodes: convolutions, images.
    layers = {"lfm2": [1], "recurrent_gemma": [1], "mllama": [0, 2]}.get(name, [0, 1, 2])
    layers = layers[: len(sites)]
    assert [site.layer for site in sites] == layers
    groups = {site.groups for site in sites}
    by_hand = network(len(layers), sites[0].heads, max(groups))
    if len(groups) == 1:
        assert names_of(lens.wiring.network) == renamed(by_hand, layers)
    else:  # of each layer as many as it has
        assert name == "mimo_v2_flash"
        found = [r.name for r in lens.wiring.network.receivers if r.kind == "k"]
        assert found == [
            f"{site.name}{'G' if site.groups < site.heads else 'H'}{n}<k>"
            for site in sites
            for n in range(site.groups)
        ]


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks(name: str) -> None:
    lens = lens_of(name)
    first = lens.anatomy["L0"]
    by_hand = network(len(lens.anatomy.sites), first.heads, first.groups)
    assert names_of(lens.wiring.network) == parallel(by_hand)
    assert len(parallel(by_hand)) == len(by_hand) - first.heads * len(lens.anatomy.sites)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_is_read_by_keys_and_values_of_cross_attention(name: str) -> None:
    own = lens_of(name).wiring.network
    senders = {sender.name for sender in own.senders}
    encoder = {name for name in senders if name.startswith("enc.")}
    assert {"enc.embed", "dec.embed"} <= senders
    for number, receiver in enumerate(own.receivers):
        read = {own.senders[row].name for row in own.exists[:, number].nonzero()[:, 0].tolist()}
        if receiver.part.startswith("cross.") and receiver.kind in ("k", "v"):
            assert read == encoder, receiver.name  # of every layer: it is done by then
        elif receiver.part.startswith("enc."):
            assert read <= encoder
        else:
            assert not read & encoder
        layer, stack = receiver.layer, receiver.part.split(".")[0]
        if stack == "dec" or (stack == "cross" and receiver.kind == "q"):
            before = {
                s.name
                for s in own.senders
                if s.name not in encoder
                and (
                    s.layer < layer
                    # The order within a layer: attention, attention to the encoder, MLP.
                    or (s.layer == layer and stack == "cross" and s.part == f"dec.L{layer}")
                    or (s.layer == layer and receiver.kind == "mlp" and s.kind == "head")
                )
            }
            assert read == before, receiver.name
        elif receiver.kind == "logits":
            assert read == senders - encoder


def test_receivers_that_heads_share_have_the_names_of_groups() -> None:
    own = lens_of("llama").wiring.network  # 4 heads of 2 groups
    shared = {r.name: r.nodes for r in own.receivers if r.part == "L1" and r.kind == "v"}
    assert shared == {"L1G0<v>": ("L1H0", "L1H1"), "L1G1<v>": ("L1H2", "L1H3")}
    queries = {r.name: r.nodes for r in own.receivers if r.part == "L1" and r.kind == "q"}
    assert queries == {f"L1H{n}<q>": (f"L1H{n}",) for n in range(4)}
    one = lens_of("gpt_bigcode").wiring.network  # all heads of one group
    (key,) = [r for r in one.receivers if r.part == "L0" and r.kind == "k"]
    assert (key.name, key.nodes) == ("L0G0<k>", ("L0H0", "L0H1", "L0H2", "L0H3"))
    alone = lens_of("gpt2").wiring.network
    assert {r.name for r in alone.receivers if r.part == "L0" and r.kind == "k"} == {
        f"L0H{n}<k>" for n in range(4)
    }


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_refused(name: str, why: str) -> None:
    lens = al.load(ARCHITECTURES[name].build())
    with pytest.raises(UnsupportedModelError, match=why):
        _ = lens.wiring


@pytest.mark.parametrize("name", ["gemma2", "bert_decoder", "bart", "jamba"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_refused_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModelError, match="not simply added"):
        _ = new_lens(name, dtype).wiring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt_neox", "llama", "phi", "opt", "mixtral", "t5", "mbart", "qwen3", "gpt_oss"],
)
def test_the_same_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    found, wanted = new_lens(name, dtype).wiring, lens_of(name).wiring
    assert found.network.edge_names == wanted.network.edge_names
    assert found.places == wanted.places
    for one, other in zip(found.readers, wanted.readers, strict=True):
        assert replace(one, projection=None) == replace(other, projection=None)


def granite(multiplier: float, dtype: torch.dtype) -> Lens:
    model: Any = ARCHITECTURES["granite"].build()
    for layer in model.model.layers:
        layer.residual_multiplier = multiplier
    model.model.embedding_multiplier = 3.0
    return al.load(model.to(dtype))


@pytest.mark.parametrize("multiplier", [0.22, 0.5, 0.6, 0.9, 1.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_added_with_a_factor(multiplier: float, dtype: torch.dtype) -> None:
    wiring = granite(multiplier, dtype).wiring
    assert len(wiring.network) == 82
    # Of a few hundred numbers the narrow types give a factor to two digits, float64 to all.
    rough = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-3)
    for place in wiring.places.values():
        for name, factor in place.factors.items():
            # The multiplier of embeddings comes before the first block: they are seen as they are.
            wanted = 1.0 if name == "embed" else multiplier
            assert factor == pytest.approx(wanted, abs=rough)


def test_factors_are_by_sender() -> None:
    wiring = granite(0.5, torch.float64).wiring
    final = wiring.factors(wiring.readers[-1].place)
    assert final.tolist() == pytest.approx([1.0] + [0.5] * 10)
    assert wiring.factors(wiring.readers[0].place).tolist() == [1.0] + [0.0] * 10


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("share", "dtype"),
    [
        (1e-2, torch.float64),
        (1e-2, torch.float32),
        # Rounding of narrow types hides a weaker one.
        (1.0, torch.bfloat16),
        (1.0, torch.float16),
    ],
)
def test_another_writer_to_the_stream_is_refused(
    layer: int, share: float, dtype: torch.dtype
) -> None:
    """A table of the tokens, of a share of the size of embeddings, added before a block."""
    model: Any = ARCHITECTURES["gpt2"].build().to(dtype)
    table = share * torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    lens = al.load(model)
    _ = lens.mlps
    ids: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True
    )
    model.transformer.h[layer].register_forward_pre_hook(
        lambda _, args: (args[0] + table[ids[-1]], *args[1:])
    )
    with pytest.raises(UnsupportedModelError, match="holds more than embeddings"):
        _ = lens.wiring


def test_an_example_of_one_prompt_would_hide_another_writer() -> None:
    model: Any = ARCHITECTURES["gpt2"].build()
    with pytest.raises(InputError, match="holds 1 of the 4 different prompts"):
        _ = al.load(model, example=example_inputs(model, batch=1)).wiring
    assert len(al.load(model, example=example_inputs(model)).wiring.network) == 262


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_an_example_too_small_for_a_rotary_embedding_is_named(prompts: int) -> None:
    """The model is not to blame."""
    model: Any = ARCHITECTURES["llama"].build()
    with pytest.raises(InputError, match=f"holds {prompts} of the 4 different prompts"):
        _ = al.load(model, example=example_inputs(model, batch=prompts)).wiring
    assert len(al.load(model, example=example_inputs(model, batch=4)).wiring.network) == 82


def test_a_writer_that_is_scaled_by_the_stream_is_refused() -> None:
    """A gate on what an MLP writes, made of the stream it reads."""
    model: Any = ARCHITECTURES["gpt2"].build().double()
    lens = al.load(model)
    model.transformer.h[1].register_forward_hook(
        lambda _, args, made: (
            made * args[0].mean(-1, keepdim=True).tanh()
            if isinstance(made, Tensor)
            else (made[0] * args[0].mean(-1, keepdim=True).tanh(), *made[1:])
        )
    )
    with pytest.raises(UnsupportedModelError, match="not simply added"):
        _ = lens.wiring


@pytest.fixture
def gpt2() -> Iterator[GPT2LMHeadModel]:
    """A model that is in the end what it was in the beginning, in train mode in part."""
    model: Any = ARCHITECTURES["gpt2"].build()
    lens = al.load(model)
    model.transformer.h[1].train()
    inputs = prompts(lens)
    before = condition(model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    yield model
    assert torch.get_rng_state().equal(state)
    assert condition(model) == before
    assert not seam._switched._held
    for name, weight in model.state_dict().items():
        assert weight.equal(weights[name])
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    model.eval()
    assert lens.model(**inputs).logits.isfinite().all()


def test_nothing_is_left_after_success(gpt2: GPT2LMHeadModel) -> None:
    lens = Lens(gpt2)
    before = condition(gpt2)
    assert len(lens.wiring.network) == 262
    assert condition(gpt2) == before


@pytest.mark.parametrize("run", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_run_that_failed(
    gpt2: GPT2LMHeadModel, run: int, error: type[BaseException]
) -> None:
    lens = Lens(gpt2)
    _ = lens.mlps
    runs: list[int] = []

    def fail(*_: object) -> None:
        runs.append(1)
        if len(runs) == run:
            raise error

    handle = gpt2.transformer.h[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        _ = lens.wiring
    handle.remove()
    assert len(runs) == run


def test_nothing_is_left_after_a_refusal() -> None:
    model: Any = ARCHITECTURES["gemma2"].build()
    lens = al.load(model)
    before = condition(model)
    with pytest.raises(UnsupportedModelError):
        _ = lens.wiring
    assert condition(model) == before


def test_writers_that_do_not_fit_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_factors, "_COPIES", 2)
    for name in ("gpt2", "mbart"):
        found, wanted = new_lens(name).wiring, lens_of(name).wiring
        assert found.network.edge_names == wanted.network.edge_names
        for place, own in wanted.places.items():
            assert dict(found.places[place].factors) == pytest.approx(dict(own.factors), abs=1e-12)
