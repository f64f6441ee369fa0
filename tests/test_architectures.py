"""The catalogue of architectures: each builds, runs, is repeatable and uses the interface."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import logging

from tests.architectures import ARCHITECTURES, PARTIAL, UNSUPPORTED, Inputs, names

TOLERANCE = 1e-5  # of eager against sdpa in float32, as a fraction of the largest output
WITHOUT_SDPA = {
    "gemma2",
    "vaultgemma",
    "gpt_oss",
    "mimo_v2_flash",
    "granite_swa",
    "t5gemma",
    "switch_transformers",
    "speech_to_text",
}
EVERY = pytest.mark.parametrize("name", names())
PADDED = pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.padded])
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(level)


class Call:
    """What one call of the attention function received and gave."""

    def __init__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **rest: Any):
        self.module, self.query, self.key, self.value, self.rest = module, query, key, value, rest
        self.pattern: Tensor = torch.empty(0)


@cache
def own_eager(kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager function of the file that a class of modules comes from."""
    return inspect.unwrap(kind.forward).__globals__["eager_attention_forward"]


@cache
def uses_interface(kind: type[nn.Module]) -> bool:
    return "attention_interface" in inspect.getsource(inspect.unwrap(kind.forward))


@cache
def built(name: str) -> PreTrainedModel:
    """A model that several tests share: they change its attention implementation alone."""
    return ARCHITECTURES[name].build()


@pytest.fixture
def calls() -> Iterator[list[Call]]:
    """Register ``watch_dense`` and ``watch_fused``; yield the list of the calls that they see."""
    seen: list[Call] = []

    def dense(module, query, key, value, attention_mask=None, **rest):
        call = Call(module, query, key, value, attention_mask=attention_mask, **rest)
        output, call.pattern = own_eager(type(module))(
            module, query, key, value, attention_mask, **rest
        )
        seen.append(call)
        return output, call.pattern

    def fused(module, query, key, value, attention_mask=None, **rest):
        seen.append(Call(module, query, key, value, attention_mask=attention_mask, **rest))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)

    for name, function, mask in (
        ("watch_dense", dense, eager_mask),
        ("watch_fused", fused, sdpa_mask),
    ):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)
    yield seen
    for name in ("watch_dense", "watch_fused"):
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


def run(model: PreTrainedModel, inputs: Inputs, implementation: str | None = None) -> Any:
    if implementation is not None:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs)


def tensors(found: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output, caches left out."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() and found.numel() else []
    if isinstance(found, (tuple, list)):
        return [tensor for each in found for tensor in tensors(each)]
    if hasattr(found, "to_tuple"):
        return tensors(found.to_tuple())
    return []


def states(output: Any) -> Tensor:
    """The output that has one row a position of the text."""
    if "text_model_output" in output:
        output = output["text_model_output"]
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def gap(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-6)).item()


def real_positions(inputs: Inputs) -> Tensor:
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    assert mask is not None
    return mask.bool()


def test_catalogue_is_broad():
    assert len(ARCHITECTURES) >= 100
    for kind in ("decoder", "encoder", "encoder-decoder", "vision", "vision-language"):
        assert len(names(kind)) >= 10, kind
    assert len(names("hybrid")) >= 10
    assert len(names("audio")) >= 5
    with pytest.raises(ValueError, match="no kind 'image'"):
        names("image")
    with pytest.raises(ValueError, match="side is 'top'"):
        ARCHITECTURES["llama"].padded(None, "top")


@EVERY
def test_builds_the_same_model_without_touching_the_global_generator(name: str):
    before = torch.get_rng_state()
    one, other = built(name), ARCHITECTURES[name].build()
    assert torch.equal(torch.get_rng_state(), before)
    assert not one.training
    weights = other.state_dict()
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    inputs = ARCHITECTURES[name].inputs(one)
    # Named, since another test that shares the first model may have left it on another function.
    found = (tensors(run(model, inputs, "eager")) for model in (one, other))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
        assert torch.isfinite(first).all()


@EVERY
def test_no_vector_of_weights_is_constant(name: str):
    for key, weight in built(name).named_parameters():
        fixed = any(part in key for part in ("A_log", "dt_bias", ".D", "slope"))
        if weight.ndim == 1 and weight.numel() > 1 and not fixed:
            assert weight.std() > 0, f"{key} is constant"


@EVERY
def test_every_attention_module_calls_the_interface(name: str, calls: list[Call]):
    model = built(name)
    run(model, ARCHITECTURES[name].inputs(model), "watch_dense")
    counts = Counter(id(call.module) for call in calls)
    able = {key for key, module in model.named_modules() if uses_interface(type(module))}
    silent = [key for key in able if not counts[id(model.get_submodule(key))]]
    assert able
    assert not silent


@EVERY
def test_watched_rows_are_those_that_the_model_returns(name: str, calls: list[Call]):
    architecture = ARCHITECTURES[name]
    model = built(name)
    inputs = architecture.inputs(model)
    output = run(model, inputs, "watch_dense")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(**inputs, output_attentions=True)
    assert all(
        torch.equal(*pair)
        for pair in zip(tensors(output), tensors(run(model, inputs)), strict=True)
    )
    shapes = {call.pattern.shape for call in calls}
    returned = [tensor for each in _attentions(eager) for tensor in tensors(each)]
    returned = [rows for rows in returned if rows.shape in shapes]  # minimax adds linear states
    assert returned
    for rows in returned:
        assert any(torch.equal(rows, call.pattern) for call in calls)


