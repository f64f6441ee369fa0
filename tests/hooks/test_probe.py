"""The probe finds what a model holds, by running it, and refuses what it cannot see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnlens as al
from attnlens.anatomy import Anatomy
from attnlens.errors import SeamError, UnsupportedModelError
from attnlens.hooks import rows
from attnlens.hooks.probe import examine
from attnlens.lens import Lens
from attnlens.zoo import induction_model
from tests.architectures import ARCHITECTURES, PARTIAL, UNSUPPORTED
from tests.oracles.attention import record


def anatomy(name: str) -> Anatomy:
    model = ARCHITECTURES[name].build()
    return examine(model, ARCHITECTURES[name].inputs(model))


def facts(found: Anatomy, *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(site, field) for field in fields) for site in found.sites]


def test_gpt2() -> None:
    found = anatomy("gpt2")
    assert facts(found, "name", "kind", "heads", "groups", "d_qk", "d_v", "causal") == [
        (f"L{layer}", "self", 4, 4, 8, 8, True) for layer in range(3)
    ]
    assert facts(found, "module", "block", "output", "call", "window", "sinks", "upcast")[1] == (
        "transformer.h.1.attn",
        "transformer.h.1",
        "transformer.h.1.attn.c_proj",
        0,
        None,
        False,
        False,
    )
    assert (found.d_model, found.vocab, found.context) == (32, 96, 64)
    assert (found.final_norm, found.unembedding) == ("transformer.ln_f", "lm_head")
    assert found.parameters == sum(p.numel() for p in ARCHITECTURES["gpt2"].build().parameters())


def test_grouped_keys_and_upcast() -> None:
    found = anatomy("llama")
    assert facts(found, "heads", "groups", "upcast") == [(4, 2, True)] * 2
    assert (found.final_norm, found.unembedding) == ("model.norm", "lm_head")


def test_windows_sinks_and_widths() -> None:
    assert facts(anatomy("gpt_oss"), "window", "sinks", "upcast") == [
        (5, True, False),
        (None, True, False),
    ]
    assert facts(anatomy("mistral"), "window", "causal") == [(5, True)] * 2
    assert facts(anatomy("modernbert"), "kind", "causal")[0] == ("encoder", False)
    assert facts(anatomy("granite_swa"), "sinks") == [(False,)] * 2
    (first, *_) = anatomy("deepseek_v3").sites
    assert first.d_v != first.d_qk


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_the_stacks_of_an_encoder_decoder(name: str) -> None:
    found = anatomy(name)
    assert facts(found, "name", "kind", "causal") == [
        ("enc.L0", "encoder", False),
        ("enc.L1", "encoder", False),
        ("dec.L0", "self", True),
        ("cross.L0", "cross", False),
        ("dec.L1", "self", True),
        ("cross.L1", "cross", False),
    ]
    assert found.stacks == ("enc", "dec", "cross")


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_cross_attention_is_told_at_equal_lengths_too(name: str) -> None:
    """Nothing in the shapes tells it from two-sided self-attention then."""
    model = ARCHITECTURES[name].build()
    ids = torch.arange(20, 44).view(2, 12)
    found = examine(model, {"input_ids": ids, "decoder_input_ids": ids.roll(1, 1)})
    assert [site.name for site in found.sites] == [site.name for site in anatomy(name).sites]
    assert [site.kind for site in found.sites] == [site.kind for site in anatomy(name).sites]


def test_one_module_for_all_layers() -> None:
    found = anatomy("albert")
    assert facts(found, "name", "call") == [("L0", 0), ("L1", 1), ("L2", 2)]
    assert len({site.module for site in found.sites}) == 1
    assert len({site.output for site in found.sites}) == 1


def test_hybrids_keep_the_numbers_of_their_layers() -> None:
    assert facts(anatomy("jamba"), "name", "block") == [
        ("L1", "model.layers.1"),
        ("L3", "model.layers.3"),
    ]


def test_towers() -> None:
    assert anatomy("clip").stacks == ("vision", "")
    assert anatomy("llava").stacks == ("vision", "")
    found = anatomy("qwen2_vl")
    assert found["vision.L0"].output is None  # fed all images at once
    assert found["L0"].output == "model.language_model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("name", ["bitnet", "qwen3_next", "moonshine"])
def test_a_gate_between_leaves_no_output_projection(name: str) -> None:
    assert all(site.output is None for site in anatomy(name).sites)


def test_it_prints_as_a_table() -> None:
    text = str(anatomy("mistral"))
    assert "MistralForCausalLM: 2 attention sites, 8 heads" in text
    assert "causal, window 5" in text
    assert "self_attn.o_proj" in text


# What is refused


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_families_outside_the_interface_are_refused(name: str) -> None:
    model = UNSUPPORTED[name]()
    before = [vars(module).keys() for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match="attention interface") as refused:
        al.load(model)
    assert type(model).__name__ in str(refused.value)
    assert [vars(module).keys() for module in model.modules()] == before


def test_what_a_model_attends_outside_the_interface_is_listed() -> None:
    git = PARTIAL["git"].build()
    found = examine(git, PARTIAL["git"].inputs(git))
    assert len(found.sites) == 1
    assert len(found.unseen) == 2
    assert "not seen, outside the attention interface: git.encoder.layer.0" in str(found)


def test_a_copied_config_is_reached() -> None:
    """vit_mae's decoder reads its own copy of the config."""
    model = PARTIAL["vit_mae"].build()
    found = examine(model, PARTIAL["vit_mae"].inputs(model))
    assert len(found.sites) == 4
    assert not found.unseen


