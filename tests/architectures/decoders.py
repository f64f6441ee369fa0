"""Text decoders without experts or state spaces."""

from __future__ import annotations

from typing import Any

from .base import PAD, VOCAB, Architecture, text

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 48,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": PAD,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
SLIDING = ["sliding_attention", "full_attention"]


def partial_rotary(factor: float) -> dict[str, Any]:
    """Rotary parameters that turn only a part of each head's width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}


def decoder(
    name: str,
    stem: str,
    notes: str = "",
    *,
    config: str | None = None,
    sharpness: float = 1.5,
    **settings: Any,
) -> Architecture:
    """A decoder whose classes are ``{stem}ForCausalLM`` and, by default, ``{stem}Config``.

    A setting of ``...`` takes the common setting of that name away.
    """
    sizes = SIZES if "n_embd" not in settings else {}
    dropped = {key for key, value in settings.items() if value is ...}
    merged = {key: value for key, value in (sizes | settings).items() if key not in dropped}
    return text(
        name,
        "decoder",
        f"{stem}ForCausalLM",
        config or f"{stem}Config",
        merged,
        sharpness=sharpness,
        notes=notes,
    )


DECODERS = [
    text(
        "gpt2",
        "decoder",
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2_SIZES | {"scale_attn_by_inverse_layer_idx": True},
        sharpness=2.5,
        notes="fused Conv1D map, scores divided by the layer number, tied embeddings",
    ),
    decoder("gpt_bigcode", "GPTBigCode", "one key head for all (multi-query)", **GPT2_SIZES),
    decoder(
        "opt",
        "OPT",
        "learned positions, biases",
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_key_value_heads=...,
        intermediate_size=...,
    ),
    decoder("biogpt", "BioGpt", "scaled embedding", num_key_value_heads=..., attention_dropout=...),
    decoder(
        "gpt_neox",
        "GPTNeoX",
        "fused map, partial rotary, parallel residual",
        num_key_value_heads=...,
        rope_parameters=partial_rotary(0.5),
    ),
    decoder("llama", "Llama", "grouped keys"),
    decoder("mistral", "Mistral", "window of 5 in every layer", sliding_window=5),
    decoder(
        "ministral",
        "Ministral",
        "window in one layer of two, head width of its own",
        sliding_window=5,
        layer_types=SLIDING,
        head_dim=12,
    ),
    decoder(
        "qwen2",
        "Qwen2",
        "biases of q, k, v; window in one layer of two",
        use_sliding_window=True,
        sliding_window=6,
        layer_types=SLIDING,
    ),
    decoder("qwen3", "Qwen3", "normed queries and keys, head width of its own", head_dim=12),
    decoder(
        "gemma", "Gemma", "one key head, head width of its own", head_dim=16, num_key_value_heads=1
    ),
    decoder(
        "gemma2",
        "Gemma2",
        "soft cap of 3, window in one layer of two, head width and scaling of its own",
        sharpness=2.0,
        head_dim=12,
        attn_logit_softcapping=3.0,
        query_pre_attn_scalar=10,
        sliding_window=5,
        layer_types=SLIDING,
    ),
    decoder(
        "gemma3_text",
        "Gemma3",
        config="Gemma3TextConfig",
        sharpness=2.0,
        notes="normed queries and keys, window in one layer of two, two rotary bases",
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=5,
        layer_types=SLIDING,
    ),
    decoder(
        "phi",
        "Phi",
        "partial rotary, biases, normed queries and keys",
        qk_layernorm=True,
        rope_parameters=partial_rotary(0.5),
    ),
    decoder("phi3", "Phi3", "fused map, window of 6", sliding_window=6),
    decoder("olmo", "Olmo", "clipped q, k, v", clip_qkv=2.0),
    decoder("olmo2", "Olmo2", "norm over all heads' queries"),
    decoder("olmo3", "Olmo3", "window in one layer of two", sliding_window=5, layer_types=SLIDING),
    decoder(
        "stablelm",
        "StableLm",
        "partial rotary, norm per head",
        qk_layernorm=True,
        use_qkv_bias=True,
        rope_parameters=partial_rotary(0.5),
    ),
    decoder("cohere", "Cohere", "norm per head, parallel residual", use_qk_norm=True),
    decoder(
        "cohere2",
        "Cohere2",
        "window with rotary, full attention without",
        sliding_window=5,
        layer_types=SLIDING,
    ),
    decoder("granite", "Granite", "scaling of its own", attention_multiplier=0.5),
    decoder("starcoder2", "Starcoder2", "window of 6, biases", sliding_window=6),
    decoder(
        "smollm3",
        "SmolLM3",
        "one layer without rotary, window in one layer of two",
        no_rope_layers=[1, 0],
        use_sliding_window=True,
        sliding_window=6,
        layer_types=SLIDING,
    ),
    decoder("helium", "Helium", "head width of its own", head_dim=8),
    decoder(
        "glm",
        "Glm",
        "partial rotary, interleaved",
        head_dim=8,
        attention_bias=True,
        rope_parameters=partial_rotary(0.5),
    ),
    decoder(
        "glm4", "Glm4", "norms after each sublayer", head_dim=8, rope_parameters=partial_rotary(0.5)
    ),
    decoder("nemotron", "Nemotron", "partial rotary", rope_parameters=partial_rotary(0.5)),
    decoder(
        "persimmon",
        "Persimmon",
        "fused map, norm per head",
        num_key_value_heads=...,
        rope_parameters=partial_rotary(0.5),
    ),
    decoder(
        "exaone4",
        "Exaone4",
        "window with rotary, full attention without, normed queries",
        sliding_window=5,
        layer_types=SLIDING,
        sliding_window_pattern=2,
    ),
    decoder("ernie4_5", "Ernie4_5", "interleaved rotary"),
    decoder("hunyuan_v1_dense", "HunYuanDenseV1", "norm after rotary", head_dim=8),
    decoder("seed_oss", "SeedOss", "biases of q, k, v; head width of its own", head_dim=12),
    decoder("arcee", "Arcee", "squared relu"),
    decoder("apertus", "Apertus", "normed queries and keys"),
    decoder("bitnet", "BitNet", "the function's output is normed before the output projection"),
    decoder("minicpm3", "MiniCPM3", "latent keys and values, d_v != d_qk", **LATENT),
    decoder(
        "modernbert_decoder",
        "ModernBertDecoder",
        "window in one layer of two; its eager path needs a mask",
        num_key_value_heads=...,
        local_attention=8,
        layer_types=SLIDING,
    ),
    decoder(
        "diffllama",
        "DiffLlama",
        "each module calls twice a forward and subtracts",
        attention_dropout=0.0,
    ),
]