def _attentions(output: Any) -> Iterator[Any]:
    for key, value in output.items():
        if "attentions" in key and value is not None:
            yield value
        elif key.endswith("model_output"):
            yield from _attentions(value)


@EVERY
def test_attention_is_neither_uniform_nor_one_hot(name: str, calls: list[Call]):
    model = built(name)
    run(model, ARCHITECTURES[name].inputs(model), "watch_dense")
    for call in calls:
        keys = call.key.shape[-2]
        largest = call.pattern[..., min(4, keys) - 1 :, :].amax(dim=-1).mean().item()
        assert 0.25 < largest < 0.95, f"mean largest weight {largest:.2f} over {keys} keys"


@EVERY
def test_sdpa_equals_eager(name: str):
    model = built(name)
    inputs = ARCHITECTURES[name].inputs(model)
    eager = run(model, inputs, "eager")
    if name in WITHOUT_SDPA:
        with pytest.raises(ValueError, match="does not support"):
            model.set_attn_implementation("sdpa")
        return
    fused = run(model, inputs, "sdpa")
    for one, other in zip(tensors(fused), tensors(eager), strict=True):
        assert gap(one, other) < TOLERANCE


@PADDED
@SIDES
def test_padded_inputs_run(name: str, side: str):
    architecture = ARCHITECTURES[name]
    assert architecture.padded is not None
    model = built(name)
    inputs = architecture.padded(model, side)
    eager = run(model, inputs, "eager")
    assert all(torch.isfinite(tensor).all() for tensor in tensors(eager))
    if name in WITHOUT_SDPA:
        return
    fused = run(model, inputs, "sdpa")
    if architecture.kind == "audio":
        return
    # Padded queries see no key, and there the two kernels differ by design.
    real = real_positions(inputs)
    assert gap(states(fused)[real], states(eager)[real]) < TOLERANCE


@EVERY
def test_float64_flag_is_true_to_the_model(name: str, calls: list[Call]):
    architecture = ARCHITECTURES[name]
    single = built(name)
    expected = tensors(run(single, architecture.inputs(single), "watch_dense"))
    calls.clear()
    model = architecture.build().double()
    inputs = architecture.inputs(model)
    assert architecture.float64
    found = tensors(run(model, inputs, "watch_dense"))
    assert {call.query.dtype for call in calls} == {torch.float64}
    assert {call.pattern.dtype for call in calls} == {torch.float64}
    for one, other in zip(found, expected, strict=True):
        assert gap(one.double(), other.double()) < 1e-3


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_never_call(name: str, calls: list[Call]):
    model = UNSUPPORTED[name]()
    run(model, {"input_ids": torch.arange(4, 20)[None]}, "watch_dense")
    assert model.config._attn_implementation != "watch_dense"
    assert not calls


@pytest.mark.parametrize(("name", "layers"), [("git", 3), ("vit_mae", 4)])
def test_partly_supported_models_call_too_rarely(name: str, layers: int, calls: list[Call]):
    model = PARTIAL[name].build()
    run(model, PARTIAL[name].inputs(model), "watch_dense")
    assert 0 < len(calls) < layers


def _only(calls: list[Call], name: str, at: int = 0) -> Call:
    model = built(name)
    run(model, ARCHITECTURES[name].inputs(model), "watch_dense")
    return calls[at]


def test_soft_cap_bites(calls: list[Call]):
    call = _only(calls, "gemma2")
    keys = call.key.repeat_interleave(2, dim=1)
    scores = call.query @ keys.transpose(-1, -2) * call.rest["scaling"]
    assert scores.abs().max() > 2 * call.rest["softcap"]


def test_sinks_take_mass(calls: list[Call]):
    sums = _only(calls, "gpt_oss", at=1).pattern.sum(-1)
    assert sums.max() <= 1 + 1e-6
    assert sums.mean() < 0.9


@pytest.mark.parametrize(
    ("name", "window"),
    [("mistral", 5), ("gemma2", 5), ("qwen2", 6), ("gpt_oss", 5), ("phi3", 6), ("mixtral", 6)],
)
def test_window_is_shorter_than_the_text(name: str, window: int, calls: list[Call]):
    pattern = _only(calls, name).pattern
    distance = torch.arange(16)[:, None] - torch.arange(16)[None]
    assert pattern[..., (distance >= window) | (distance < 0)].eq(0).all()
    assert pattern[..., distance == window - 1].ne(0).all()


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3", "mimo_v2_flash"])
def test_values_have_a_width_of_their_own(name: str, calls: list[Call]):
    call = _only(calls, name)
    assert call.value.shape[-1] != call.query.shape[-1]


@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("gemma", 1), ("gpt_bigcode", 1)])
def test_keys_are_grouped(name: str, heads: int, calls: list[Call]):
    call = _only(calls, name)
    assert (call.query.shape[1], call.key.shape[1]) == (4, heads)


def test_t5_bias_is_not_zero(calls: list[Call]):
    assert _only(calls, "t5").rest["position_bias"].std() > 0.3


def test_one_module_runs_for_all_layers_of_albert(calls: list[Call]):
    _only(calls, "albert")
    assert len(calls) == 3
    assert len({id(call.module) for call in calls}) == 1