def test_kernels_without_readable_masks_are_refused() -> None:
    model = ARCHITECTURES["llama"].build()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"'flex_attention'.*sdpa"):
        Lens(model)
    assert model.config._attn_implementation_internal == "flex_attention"


def test_a_transformer_lens_bridge_is_refused() -> None:
    """The real bridge imports for seconds; its class is told by where it comes from."""
    bridge = type(
        "TransformerBridge", (nn.Module,), {"__module__": "transformer_lens.model_bridge"}
    )
    with pytest.raises(UnsupportedModelError, match=r"TransformerBridge.*before a bridge"):
        al.load(bridge())


@pytest.mark.long
def test_the_real_transformer_lens_bridge_is_refused(tmp_path: Path) -> None:
    """Around a model, and the model that it changed in place."""
    lens = pytest.importorskip("transformer_lens.model_bridge")
    model = ARCHITECTURES["gpt2"].build()
    model.save_pretrained(tmp_path)
    bridge = lens.TransformerBridge.boot_transformers(str(tmp_path), hf_model=model, device="cpu")
    for changed in (bridge, model):
        with pytest.raises(UnsupportedModelError, match="TransformerLens"):
            al.load(changed)


def test_a_sparse_indexer_is_refused() -> None:
    """Its keys are picked outside the mask, by code that looks at the kernel's name."""
    if not hasattr(transformers, "DeepseekV32ForCausalLM"):
        pytest.skip("this transformers has no model with a sparse indexer")
    config = transformers.DeepseekV32Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        index_topk=4,
        index_n_heads=2,
        index_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    model = transformers.DeepseekV32ForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError):
        al.load(model, example={"input_ids": torch.arange(4, 20)[None]})


def test_a_random_forward_is_refused() -> None:
    """Nothing could be said of the seam changing nothing."""
    model = ARCHITECTURES["llama"].build()
    model.model.norm.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    with pytest.raises(UnsupportedModelError, match="changes when"):
        Lens(model)


def test_the_self_check_finds_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows under another scale are not the model's."""
    lens = Lens(ARCHITECTURES["gpt2"].build())
    assert lens.check().passed
    right = rows.scaled_products
    monkeypatch.setattr(rows, "scaled_products", lambda q, k, scale: right(q, k, scale * 1.001))
    check = lens.check()
    assert not check.passed
    assert "L0: recomputed rows differ" in check.problems[0]
    with pytest.raises(SeamError, match="self-check of GPT2LMHeadModel failed"):
        check.raise_problems()


def test_the_self_check_finds_a_pattern_that_does_not_matter() -> None:
    model: Any = ARCHITECTURES["gpt2"].build()
    for block in model.transformer.h:
        nn.init.zeros_(block.attn.c_proj.weight)
    check = Lens(model).check()
    assert check.problems == ("changing a pattern changes nothing at L0, L1, L2",)


def test_the_self_check_as_a_table() -> None:
    frame = Lens(ARCHITECTURES["gpt_oss"].build()).check().to_frame()
    assert list(frame["site"]) == ["L0", "L1"]
    assert (frame["row_error"] < 2e-6).all()
    assert (frame["row_sum"] < 0.9).all()
    assert frame["moves"].all()


# Weights of each head


def made(weight: Tensor, hidden: Tensor) -> Tensor:
    """`batch head position d` from `head d_model d`, without what is constant (a bias)."""
    return torch.einsum("btm,hmd->bhtd", hidden, weight)


def centred(tensor: Tensor) -> Tensor:
    return tensor - tensor.mean((0, 2), keepdim=True)


