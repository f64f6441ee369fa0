"""Decoders that mix attention with state spaces, convolutions or linear attention."""

from __future__ import annotations

from typing import Any

from .base import Architecture, text
from .decoders import SIZES, partial_rotary

MAMBA_1: dict[str, Any] = {
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
MAMBA_2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def hybrid(
    name: str, stem: str, notes: str, *, sharpness: float = 1.5, **settings: Any
) -> Architecture:
    """A hybrid decoder whose classes are ``{stem}ForCausalLM`` and ``{stem}Config``."""
    merged = SIZES | settings
    return text(
        name,
        "hybrid",
        f"{stem}ForCausalLM",
        f"{stem}Config",
        {key: value for key, value in merged.items() if value is not ...},
        sharpness=sharpness,
        notes=notes,
    )


HYBRIDS = [
    hybrid(
        "jamba",
        "Jamba",
        "attention in layers 1 and 3 of 4, experts",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        **MAMBA_1,
    ),
    hybrid(
        "zamba",
        "Zamba",
        "one attention module for all attention layers, of twice the width",
        num_hidden_layers=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=2,
        **MAMBA_1,
    ),
    hybrid(
        "zamba2",
        "Zamba2",
        "one attention module for all attention layers, with adapters and rotary",
        num_hidden_layers=4,
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8,
        mamba_headdim=16,
        n_mamba_heads=4,
        chunk_size=8,
        num_mem_blocks=1,
        use_shared_attention_adapter=True,
        adapter_rank=4,
        use_mem_rope=True,
        use_mamba_kernels=False,
    ),
    hybrid(
        "qwen3_next",
        "Qwen3Next",
        "the function's output is gated before the output projection",
        sharpness=2.5,
        head_dim=12,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters=partial_rotary(0.5),
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        **LINEAR,
    ),
    hybrid(
        "bamba",
        "Bamba",
        "attention in layer 1 of 3",
        num_hidden_layers=3,
        attn_layer_indices=[1],
        rope_parameters=partial_rotary(0.5),
        **MAMBA_2,
    ),
    hybrid(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        "attention in layer 1 of 3, scaling of its own",
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        attention_multiplier=0.5,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=48,
        **MAMBA_2,
    ),
    hybrid(
        "falcon_h1",
        "FalconH1",
        "attention beside a state space in each layer",
        mamba_d_ssm=64,
        key_multiplier=0.7,
        **MAMBA_2,
    ),
    hybrid(
        "lfm2", "Lfm2", "short convolutions and attention", layer_types=["conv", "full_attention"]
    ),
    hybrid(
        "minimax",
        "MiniMax",
        "linear attention and attention",
        layer_types=["linear_attention", "full_attention"],
        block_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        head_dim=8,
    ),
    hybrid(
        "recurrent_gemma",
        "RecurrentGemma",
        "window of 6",
        block_types=["recurrent", "attention"],
        lru_width=32,
        attention_window_size=6,
        head_dim=8,
        rope_parameters=partial_rotary(0.5),
    ),
    hybrid(
        "nemotron_h",
        "NemotronH",
        "attention in one block of three, no rotary",
        num_hidden_layers=...,
        layers_block_type=["mamba", "attention", "mlp"],
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=8,
        use_mamba_kernels=False,
    ),
    hybrid(
        "olmo_hybrid",
        "OlmoHybrid",
        "linear attention and attention",
        layer_types=["linear_attention", "full_attention"],
        **LINEAR,
    ),
]
