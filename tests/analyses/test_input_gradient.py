"""Input x gradient and integrated gradients against linear models, autograd and captum."""

import copy
from typing import Any

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attnlens as al
from attnlens.analyses.input_gradient import input_gradient, integrated_gradients
from attnlens.analyses.target import Target
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.embedded import token_tables
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES

PAD = 0
PEERS = ("gpt2", "llama", "bert")


def linear_model() -> nn.Module:
    """Logits are linear in the embeddings: one layer of even attention, no norm, a silent MLP."""
    model = tiny_gpt2(layers=1, sharp=0.0)
    block = model.transformer.h[0]
    model.transformer.ln_f = block.ln_1 = nn.Identity()
    with torch.no_grad():
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
    return model


@pytest.fixture(scope="module")
def linear_lens() -> Lens:
    return al.load(linear_model())


def linear_scores(model: nn.Module, rows: Tensor, direction: Tensor) -> Tensor:
    """What each of some rows, one a token, adds to the last position's logits along a direction."""
    attention = model.transformer.h[0].attn
    copied = attention.c_attn.weight[:, 64:] @ (attention.c_proj.weight @ direction)
    scores = rows @ copied / rows.shape[1]
    scores[:, -1] += rows[:, -1] @ direction
    return scores


def by_hand(lens: Lens, ids: Tensor, token: int, at: int) -> Tensor:
    """embedding x gradient of one logit, by plain autograd with embeddings given to the model."""
    model = copy.deepcopy(lens.model)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, at, token].sum().backward()
    return (embeddings * embeddings.grad).sum(-1).detach()


def padded(side: str) -> dict[str, Tensor]:
    """Prompts of 4 and 7 tokens, padded on one side."""
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(1, 40, (size,), generator=draw).tolist() for size in (4, 7)]
    fill = {"left": lambda row, pad: [pad] * (7 - len(row)) + row}
    put = fill.get(side, lambda row, pad: row + [pad] * (7 - len(row)))
    ids = torch.tensor([put(row, PAD) for row in rows])
    mask = torch.tensor([put([1] * len(row), 0) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_input_gradient_is_exact_on_a_linear_model(linear_lens: Lens, ids: Tensor) -> None:
    model = linear_lens.model
    found = input_gradient(linear_lens, ids, Target(7, against=9))
    direction = model.lm_head.weight[7] - model.lm_head.weight[9]
    expected = linear_scores(model, model.transformer.wte(ids), direction)
    assert torch.allclose(found.scores, expected, atol=1e-13)
    # What tokens do not say is what positions and biases do: the value were the tokens' all 0.
    assert found.ledger is not None
    position = linear_scores(model, model.transformer.wpe.weight[None, :12], direction).sum()
    attention = model.transformer.h[0].attn
    bias = attention.c_attn.bias[64:] @ attention.c_proj.weight + attention.c_proj.bias
    assert torch.allclose(
        found.ledger.remainder, (position + bias @ direction).expand(2), atol=1e-13
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "gemma2", "gpt_neox", "qwen3"])
def test_input_gradient_is_what_plain_autograd_says(name: str) -> None:
    lens = architecture(name)
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    found = input_gradient(lens, ids, Target(5, at=-2))
    expected = by_hand(lens, ids, 5, at=-2)
    if name.startswith("gemma"):  # looks up scaled embeddings, and scales no given ones
        assert found.scores.shape == expected.shape
    else:
        assert torch.allclose(found.scores, expected, atol=1e-9)
    assert (found.scores[:, -1] == 0).all()  # later than what is read
    assert (found.scores[:, :-1] != 0).all()


@pytest.mark.parametrize("method", [input_gradient, integrated_gradients])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batches_change_nothing(random_lens: Lens, method: Any, side: str) -> None:
    batch = padded(side)
    found = method(random_lens, batch, Target([3, 8], at=[-1, -2]))
    for prompt, (token, at) in enumerate([(3, -1), (8, -2)]):
        own = batch["input_ids"][prompt][batch["attention_mask"][prompt].bool()]
        alone = method(random_lens, own[None], Target(token, at=at))
        assert found.tokens[prompt] == alone.tokens[0]
        assert torch.allclose(found.of(prompt), alone.of(0), atol=1e-12)
        assert torch.allclose(found.value[prompt], alone.value[0], atol=1e-12)
    assert (found.scores[0, 4:] == 0).all()


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
@pytest.mark.parametrize("method", [input_gradient, integrated_gradients])
def test_text_and_decoder_are_both_scored(name: str, method: Any) -> None:
    lens = architecture(name)
    draw = torch.Generator().manual_seed(1)
    text, own = (torch.randint(4, 90, (2, size), generator=draw) for size in (7, 5))
    more = {"steps": 300} if method is integrated_gradients else {}
    found = method(lens, {"input_ids": text, "decoder_input_ids": own}, Target(11), **more)
    assert [len(words) for words in found.tokens] == [12, 12]
    assert (found.scores != 0).all()
    assert found.ledger is not None
    if method is integrated_gradients:
        change = found.value - found.ledger.entries["baseline"]
        assert (found.ledger.remainder.abs() < 0.02 * change.abs()).all()
        return
    same = {"input_ids": text, "decoder_input_ids": text}  # told apart by their order
    assert method(lens, same, Target(11)).scores.shape == (2, 14)


def captums(lens: Lens, ids: Tensor, token: int, at: int, start: int, steps: int) -> Tensor:
    model = copy.deepcopy(lens.model)
    (table,) = token_tables(model)

    def logit(given: Tensor) -> Tensor:
        return model(input_ids=given).logits[:, at, token]

    peer = LayerIntegratedGradients(logit, table)
    found = peer.attribute(ids, torch.full_like(ids, start), n_steps=steps, method="gausslegendre")
    assert isinstance(found, Tensor)
    return found.sum(-1).detach()


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_integrated_gradients_are_captums(name: str, batch_size: int) -> None:
    build = ARCHITECTURES[name].build
    lens = al.load(_masked_bert() if name == "bert" else build().double())
    ids = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(2))
    target = Target(5, at=-1)
    found = integrated_gradients(lens, ids, target, steps=9, baseline=6, batch_size=batch_size)
    expected = captums(lens, ids, 5, -1, start=6, steps=9)
    assert torch.allclose(found.scores, expected, atol=1e-9)
    assert found.settings["quadrature"] == "Gauss-Legendre"


