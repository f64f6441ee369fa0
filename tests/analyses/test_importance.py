"""Gradient importance against plain autograd, and against what taking a head away really does."""

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import attnlens as al
from attnlens.analyses.importance import Estimator, first_order_effects, gradient_importance
from attnlens.errors import InputError, TaskError
from attnlens.hooks.edits import Edit, Patch, SteerStream
from attnlens.lens import Lens
from attnlens.sweeps.trials import Trial
from attnlens.tasks import Task, repeated_tokens
from tests.analyses.conftest import tiny_gpt2
from tests.architectures import ARCHITECTURES


def linear_readout() -> GPT2LMHeadModel:
    """Logits are linear in what the heads of the last layer write: no last MLP, no last norm."""
    model = tiny_gpt2()
    model.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.weight.zero_()
        model.transformer.h[-1].mlp.c_proj.bias.zero_()
    return model


@pytest.fixture(scope="module")
def linear_lens() -> Lens:
    return al.load(linear_readout())


def ragged(prompts: int = 4, seed: int = 0) -> Task:
    """Random prompts of 4 to 10 tokens, graded by logit difference at two places."""
    draw = torch.Generator().manual_seed(seed)

    def some(count: int) -> list[int]:
        return torch.randint(1, 40, (count,), generator=draw).tolist()

    lengths = [4, 10, 7, 5, 9, 6][:prompts]
    return Task.from_prompts(
        "ragged",
        clean=[some(length) for length in lengths],
        corrupt=[some(length) for length in lengths],
        reads=[[1, length - 1] for length in lengths],
        answers=[some(2) for _ in lengths],
        wrong=[some(2) for _ in lengths],
    )


def by_hand(model: nn.Module, task: Task, metric: str) -> list[Tensor]:
    """z . dM/dz, `prompt query head` a layer, by plain autograd at the projections' inputs."""
    model = copy.deepcopy(model)
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    for block in model.transformer.h:
        block.attn.c_proj.register_forward_pre_hook(keep)
    logits = model(task.clean, attention_mask=task.mask.long()).logits
    task.score(task.at_reads(logits), metric).sum().backward()
    return [(z * z.grad).unflatten(-1, (4, 8)).sum(-1).detach() for z in seen]


@pytest.mark.parametrize("metric", ["loss", "logit_difference"])
def test_importance_is_what_plain_autograd_says(random_lens: Lens, metric: str) -> None:
    task = ragged()
    layers = by_hand(random_lens.model, task, metric)
    tokens = gradient_importance(random_lens, task, metric)
    prompts = gradient_importance(random_lens, task, metric, estimator="prompts")
    assert [str(head) for head in tokens.heads[:5]] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    each = torch.cat([products.abs().sum(1) for products in layers], 1)
    whole = torch.cat([products.sum(1) for products in layers], 1)
    assert torch.allclose(tokens.by_prompt, each.T, atol=1e-12)
    assert torch.allclose(tokens.importance, each.mean(0), atol=1e-12)
    assert torch.allclose(prompts.importance, whole.abs().mean(0), atol=1e-12)
    for found in (tokens, prompts):
        assert torch.allclose(found.signed, -whole.mean(0), atol=1e-12)
        assert torch.allclose(found.signed_by_prompt, -whole.T, atol=1e-12)
    assert (tokens.low <= tokens.importance).all()
    assert (tokens.importance <= tokens.high).all()
    assert tokens.prompts == 4


def test_with_a_linear_readout_signed_is_the_drop_under_ablation(linear_lens: Lens) -> None:
    task = ragged()
    exact = al.ablate(linear_lens, task, "L2", metric="logit_difference", controls=0)
    found = gradient_importance(linear_lens, task, "logit_difference")
    assert torch.allclose(found.signed[8:], exact.effect, atol=1e-12)
    assert torch.allclose(found.signed_by_prompt[8:], exact.ablated - exact.clean, atol=1e-12)
    assert exact.effect.abs().min() > 1e-4
    below = al.ablate(linear_lens, task, "L0", metric="logit_difference", controls=0)
    assert not torch.allclose(found.signed[:4], below.effect, rtol=0.01)


