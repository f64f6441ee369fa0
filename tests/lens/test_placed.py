"""Models whose weights accelerate has laid out, some of them away on disk, are as the plain one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnlens as al
from attnlens.anatomy.placed import weight_names, weight_of
from attnlens.errors import InputError, WeightsError
from attnlens.lens import Lens
from attnlens.sweeps.fingerprint import model_facts
from attnlens.sweeps.modes import Ablator
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.sweep import SweepSettings
from tests.architectures import ARCHITECTURES
from tests.sweeps.naive import task_of

accelerate = pytest.importorskip("accelerate")

NAMES = ("gpt2", "llama", "mixtral", "bart")
IDS = torch.tensor([[20, 21, 22, 23, 24, 25, 26], [26, 20, 24, 21, 25, 22, 23]])


def laid_out(model: nn.Module, layout: str, folder: Path) -> nn.Module:
    """A copy with accelerate's hooks: all on the CPU, all but some on disk, or all in memory."""
    model = copy.deepcopy(model)
    if layout == "away":
        return accelerate.cpu_offload(model, execution_device="cpu")
    modules = dict(model.named_modules())
    blocks = {
        f"{name}.{child}": "disk" if child == "1" and layout == "disk" else "cpu"
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList)
        for child, _ in module.named_children()
    }
    others = {
        name: "cpu"
        for name, module in modules.items()
        if not list(module.children()) and not name.startswith(tuple(f"{b}." for b in blocks))
    }
    # As "auto" has it: whole blocks, whose own forward accelerate replaces.
    places = blocks | others
    places |= {name: "cpu" for name, _ in model.named_buffers(recurse=False)}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def forwards(model: nn.Module) -> dict[str, Any]:
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    ARCHITECTURES["llama"].build().save_pretrained(folder)
    return folder


@pytest.fixture(params=[(n, layout) for n in NAMES for layout in ("cpu", "disk", "away")], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Lens, Lens, dict[str, Any]]:
    """The plain model, the same laid out, and the forwards of the latter before all."""
    name, layout = request.param
    model = ARCHITECTURES[name].build().double()
    placed = laid_out(model, layout, tmp_path)
    assert any(weight.is_meta for weight in placed.parameters()) == (layout != "cpu")
    before = forwards(placed)
    plain = al.load(model)
    assert all(before[site.block] for site in plain.anatomy.sites) or layout == "away"
    return plain, al.load(placed), before


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_runs_edits_and_sweeps_are_those_of_the_plain_model(
    pair: tuple[Lens, Lens, dict[str, Any]],
) -> None:
    plain, placed, before = pair
    assert placed.device.type == "cpu"
    kinds = ("q", "pattern", "z", "residual")
    kinds += ("result",) if plain.anatomy.sites[0].output else ()
    last = plain.anatomy.sites[-1]
    weights = [lens.weights(last.name).output for lens in (placed, plain)]
    torch.testing.assert_close(*weights)
    one, other = plain.run(IDS, keep=kinds), placed.run(IDS, keep=kinds)
    for kind in kinds:
        for site, kept in one.kept[kind].items():
            torch.testing.assert_close(other.kept[kind][site], kept, rtol=0, atol=1e-12)

    task = task_of(plain)
    for mode in ("zero", "resample"):
        values = []
        for lens in (plain, placed):
            ablator = Ablator.of(lens, task, mode)
            trials = [ablator.trial([head]) for head in lens.anatomy.find("all")]
            values.append(run_trials(lens, task, trials, settings=SweepSettings(batch_size=2)))
        assert values[1].notes == values[0].notes
        torch.testing.assert_close(values[1].values, values[0].values, rtol=0, atol=1e-9)
    head = str(last.head(1))
    steps = {last.name: torch.ones(last.heads, last.d_v)}
    texts = []
    for lens in (plain, placed):
        with lens.edit(al.Uniform(head), al.Steer(head, "z", steps)):
            texts.append(lens.logits(task.clean_inputs(), task.reads))
    torch.testing.assert_close(texts[1], texts[0], rtol=0, atol=1e-12)

    assert model_facts(placed)["weights"] == model_facts(plain)["weights"]
    assert forwards(placed.model) == before


MAP = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
MAP |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


def test_a_folder_is_laid_out_as_it_is_loaded(folder: Path) -> None:
    plain, placed = al.load(folder), al.load(folder, device_map=MAP)
    assert any(weight.is_meta for weight in placed.model.parameters())
    assert weight_names(placed.model) == weight_names(plain.model)
    for name, weight in plain.model.named_parameters():
        assert torch.equal(weight_of(placed.model, name), weight)
    reads, auto = torch.full((2, 1), 6), al.load(folder, device_map="auto")
    wanted = plain.logits(IDS, reads)
    for lens in (placed, auto):
        torch.testing.assert_close(lens.logits(IDS, reads).cpu(), wanted, rtol=0, atol=1e-5)


def test_damage_is_seen_in_weights_that_are_away(folder: Path, tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj"):
        al.load(tmp_path, device_map=MAP)


def test_what_cannot_be_placed_is_told(folder: Path) -> None:
    with pytest.raises(InputError, match="not both"):
        al.load(folder, device="cpu", device_map="auto")
    placed = al.load(folder, device_map=MAP).model
    for changed in ({"device": "cpu"}, {"dtype": "float64"}):
        with pytest.raises(InputError, match="neither be moved nor change its dtype"):
            al.load(placed, **changed)
    with pytest.raises(InputError, match=r"give al\.load a folder"):
        al.load(placed, device_map="auto")