def _masked_bert() -> nn.Module:
    from transformers import BertForMaskedLM

    from tests.architectures import randomise

    config = ARCHITECTURES["bert"].build().config
    model = BertForMaskedLM(config)
    randomise(model, seed=0)
    return model.double().eval()


@pytest.mark.parametrize("baseline", ["mean", "padding", 6])
def test_the_ledger_closes_with_enough_steps(baseline: str | int) -> None:
    lens = architecture("llama")
    ids = torch.randint(4, 90, (2, 6), generator=torch.Generator().manual_seed(2))
    # Norms make the way from near 0 rough.
    found = integrated_gradients(lens, ids, Target(5, 9), steps=200, baseline=baseline)
    ledger = found.ledger
    assert ledger is not None
    assert ledger.remainder.abs().max() < 1e-2
    assert found.notes == ()
    coarse = integrated_gradients(lens, ids, Target(5, 9), steps=1, baseline=baseline)
    assert "too few" in coarse.notes[0]


def test_zero_lies_badly_for_a_model_that_begins_with_a_norm() -> None:
    # A documented limit: the first norm makes all of the way but its very beginning look alike.
    ids = torch.randint(4, 90, (2, 6), generator=torch.Generator().manual_seed(2))
    found = integrated_gradients(architecture("llama"), ids, Target(5, 9), baseline="zero")
    assert "the baseline lies where the model is not smooth" in found.notes[0]


def test_baseline_is_the_value_with_those_embeddings(random_lens: Lens, ids: Tensor) -> None:
    found = integrated_gradients(random_lens, ids, Target(5), baseline=8)
    assert found.ledger is not None
    logits = random_lens.logits(torch.full_like(ids, 8), torch.full((2, 1), 11))
    assert torch.allclose(found.ledger.entries["baseline"], logits[:, 0, 5], atol=1e-12)


@given(token=st.integers(0, 39), steps=st.integers(1, 5), seed=st.integers(0, 99))
def test_integrated_gradients_are_exact_on_a_linear_model(
    linear_lens: Lens, token: int, steps: int, seed: int
) -> None:
    model = linear_lens.model
    ids = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(seed))
    table = model.transformer.wte.weight
    found = integrated_gradients(linear_lens, ids, Target(token), steps=steps)
    moved = table[ids] - table.mean(0)
    expected = linear_scores(model, moved, model.lm_head.weight[token])
    assert torch.allclose(found.scores, expected, atol=1e-13)
    assert found.ledger is not None
    assert found.ledger.remainder.abs().max() < 1e-13


@pytest.mark.parametrize("method", [input_gradient, integrated_gradients])
def test_the_model_is_left_as_it_was(method: Any, ids: Tensor) -> None:
    model = tiny_gpt2()
    lens = al.load(model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    expected = method(al.load(frozen), ids, Target(5)).scores
    model.train()
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    with torch.inference_mode():
        inside = method(lens, ids.clone(), Target(5)).scores
    assert torch.equal(inside, expected)
    assert model.training
    assert (model.transformer.wte.weight.grad == 1).all()
    grads = [weight.grad for name, weight in model.named_parameters() if "wte" not in name]
    assert all(grad is None for grad in grads)
    assert all(weight.requires_grad for weight in model.parameters())

    def fails(_: Any) -> Tensor:
        raise KeyError("no such metric")

    with pytest.raises(KeyError):
        method(lens, ids, fails)
    assert all(not module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_any_function_of_the_output(random_lens: Lens, ids: Tensor) -> None:
    def third(output: Any) -> Tensor:
        return output.logits[:, -1, 3]

    for method in (input_gradient, integrated_gradients):
        named = method(random_lens, ids, Target(3))
        found = method(random_lens, ids, third)
        assert torch.allclose(found.scores, named.scores, atol=1e-12)
        assert found.target == ("third", "third")


def test_what_cannot_be_scored_is_refused(random_lens: Lens, ids: Tensor) -> None:
    def accuracy(output: Any) -> Tensor:
        return (output.logits[:, -1].argmax(-1) == 3).double()

    with pytest.raises(InputError, match="no gradient"):
        input_gradient(random_lens, ids, accuracy)
    with pytest.raises(InputError, match="no baseline 'noise'"):
        integrated_gradients(random_lens, ids, baseline="noise")
    with pytest.raises(InputError, match="steps=0"):
        integrated_gradients(random_lens, ids, steps=0)
    with pytest.raises(InputError, match="no token id"):
        integrated_gradients(random_lens, ids, baseline=40)
    with pytest.raises(InputError, match="no padding token"):
        integrated_gradients(random_lens, ids, baseline="padding")
    vit = architecture("vit")
    pixels = ARCHITECTURES["vit"].inputs(vit.model)
    with pytest.raises(UnsupportedModelError, match="no table of token embeddings"):
        input_gradient(
            vit,
            {name: value.double() for name, value in pixels.items()},
            lambda output: output.last_hidden_state[:, 0, 0],
        )
