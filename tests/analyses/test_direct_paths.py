"""Path patching along direct edges: one edge of a forward that is written out, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnlens as al
from attnlens.analyses.path_patching import PathEffects
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.lens import Lens
from attnlens.sweeps.sweep import SweepSettings
from attnlens.tasks import Task
from attnlens.tasks.other_name import other_name
from attnlens.zoo import name_model
from tests.analyses.conftest import tiny_gpt2
from tests.analyses.test_path_patching import random_task, tiny_llama
from tests.architectures import ARCHITECTURES
from tests.oracles import paths


@pytest.fixture(scope="module")
def task() -> Task:
    return random_task((11, 11, 11))


@pytest.fixture(scope="module")
def lens() -> Lens:
    return al.load(tiny_gpt2())


def by_hand(lens: Lens, task: Task, edge: paths.Edge) -> torch.Tensor:
    """The change of each prompt's metric with one edge of a GPT-2 as in the corrupt run."""
    with torch.no_grad():
        clean, _ = paths.run(lens.model, task.clean)
        _, other = paths.run(lens.model, task.corrupt)
        patched, _ = paths.run(lens.model, task.clean, edge, other)
    return task.score(task.at_reads(patched)) - task.score(task.at_reads(clean))


def change(found: PathEffects, sender: str) -> torch.Tensor:
    return found.patched[found.senders.index(sender)] - found.clean


def test_one_edge_is_that_of_the_forward_written_out(lens: Lens, task: Task) -> None:
    for receiver, kind in (("L2H1", "q"), ("L2H1", "k"), ("L1H0", "v")):
        found = al.path_patch(lens, task, f"{receiver}<{kind}>", form="direct")
        for sender in ("L0H0", "L0H3", *(["L1H2"] if receiver == "L2H1" else [])):
            wanted = by_hand(lens, task, (sender, receiver, kind))
            assert wanted.abs().max() > 1e-6
            # float64, the same sums in another order
            assert torch.allclose(change(found, sender), wanted, atol=1e-10, rtol=0)


def test_edges_to_the_logits(lens: Lens, task: Task) -> None:
    found = al.path_patch(lens, task, form="direct")
    for sender in found.senders:
        wanted = by_hand(lens, task, (sender, "logits", ""))
        assert torch.allclose(change(found, sender), wanted, atol=1e-10, rtol=0)
    # To the logits MLPs answer in the other form, and hear nothing in this.
    frozen = al.path_patch(lens, task)
    assert not torch.allclose(frozen.patched, found.patched, atol=1e-6)


def test_both_forms_agree_where_mlps_write_nothing() -> None:
    lens = al.load(name_model().double())
    task = other_name(lens, prompts=3, length=10)
    for receivers in ("logits", "L3H0<q>", ["L2H1<k>", "L2H3<v>"]):
        direct = al.path_patch(lens, task, receivers, form="direct")
        frozen = al.path_patch(lens, task, receivers)
        assert direct.senders == frozen.senders
        assert torch.allclose(direct.patched, frozen.patched, atol=1e-9)
        assert torch.allclose(direct.share, frozen.share, atol=1e-9)


def test_heads_that_share_keys_receive_together() -> None:
    lens, task = al.load(tiny_llama()), random_task((9, 9))
    one = al.path_patch(lens, task, "L2H0<k>", form="direct")
    other = al.path_patch(lens, task, "L2H1<k>", form="direct")
    assert torch.equal(one.patched, other.patched)
    assert any("read the same k" in note for note in one.notes)
    query = al.path_patch(lens, task, "L2H0<q>", form="direct")
    assert not torch.allclose(query.patched, al.path_patch(lens, task, "L2H1<q>").patched)


def test_embeddings_and_mlps_send_and_receive(lens: Lens, task: Task) -> None:
    found = al.path_patch(lens, task, "L2.mlp", ["embed", "L0.mlp", "L1H1"], form="direct")
    with torch.no_grad():
        clean, written = paths.run(lens.model, task.clean)
        _, other = paths.run(lens.model, task.corrupt)
        base = task.score(task.at_reads(clean))
        for sender, name in (("embed", "embed"), ("L0.mlp", "M0"), ("L1H1", "L1H1")):
            offsets = {("M2", ""): other[name] - written[name]}
            patched, _ = paths.run(lens.model, task.clean, offsets=offsets)
            wanted = task.score(task.at_reads(patched)) - base
            assert torch.allclose(change(found, sender), wanted, atol=1e-10, rtol=0)


def test_denoising_is_noise_with_the_prompts_changed_about(lens: Lens, task: Task) -> None:
    found = al.path_patch(lens, task, "L2H1<v>", "L0H2", form="direct", direction="denoise")
    with torch.no_grad():
        corrupt, _ = paths.run(lens.model, task.corrupt)
        _, clean = paths.run(lens.model, task.clean)
        patched, _ = paths.run(lens.model, task.corrupt, ("L0H2", "L2H1", "v"), clean)
    wanted = task.score(task.at_reads(patched)) - task.score(task.at_reads(corrupt))
    assert torch.allclose(found.patched[0] - found.corrupt, wanted, atol=1e-10, rtol=0)


def test_what_this_form_does_not_have(lens: Lens, task: Task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in memory"):
        al.path_patch(lens, task, form="direct", sweep=SweepSettings(store=tmp_path / "store"))
    gemma = al.load(ARCHITECTURES["gemma2"].build())
    with pytest.raises(UnsupportedModelError, match="not simply added"):
        al.path_patch(gemma, task, form="direct")