@given(seed=st.integers(0, 1000), prompts=st.integers(1, 6))
def test_tokens_are_never_less_than_prompts(random_lens: Lens, seed: int, prompts: int) -> None:
    task = ragged(prompts, seed)
    tokens = gradient_importance(random_lens, task, resamples=10)
    whole = gradient_importance(random_lens, task, estimator=Estimator.PROMPTS, resamples=10)
    # sums of the same numbers in another order
    assert (tokens.by_prompt >= whole.by_prompt - 1e-12).all()
    assert (whole.by_prompt == whole.signed_by_prompt.abs()).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_change_nothing(random_lens: Lens, batch_size: int) -> None:
    task = ragged(6)
    whole = gradient_importance(random_lens, task, batch_size=6)
    parts = gradient_importance(random_lens, task, batch_size=batch_size)
    assert torch.allclose(whole.by_prompt, parts.by_prompt, atol=1e-12)
    assert torch.allclose(whole.signed_by_prompt, parts.signed_by_prompt, atol=1e-12)


@pytest.mark.parametrize("metric", ["loss", "logit_difference"])
def test_only_the_circuit_matters(induction_lens: Lens, metric: str) -> None:
    task = repeated_tokens(induction_lens, prompts=4, period=8)
    found = gradient_importance(induction_lens, task, metric)
    frame = found.to_frame().set_index("head")
    others = frame.drop(["L0H1", "L1H2"])
    assert (others[["importance", "signed", "importance_high"]] == 0).all(axis=None)
    assert frame.loc["L1H2", "importance"] > frame.loc["L0H1", "importance"] > 0
    # Without L1H2 the answer's logit is 16 lower, and only the norm is not linear in that.
    if metric == "logit_difference":
        assert frame.loc["L1H2", "signed"] < -10


def test_a_head_that_writes_nothing_has_no_importance() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[16:24] = 0
    found = gradient_importance(al.load(model), ragged()).to_frame().set_index("head")
    assert found.loc["L1H2", "importance"] == 0
    assert (found.drop("L1H2")["importance"] > 0).all()


def test_normalised_layers_have_norm_one(random_lens: Lens) -> None:
    plain = gradient_importance(random_lens, ragged())
    found = gradient_importance(random_lens, ragged(), normalise=True)
    for layer in range(3):
        own = slice(4 * layer, 4 * layer + 4)
        assert found.importance[own].square().sum() == pytest.approx(1)
        norm = plain.importance[own].norm()
        assert torch.allclose(found.importance[own] * norm, plain.importance[own])
        assert torch.allclose(found.high[own] * norm, plain.high[own])
    assert torch.equal(found.signed, plain.signed)
    silent = tiny_gpt2()
    with torch.no_grad():
        silent.transformer.h[1].attn.c_proj.weight.zero_()
    layers = gradient_importance(al.load(silent), ragged(), normalise=True).importance
    assert (layers[4:8] == 0).all()


def test_accuracy_goes_by_the_loss_and_says_so(random_lens: Lens) -> None:
    found = gradient_importance(random_lens, ragged(), "accuracy")
    loss = gradient_importance(random_lens, ragged(), "loss")
    assert found.metric == "loss"
    assert torch.equal(found.importance, loss.importance)
    assert "Accuracy has no gradient" in found.notes[0]
    assert loss.notes == ()
    single = gradient_importance(random_lens, ragged(1))
    assert "One prompt" in single.notes[0]
    assert single.low.isnan().all()


def test_inside_an_edit_it_is_the_edited_models(random_lens: Lens) -> None:
    task = ragged()
    with random_lens.edit(al.Zero("L0H1")):
        found = gradient_importance(random_lens, task)
    model = copy.deepcopy(random_lens.model)
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight[8:16] = 0
    wanted = gradient_importance(al.load(model), task)
    assert torch.allclose(found.importance, wanted.importance, atol=1e-12)
    assert found.importance[1] == 0


def trials_of(lens: Lens, task: Task) -> list[Sequence[Edit]]:
    means = lens.mean_z(task.corrupt_inputs())
    other = lens.run(task.corrupt_inputs(), keep=("v", "z"))
    return [
        [al.Zero("L2H1")],
        [al.Scale("L2H0", 0.3)],
        [al.Scale("L2H3", 3.0, queries=1)],
        [al.Mean("L2", means)],
        [al.Uniform("L2H2")],
        [al.Zero("L2H1"), al.Uniform("L2H2,L2H3")],
        [Patch("L2H1", "z", other.z)],
        [Patch("L2H1,L2H2", "v", other.v)],  # acts before the kernel
        [al.Zero("L2H1", queries=task.mask & (task.clean > 20))],  # as wide as the whole task
    ]


