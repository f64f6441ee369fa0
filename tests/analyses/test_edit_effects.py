import pytest
import torch

import attnlens as al
from attnlens.analyses.ablation import ablate
from attnlens.analyses.edit_effects import try_edits
from attnlens.errors import InputError
from attnlens.lens import Lens
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task, repeated_tokens


@pytest.fixture(scope="module")
def task(random_lens: Lens) -> Task:
    return repeated_tokens(random_lens, prompts=5, period=5)


def test_edits_are_graded_as_in_a_block_of_edit(random_lens: Lens, task: Task) -> None:
    kept = random_lens.run(task.corrupt_inputs(), keep=("z", "residual"))
    lists = {
        "quiet": al.Scale("L1", 0.5),
        "patched": [al.Patch("L2H1", "z", kept.z), al.Zero("L0H3", queries=2)],
        "stream": al.PatchStream("L2", values=kept.kept["residual"]),
        "same": al.Scale("all", 1.0),
    }
    found = try_edits(random_lens, task, lists, sweep=SweepSettings(batch_size=2))
    assert found.names == tuple(lists)
    for number, given in enumerate(lists.values()):
        edits = [given] if not isinstance(given, list) else given
        with random_lens.edit(*edits):
            wanted = task.score(random_lens.logits(task.clean_inputs(), task.reads))
        torch.testing.assert_close(found.edited[number], wanted, rtol=1e-12, atol=1e-12)
    assert found.effect[3].abs() < 1e-12
    # The stream of the corrupt run gives its answers; the last copy's tokens are the same there.
    corrupt = task.score(random_lens.logits(task.corrupt_inputs(), task.reads))
    torch.testing.assert_close(found.edited[2], corrupt, rtol=1e-12, atol=1e-12)
    frame = found.to_frame()
    assert frame["name"].tolist() == list(lists)
    assert "; " in frame["edits"][1]


def test_only_the_circuit_matters_to_edits_too(induction_lens: Lens) -> None:
    task = repeated_tokens(induction_lens, prompts=3, period=8)
    lists = {str(head): al.Zero(head) for head in induction_lens.anatomy.find("all")}
    found = try_edits(induction_lens, task, lists, metric="accuracy")
    matter = [name for name, by in zip(found.names, found.effect, strict=True) if by < -0.8]
    assert matter == ["L0H1", "L1H2"]
    assert int((found.effect == 0).sum()) == 6
    same = ablate(induction_lens, task, metric="accuracy", controls=0)
    assert torch.equal(found.edited, same.ablated)


def test_edits_are_stored_and_resumed(random_lens: Lens, task: Task, tmp_path) -> None:
    lists = {"a": al.Zero("L0H0"), "b": [al.Hide("L1", keys=0)]}
    sweep = SweepSettings(store=tmp_path / "edits")
    first = try_edits(random_lens, task, lists, sweep=sweep)
    again = SweepSettings(store=tmp_path / "edits", resume=True)
    second = try_edits(random_lens, task, lists, sweep=again)
    assert torch.equal(first.edited, second.edited)
    assert Store.open(tmp_path / "edits").manifest.settings["kind"] == "edits"


def test_no_edits_are_refused(random_lens: Lens, task: Task) -> None:
    with pytest.raises(InputError, match="No edits"):
        try_edits(random_lens, task, {})
    with pytest.raises(InputError, match="'empty' has no edit"):
        try_edits(random_lens, task, {"empty": []})
