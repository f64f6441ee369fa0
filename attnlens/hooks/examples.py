"""A small input that a model of any modality can run, for the probe and the self-check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnlens.anatomy.placed import input_device
from attnlens.errors import UnsupportedModelError

LENGTH = 9
DECODER_LENGTH = 6


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    """A batch on the model's device, by the name of its main input.

    Encoder and decoder lengths differ, so that cross-attention can be told by its shape.
    """
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    device = input_device(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocab = text.vocab_size
        special = {config_id for config_id in _special_ids(text) if config_id < vocab}
        allowed = torch.tensor([i for i in range(min(vocab, 5000)) if i not in special])
        picks = torch.randint(len(allowed), (batch, length), generator=generator)
        return allowed[picks].to(device)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device, dtype)

    inputs: dict[str, Tensor] = {}
    try:
        if main == "pixel_values":
            vision = getattr(config, "vision_config", config)
            size = vision.image_size
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            inputs["pixel_values"] = noise(getattr(vision, "num_channels", 3), height, width)
        elif main == "input_features":
            inputs["input_features"] = noise(config.num_mel_bins, 2 * config.max_source_positions)
        elif main == "input_values":
            inputs["input_values"] = noise(4000)
        else:
            inputs["input_ids"] = ids(LENGTH)
            if hasattr(config, "vision_config") and getattr(model, "get_image_features", None):
                inputs.update(_contrastive_images(model, noise))
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids(DECODER_LENGTH)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"attnlens cannot make an example input for {type(model).__name__} ({error}). Give "
            "one, as the model's processor makes it: al.load(model, example={...})."
        ) from error
    return inputs


def _contrastive_images(model: nn.Module, noise: Any) -> dict[str, Tensor]:
    """Images beside the text for models that need both (CLIP, SigLIP), and for no others."""
    config: Any = model.config
    if not hasattr(config, "projection_dim") and not hasattr(model, "logit_scale"):
        return {}
    vision = config.vision_config
    return {"pixel_values": noise(vision.num_channels, vision.image_size, vision.image_size)}


def _special_ids(config: Any) -> set[int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "image_token_index")
    found: set[int] = set()
    for name in names:
        value = getattr(config, name, None)
        found.update(
            value if isinstance(value, list) else [value] if isinstance(value, int) else []
        )
    return found
