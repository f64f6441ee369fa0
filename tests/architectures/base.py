"""What an architecture of the catalogue is, and how its weights are drawn."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = (
    "decoder",
    "encoder",
    "encoder-decoder",
    "vision",
    "vision-language",
    "audio",
    "hybrid",
)

Inputs = dict[str, Tensor]

VOCAB = 96
BATCH = 2
POSITIONS = 16
SHORT = 10  # real positions of the shorter row of a padded batch
PAD = 1


@dataclass(frozen=True)
class Architecture:
    """One real transformers architecture, built small from a config, with inputs for it."""

    name: str
    kind: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[PreTrainedModel], Inputs]
    padded: Callable[[PreTrainedModel, str], Inputs] | None
    float64: bool
    notes: str = ""


# Names of the parameters that make a query or a key, so that scores can be made sharp.
_QUERY_KEY = re.compile(
    r"(^|[._])(q|k|query|key|q_proj|k_proj|q_lin|k_lin|qkv|qkv_proj|query_key_value|c_attn|Wqkv"
    r"|query_proj|key_proj|q_b_proj|k_proj_with_mqa|kv_b_proj|linear_q|linear_k|in_proj)\.weight$"
)
_QUERY_KEY_NORM = re.compile(r"(^|\.)(q|k|query|key)_(norm|layernorm)\.(.*\.)?weight$")
_STATE_SPACE = re.compile(r"(A_log|dt_bias|\.D|lru|rg_lru|recurrent|decay|slope)")


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if type(module).__name__ == "Conv1D":  # the transposed linear map of GPT-2
        return weight.shape[0]
    return math.prod(weight.shape[1:]) if weight.ndim > 1 else weight.shape[0]


def _redraw(name: str, module: nn.Module, weight: Tensor, sharpness: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.dtype)
    if _STATE_SPACE.search(name):
        return
    if _QUERY_KEY_NORM.search(name):
        weight.mul_(sharpness).add_(noise, alpha=0.2)
    elif "sink" in name:
        weight.copy_(noise).add_(1.0)
    elif weight.ndim == 1:
        weight.add_(noise, alpha=0.15)
    elif isinstance(module, nn.Embedding):
        weight.copy_(noise)
    elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or name.endswith(
        ".weight"
    ):
        gain = sharpness if _QUERY_KEY.search(name) else 1.0
        weight.copy_(noise).mul_(gain / math.sqrt(_fan_in(module, weight)))
    elif "expert" in name:
        weight.copy_(noise).div_(math.sqrt(weight.shape[-1]))
    else:  # class tokens, position tables, bias tables
        weight.add_(noise, alpha=0.5)


@torch.no_grad()
def randomise(model: nn.Module, seed: int, sharpness: float = 1.5) -> None:
    """Draw all weights anew, so that attention is far from uniform and no weight is at its init.

    Linear maps get unit gain, those of queries and keys ``sharpness`` (with normed queries and
    keys the norm's weight is scaled instead); biases and norm weights get noise about their init.
    Weights that are shared are drawn once, and the draw does not depend on the global generator.
    """
    for index, (name, weight) in enumerate(model.named_parameters()):
        owner, _, _ = name.rpartition(".")
        if weight.is_floating_point():
            _redraw(name, model.get_submodule(owner), weight, sharpness, seed + 1_000_003 * index)


def builder(
    model_class: str,
    config_class: str,
    settings: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    *,
    seed: int = 0,
    sharpness: float = 1.5,
    finish: Callable[[Any], None] | None = None,
) -> Callable[[], PreTrainedModel]:
    """Give a function that builds the named transformers model, seeded and in evaluation mode.

    ``settings`` may be a function, for configs that hold other configs; ``finish`` may change the
    model once its weights are drawn.
    """

    def build() -> PreTrainedModel:
        import transformers

        config = getattr(transformers, config_class)(
            **(settings() if callable(settings) else settings)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, model_class)(config)
        if model._can_set_experts_implementation():  # the default kernel has no float64
            model.set_experts_implementation("eager")
        randomise(model, seed, sharpness)
        if finish is not None:
            with torch.no_grad():
                finish(model)
        return model.eval()

    return build


def token_ids(seed: int, positions: int = POSITIONS, vocab: int = VOCAB, first: int = 4) -> Tensor:
    """Draw a batch of token ids ``[batch, position]`` that holds no special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, vocab, (BATCH, positions), generator=generator)


def padding_mask(side: str, positions: int = POSITIONS, short: int = SHORT) -> Tensor:
    """Mask ``[batch, position]`` whose second row holds ``short`` positions, padded on ``side``."""
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}, not 'left' or 'right'")
    mask = torch.ones(BATCH, positions, dtype=torch.long)
    mask[1, slice(short, None) if side == "right" else slice(0, positions - short)] = 0
    return mask


def noise(model: PreTrainedModel, seed: int, *shape: int) -> Tensor:
    """Draw a normal tensor in the model's dtype, an image or a sound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(model.dtype)


def text_inputs(positions: int = POSITIONS, vocab: int = VOCAB) -> Callable[..., Inputs]:
    """Inputs of a model that reads token ids."""

    def inputs(model: PreTrainedModel) -> Inputs:
        return {"input_ids": token_ids(1, positions, vocab)}

    return inputs


def text_padded(positions: int = POSITIONS, vocab: int = VOCAB) -> Callable[..., Inputs]:
    """Padded inputs of a model that reads token ids."""

    def padded(model: PreTrainedModel, side: str) -> Inputs:
        mask = padding_mask(side, positions)
        ids = token_ids(2, positions, vocab)
        return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}

    return padded


def text(
    name: str,
    kind: str,
    model_class: str,
    config_class: str,
    settings: Mapping[str, Any],
    *,
    sharpness: float = 1.5,
    float64: bool = True,
    notes: str = "",
    positions: int = POSITIONS,
    finish: Callable[[Any], None] | None = None,
) -> Architecture:
    """An architecture that reads token ids alone."""
    return Architecture(
        name=name,
        kind=kind,
        build=builder(
            model_class,
            config_class,
            settings,
            seed=zlib.crc32(name.encode()),
            sharpness=sharpness,
            finish=finish,
        ),
        inputs=text_inputs(positions),
        padded=text_padded(positions),
        float64=float64,
        notes=notes,
    )
