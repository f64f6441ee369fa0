"""Screened ablation: estimates that are exact, one that a saturated softmax hides, and notes."""

import pytest
import torch
from torch import nn

import attnlens as al
from attnlens.analyses.ablation import Mode, ablate
from attnlens.analyses.screening import ablate_screened
from attnlens.errors import HeadError, InputError
from attnlens.lens import Lens
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task, repeated_tokens
from tests.analyses.conftest import tiny_gpt2


@pytest.fixture(scope="module")
def linear_lens() -> Lens:
    """Logits are linear in what the heads of the last layer write: no last MLP, no last norm."""
    model = tiny_gpt2()
    model.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.weight.zero_()
        model.transformer.h[-1].mlp.c_proj.bias.zero_()
    return al.load(model)


@pytest.fixture(scope="module")
def task(linear_lens: Lens) -> Task:
    return repeated_tokens(linear_lens, prompts=3, period=5)


LINEAR = [mode for mode in Mode if mode is not Mode.FROZEN]


@pytest.mark.parametrize("mode", LINEAR)
def test_with_a_linear_readout_estimates_are_exact(
    linear_lens: Lens, task: Task, mode: Mode
) -> None:
    found = ablate_screened(linear_lens, task, "L2", 4, mode, "logit_difference")
    exact = ablate(linear_lens, task, "L2", mode, "logit_difference", controls=0)
    assert found.heads == exact.heads
    # means are kept in float64, and z too
    assert torch.allclose(found.estimate, exact.effect, atol=1e-10)
    assert torch.allclose(found.low, exact.low, atol=1e-10)
    assert torch.allclose(found.high, exact.high, atol=1e-10)
    assert found.agreement == pytest.approx(1)
    assert found.notes == ()


def test_the_leading_heads_are_ablated_exactly(linear_lens: Lens, task: Task) -> None:
    """Below the last layer estimates are no effects, and what was not verified stays unknown."""
    found = ablate_screened(linear_lens, task, top=5)
    ranked = found.estimate.abs().argsort(descending=True).tolist()
    assert found.exact.heads == tuple(found.heads[i] for i in ranked[:5])
    wanted = ablate(linear_lens, task, controls=0)
    frame = found.to_frame()
    assert frame["head"].tolist() == [str(head) for head in wanted.heads]
    effects = torch.tensor(frame["effect"].tolist())
    assert int(effects.isnan().sum()) == 7
    leading = ~effects.isnan()
    assert torch.allclose(effects[leading], wanted.effect[leading].float(), atol=1e-6)
    assert -1 <= found.agreement < 1


def test_what_the_estimate_gives_of_the_wired_circuit(induction_lens: Lens) -> None:
    """A saturated softmax hides L0H1 from the gradient: what is left has even the wrong sign.

    The answer's logit is 16 o / sd, where o is what L1H2 wrote and sd that of a stream with a one
    in each of four places (o is one of them; means are small): to first order the logit falls by
    3/4 of what o loses, and rises by 1/4 of what another place does. So L1H2 has -3/4 of 16. The
    place of L0H1 is one of four here and, at the norm below L1H2, one of three: 16 (1/4 + 3/4 1/3).
    That L1H2 then looks elsewhere, which takes all of the 16, no gradient tells.
    """
    task = repeated_tokens(induction_lens, prompts=4, period=8)
    found = ablate_screened(induction_lens, task, top=2, metric="logit_difference")
    assert [str(head) for head in found.exact.heads] == ["L1H2", "L0H1"]
    # the softmaxes have tails
    assert found.exact.effect.tolist() == pytest.approx([-16, -16], abs=0.01)
    estimates = dict(zip(map(str, found.heads), found.estimate.tolist(), strict=True))
    assert estimates.pop("L1H2") == pytest.approx(-12, abs=0.01)
    assert estimates.pop("L0H1") == pytest.approx(8, abs=0.01)
    assert all(abs(estimate) < 1e-6 for estimate in estimates.values())


def test_more_than_all_heads_are_all_heads(linear_lens: Lens, task: Task) -> None:
    found = ablate_screened(linear_lens, task, "L1", top=99)
    assert set(found.exact.heads) == set(found.heads) == set(linear_lens.anatomy.find("L1"))
    assert not found.to_frame()["effect"].isna().any()


@pytest.mark.parametrize("mode", ["resample", "frozen"])
def test_modes_that_are_made_of_other_runs(linear_lens: Lens, task: Task, mode: str) -> None:
    """Parts of the prompts have runs of their own."""
    whole = ablate_screened(linear_lens, task, "L0", 3, mode)
    parts = ablate_screened(linear_lens, task, "L0", 3, mode, sweep=SweepSettings(batch_size=2))
    assert torch.allclose(parts.estimate, whole.estimate, atol=1e-12)
    assert torch.allclose(parts.exact.effect, whole.exact.effect, atol=1e-12)
    wanted = ablate(linear_lens, task, whole.exact.heads, mode, controls=0)
    assert torch.allclose(whole.exact.effect, wanted.effect, atol=1e-12)


def test_estimates_of_frozen_are_those_of_zero_and_it_says_so(
    linear_lens: Lens, task: Task
) -> None:
    frozen = ablate_screened(linear_lens, task, "L0", 3, "frozen")
    zero = ablate_screened(linear_lens, task, "L0", 3, "zero")
    assert torch.equal(frozen.estimate, zero.estimate)
    assert not torch.allclose(frozen.exact.effect, zero.exact.effect, rtol=1e-3)
    assert "those of mode zero" in frozen.notes[0]
    assert zero.notes == ()


def test_agreement_is_of_three_heads_and_one_metric(linear_lens: Lens, task: Task) -> None:
    assert torch.tensor(ablate_screened(linear_lens, task, top=2).agreement).isnan()
    graded = ablate_screened(linear_lens, task, top=3, metric="accuracy")
    assert torch.tensor(graded.agreement).isnan()
    assert graded.exact.metric == "accuracy"
    assert "Accuracy has no gradient" in graded.notes[0]
    assert "ranks are not compared" in graded.notes[1]
    loss = ablate_screened(linear_lens, task, top=3, metric="loss")
    assert torch.equal(graded.estimate, loss.estimate)


@pytest.mark.filterwarnings("error")
def test_heads_that_do_nothing_have_no_ranks(induction_lens: Lens) -> None:
    task = repeated_tokens(induction_lens, prompts=2, period=8)
    found = ablate_screened(induction_lens, task, "L0H0,L0H2,L0H3,L1H0")
    assert found.estimate.abs().max() < 1e-6
    assert torch.tensor(found.agreement).isnan()


def test_the_model_is_as_before(linear_lens: Lens, task: Task) -> None:
    before = linear_lens.logits(task.clean_inputs(), task.reads)
    ablate_screened(linear_lens, task, top=3, mode="resample")
    assert torch.equal(before, linear_lens.logits(task.clean_inputs(), task.reads))
    assert all(weight.grad is None for weight in linear_lens.model.parameters())


def test_bad_requests_are_named(linear_lens: Lens, task: Task) -> None:
    with pytest.raises(InputError, match="top=0"):
        ablate_screened(linear_lens, task, top=0)
    with pytest.raises(InputError, match="zero, mean"):
        ablate_screened(linear_lens, task, mode="none")
    with pytest.raises(HeadError, match="L7H0"):
        ablate_screened(linear_lens, task, "L7H0")
