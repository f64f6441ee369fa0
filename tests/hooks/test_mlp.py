"""The MLP of a block is found by running it, and can be computed at some positions only."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnlens.anatomy import Anatomy
from attnlens.errors import SeamError
from attnlens.hooks.mlp import Mlp, OnlyRows, find_mlps
from attnlens.hooks.probe import examine
from attnlens.hooks.session import Observer, Session
from tests.architectures import ARCHITECTURES, Inputs

# What the model's own code adds to the stream, read by hand; then what computes it from a stream.
KNOWN = {
    "gpt2": ("mlp", "mlp"),
    "llama": ("mlp", "mlp"),
    "mixtral": ("mlp", "mlp"),
    "gpt_oss": ("mlp", "mlp"),
    "deepseek_v3": ("mlp", "mlp"),
    "llama4_text": ("feed_forward", "feed_forward"),
    "granite": ("mlp", "mlp"),
    "gpt_neox": ("mlp", "mlp"),
    "phi": ("mlp", "mlp"),
    "cohere": ("mlp", "mlp"),
    "gemma2": ("post_feedforward_layernorm", "mlp"),
    "olmo2": ("post_feedforward_layernorm", "mlp"),
    "opt": ("fc2", None),
    "bert": ("output.dense", None),
    "distilbert": ("ffn", "ffn"),
    "modernbert": ("mlp", "mlp"),
    "albert": ("ffn_output", None),
    "falcon_h1": ("feed_forward", "feed_forward"),
    "jamba": ("feed_forward", "feed_forward"),
    "bart": ("fc2", None),
    "whisper": ("fc2", None),
    "vit": ("mlp", "mlp"),
    "dinov2": ("layer_scale2", "mlp"),
    "wav2vec2_conformer": ("ffn2", "ffn2"),
}
# Attention alone, a mixer over positions after it, or a sum of two modules or of numbers.
NONE = ["nemotron_h", "longcat_flash", "zamba", "zamba2", "segformer", "granitemoehybrid"]
WHOLE = ["gpt2", "llama", "gemma2", "mixtral", "gpt_oss", "cohere", "distilbert", "llama4_text"]


@cache
def opened(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Inputs, Anatomy]:
    model: Any = ARCHITECTURES[name].build().to(dtype)
    inputs = ARCHITECTURES[name].inputs(model)
    return model, inputs, examine(model, inputs)


def blocks_of(anatomy: Anatomy) -> list[str]:
    return list(dict.fromkeys(site.block for site in anatomy.sites if site.block is not None))


@pytest.mark.parametrize("name", KNOWN)
def test_the_mlp_of_every_block_is_the_one_known(name: str) -> None:
    model, inputs, anatomy = opened(name)
    added, computed = KNOWN[name]
    assert find_mlps(model, anatomy, inputs) == {
        block: Mlp(f"{block}.{added}", computed and f"{block}.{computed}")
        for block in blocks_of(anatomy)
    }


def test_of_t5_the_module_inside_the_residual() -> None:
    model, inputs, anatomy = opened("t5")
    found = find_mlps(model, anatomy, inputs)
    assert {block: mlp.name for block, mlp in found.items()} == {
        f"{stack}.block.{i}": f"{stack}.block.{i}.layer.{last}.DenseReluDense"
        for stack, last in (("encoder", 1), ("decoder", 2))
        for i in range(2)
    }


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_mlp_is_not_given_as_one(name: str) -> None:
    model, inputs, anatomy = opened(name)
    assert find_mlps(model, anatomy, inputs) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "cohere", "gemma2", "bert"])
def test_found_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    model, inputs, anatomy = opened(name, dtype)
    added, computed = KNOWN[name]
    assert find_mlps(model, anatomy, inputs) == {
        block: Mlp(f"{block}.{added}", computed and f"{block}.{computed}")
        for block in blocks_of(anatomy)
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gpt_neox", "cohere", "opt", "gemma2", "mixtral"]
)
def test_a_vector_on_its_output_is_one_on_the_stream(name: str) -> None:
    """What leaves a pre-norm block moves by just what is added to its MLP's output."""
    model, inputs, anatomy = opened(name)
    block = blocks_of(anatomy)[0]
    mlp = find_mlps(model, anatomy, inputs)[block]
    vector = torch.linspace(-1, 1, model.config.hidden_size, dtype=torch.float64)
    left: list[Tensor] = []

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        left.append(output if isinstance(output, Tensor) else output[0])

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        return output + vector if isinstance(output, Tensor) else (output[0] + vector, *output[1:])

    watching = model.get_submodule(block).register_forward_hook(leave)
    model(**inputs)
    adding = model.get_submodule(mlp.name).register_forward_hook(add)
    model(**inputs)
    watching.remove()
    adding.remove()
    assert torch.allclose(left[1] - left[0], vector.expand_as(left[0]), atol=1e-12)