# Without a rotation between the projection and attention, q and k too are equal at all positions.
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gpt2", "qkv"),
        ("gpt_bigcode", "qkv"),
        ("opt", "qkv"),
        ("bert", "qkv"),
        ("bart", "qkv"),
        ("t5", "qkv"),
        ("vit", "qkv"),
        ("nemotron_h", "qkv"),
        ("gpt_neox", "v"),
        ("phi3", "v"),
        ("llama", "v"),
        ("gemma2", "v"),
        ("nomic_bert", "v"),
        ("modernbert", "v"),
        ("qwen3", "v"),
        ("zamba", "qkv"),
    ],
)
def test_weights_make_q_k_v_and_result(name: str, kinds: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    inputs = architecture.inputs(model)
    lens = Lens(model, example=None if "input_ids" in inputs else inputs)
    calls = record(model, lens.anatomy, inputs).calls
    trace = lens.run(inputs, keep=("z", "result"))
    for site in lens.anatomy.sites:
        if site.kind == "cross":
            continue
        weights, call = lens.weights(site.name), calls[site.name]
        assert weights.query.shape == (site.heads, weights.query.shape[1], site.d_qk)
        assert weights.key.shape[0] == weights.value.shape[0] == site.groups
        hidden = attention_input(model, site.module, inputs, site.call)
        for kind, weight in zip("qkv", (weights.query, weights.key, weights.value), strict=True):
            if kind in kinds:
                received = {"q": call.query, "k": call.key, "v": call.value}[kind]
                found = made(weight.detach(), hidden)
                torch.testing.assert_close(centred(found), centred(received), atol=1e-4, rtol=1e-3)
        result = torch.einsum("bhtv,hvd->bhtd", trace.z[site.name], weights.output.detach())
        torch.testing.assert_close(result, trace.result[site.name], atol=1e-5, rtol=1e-4)


def attention_input(model: nn.Module, module: str, inputs: Any, call: int) -> Tensor:
    """The stream that an attention module is given."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found[call]


@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "llama", "gemma2"])
def test_weights_make_scores_where_rotation_turns_nothing(name: str) -> None:
    """At position 0 the rotary embedding is the identity."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    lens = Lens(model)
    ids = torch.arange(20, 44)[:, None]
    inputs = {"input_ids": ids}
    call = record(model, lens.anatomy, inputs).calls["L1"]
    weights = lens.weights("L1")
    hidden = attention_input(model, lens.anatomy["L1"].module, inputs, 0)
    torch.testing.assert_close(
        centred(made(weights.query.detach(), hidden)), centred(call.query), atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(
        centred(made(weights.key.detach(), hidden)), centred(call.key), atol=1e-4, rtol=1e-3
    )


def test_weights_of_the_layout_by_hand() -> None:
    """GPT-2's fused map holds q, k, v side by side; GPT-NeoX's interleaves them head by head."""
    gpt2: Any = ARCHITECTURES["gpt2"].build()
    weights = Lens(gpt2).weights("L1")
    fused = gpt2.transformer.h[1].attn.c_attn.weight
    assert torch.equal(weights.query[2], fused[:, 16:24])
    assert torch.equal(weights.key[2], fused[:, 32 + 16 : 32 + 24])
    assert torch.equal(weights.value[2], fused[:, 64 + 16 : 64 + 24])
    assert torch.equal(weights.output[2], gpt2.transformer.h[1].attn.c_proj.weight[16:24])

    neox: Any = ARCHITECTURES["gpt_neox"].build()
    weights = Lens(neox).weights("L0")
    fused = neox.gpt_neox.layers[0].attention.query_key_value.weight.T
    assert torch.equal(weights.query[1], fused[:, 24:32])
    assert torch.equal(weights.value[1], fused[:, 40:48])

    bart: Any = ARCHITECTURES["bart"].build()
    layer = bart.model.encoder.layers[0].self_attn
    weights = Lens(bart).weights("enc.L0")
    torch.testing.assert_close(weights.key[1], layer.k_proj.weight[8:16].T)
    torch.testing.assert_close(weights.output[1], layer.out_proj.weight[:, 8:16].T)


def test_latent_attention_has_no_weights_per_head() -> None:
    weights = Lens(ARCHITECTURES["deepseek_v3"].build()).weights("L0")
    with pytest.raises(UnsupportedModelError, match="The key of L0 comes from no single linear"):
        _ = weights.key


def test_weights_of_silent_heads_are_told_apart() -> None:
    model: Any = induction_model()
    layer, weights = model.transformer.h[0].attn.c_attn.weight, Lens(model).weights("L0")
    for head in range(4):
        own = slice(32 * head, 32 * head + 32)
        assert torch.equal(weights.query[head], layer[:, :128][:, own])
        assert torch.equal(weights.value[head], layer[:, 256:][:, own])
