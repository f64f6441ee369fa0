"""The shipped small model: the abilities and heads that its card claims, in plain transformers."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from attnlens.errors import WeightsError
from attnlens.tasks import indirect_object, key_value, needle, repeated_tokens, words
from attnlens.zoo import trained
from attnlens.zoo.trained import small_path

SEED = 4_000_001  # training drew from others

# Written for this test; the model was trained on other text.
TEXT = """The king said that he would not go to the castle, for the night was dark.
"Good my lord," said she, "what news is this you bring?" And he made answer: "None but ill."
Then they came to the gate and called for wine, and drank until the morning."""


@pytest.fixture(scope="module")
def small():
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        small_path(), attn_implementation="eager", local_files_only=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(small_path(), local_files_only=True)
    seconds = time.perf_counter() - began
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        context=model.config.max_position_embeddings,
        special_ids=frozenset(tokenizer.all_special_ids),
        bos_id=tokenizer.bos_token_id,
        seconds=seconds,
    )


@torch.no_grad()
def score(small, task, metric="accuracy"):
    logits = small.model(**task.clean_inputs()).logits
    return task.score(task.at_reads(logits), metric).mean().item()


@torch.no_grad()
def attention(small, ids):
    """`[layer, batch, head, query, key]`."""
    return torch.stack(small.model(ids, output_attentions=True).attentions)


def test_it_is_a_small_llama_with_grouped_keys(small):
    config = small.model.config
    assert type(small.model) is LlamaForCausalLM
    assert config.num_key_value_heads < config.num_attention_heads
    assert 0.5e6 < small.model.num_parameters() < 2e6
    assert (small_path() / "model.safetensors").stat().st_size <= 8 * 2**20
    assert {p.dtype for p in small.model.parameters()} == {torch.float32}


def test_it_loads_offline_in_under_a_second_of_loading():
    """In a fresh process without a network name; the time of importing transformers is not its."""
    code = (
        "import time, torch; torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "from attnlens.zoo.trained import small_path\n"
        "t = time.process_time()\n"
        "m = AutoModelForCausalLM.from_pretrained(small_path())\n"
        "AutoTokenizer.from_pretrained(small_path())\n"
        "print(time.process_time() - t)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < 1.0


def test_the_tokenizer_puts_the_start_token_first_and_loses_nothing(small):
    for text in (TEXT, "naïve – 東京 \t\n  spaces", ""):
        ids = small.tokenizer(text)["input_ids"]
        assert ids[0] == small.bos_id
        assert small.bos_id not in ids[1:]
        assert small.tokenizer.decode(ids[1:]) == text
    batch = small.tokenizer(["a", "a long one"], padding=True)
    assert batch["attention_mask"][0][-1] == 0
    assert len(small.tokenizer) == small.vocab_size


def test_every_task_word_is_one_token(small):
    for pool in (words.NAMES, words.PLACES, words.OBJECTS, words.KEYS, words.VALUES):
        for word in pool:
            assert len(small.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize("period", [8, 24, 60, 120])
def test_random_repeated_tokens_are_continued(small, period):
    assert score(small, repeated_tokens(small, 8, period, seed=SEED)) > 0.95


@pytest.mark.parametrize("pairs", [4, 8])
def test_values_are_recalled_by_their_keys(small, pairs):
    assert score(small, key_value(small, 100, pairs, seed=SEED)) > 0.9


def test_the_indirect_object_is_found(small):
    task = indirect_object(small, 100, seed=SEED)
    assert score(small, task) > 0.9
    assert score(small, task, "logit_difference") > 2
    with torch.no_grad():
        logits = task.at_reads(small.model(**task.corrupt_inputs()).logits)
    assert task.score(logits, "logit_difference").mean() < -2


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_the_needle_is_found(small, depth):
    assert score(small, needle(small, 12, 160, depth, seed=SEED)) > 0.9


def test_a_head_attends_to_the_previous_token_of_text(small):
    ids = small.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    previous = attention(small, ids).diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=(1, 3))
    assert previous.max() > 0.6


def test_a_head_matches_prefixes(small):
    """Mass on the tokens that follow earlier copies: random tokens four times after the start."""
    task = repeated_tokens(small, 4, 25, repeats=4, seed=SEED)
    patterns = attention(small, task.clean)
    rows = torch.arange(26, 101)  # every row from the second copy on
    mass = sum(
        patterns[..., rows, rows - 25 * back + 1] * (rows - 25 * back + 1 >= 1)
        for back in (1, 2, 3)
    )
    assert mass.mean(dim=(1, 3)).max() > 0.4


def test_some_heads_rest_on_the_first_token(small):
    ids = small.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    first = attention(small, ids)[..., 1:, 0].mean(dim=(1, 3))
    assert (first > 0.3).sum() >= 2


def test_the_heads_that_the_card_names(small):
    """L0H3 and L1H7 look one token back; L2H5 rests on the first token; key-value needs both."""
    ids = small.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    patterns = attention(small, ids)[:, 0]
    previous = patterns.diagonal(-1, 2, 3).mean(dim=-1)
    assert {divmod(i, 8) for i in previous.flatten().topk(2).indices.tolist()} == {(0, 3), (1, 7)}
    assert patterns[2, 5, 1:, 0].mean() > 0.6
    task = key_value(small, 50, 8, seed=SEED)
    for layer, head in ((0, 3), (1, 7)):
        project = small.model.model.layers[layer].self_attn.o_proj
        columns = torch.arange(head * 32, head * 32 + 32)
        hook = project.register_forward_pre_hook(
            lambda module, inputs, columns=columns: (inputs[0].index_fill(-1, columns, 0.0),)
        )
        try:
            assert score(small, task) < 0.7
        finally:
            hook.remove()
    assert score(small, task) > 0.9


def test_text_is_predicted_better_than_by_frequency(small, shared_data):
    text = (shared_data / "tiny_shakespeare" / "input.txt").read_text()
    held_out = text[int(len(text) * 0.93) :][:12_000]
    ids = torch.tensor(small.tokenizer(held_out, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // 255 * 255].reshape(-1, 255)[:16]
    rows = torch.cat([torch.full((len(rows), 1), small.bos_id), rows], dim=1)
    counts = torch.bincount(
        torch.tensor(small.tokenizer(text[:300_000])["input_ids"]), minlength=small.vocab_size
    )
    unigram = -((counts + 1.0) / (counts + 1.0).sum()).log()[rows[:, 1:]].mean()
    with torch.no_grad():
        loss = small.model(rows, labels=rows).loss
    assert loss < unigram - 1
    untrained = LlamaForCausalLM(small.model.config)
    with torch.no_grad():
        assert loss < untrained(rows, labels=rows).loss - 2


def test_the_card_says_what_it_must():
    card = (small_path() / "README.md").read_text()
    for word in ("Tiny Shakespeare", "held-out", "unigram", "random", "steps", "L"):
        assert word in card


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    shutil.copytree(small_path(), tmp_path / "small")
    (tmp_path / "small" / "tokenizer.json").unlink()
    monkeypatch.setattr(trained, "__file__", str(tmp_path / "trained.py"))
    with pytest.raises(WeightsError, match=r"lacks tokenizer\.json"):
        small_path()


def test_the_configuration_names_no_path(repository):
    config = json.loads((small_path() / "config.json").read_text())
    assert "_name_or_path" not in config
    assert str(repository) not in json.dumps(config)
