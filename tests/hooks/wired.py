"""What tests of wiring and edges share: models whose edges are defined, and runs of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

import attnlens as al
from attnlens.hooks.edge_run import Activations, EdgeRun, Listen, as_reference
from attnlens.hooks.examples import example_inputs
from attnlens.hooks.session import Observer, Session
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES, Inputs

SERIAL = (
    "gpt2", "gpt_bigcode", "opt", "biogpt", "llama", "mistral", "ministral", "qwen2", "qwen3",
    "gemma", "phi3", "olmo", "stablelm", "granite", "starcoder2", "smollm3", "helium", "glm",
    "nemotron", "persimmon", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "arcee", "apertus",
)  # fmt: skip
PARALLEL = ("gpt_neox", "phi", "cohere", "cohere2")
"""Decoders whose MLPs do not read the heads of their own layer."""
EXPERTS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "dots1", "minimax_m2",
    "glm4_moe", "gpt_oss", "mimo_v2_flash", "granite_swa", "llama4_text", "vaultgemma",
)  # fmt: skip
ENCODER_DECODERS = (
    "t5", "mt5", "umt5", "switch_transformers", "mbart", "pegasus", "m2m_100", "blenderbot",
    "whisper",
)  # fmt: skip
WITH_IMAGES = (
    "llava", "idefics3", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama",
)  # fmt: skip
"""Read as text models: nodes are those of the text stack."""
OTHERS = ("lfm2", "recurrent_gemma", "eurobert")
"""Hybrids with one layer of attention, the last; what stands before it counts as embeddings."""
WIRED = (*SERIAL, *PARALLEL, *EXPERTS, *ENCODER_DECODERS, *WITH_IMAGES, *OTHERS)


def new_lens(name: str, dtype: torch.dtype = torch.float64) -> Lens:
    """A model of its own."""
    return al.load(ARCHITECTURES[name].build().to(dtype))


lens_of = cache(new_lens)
"""A model that all tests share."""


def prompts(lens: Lens) -> Inputs:
    """Two prompts."""
    return example_inputs(lens.model, batch=2)


def others(inputs: Inputs) -> Inputs:
    """The same prompts changed about, to be each other's reference."""
    return {name: tensor.flip(0) for name, tensor in inputs.items()}


@torch.no_grad()
def forward(lens: Lens, inputs: Inputs, *observers: Observer) -> Tensor:
    """Logits at all positions."""
    with Session(lens.model, lens.anatomy, observers):
        return lens.model(**inputs).logits


def heard(lens: Lens, inputs: Inputs) -> tuple[Activations, Tensor]:
    """What a run wrote and read, and its logits."""
    listen = Listen(lens.wiring)
    logits = forward(lens, inputs, listen)
    return listen.activations, logits


def cut(
    lens: Lens, inputs: Inputs, written: Mapping[str, Tensor], kept: Tensor, *observers: Observer
) -> Tensor:
    """Logits of each choice of edges: `copy batch position vocab`."""
    clean, _ = heard(lens, inputs)
    reference = as_reference(lens.wiring, clean, written)
    copies = {n: t.repeat(len(kept), *[1] * (t.ndim - 1)) for n, t in inputs.items()}
    logits = forward(lens, copies, EdgeRun(lens.wiring, reference, kept), *observers)
    return logits.unflatten(0, (len(kept), -1))
