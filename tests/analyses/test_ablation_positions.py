import pytest
import torch

from attnlens.analyses.ablation import ablate
from attnlens.analyses.ablation_positions import ablate_positions
from attnlens.errors import InputError
from attnlens.hooks.edits import Zero
from attnlens.lens import Lens
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task, repeated_tokens

PERIOD = 8


@pytest.fixture(scope="module")
def task(induction_lens: Lens) -> Task:
    """START, 8 tokens, the same 8 again; the first 7 of the second copy are read."""
    return repeated_tokens(induction_lens, prompts=5, period=PERIOD)


def test_each_head_matters_where_it_writes_what_is_used(induction_lens: Lens, task: Task) -> None:
    """One of 7 answers is lost: L1H2 where it answers, L0H1 one after what is looked for."""
    found = ablate_positions(induction_lens, task, "all", metric="accuracy")
    assert found.effect.shape == (8, 17)
    at = {str(head): number for number, head in enumerate(found.heads)}
    one = torch.tensor(-1 / 7).double()
    induction, previous = torch.zeros(17).double(), torch.zeros(17).double()
    induction[9:16] = one  # rows that are read
    previous[2:9] = one  # what stands behind each token of the first copy
    torch.testing.assert_close(found.effect[at["L1H2"]], induction)
    torch.testing.assert_close(found.effect[at["L0H1"]], previous)
    others = [number for name, number in at.items() if name not in ("L0H1", "L1H2")]
    assert (found.effect[others] == 0).all()
    assert found.positions == tuple(range(17))
    assert len(found.tokens) == 17


@pytest.mark.parametrize("mode", ["zero", "resample", "uniform"])
def test_positions_before_a_change_need_not_run_again(random_lens: Lens, mode: str) -> None:
    task = repeated_tokens(random_lens, prompts=3, period=9)
    found = ablate_positions(random_lens, task, "L0H1,L2H3", mode=mode)
    full = ablate_positions(
        random_lens, task, "L0H1,L2H3", mode=mode, sweep=SweepSettings(restart=False)
    )
    torch.testing.assert_close(found.ablated, full.ablated, rtol=1e-10, atol=1e-10)
    # The last position is never read.
    assert (found.effect[:, -1].abs() < 1e-12).all()


def test_a_position_is_an_edit_at_that_row(random_lens: Lens) -> None:
    task = repeated_tokens(random_lens, prompts=3, period=5)
    found = ablate_positions(random_lens, task, "L1H2", positions=(2, -2))
    for column, position in enumerate(found.positions):
        with random_lens.edit(Zero("L1H2", queries=position)):
            logits = random_lens.logits(task.clean_inputs(), task.reads)
        wanted = task.score(logits)
        torch.testing.assert_close(found.ablated[0, column], wanted, rtol=1e-12, atol=1e-12)
    frame = found.to_frame()
    assert frame["position"].tolist() == [2, -2]
    assert frame["effect"].tolist() == found.effect[0].tolist()


def test_at_the_only_row_that_is_read_the_last_layer_is_a_whole_ablation(
    random_lens: Lens,
) -> None:
    task = repeated_tokens(random_lens, prompts=3, period=3)
    last = task.subset([0, 1, 2])
    rows = [int(row) for row in last.reads[0]]
    found = ablate_positions(random_lens, task, "L2H0", positions=rows, metric="loss")
    whole = ablate(random_lens, task, "L2H0", metric="loss", controls=0)
    # Each read is moved by its own position alone, and the metric is their mean.
    torch.testing.assert_close(found.effect.sum(1), whole.effect)


def test_positions_that_a_prompt_does_not_have_are_refused(random_lens: Lens) -> None:
    task = repeated_tokens(random_lens, prompts=2, period=5)
    length = int(task.mask.sum(1).min())
    for positions in ((length,), (-length - 1,), ()):
        with pytest.raises(InputError, match=f"choose {-length} to {length - 1}"):
            ablate_positions(random_lens, task, "L0H0", positions)
