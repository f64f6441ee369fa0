"""Models that read sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .base import BATCH, Architecture, Inputs, builder, noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 4 * 2 * 2 * 16
WAVE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_stride": [4, 2, 2],
    "conv_kernel": [4, 2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
    "feat_extract_norm": "layer",
    "attention_dropout": 0.1,
}


def _wave(model: PreTrainedModel) -> Inputs:
    return {"input_values": noise(model, 31, BATCH, SAMPLES)}


def _short_wave(model: PreTrainedModel, side: str) -> Inputs:
    mask = torch.ones(BATCH, SAMPLES, dtype=torch.long)
    mask[1, slice(160, None) if side == "right" else slice(0, SAMPLES - 160)] = 0
    return {"input_values": noise(model, 32, BATCH, SAMPLES) * mask, "attention_mask": mask}


def listener(name: str, stem: str, notes: str, **settings: Any) -> Architecture:
    """A speech model of wav2vec 2's shape."""
    return Architecture(
        name=name,
        kind="audio",
        build=builder(
            f"{stem}Model", f"{stem}Config", WAVE | settings, seed=len(name), sharpness=2.0
        ),
        inputs=_wave,
        padded=_short_wave,
        float64=True,
        notes=notes + "; the mask gives each row's length, so padding counts as right padding",
    )


def _patches(model: PreTrainedModel) -> Inputs:
    return {"input_values": noise(model, 33, BATCH, 16, 16)}


AUDIO = [
    listener("wav2vec2", "Wav2Vec2", "norms after"),
    listener("wav2vec2_stable", "Wav2Vec2", "norms before", do_stable_layer_norm=True),
    listener("hubert", "Hubert", "norms after"),
    listener("unispeech", "UniSpeech", "norms after"),
    listener(
        "data2vec_audio",
        "Data2VecAudio",
        "norms after",
        conv_pos_kernel_size=3,
        num_conv_pos_embedding_groups=2,
    ),
    listener(
        "wav2vec2_conformer",
        "Wav2Vec2Conformer",
        "relative position bias made of the query",
        position_embeddings_type="relative",
        conv_depthwise_kernel_size=3,
    ),
    Architecture(
        name="audio_spectrogram_transformer",
        kind="audio",
        build=builder(
            "ASTModel",
            "ASTConfig",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "patch_size": 4,
                "frequency_stride": 4,
                "time_stride": 4,
                "max_length": 16,
                "num_mel_bins": 16,
            },
            seed=3,
        ),
        inputs=_patches,
        padded=None,
        float64=True,
        notes="patches of a spectrogram",
    ),
]
