"""Model folders for the command line: with a tokenizer, without one, and broken ones."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from attnlens.zoo.induction import induction_model
from tests.tasks.models import gpt2_like

CONTEXT = 96


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A random two-layer Llama with a tokenizer, context 96."""
    torch.manual_seed(0)
    tokenizer = gpt2_like().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=CONTEXT,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "small"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wired_model(tmp_path_factory):
    """The hand-wired induction model as a folder; it has no tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "wired"
    induction_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_model(tmp_path_factory):
    """A random BERT, which sees both sides."""
    torch.manual_seed(0)
    tokenizer = gpt2_like().tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "encoder"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(small_model, tmp_path):
    """A copy of the small model to break."""
    return shutil.copytree(small_model, tmp_path / "broken")


@pytest.fixture
def pickle_only(copy_of):
    (copy_of / "model.safetensors").unlink()
    torch.save({}, copy_of / "pytorch_model.bin")
    return copy_of


@pytest.fixture
def remote_code(copy_of):
    config = json.loads((copy_of / "config.json").read_text())
    config |= {"model_type": "stranger", "architectures": ["Stranger"]}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Stranger"}
    (copy_of / "config.json").write_text(json.dumps(config))
    (copy_of / "code.py").write_text("raise SystemExit('this must never run')\n")
    return copy_of


@pytest.fixture
def nan_weights(copy_of):
    model = LlamaForCausalLM.from_pretrained(copy_of)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    model.save_pretrained(copy_of)
    return copy_of


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "Ann and Ben went home. <|endoftext|> Then Ben said: <b>hello</b> & Ann left.\n"
    )
    return path