@pytest.mark.parametrize("batch_size", [4, 3])
def test_with_a_linear_readout_first_order_effects_are_exact(
    linear_lens: Lens, batch_size: int
) -> None:
    task = ragged()
    trials = trials_of(linear_lens, task)
    named = [Trial(str(number), edits) for number, edits in enumerate(trials)]
    found = first_order_effects(linear_lens, task, named, batch_size=batch_size)
    reads = task.reads
    clean = task.score(linear_lens.logits(task.clean_inputs(), reads))
    for number, edits in enumerate(trials):
        with linear_lens.edit(*edits):
            edited = task.score(linear_lens.logits(task.clean_inputs(), reads))
        assert torch.allclose(found[number], edited - clean, atol=1e-10)
        assert (edited - clean).abs().max() > 1e-4


def zero(*heads: str) -> Trial:
    return Trial(" ".join(heads), [al.Zero(head) for head in heads])


def test_first_order_effects_add_up_and_halve(random_lens: Lens) -> None:
    task = ragged()
    signed = gradient_importance(random_lens, task).signed_by_prompt
    heads = [str(head) for head in random_lens.anatomy.heads]
    zeros = first_order_effects(random_lens, task, [zero(head) for head in heads])
    assert torch.allclose(zeros, signed, atol=1e-12)
    halves = first_order_effects(random_lens, task, [Trial("half", [al.Scale("L0H2", 0.5)])])
    assert torch.allclose(halves[0], signed[2] / 2, atol=1e-12)
    pair = first_order_effects(random_lens, task, [zero("L0H1", "L2H3")])
    assert torch.allclose(pair[0], signed[1] + signed[11], atol=1e-12)


def test_an_edit_of_no_head_is_refused(random_lens: Lens) -> None:
    steer = SteerStream("L1", vectors={"L1": torch.zeros(32)})
    with pytest.raises(InputError, match=r"'push' .* changes a stream"):
        first_order_effects(random_lens, ragged(), [Trial("push", [steer])])


def test_bad_requests_are_named(random_lens: Lens) -> None:
    with pytest.raises(InputError, match="tokens, prompts"):
        gradient_importance(random_lens, ragged(), estimator="heads")
    with pytest.raises(TaskError, match="unknown metric"):
        gradient_importance(random_lens, ragged(), metric="f1")
    with pytest.raises(InputError, match="resamples"):
        gradient_importance(random_lens, ragged(), resamples=0)
    headless = al.load(tiny_gpt2().transformer)
    with pytest.raises(InputError, match="no language-model head"):
        gradient_importance(headless, ragged())
    broken = al.load(tiny_gpt2())
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        gradient_importance(broken, ragged())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mixtral"])
def test_on_other_decoders_padding_and_batches_change_nothing(name: str) -> None:
    lens = al.load(ARCHITECTURES[name].build().double())
    task = repeated_tokens(lens, prompts=3, period=4)
    other = repeated_tokens(lens, prompts=1, period=6, seed=2)
    longer = Task.from_prompts(
        "both",
        clean=[*task.clean.tolist(), *other.clean.tolist()],
        corrupt=[*task.corrupt.tolist(), *other.corrupt.tolist()],
        reads=[row[-3:] for row in [*task.reads.tolist(), *other.reads.tolist()]],
        answers=[row[-3:] for row in [*task.answers.tolist(), *other.answers.tolist()]],
        wrong=[row[-3:] for row in [*task.wrong.tolist(), *other.wrong.tolist()]],
        metric="loss",
    )
    alone = gradient_importance(lens, task, resamples=10)
    padded = gradient_importance(lens, longer, resamples=10)
    # norms and softmaxes of these models are float32
    assert torch.allclose(padded.by_prompt[:, :3], alone.by_prompt, rtol=1e-4, atol=1e-6)
    assert padded.importance.min() > 0
