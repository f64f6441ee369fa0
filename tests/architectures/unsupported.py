"""Models whose attention, or a part of it, does not go through the attention interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .base import PAD, VOCAB, Architecture, Inputs, builder, text_inputs
from .encoders import BERT_SIZES
from .multimodal import TEXT_TOWER, TOWER, images
from .vision import VIT_SIZES, mae_image

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def _captioned(model: PreTrainedModel) -> Inputs:
    return text_inputs()(model) | images(model)


# None of the attention is on the interface.
UNSUPPORTED: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": builder(
        "BloomForCausalLM", "BloomConfig", _ENDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    ),
    "falcon": builder(
        "FalconForCausalLM",
        "FalconConfig",
        _ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gptj": builder(
        "GPTJForCausalLM",
        "GPTJConfig",
        _ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    ),
    "gpt_neo": builder(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        _ENDS
        | {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 64,
        },
    ),
    "mpt": builder(
        "MptForCausalLM",
        "MptConfig",
        _ENDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    ),
    "deberta_v2": builder(
        "DebertaV2ForMaskedLM", "DebertaV2Config", BERT_SIZES | {"relative_attention": True}
    ),
    "mpnet": builder("MPNetForMaskedLM", "MPNetConfig", BERT_SIZES),
}

# A part of the attention is on the interface and a part is not, or is not reached by the switch.
PARTIAL: dict[str, Architecture] = {
    "git": Architecture(
        name="git",
        kind="vision-language",
        build=builder(
            "GitForCausalLM",
            "GitConfig",
            TEXT_TOWER | {"vision_config": TOWER | {"num_hidden_layers": 1}},
        ),
        inputs=_captioned,
        padded=None,
        float64=True,
        notes="the image tower is on the interface, the text stack is not",
    ),
    "vit_mae": Architecture(
        name="vit_mae",
        kind="vision",
        build=builder(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            VIT_SIZES
            | {
                "decoder_num_attention_heads": 2,
                "decoder_hidden_size": 16,
                "decoder_num_hidden_layers": 2,
                "decoder_intermediate_size": 32,
                "mask_ratio": 0.25,
            },
        ),
        inputs=mae_image,
        padded=None,
        float64=True,
        notes="the decoder reads a copy of the config, which set_attn_implementation leaves alone",
    ),
}