def test_of_layers_that_share_an_mlp_no_rows_can_be_computed_alone() -> None:
    model: Any = ARCHITECTURES["llama"].build()
    model.model.layers[1] = model.model.layers[0]
    inputs = ARCHITECTURES["llama"].inputs(model)
    found = find_mlps(model, examine(model, inputs), inputs)
    assert found == {"model.layers.0": Mlp("model.layers.0.mlp", None)}


def test_what_attention_adds_is_not_taken_for_a_silent_mlp() -> None:
    model: Any = ARCHITECTURES["bert"].build()
    for weight in model.bert.encoder.layer[1].output.dense.parameters():
        nn.init.zeros_(weight)
    inputs = ARCHITECTURES["bert"].inputs(model)
    found = find_mlps(model, examine(model, inputs), inputs)
    assert list(found) == ["bert.encoder.layer.0"]


def test_a_module_around_attentions_own_projection_is_none_either() -> None:
    """YOLOS's projection lies in a module beside attention, which holds a matrix as MLPs do."""
    model, inputs, anatomy = opened("yolos")
    found = find_mlps(model, anatomy, inputs)
    silent: Any = ARCHITECTURES["yolos"].build().double()
    for mlp in found.values():
        for weight in silent.get_submodule(mlp.name).parameters():
            nn.init.zeros_(weight)
    assert len(found) == len(blocks_of(anatomy))
    assert find_mlps(silent, examine(silent, inputs), inputs) == {}


def test_nothing_stays_on_a_model_that_fails() -> None:
    model, inputs, anatomy = opened("gpt2")

    def fail(*_: object) -> None:
        raise MemoryError

    handle = model.transformer.h[2].mlp.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        find_mlps(model, anatomy, inputs)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def run(model: Any, anatomy: Anatomy, inputs: Inputs, *observers: Observer) -> Tensor:
    with Session(model, anatomy, observers):
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("name", WHOLE)
def test_rows_that_are_read_are_as_in_the_full_run(name: str) -> None:
    model, inputs, anatomy = opened(name)
    last = find_mlps(model, anatomy, inputs)[blocks_of(anatomy)[-1]]
    assert last.computed is not None
    reads = torch.tensor([[3, 0], [9, 9]])
    seen: list[Tensor] = []
    inside = [m for m in model.get_submodule(last.computed).modules() if not list(m.children())]
    handle = inside[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wanted = run(model, anatomy, inputs)
    found = run(model, anatomy, inputs, OnlyRows(last, reads))
    handle.remove()
    for prompt, rows in enumerate(reads):
        assert (found[prompt, rows] - wanted[prompt, rows]).abs().max() < 1e-12
    assert not torch.allclose(found, wanted)
    assert seen[-1].numel() < seen[0].numel()
    assert all("forward" not in vars(module) for module in model.modules())


def test_rows_of_copies() -> None:
    model, inputs, anatomy = opened("llama")
    last = find_mlps(model, anatomy, inputs)[blocks_of(anatomy)[-1]]
    reads = torch.tensor([[3], [9]])
    wanted = run(model, anatomy, inputs)
    copies = {name: value.repeat(3, 1) for name, value in inputs.items()}
    found = run(model, anatomy, copies, OnlyRows(last, reads))
    for row in range(6):
        prompt = row % 2
        gap = found[row, reads[prompt]] - wanted[prompt, reads[prompt]]
        assert gap.abs().max() < 1e-12


def test_rows_that_cannot_be_computed_alone_are_refused() -> None:
    model, inputs, anatomy = opened("bert")
    mlp = find_mlps(model, anatomy, inputs)[blocks_of(anatomy)[-1]]
    assert not mlp.whole
    with pytest.raises(SeamError, match="whole MLP"):
        OnlyRows(mlp, torch.tensor([[0], [0]]))
    model, inputs, anatomy = opened("gpt2")
    mlp = find_mlps(model, anatomy, inputs)[blocks_of(anatomy)[-1]]
    for reads in (torch.tensor([[0], [99]]), torch.tensor([[0], [0], [0]])):
        with pytest.raises(SeamError, match="cannot be found"):
            run(model, anatomy, inputs, OnlyRows(mlp, reads))


def test_one_position_is_too_few_to_tell() -> None:
    model, inputs, anatomy = opened("gpt2")
    short = {name: value[:, :1] for name, value in inputs.items()}
    assert find_mlps(model, replace(anatomy), short) == {}
