"""Gradients at z: finite differences, the identity with dA, and a model left as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import attnlens as al
from attnlens.errors import InputError, SeamError, UnsupportedModelError
from attnlens.hooks import seam
from attnlens.hooks.gradients import z_gradients
from attnlens.hooks.probe import output_tensors
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES

IDS = torch.tensor([[3, 9, 4, 17, 9, 4, 11], [5, 6, 30, 2, 8, 5, 6]])


def llama(checkpointing: bool = False) -> LlamaForCausalLM:
    """Two layers, four heads on two groups, float64 throughout (Llama's own norm is float32)."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        attention_dropout=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for block in model.model.layers:
            block.input_layernorm = nn.RMSNorm(16, 1e-6)
            block.post_attention_layernorm = nn.RMSNorm(16, 1e-6)
        model.model.norm = nn.RMSNorm(16, 1e-6)
        for weight in model.parameters():
            weight.data.add_(torch.randn_like(weight), alpha=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.double().eval()


def metric(output: Any) -> Tensor:
    """The log-probability of token 7 after the whole prompt."""
    return output.logits[:, -1].log_softmax(-1)[:, 7]


@pytest.fixture(scope="module")
def lens() -> Lens:
    return al.load(llama())


def gradients(lens: Lens, inputs: Any = IDS, measure: Callable[[Any], Tensor] = metric):
    batch = lens.encode(inputs)
    return z_gradients(lens.model, lens.anatomy_for(batch), batch.inputs, measure)


@contextmanager
def shifted(projection: nn.Module, prompt: int, row: int, column: int, by: float) -> Iterator[None]:
    """Add to one number of what the output projection gets."""

    def add(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        changed = args[0].clone()
        changed[prompt, row, column] += by
        return (changed,)

    handle = projection.register_forward_pre_hook(add)
    yield
    handle.remove()


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_are_finite_differences(lens: Lens, layer: int) -> None:
    found = gradients(lens)[f"L{layer}"].gradient.flatten(2)
    projection = lens.model.model.layers[layer].self_attn.o_proj
    step = 1e-5
    for place in [(0, 6, 3), (0, 6, 15), (1, 2, 9), (1, 6, 4), (0, 0, 0)]:
        ends: list[Tensor] = []
        for sign in (1, -1):
            with shifted(projection, *place, sign * step), torch.no_grad():
                ends.append(metric(lens.model(IDS)).sum())
        slope = float(ends[0] - ends[1]) / (2 * step)
        # float64: the differences themselves are good to about 1e-10
        assert float(found[place]) == pytest.approx(slope, abs=1e-8)
    assert found.abs().max() > 1e-3


def test_z_is_what_a_plain_run_keeps(lens: Lens) -> None:
    kept = lens.run(IDS, keep="z").z
    for name, found in gradients(lens).items():
        assert torch.equal(found.z.transpose(1, 2), kept[name])
        assert not found.z.requires_grad
        assert found.z.grad_fn is None
        assert found.gradient.grad_fn is None


def test_pattern_times_its_gradient_is_z_times_its_gradient(lens: Lens) -> None:
    """sum_s A dM/dA = z . dM/dz for each row, where A comes from the model's own eager code."""
    eager = llama()
    eager.set_attn_implementation("eager")
    output = eager(IDS, output_attentions=True)
    slopes = torch.autograd.grad(metric(output).sum(), output.attentions)
    for layer, (pattern, slope) in enumerate(zip(output.attentions, slopes, strict=True)):
        found = gradients(lens)[f"L{layer}"]
        wanted = (pattern * slope).sum(-1).transpose(1, 2)
        # Eager rows are float32 (Llama's softmax is), so is the agreement.
        assert torch.allclose((found.z * found.gradient).sum(-1), wanted, atol=1e-7)


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "asks": [weight.requires_grad for weight in model.parameters()],
        "grads": [None if w.grad is None else w.grad.clone() for w in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "kernels": [config._attn_implementation for config in seam.attention_configs(model)],
    }


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_nothing_of_the_model_changes(lens: Lens, frozen: bool, mode: Any) -> None:
    wanted = gradients(lens)
    other = al.load(llama())
    model = other.model.requires_grad_(not frozen).train()
    model.lm_head.eval()
    before = state(model)
    with mode():
        found = gradients(other, IDS.clone())
    after = state(model)
    assert all(grad is None for grad in after["grads"])
    assert before == after
    for name in wanted:
        assert torch.equal(found[name].gradient, wanted[name].gradient)


def test_gradients_of_a_training_step_stay(lens: Lens) -> None:
    model = llama().requires_grad_()
    metric(model(IDS)).sum().backward()
    kept = [weight.grad.clone() for weight in model.parameters()]
    gradients(al.load(model))
    assert all(torch.equal(a, w.grad) for a, w in zip(kept, model.parameters(), strict=True))


def test_a_failing_metric_leaves_the_model_as_it_was() -> None:
    lens = al.load(llama().train())
    before = state(lens.model)

    def fails(_: Any) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gradients(lens, measure=fails)
    assert state(lens.model) == before


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(lens: Lens, side: str) -> None:
    short = IDS[:, :4]
    alone = gradients(lens, short, lambda output: output.logits[:, 3, 7])
    pad = torch.zeros(2, 3, dtype=torch.long)
    parts = [(pad, 0), (short, 1)] if side == "left" else [(short, 1), (pad, 0)]
    inputs = {
        "input_ids": torch.cat([ids for ids, _ in parts], 1),
        "attention_mask": torch.cat([torch.full_like(ids, real) for ids, real in parts], 1),
    }
    last = 6 if side == "left" else 3
    padded = gradients(lens, inputs, lambda output: output.logits[:, last, 7])
    place = slice(3, None) if side == "left" else slice(4)
    for name, found in padded.items():
        # Rotary tables are float32, so shifted positions agree to that.
        assert torch.allclose(found.gradient[:, place], alone[name].gradient, atol=1e-6)
        rest = found.gradient.clone()
        rest[:, place] = 0
        assert (rest == 0).all()


def test_a_prompts_gradient_does_not_depend_on_its_neighbours(lens: Lens) -> None:
    both, first = gradients(lens), gradients(lens, IDS[:1])
    for name in both:
        assert torch.allclose(both[name].gradient[:1], first[name].gradient, atol=1e-12)


def test_half_precision(lens: Lens) -> None:
    """Of a bfloat16 model they are those of its own arithmetic: near the float64 ones."""
    found = gradients(al.load(llama().bfloat16()))["L0"]
    wanted = gradients(lens)["L0"].gradient
    assert found.gradient.dtype == torch.bfloat16
    angle = torch.cosine_similarity(found.gradient.double().flatten(), wanted.flatten(), dim=0)
    assert angle > 0.98


def test_transformers_checkpointing_works(lens: Lens) -> None:
    found = gradients(al.load(llama(checkpointing=True).train()))
    for name, wanted in gradients(lens).items():
        assert torch.equal(found[name].gradient, wanted.gradient)


def wrapped(model: nn.Module, reentrant: bool) -> nn.Module:
    """Checkpoint every block whatever the mode, as users' own training code may."""
    for block in model.model.layers:
        plain = block.forward

        def forward(hidden: Tensor, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            def run(hidden: Tensor) -> Any:
                return plain(hidden, *args, **kwargs)

            return checkpoint(run, hidden, use_reentrant=reentrant)

        block.forward = forward
    return model


def test_checkpointing_of_the_users_own_works_or_is_refused(lens: Lens) -> None:
    found = gradients(al.load(wrapped(llama(), reentrant=False)))
    for name, wanted in gradients(lens).items():
        assert torch.equal(found[name].gradient, wanted.gradient)
        assert torch.equal(found[name].z, wanted.z)
    refused = al.load(wrapped(llama(), reentrant=True))
    before = state(refused.model)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        gradients(refused)
    assert state(refused.model) == before


def test_edits_act_first(lens: Lens) -> None:
    with lens.edit(al.Zero("L0H1")):
        edited = gradients(lens)
        with torch.no_grad():
            value = metric(lens.model(IDS))
    assert (edited["L0"].z[:, :, 1] == 0).all()
    assert edited["L0"].gradient[:, :, 1].abs().max() > 0
    assert not torch.allclose(edited["L1"].gradient, gradients(lens)["L1"].gradient)
    assert not torch.allclose(value, metric(lens.model(IDS)))


def test_z_may_be_changed_in_place_by_the_model(lens: Lens) -> None:
    """A model that doubles z in place before its projection: twice the gradient, z as it was."""
    model = llama()
    projection = model.model.layers[1].self_attn.o_proj
    weights = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight.div_(2)
    other = al.load(model)  # the same model as a whole
    handle = projection.register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    found, wanted = gradients(other)["L1"], gradients(lens)["L1"]
    handle.remove()
    assert torch.equal(projection.weight * 2, weights)
    assert torch.allclose(found.z, wanted.z, atol=1e-12)
    assert torch.allclose(found.gradient, wanted.gradient, atol=1e-12)


def test_chosen_sites_alone(lens: Lens) -> None:
    batch = lens.encode(IDS)
    site = lens.anatomy["L1"]
    found = z_gradients(lens.model, lens.anatomy, batch.inputs, metric, [site])
    assert list(found) == ["L1"]
    assert torch.equal(found["L1"].gradient, gradients(lens)["L1"].gradient)


def test_sites_after_all_that_is_read_have_none(lens: Lens) -> None:
    def early(output: Any) -> Tensor:
        return output.hidden_states[1].square().sum((1, 2))

    inputs = {"input_ids": IDS, "output_hidden_states": True}
    found = z_gradients(lens.model, lens.anatomy, inputs, early)
    assert found["L0"].gradient.abs().max() > 0
    assert (found["L1"].gradient == 0).all()


def test_what_has_no_gradient_is_refused(lens: Lens) -> None:
    with pytest.raises(InputError, match="The metric has no gradient"):
        gradients(lens, measure=lambda output: output.logits.argmax(-1).double())
    with pytest.raises(InputError, match="at L0 is not finite"):
        gradients(lens, measure=lambda output: metric(output) * torch.inf)
    cut = llama()
    cut.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    with pytest.raises(UnsupportedModelError, match="No gradient comes back to L0"):
        gradients(al.load(cut))


def test_a_site_that_does_not_run_is_told() -> None:
    lens = al.load(llama())
    lens.model.config.num_hidden_layers = 1
    with pytest.raises(SeamError, match="No attention call was seen at L1"):
        gradients(lens)


# fmt: off
ONE_OF_EACH = [
    "gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3_text", "cohere",
    "phi3", "mixtral", "deepseek_v3", "gpt_oss", "jamba", "zamba2", "qwen3_next", "bert",
    "albert", "modernbert", "t5", "bart", "whisper", "vit", "swin", "clip", "llava",
    "qwen2_vl", "wav2vec2",
]
# fmt: on


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_on_many_architectures_gradients_say_what_scaling_a_head_does(name: str) -> None:
    """sum z . dM/dz is the slope of M in the factor of a head's z."""
    each = ARCHITECTURES[name]
    model = each.build().double()
    inputs = each.inputs(model)
    lens = al.load(model, example=inputs, check=False)
    batch = lens.encode(inputs)

    def measure(output: Any) -> Tensor:
        first = output_tensors(output)[0].double()
        weights = torch.linspace(0.3, 1.7, first.numel(), dtype=torch.float64).view(first.shape)
        return (first * weights).tanh().flatten(1).mean(1)

    anatomy = lens.anatomy_for(batch)
    found = z_gradients(model, anatomy, batch.inputs, measure)
    for site in {anatomy.sites[0], anatomy.sites[-1]}:
        head = site.head(site.heads - 1)
        own = found[site.name]
        slope = float((own.z * own.gradient)[:, :, head.head].sum())
        misses: list[float] = []
        # Norms and softmaxes in float32 are rough at small steps, curves at large ones; a wrong
        # gradient is wrong at all of them.
        for step in (1e-2, 1e-3, 1e-4, 1e-5):
            ends: list[float] = []
            for factor in (1 + step, 1 - step):
                with lens.edit(al.Scale((head,), factor)), torch.no_grad():
                    ends.append(float(measure(model(**batch.inputs)).sum()))
            misses.append(abs((ends[0] - ends[1]) / (2 * step) - slope))
        assert min(misses) < 2e-3 * abs(slope) + 1e-6
