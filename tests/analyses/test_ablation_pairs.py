import pytest
import torch

from attnlens.analyses.ablation import ablate
from attnlens.analyses.ablation_groups import ablate_together
from attnlens.analyses.ablation_pairs import ablate_pairs
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.tasks import Task, repeated_tokens


@pytest.fixture(scope="module")
def task(induction_lens: Lens) -> Task:
    return repeated_tokens(induction_lens, prompts=5, period=8)


def test_the_two_heads_of_the_circuit_do_one_thing(induction_lens: Lens, task: Task) -> None:
    """Without L1H2 nothing is written: all logits are 0, with L0H1 or without.

    Without L0H1 the induction head looks at the start token and answers it with 16; so accuracy is
    0 without either, and the interaction makes good one of the two effects.
    """
    found = ablate_pairs(induction_lens, task, "all", metric="accuracy")
    at = {str(head): number for number, head in enumerate(found.heads)}
    one, other = at["L0H1"], at["L1H2"]
    single = found.single.clone()
    assert single[one] < -0.8
    assert single[other] < -0.8
    assert found.joint[one, other] == pytest.approx(float(single[other]))
    assert found.interaction[one, other] == pytest.approx(float(-single[one]))
    idle = [number for number in at.values() if number not in (one, other)]
    assert (single[idle] == 0).all()
    assert (found.interaction[idle] == 0).all()
    torch.testing.assert_close(found.joint[idle][:, other], single[other].expand(len(idle)))
    assert torch.equal(found.interaction, found.interaction.T)
    assert torch.equal(found.joint.diagonal(), single)


def test_the_loss_of_the_pair_is_known(induction_lens: Lens, task: Task) -> None:
    """Without L1H2 all 32 tokens are alike, and it does not matter what L0H1 does."""
    found = ablate_pairs(induction_lens, task, "L0H1,L1H2", metric="loss")
    alike = torch.tensor(32.0).double().log()
    # 16 for the right token and 0 for 31 others, up to the tails of a softmax.
    assert (found.clean < 1e-3).all()
    lost = alike - found.clean.mean()
    close = {"rtol": 0, "atol": 1e-5}  # float32
    torch.testing.assert_close(found.single[1], lost, **close)
    torch.testing.assert_close(found.joint[0, 1], lost, **close)
    torch.testing.assert_close(found.interaction[0, 1], -found.single[0], **close)
    assert found.single[0] > 10  # sure of the start token


def test_an_interaction_is_joint_minus_sum(random_lens: Lens) -> None:
    task = repeated_tokens(random_lens, prompts=4, period=5)
    found = ablate_pairs(random_lens, task, "L0H0,L1H2,L2H3", "mean", seed=3)
    single = ablate(random_lens, task, "L0H0,L1H2,L2H3", "mean", controls=0)
    joint = ablate_together(random_lens, task, "L0H0,L2H3", "mean", controls=0)
    torch.testing.assert_close(found.single, single.effect, rtol=1e-12, atol=1e-12)
    assert float(found.joint[0, 2]) == pytest.approx(joint.effect, abs=1e-12)
    wanted = float(joint.effect - single.effect[0] - single.effect[2])
    assert float(found.interaction[0, 2]) == pytest.approx(wanted, abs=1e-12)
    assert found.low[0, 2] < found.interaction[0, 2] < found.high[0, 2]
    frame = found.to_frame()
    assert frame[["head", "other"]].to_numpy().tolist() == [
        ["L0H0", "L1H2"],
        ["L0H0", "L2H3"],
        ["L1H2", "L2H3"],
    ]
    assert frame["interaction"][1] == pytest.approx(wanted, abs=1e-12)


def test_one_head_is_no_pair(random_lens: Lens) -> None:
    with pytest.raises(InputError, match="a pair needs two"):
        ablate_pairs(random_lens, repeated_tokens(random_lens, prompts=2, period=5), "L0H0")
