import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.analyses.ablation import Mode, ablate
from attnlens.analyses.ablation_groups import ablate_together
from attnlens.errors import HeadError, InputError
from attnlens.lens import Lens
from attnlens.tasks import Task, repeated_tokens
from tests.analyses.conftest import tiny_gpt2


@pytest.fixture(scope="module")
def task(induction_lens: Lens) -> Task:
    return repeated_tokens(induction_lens, prompts=5, period=8)


@pytest.fixture
def small(random_lens: Lens) -> Task:
    return repeated_tokens(random_lens, prompts=3, period=5)


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.FROZEN])
def test_only_the_circuit_matters(induction_lens: Lens, task: Task, mode: Mode) -> None:
    found = ablate(induction_lens, task, mode=mode, metric="accuracy")
    assert (found.clean == 1).all()
    frame = found.to_frame().set_index("head")
    assert (frame.loc[["L0H1", "L1H2"], "ablated"] < 0.2).all()
    assert (frame.drop(["L0H1", "L1H2"])["effect"].abs() < 1e-12).all()
    # the control of a head of the circuit is heads that do nothing, and the other way round
    assert frame.loc["L0H1", "control"] == 0
    assert frame.loc["L0H0", "control"] == pytest.approx(frame.loc["L0H1", "effect"] / 3)


def test_with_later_maps_frozen_the_previous_token_head_is_not_missed(
    induction_lens: Lens, task: Task
) -> None:
    """L0H1 works through the map of L1H2 alone; L1H2 writes the answer itself."""
    found = ablate(induction_lens, task, mode="frozen", metric="accuracy", controls=0)
    frame = found.to_frame().set_index("head")
    assert frame.loc["L1H2", "ablated"] < 0.2
    assert (frame.drop("L1H2")["effect"].abs() < 1e-12).all()


def test_zero_is_zeroing_the_output_projections_slice(random_lens: Lens, small: Task) -> None:
    found = ablate(random_lens, small, "L1H2", metric="loss")
    projection = random_lens.model.transformer.h[1].attn.c_proj

    def drop(_: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        changed = given[0].clone()
        changed[..., 16:24] = 0
        return (changed,)

    handle = projection.register_forward_pre_hook(drop)
    with torch.no_grad():
        logits = random_lens.model(small.clean).logits
    handle.remove()
    wanted = small.score(small.at_reads(logits), "loss")
    assert torch.allclose(found.ablated[0], wanted, atol=1e-12)
    assert not torch.allclose(found.ablated[0], found.clean)


def test_uniform_is_the_even_mean_of_visible_values(random_lens: Lens, small: Task) -> None:
    found = ablate(random_lens, small, "L2H1", mode="uniform")
    trace = random_lens.run(small.clean, keep="v", layers="L2")
    value = trace.v[2][:, 1]
    seen = torch.arange(1, value.shape[1] + 1)[:, None]
    even = value.cumsum(1) / seen

    def replace(_: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        changed = given[0].clone()
        changed[..., 8:16] = even
        return (changed,)

    handle = random_lens.model.transformer.h[2].attn.c_proj.register_forward_pre_hook(replace)
    with torch.no_grad():
        logits = random_lens.model(small.clean).logits
    handle.remove()
    assert torch.allclose(found.ablated[0], small.score(small.at_reads(logits)), atol=1e-10)


def test_the_mean_of_a_constant_head_changes_nothing(small: Task) -> None:
    model = tiny_gpt2()
    with torch.no_grad():  # the value of head 3 in layer 0 is its bias, whatever stands there
        attention = model.transformer.h[0].attn
        attention.c_attn.weight[:, 64 + 24 :] = 0
        attention.c_attn.bias[64 + 24 :] = torch.arange(1.0, 9).double()
    lens = al.load(model)
    found = ablate(lens, small, "L0H3,L0H2", mode="mean")
    assert torch.allclose(found.effect[0], torch.tensor(0.0).double(), atol=1e-5)
    assert abs(float(found.effect[1])) > 1e-3
    assert abs(float(ablate(lens, small, "L0H3").effect[0])) > 1e-3


def test_the_reference_gives_the_means(random_lens: Lens, small: Task) -> None:
    corrupt = ablate(random_lens, small, "L0H0", mode="mean", controls=0)
    same = ablate(
        random_lens, small, "L0H0", mode="mean", reference=small.corrupt_inputs(), controls=0
    )
    other = ablate(random_lens, small, "L0H0", mode="mean", reference=[[1, 2, 3]], controls=0)
    assert torch.equal(corrupt.ablated, same.ablated)
    assert not torch.equal(corrupt.ablated, other.ablated)


def test_controls_are_other_heads_of_the_layer(random_lens: Lens, small: Task) -> None:
    seen: list[tuple[int, int]] = []
    found = ablate(
        random_lens, small, "L1H0", controls=2, seed=4, progress=lambda *at: seen.append(at)
    )
    (drawn,) = found.control_heads
    assert len(drawn) == 2
    assert all(head.site == "L1" and head.head != 0 for head in drawn)
    # the clean run, the head and two controls, each on three prompts
    assert seen == [(3, 12), (6, 12), (9, 12), (12, 12)]
    others = ablate(random_lens, small, drawn, controls=0)
    assert torch.allclose(found.control[0], others.effect.mean())
    assert others.control.isnan().all()
    assert "No control" in others.notes[0]
    again = ablate(random_lens, small, "L1H0", controls=2, seed=4)
    assert again.control_heads == found.control_heads
    assert torch.equal(again.low, found.low)


def test_intervals_are_of_paired_differences(random_lens: Lens, small: Task) -> None:
    found = ablate(random_lens, small, "L0", controls=0)
    change = found.ablated - found.clean
    assert torch.allclose(found.effect, change.mean(1))
    assert (found.low >= change.amin(1) - 1e-12).all()
    assert (found.high <= change.amax(1) + 1e-12).all()
    assert (found.low < found.high).all()


def test_a_set_is_ablated_at_once_beside_matched_sets(induction_lens: Lens, task: Task) -> None:
    found = ablate_together(induction_lens, task, "L0H1,L1H2", metric="accuracy", controls=4)
    assert found.effect < -0.8
    assert (found.control == 0).all()
    for drawn in found.control_sets:
        assert [head.site for head in drawn] == ["L0", "L1"]
        assert not set(drawn) & set(found.heads)
    full = ablate_together(induction_lens, task, "L0", metric="accuracy")
    assert full.control.numel() == 0
    assert "No control: L0 has 0 heads outside the set" in full.notes[0]


def test_the_model_is_as_before(random_lens: Lens, small: Task) -> None:
    before = random_lens.logits(small.clean_inputs(), small.reads)
    ablate(random_lens, small, "L0", mode="uniform", controls=0)
    assert torch.equal(before, random_lens.logits(small.clean_inputs(), small.reads))


def test_bad_requests_are_named(random_lens: Lens, small: Task) -> None:
    with pytest.raises(
        InputError, match="zero, mean, position_mean, resample, uniform, identity, frozen"
    ):
        ablate(random_lens, small, mode="none")
    with pytest.raises(HeadError, match="L7H0"):
        ablate(random_lens, small, "L7H0")
