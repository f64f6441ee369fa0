"""A model and a task are known again by every number in them, and by nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import attnlens as al
from attnlens.errors import FileError
from attnlens.lens import Lens
from attnlens.sweeps.fingerprint import model_facts, task_facts
from attnlens.sweeps.manifest import Manifest
from attnlens.sweeps.store import Store
from attnlens.tasks import Task, repeated_tokens


def make_lens(**changed: Any) -> Lens:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=40, **changed)
    return al.load(GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def lens() -> Lens:
    return make_lens()


@pytest.fixture(scope="module")
def task(lens: Lens) -> Task:
    return repeated_tokens(lens, prompts=2, period=4)


def test_a_model_loaded_anew_is_the_same(lens: Lens, tmp_path: Path) -> None:
    facts = model_facts(lens)
    assert facts["name"] == "GPT2LMHeadModel"
    assert facts == model_facts(make_lens())
    lens.model.save_pretrained(tmp_path)
    assert facts == model_facts(al.load(GPT2LMHeadModel.from_pretrained(tmp_path)))


def test_running_a_model_changes_nothing(lens: Lens) -> None:
    before = model_facts(lens)
    lens.run([1, 2, 3])
    assert model_facts(lens) == before


def test_the_smallest_change_of_any_weight_is_seen() -> None:
    lens = make_lens()
    seen = {model_facts(lens)["weights"]}
    for number, weight in enumerate(lens.model.parameters()):
        with torch.no_grad():
            flat = weight.view(-1)  # the last number of even ones, one in the middle of odd ones
            at = -1 if number % 2 else flat.numel() // 2
            flat[at] = torch.nextafter(flat[at], torch.tensor(9.0))
        seen.add(model_facts(lens)["weights"])
    lens.model.register_buffer("rotation", torch.ones(3))
    seen.add(model_facts(lens)["weights"])
    lens.model.bfloat16()
    seen.add(model_facts(lens)["weights"])
    assert len(seen) == len(list(lens.model.parameters())) + 3


def test_how_a_weight_lies_in_memory_does_not_matter(lens: Lens) -> None:
    other = make_lens()
    for weight in other.model.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.t().contiguous().t()
    assert model_facts(other) == model_facts(lens)


def test_weights_that_are_offloaded_count_as_those_in_memory(lens: Lens) -> None:
    offloaded = [make_lens(), make_lens(), make_lens(n_inner=16)]
    for other in offloaded:
        accelerate.cpu_offload(other.model)
    same, again, smaller = (model_facts(other)["weights"] for other in offloaded)
    assert same == again == model_facts(lens)["weights"]
    assert smaller != same


def test_the_same_weights_under_another_config_are_another_model(lens: Lens) -> None:
    other = make_lens(activation_function="relu")
    facts, now = model_facts(lens), model_facts(other)
    assert facts["weights"] == now["weights"]
    assert {key for key in now["config"] if now["config"][key] != facts["config"][key]} == {
        "activation_function"
    }


def test_a_task_is_known_by_what_is_graded(task: Task) -> None:
    facts = task_facts(task)
    assert facts == task_facts(replace(task, texts=("a",) * len(task)))
    assert facts["metric"] == task.metric
    assert task_facts(task, "accuracy") == facts | {"metric": "accuracy"}
    seen = {facts["tensors"]}
    for name in ("clean", "corrupt", "answers", "wrong"):
        tensor = getattr(task, name).clone()
        tensor[-1, -1] += 1
        seen.add(task_facts(replace(task, **{name: tensor}))["tensors"])
    reads = task.reads.clone()
    reads[0, 0] -= 1
    seen.add(task_facts(replace(task, reads=reads))["tensors"])
    assert len(seen) == 6


def test_a_sweep_of_another_model_is_refused(lens: Lens, task: Task, tmp_path: Path) -> None:
    def known(lens: Lens) -> Manifest:
        return Manifest.of(
            model=model_facts(lens), task=task_facts(task), prompts=len(task), trials=[("L0H0", 0)]
        )

    Store.create(tmp_path / "sweep", known(lens))
    Store.resume(tmp_path / "sweep", known(make_lens()))
    other = make_lens()
    other.model.get_parameter("transformer.h.0.attn.c_proj.weight").data[0, 0] = 0
    with pytest.raises(FileError, match=r"another sweep: model.weights is \"sha256"):
        Store.resume(tmp_path / "sweep", known(other))
    with pytest.raises(FileError, match=r"model.config.n_inner is null there and 32 here"):
        Store.resume(tmp_path / "sweep", known(make_lens(n_inner=32)))
