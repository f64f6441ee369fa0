"""Encoder-decoder models that read token ids or a spectrogram."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .base import (
    BATCH,
    PAD,
    POSITIONS,
    VOCAB,
    Architecture,
    Inputs,
    builder,
    noise,
    padding_mask,
    token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOURCE = POSITIONS
TARGET = 12
T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": PAD,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}
BART_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 3,
}


def _inputs(model: PreTrainedModel) -> Inputs:
    return {"input_ids": token_ids(1, SOURCE), "decoder_input_ids": token_ids(2, TARGET)}


def _padded(model: PreTrainedModel, side: str) -> Inputs:
    source = padding_mask(side, SOURCE)
    target = padding_mask(side, TARGET, short=7)
    return {
        "input_ids": token_ids(3, SOURCE).masked_fill(source == 0, PAD),
        "attention_mask": source,
        "decoder_input_ids": token_ids(4, TARGET).masked_fill(target == 0, PAD),
        "decoder_attention_mask": target,
    }


def translator(
    name: str,
    stem: str,
    notes: str = "",
    *,
    sizes: dict[str, Any] | Callable[[], dict[str, Any]],
    sharpness: float = 1.5,
    float64: bool = True,
) -> Architecture:
    """An encoder-decoder that reads token ids, of the classes that ``stem`` begins."""
    head = "MTModel" if stem == "Marian" else "ForConditionalGeneration"
    return Architecture(
        name=name,
        kind="encoder-decoder",
        build=builder(f"{stem}{head}", f"{stem}Config", sizes, seed=len(name), sharpness=sharpness),
        inputs=_inputs,
        padded=_padded,
        float64=float64,
        notes=notes,
    )


def _t5gemma() -> dict[str, Any]:
    import transformers

    def half(decoder: bool) -> Any:
        return transformers.T5GemmaModuleConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=10,
            attn_logit_softcapping=5.0,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            pad_token_id=PAD,
            is_decoder=decoder,
        )

    return {"encoder": half(False), "decoder": half(True), "vocab_size": VOCAB}


def _spectrogram(model: PreTrainedModel) -> Inputs:
    return {
        "input_features": noise(model, 5, BATCH, 8, 2 * SOURCE),
        "decoder_input_ids": token_ids(2, TARGET),
    }


def _speech_features(model: PreTrainedModel) -> Inputs:
    return {
        "input_features": noise(model, 5, BATCH, 2 * SOURCE, 8),
        "decoder_input_ids": token_ids(2, TARGET),
    }


def _speech_padded(model: PreTrainedModel, side: str) -> Inputs:
    target = padding_mask(side, TARGET, short=7)
    return _speech_features(model) | {
        "attention_mask": padding_mask("right", 2 * SOURCE, short=18),
        "decoder_input_ids": token_ids(4, TARGET).masked_fill(target == 0, PAD),
        "decoder_attention_mask": target,
    }


def _waveform(model: PreTrainedModel) -> Inputs:
    return {
        "input_values": noise(model, 6, BATCH, 64 * 6 * 15),
        "decoder_input_ids": token_ids(2, TARGET),
    }


ENCODER_DECODERS = [
    translator(
        "t5",
        "T5",
        "relative position bias from the first layer, no scaling",
        sizes=T5_SIZES,
        sharpness=1.0,
    ),
    translator("mt5", "MT5", "T5 with a gated feed-forward", sizes=T5_SIZES, sharpness=1.0),
    translator(
        "umt5",
        "UMT5",
        "a relative position bias of its own in each layer",
        sizes=T5_SIZES,
        sharpness=1.0,
    ),
    translator(
        "switch_transformers",
        "SwitchTransformers",
        "T5 with experts",
        sizes=T5_SIZES | {"num_experts": 2, "expert_capacity": 64},
        sharpness=1.0,
    ),
    translator(
        "t5gemma", "T5Gemma", "soft cap and windows in both stacks", sizes=_t5gemma, sharpness=2.5
    ),
    translator(
        "bart", "Bart", "tied embeddings, another number of heads in each stack", sizes=BART_SIZES
    ),
    translator("mbart", "MBart", sizes=BART_SIZES),
    translator("pegasus", "Pegasus", "sinusoidal positions", sizes=BART_SIZES),
    translator("marian", "Marian", "sinusoidal positions", sizes=BART_SIZES),
    translator("m2m_100", "M2M100", "sinusoidal positions", sizes=BART_SIZES),
    translator("plbart", "PLBart", sizes=BART_SIZES),
    translator("blenderbot", "Blenderbot", "norms before", sizes=BART_SIZES),
    translator("blenderbot_small", "BlenderbotSmall", sizes=BART_SIZES),
    Architecture(
        name="whisper",
        kind="encoder-decoder",
        build=builder(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            BART_SIZES
            | {
                "num_mel_bins": 8,
                "max_source_positions": SOURCE,
                "max_target_positions": 32,
                "attention_dropout": 0.1,
            },
            seed=7,
        ),
        inputs=_spectrogram,
        padded=None,
        float64=True,
        notes="reads a spectrogram of fixed length, so there is no padding",
    ),
    Architecture(
        name="speech_to_text",
        kind="encoder-decoder",
        build=builder(
            "Speech2TextForConditionalGeneration",
            "Speech2TextConfig",
            BART_SIZES
            | {
                "input_feat_per_channel": 8,
                "max_source_positions": 64,
                "max_target_positions": 32,
                "num_conv_layers": 1,
                "conv_kernel_sizes": [3],
                "conv_channels": 16,
            },
            seed=8,
        ),
        inputs=_speech_features,
        padded=_speech_padded,
        float64=True,
        notes="reads a spectrogram, padded on the right whatever the side; sdpa is not offered",
    ),
    Architecture(
        name="moonshine",
        kind="encoder-decoder",
        build=builder(
            "MoonshineForConditionalGeneration",
            "MoonshineConfig",
            {
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 48,
                "encoder_num_hidden_layers": 2,
                "decoder_num_hidden_layers": 2,
                "encoder_num_attention_heads": 4,
                "decoder_num_attention_heads": 4,
                "pad_head_dim_to_multiple_of": 12,
                "max_position_embeddings": 64,
                "pad_token_id": PAD,
                "bos_token_id": 2,
                "eos_token_id": 3,
                "decoder_start_token_id": 2,
            },
            seed=9,
            sharpness=2.0,
        ),
        inputs=_waveform,
        padded=None,
        float64=True,
        notes="pads each head's width with zeros for the function and cuts its output again",
    ),
]
