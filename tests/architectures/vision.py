"""Vision transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import BATCH, Architecture, Inputs, builder, noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE = 16
VIT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 4,
    "num_channels": 3,
    "attention_probs_dropout_prob": 0.1,
}


def _image(model: PreTrainedModel) -> Inputs:
    return {"pixel_values": noise(model, 11, BATCH, 3, SIDE, SIDE)}


def _large_image(model: PreTrainedModel) -> Inputs:
    return {"pixel_values": noise(model, 11, BATCH, 3, 2 * SIDE, 2 * SIDE)}


def vision(
    name: str,
    model_class: str,
    config_class: str,
    notes: str = "",
    *,
    inputs: Any = _image,
    float64: bool = True,
    sharpness: float = 1.5,
    common: dict[str, Any] = VIT_SIZES,
    **settings: Any,
) -> Architecture:
    """A model that reads square images of 16 or 32 pixels."""
    return Architecture(
        name=name,
        kind="vision",
        build=builder(
            model_class, config_class, common | settings, seed=len(name), sharpness=sharpness
        ),
        inputs=inputs,
        padded=None,
        float64=float64,
        notes=notes,
    )


def mae_image(model: PreTrainedModel) -> Inputs:
    """An image and the noise that orders its patches."""
    return _image(model) | {"noise": noise(model, 12, BATCH, 16)}


VISION = [
    vision("vit", "ViTModel", "ViTConfig", "class token, 17 positions"),
    vision("deit", "DeiTModel", "DeiTConfig", "class and distillation tokens"),
    vision(
        "vit_mae",
        "ViTMAEModel",
        "ViTMAEConfig",
        "the patches kept by a mask",
        inputs=mae_image,
        mask_ratio=0.25,
    ),
    vision("ijepa", "IJepaModel", "IJepaConfig", "no class token"),
    vision(
        "yolos",
        "YolosModel",
        "YolosConfig",
        "detection tokens",
        image_size=[SIDE, SIDE],
        num_detection_tokens=4,
    ),
    vision(
        "beit",
        "BeitModel",
        "BeitConfig",
        "relative position bias",
        use_relative_position_bias=True,
        layer_scale_init_value=0.5,
    ),
    vision("dinov2", "Dinov2Model", "Dinov2Config", "softmax not upcast"),
    vision(
        "dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        "register tokens",
        num_register_tokens=2,
    ),
    vision(
        "dinov3_vit",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        "rotary over the patches",
        num_register_tokens=2,
    ),
    vision(
        "swin",
        "SwinModel",
        "SwinConfig",
        "windows of 4 by 4 in the batch, shifted in one layer of two; the bias is the mask",
        inputs=_large_image,
        common={},
        image_size=2 * SIDE,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    vision("clip_vision", "CLIPVisionModel", "CLIPVisionConfig"),
    vision(
        "siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", "no class token, a pooling head"
    ),
    vision(
        "segformer",
        "SegformerModel",
        "SegformerConfig",
        "keys on a coarser grid than queries",
        inputs=_large_image,
        common={},
        depths=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
]
