"""Models that read images and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .base import (
    BATCH,
    PAD,
    VOCAB,
    Architecture,
    Inputs,
    builder,
    noise,
    padding_mask,
    text_inputs,
    text_padded,
    token_ids,
)
from .decoders import SIZES, partial_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE = 16
IMAGE = 90  # the token that stands for a piece of an image
LENGTH = 20
TEXT: dict[str, Any] = SIZES
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 4,
    "num_channels": 3,
}
TEXT_TOWER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def images(model: PreTrainedModel) -> Inputs:
    """A batch of square images."""
    return {"pixel_values": noise(model, 21, BATCH, 3, SIDE, SIDE)}


def _with_image(pieces: int, mask: torch.Tensor | None, wrap: tuple[int, int] | None) -> Inputs:
    """Ids that hold ``pieces`` image tokens in each row, between the two tokens of ``wrap``."""
    ids = token_ids(22, LENGTH, vocab=IMAGE - 2)
    found: Inputs = {}
    if mask is not None:
        ids = ids.masked_fill(mask == 0, PAD)
        found["attention_mask"] = mask
    for row in range(BATCH):
        start = 4 if mask is None else int(mask[row].nonzero()[0]) + 2
        ids[row, start : start + pieces] = IMAGE
        if wrap is not None:
            ids[row, start - 1], ids[row, start + pieces] = wrap
    return found | {"input_ids": ids}


def _mark_images(found: Inputs) -> Inputs:
    return found | {"mm_token_type_ids": (found["input_ids"] == IMAGE).long()}


def _mark_blocks(found: Inputs) -> Inputs:
    return found | {"token_type_ids": (found["input_ids"] == IMAGE).long()}


def _mark_suffix(found: Inputs) -> Inputs:
    suffix = torch.arange(LENGTH) >= LENGTH - 6
    return found | {"token_type_ids": suffix.long().expand(BATCH, -1).contiguous()}


def _reader(
    name: str,
    stem: str,
    pieces: int,
    settings: Callable[[], dict[str, Any]],
    notes: str,
    *,
    pixels: Callable[[PreTrainedModel], Inputs] = images,
    finish: Callable[[Inputs], Inputs] = lambda found: found,
    wrap: tuple[int, int] | None = None,
) -> Architecture:
    """A decoder that reads ``pieces`` image positions among its tokens."""

    def inputs(model: PreTrainedModel) -> Inputs:
        return finish(_with_image(pieces, None, wrap)) | pixels(model)

    def padded(model: PreTrainedModel, side: str) -> Inputs:
        mask = padding_mask(side, LENGTH, short=pieces + 6)
        return finish(_with_image(pieces, mask, wrap)) | pixels(model)

    return Architecture(
        name=name,
        kind="vision-language",
        build=builder(f"{stem}ForConditionalGeneration", f"{stem}Config", settings, seed=pieces),
        inputs=inputs,
        padded=padded,
        float64=True,
        notes=notes,
    )


def _llava() -> dict[str, Any]:
    import transformers

    return {
        "vision_config": transformers.CLIPVisionConfig(**(TOWER | {"patch_size": 8})),
        "text_config": transformers.LlamaConfig(**TEXT),
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    }


def _paligemma() -> dict[str, Any]:
    import transformers

    return {
        "vision_config": transformers.SiglipVisionConfig(
            **(TOWER | {"patch_size": 8, "vision_use_head": False})
        ),
        "text_config": transformers.GemmaConfig(**(TEXT | {"head_dim": 8})),
        "image_token_index": IMAGE,
        "projection_dim": 32,
    }


def _gemma3() -> dict[str, Any]:
    import transformers

    return {
        "vision_config": transformers.SiglipVisionConfig(**(TOWER | {"vision_use_head": False})),
        "text_config": transformers.Gemma3TextConfig(
            **TEXT,
            head_dim=12,
            query_pre_attn_scalar=10,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": IMAGE + 1,
        "eoi_token_index": IMAGE + 2,
    }


def _idefics3() -> dict[str, Any]:
    import transformers

    return {
        "vision_config": transformers.Idefics3VisionConfig(**TOWER),
        "text_config": transformers.LlamaConfig(**TEXT),
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": PAD,
    }


def _smolvlm() -> dict[str, Any]:
    import transformers

    return _idefics3() | {"vision_config": transformers.SmolVLMVisionConfig(**TOWER)}


def _internvl() -> dict[str, Any]:
    import transformers

    return {
        "vision_config": transformers.InternVLVisionConfig(
            **(TOWER | {"image_size": [SIDE, SIDE], "patch_size": [4, 4]}), use_qk_norm=True
        ),
        "text_config": transformers.Qwen2Config(**TEXT),
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    }


QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _qwen2_vl() -> dict[str, Any]:
    return QWEN_IDS | {
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        "text_config": TEXT | {"rope_parameters": QWEN_ROPE},
    }


def _qwen2_5_vl() -> dict[str, Any]:
    return QWEN_IDS | {
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "window_size": 8,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        "text_config": TEXT | {"rope_parameters": QWEN_ROPE},
    }


def _qwen3_vl() -> dict[str, Any]:
    return QWEN_IDS | {
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "text_config": TEXT | {"head_dim": 8, "rope_parameters": QWEN_ROPE},
    }


def _qwen_images(model: PreTrainedModel) -> Inputs:
    """Two images of 4 by 4 patches, which merge to 4 positions each."""
    return {
        "pixel_values": noise(model, 23, 2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def _tiled(model: PreTrainedModel) -> Inputs:
    return {"pixel_values": images(model)["pixel_values"][:, None]}


def _pair(name: str, stem: str, notes: str, sharpness: float = 1.5) -> Architecture:
    """Two towers, an image's and a text's."""

    def inputs(model: PreTrainedModel) -> Inputs:
        return text_inputs()(model) | images(model)

    def padded(model: PreTrainedModel, side: str) -> Inputs:
        return text_padded()(model, side) | images(model)

    return Architecture(
        name=name,
        kind="vision-language",
        build=builder(
            f"{stem}Model",
            f"{stem}Config",
            lambda: {
                "text_config": TEXT_TOWER,
                "vision_config": TOWER,
                "projection_dim": 24,
            },
            seed=len(name),
            sharpness=sharpness,
        ),
        inputs=inputs,
        padded=padded,
        float64=True,
        notes=notes,
    )


def _mllama() -> dict[str, Any]:
    return {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 8,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        "text_config": {key: value for key, value in TEXT.items() if key != "attention_dropout"}
        | {
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": partial_rotary(1.0),
        },
        "image_token_index": IMAGE,
    }


def _mllama_images(model: PreTrainedModel) -> Inputs:
    tiles = noise(model, 24, BATCH, 1, 2, 3, SIDE, SIDE)
    seen = torch.ones(BATCH, LENGTH, 1, 2, dtype=torch.long)
    seen[:, :3] = 0
    seen[1, :, :, 1] = 0
    return {
        "pixel_values": tiles,
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
        "cross_attention_mask": seen,
    }


MULTIMODAL = [
    _pair("clip", "CLIP", "a causal text tower and an image tower"),
    _pair("siglip", "Siglip", "two towers without causality"),
    _reader("llava", "Llava", 4, _llava, "CLIP tower and Llama"),
    _reader(
        "paligemma",
        "PaliGemma",
        4,
        _paligemma,
        "SigLIP tower and Gemma, whose prefix sees all of itself",
        finish=_mark_suffix,
    ),
    _reader(
        "gemma3",
        "Gemma3",
        4,
        _gemma3,
        "SigLIP tower and Gemma 3; image positions see one another",
        finish=_mark_blocks,
    ),
    _reader("idefics3", "Idefics3", 4, _idefics3, "SigLIP-like tower and Llama", pixels=_tiled),
    _reader("smolvlm", "SmolVLM", 4, _smolvlm, "SigLIP-like tower and Llama", pixels=_tiled),
    _reader("internvl", "InternVL", 4, _internvl, "tower with normed queries, and Qwen2"),
    _reader(
        "qwen2_vl",
        "Qwen2VL",
        4,
        _qwen2_vl,
        "the tower calls once for each image; rotary in three parts",
        pixels=_qwen_images,
        finish=_mark_images,
        wrap=(IMAGE + 2, IMAGE + 3),
    ),
    _reader(
        "qwen2_5_vl",
        "Qwen2_5_VL",
        4,
        _qwen2_5_vl,
        "the tower calls once for each window or image",
        pixels=_qwen_images,
        finish=_mark_images,
        wrap=(IMAGE + 2, IMAGE + 3),
    ),
    _reader(
        "qwen3_vl",
        "Qwen3VL",
        4,
        _qwen3_vl,
        "the tower calls once for each image",
        pixels=_qwen_images,
        finish=_mark_images,
        wrap=(IMAGE + 2, IMAGE + 3),
    ),
    _reader(
        "mllama",
        "Mllama",
        1,
        _mllama,
        "cross-attention to tiles of an image, with normed queries",
        pixels=_mllama_images,
    ),
]
