"""Text decoders with experts, latent keys and values, or learned sinks."""

from __future__ import annotations

from typing import Any

from .decoders import LATENT, SLIDING, decoder, partial_rotary

TWO_OF_FOUR: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
GROUPED: dict[str, Any] = {"n_group": 2, "topk_group": 2}

EXPERTS = [
    decoder("mixtral", "Mixtral", "window of 6", sliding_window=6, **TWO_OF_FOUR),
    decoder(
        "qwen2_moe",
        "Qwen2Moe",
        "shared expert",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    decoder(
        "qwen3_moe",
        "Qwen3Moe",
        "normed queries and keys",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        head_dim=12,
    ),
    decoder("olmoe", "Olmoe", "normed queries and keys", num_experts=4, num_experts_per_tok=2),
    decoder(
        "granitemoe", "GraniteMoe", "scaling of its own", attention_multiplier=0.5, **TWO_OF_FOUR
    ),
    decoder(
        "phimoe",
        "Phimoe",
        "biases, window of 6",
        sliding_window=6,
        attention_bias=True,
        **TWO_OF_FOUR,
    ),
    decoder(
        "deepseek_v2",
        "DeepseekV2",
        "latent keys and values, d_v != d_qk",
        **(LATENT | ROUTED),
    ),
    decoder(
        "deepseek_v3",
        "DeepseekV3",
        "latent keys and values, d_v != d_qk",
        **(LATENT | ROUTED | GROUPED),
    ),
    decoder("dots1", "Dots1", "normed queries and keys", head_dim=8, **(ROUTED | GROUPED)),
    decoder("minimax_m2", "MiniMaxM2", "norm over all heads' queries", head_dim=12, **TWO_OF_FOUR),
    decoder(
        "glm4_moe",
        "Glm4Moe",
        "partial rotary, normed queries and keys",
        head_dim=8,
        use_qk_norm=True,
        rope_parameters=partial_rotary(0.5),
        **(ROUTED | GROUPED),
    ),
    decoder(
        "gpt_oss",
        "GptOss",
        "a learned sink per head: rows sum to less than 1; window in one layer of two",
        head_dim=12,
        sliding_window=5,
        layer_types=SLIDING,
        **TWO_OF_FOUR,
    ),
    decoder(
        "mimo_v2_flash",
        "MiMoV2Flash",
        "a learned sink in windowed layers alone, d_v != d_qk",
        head_dim=12,
        v_head_dim=8,
        sliding_window=5,
        layer_types=SLIDING,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters={
            kind: partial_rotary(0.5) for kind in ("full_attention", "sliding_attention")
        },
        **(TWO_OF_FOUR | {"n_routed_experts": 4, "moe_intermediate_size": 24}),
    ),
    decoder(
        "granite_swa",
        "GraniteSWA",
        "a learned sink that scales the output: the weights returned leave it out",
        attention_multiplier=0.5,
        sliding_window=5,
        layer_types=SLIDING,
    ),
    decoder(
        "llama4_text",
        "Llama4",
        "chunks of 6 with rotary, full attention without; softmax in the model's dtype",
        config="Llama4TextConfig",
        head_dim=8,
        attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        intermediate_size_mlp=48,
        floor_scale=4,
        **(TWO_OF_FOUR | {"num_experts_per_tok": 1}),
    ),
    decoder(
        "vaultgemma",
        "VaultGemma",
        "soft cap of 3",
        head_dim=12,
        attn_logit_softcapping=3.0,
        query_pre_attn_scalar=10,
        sliding_window=5,
        layer_types=SLIDING,
    ),
    decoder(
        "longcat_flash",
        "LongcatFlash",
        "two attention modules a layer, latent keys and values",
        num_layers=2,
        head_dim=4,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        num_hidden_layers=...,
        **LATENT,
    ),
]
