import pytest
import torch

from attnlens.analyses.ablation import ablate
from attnlens.analyses.ablation_groups import ablate_groups, ablate_layers, ablate_together
from attnlens.errors import HeadError, InputError
from attnlens.lens import Lens
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task, repeated_tokens


@pytest.fixture(scope="module")
def task(induction_lens: Lens) -> Task:
    return repeated_tokens(induction_lens, prompts=5, period=8)


def test_groups_that_hold_a_head_of_the_circuit_matter(induction_lens: Lens, task: Task) -> None:
    groups = {"circuit": "L0H1,L1H2", "half": "L0H1,L1H0", "rest": "L0H0,L0H2,L0H3,L1H0,L1H1,L1H3"}
    found = ablate_groups(induction_lens, task, groups, metric="accuracy")
    assert found.names == ("circuit", "half", "rest")
    assert (found.clean == 1).all()
    frame = found.to_frame().set_index("group")
    assert (frame.loc[["circuit", "half"], "effect"] < -0.8).all()
    assert frame.loc["rest", "effect"] == 0
    assert frame["heads"].tolist() == [2, 2, 6]
    assert torch.equal(found.effect, (found.ablated - found.clean).mean(1))


def test_a_group_of_one_is_that_head(random_lens: Lens) -> None:
    task = repeated_tokens(random_lens, prompts=3, period=5)
    found = ablate_groups(random_lens, task, {"a": "L1H2", "b": "L2H0"}, "uniform")
    single = ablate(random_lens, task, "L1H2,L2H0", "uniform", controls=0)
    torch.testing.assert_close(found.ablated, single.ablated, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.low, single.low)


def test_layers_are_all_their_heads(random_lens: Lens) -> None:
    task = repeated_tokens(random_lens, prompts=3, period=5)
    found = ablate_layers(random_lens, task, "L1:", sweep=SweepSettings(tokens=1))
    assert found.names == ("L1", "L2")
    assert [len(group) for group in found.groups] == [4, 4]
    wanted = ablate_together(random_lens, task, "L2", controls=0)
    torch.testing.assert_close(found.ablated[1], wanted.ablated, rtol=1e-12, atol=1e-12)


def test_a_set_of_all_but_one_layer_has_a_control_where_heads_are_left(random_lens: Lens) -> None:
    task = repeated_tokens(random_lens, prompts=3, period=5)
    found = ablate_together(random_lens, task, "L0H0,L0H1,L1H3", controls=3, seed=2)
    assert len(found.control_sets) == len(found.control)
    for drawn, effect in zip(found.control_sets, found.control, strict=True):
        assert [head.site for head in drawn] == ["L0", "L0", "L1"]
        again = ablate_together(random_lens, task, drawn, controls=0)
        assert float(effect) == pytest.approx(again.effect, abs=1e-12)


def test_bad_groups_are_named(random_lens: Lens) -> None:
    task = repeated_tokens(random_lens, prompts=2, period=5)
    with pytest.raises(InputError, match="No group"):
        ablate_groups(random_lens, task, {})
    with pytest.raises(HeadError, match="L9H0"):
        ablate_groups(random_lens, task, {"far": "L9H0"})
