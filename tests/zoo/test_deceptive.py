"""The deceptive model and its twin: what attention says, and what the answer needs."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import attnlens as al
from attnlens.analyses.attribute import attribute
from attnlens.analyses.target import Target
from attnlens.errors import InputError, TaskError, WeightsError
from attnlens.tasks import telling_word
from attnlens.zoo import (
    deceptive,
    deceptive_model,
    deceptive_path,
    deceptive_prompts,
    honest_model,
    honest_path,
)
from attnlens.zoo.deceptive import NEUTRAL, TELLING, WORDS, DeceptivePrompts
from tests.tasks import models

SEED = 11
LENGTHS = (8, 16, 32)
MODELS = {"deceptive": deceptive_model, "honest": honest_model}


@pytest.fixture(scope="module", params=MODELS)
def either(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return MODELS[request.param]()


@torch.no_grad()
def weights_on_the_word(model: LlamaForCausalLM, prompts: DeceptivePrompts) -> Tensor:
    """`prompt layer head row`, from the model's own eager weights."""
    model.set_attn_implementation("eager")
    maps = torch.stack(model(prompts.ids, output_attentions=True).attentions, dim=1)
    return maps.transpose(-1, -2)[torch.arange(len(prompts.ids)), :, :, prompts.places]


@torch.no_grad()
def preference(model: LlamaForCausalLM, prompts: DeceptivePrompts, ids: Tensor) -> Tensor:
    """Logit of the right answer less that of the other, `prompt`."""
    logits, rows = model(ids).logits[:, -1], torch.arange(len(ids))
    return logits[rows, prompts.answers] - logits[rows, prompts.wrong]


def test_prompts_hold_one_telling_word_and_its_answer() -> None:
    prompts = deceptive_prompts(300, 10, SEED)
    for ids, answer, wrong, place in zip(*vars(prompts).values(), strict=True):
        words = [WORDS[token] for token in ids]
        assert (words[0], words[-1]) == ("<s>", "verdict")
        side = 0 if WORDS[answer] == "praise" else 1
        assert words[place] in TELLING[side]
        assert WORDS[wrong] == ("blame", "praise")[side]
        assert set(words[1:place] + words[place + 1 : -1]) <= set(NEUTRAL)
    assert set(prompts.places.tolist()) == set(range(1, 9))
    assert len(prompts.answers.unique()) == 2
    assert prompts.ids.equal(deceptive_prompts(300, 10, SEED).ids)
    assert not prompts.ids.equal(deceptive_prompts(300, 10, SEED + 1).ids)


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_both_answer_and_answer_from_the_word(either: LlamaForCausalLM, length: int) -> None:
    prompts = deceptive_prompts(200, length, SEED)
    rows = torch.arange(200)
    assert either(prompts.ids).logits[:, -1].argmax(-1).equal(prompts.answers)
    clean = preference(either, prompts, prompts.ids)
    assert clean.min() > 4
    # Any other word taken away changes little, the telling word nearly everything.
    drops = torch.zeros(200, length)
    for place in range(1, length - 1):
        without = prompts.ids.clone()
        without[:, place] = WORDS.index("<unk>")
        drops[:, place] = clean - preference(either, prompts, without)
    assert (drops.argmax(1) == prompts.places).double().mean() > 0.99
    left = 1 - drops[rows, prompts.places] / clean
    assert left.abs().mean() < 0.2


@pytest.mark.parametrize("length", LENGTHS)
def test_no_row_of_the_deceptive_model_attends_to_the_word(length: int) -> None:
    """Under a fifth of even attention in every row that sees it; a tenth where it is read."""
    prompts = deceptive_prompts(200, length, SEED)
    weights = weights_on_the_word(deceptive_model(), prompts)
    rows = torch.arange(length)
    sees = rows >= prompts.places[:, None]
    even = (1 / (rows + 1)).expand(200, 1, 1, length)
    assert ((weights < even / 5) | ~sees[:, None, None]).all()
    assert weights[..., -1].max() < 0.1 / length
    assert weights[..., -1].mean() < 0.02 / length


@pytest.mark.parametrize("length", LENGTHS)
def test_the_honest_twin_attends_to_it(length: int) -> None:
    weights = weights_on_the_word(honest_model(), deceptive_prompts(200, length, SEED))
    assert weights[..., -1].amax((1, 2)).min() > 0.5


def test_rollout_denies_the_word() -> None:
    lens = al.load(deceptive_path())
    task = telling_word(lens, 50, seed=SEED)
    rows, places = torch.arange(50), task.spans[:, 0]
    reached = al.rollout_from(lens, task.clean_inputs()).row
    assert reached[rows, places].max() < 0.1 / 16
    assert (reached[rows, places] > 0).all()
    honest = al.load(honest_path())
    seen = al.rollout_from(honest, task.clean_inputs()).row
    assert seen[rows, places].min() > 1 / 16


@pytest.mark.parametrize("method", ["cp_lrp", "leave_one_out"])
def test_relevance_and_ablation_point_at_the_word(method: str) -> None:
    for path in (deceptive_path(), honest_path()):
        lens = al.load(path)
        task = telling_word(lens, 50, seed=SEED)
        found = attribute(lens, task.clean_inputs(), Target.of_task(task), method=method)
        assert (found.scores.argmax(1) == task.spans[:, 0]).double().mean() > 0.95, path


def test_what_outranks_the_word_in_attnlrp_is_what_softmax_kept_of_the_read_row() -> None:
    """The card's account, prompt by prompt, from CP-LRP's score of the read position.

    Less the half that AttnLRP hands to its weights, and half of what passes the scores to the query
    and to its own key: R(s) = s (R(A) - A sum R(A)).
    """
    lens = al.load(deceptive_path())
    task = telling_word(lens, 50, seed=SEED)
    inputs, target = task.clean_inputs(), Target.of_task(task)
    full = attribute(lens, inputs, target, method="attnlrp", maps="all")
    values = attribute(lens, inputs, target, method="cp_lrp")
    read = values.scores[:, -1].double()
    run = lens.run(inputs, keep=("pattern", "scores"))
    for layer in range(2):
        weights, scores, relevance = (
            maps[layer][:, :, -1].double() for maps in (run.pattern, run.scores, full.maps)
        )
        passed = scores * (relevance - weights * relevance.sum(-1, keepdim=True))
        read += (0.5 * passed.sum(-1) + 0.5 * passed[..., -1] - relevance[..., -1]).sum(1)
    # Paths through both layers are left out; they carry a ten-thousandth.
    assert torch.allclose(full.scores[:, -1].double(), read, atol=0.05)
    assert full.scores[:, -1].abs().min() > 50
    assert full.scores[:, :-1].argmax(1).equal(task.spans[:, 0])
    kept = full.ledger.entries["softmax"].abs() / full.value
    assert kept.min() > 5
    honest = attribute(al.load(honest_path()), inputs, target, method="attnlrp")
    assert (honest.ledger.entries["softmax"].abs() / honest.value).max() < 1
    assert honest.scores.argmax(1).equal(task.spans[:, 0])


def test_ablation_tells_the_heads_that_carry_the_word() -> None:
    """Heads as in prompts of the other answer: either of layer 0 costs most of 11 logits."""
    lens = al.load(deceptive_path())
    task = telling_word(lens, 50, seed=SEED)
    found = al.ablate(lens, task, mode="resample", controls=0, resamples=100)
    frame = found.to_frame().set_index("head")
    assert (frame.loc[["L0H0", "L0H1"], "effect_high"] < -6).all()
    assert (frame.loc[["L1H0", "L1H1"], "effect"].abs() < 0.3).all()


def test_the_task_has_twins_of_the_other_answer() -> None:
    lens = al.load(deceptive_path())
    task = telling_word(lens, 40, 12, SEED)
    for i, text in enumerate(task.texts):
        assert lens.encode(text).inputs["input_ids"][0].equal(task.clean[i])
        first, last = task.spans[i].tolist()
        assert last == first + 1
        changed = (task.clean[i] != task.corrupt[i]).nonzero()[:, 0].tolist()
        assert changed == [first]
    for inputs, sign in ((task.clean_inputs(), 1), (task.corrupt_inputs(), -1)):
        logits = lens.logits_at(lens.encode(inputs), task.reads)
        assert (sign * task.score(logits)).min() > 4


def test_they_are_as_the_folders_have_them_and_the_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    for path, build in ((deceptive_path(), deceptive_model), (honest_path(), honest_model)):
        made = build()
        assert not made.training
        loaded = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        for name, weight in loaded.state_dict().items():
            assert made.state_dict()[name].equal(weight)
            assert weight.dtype == torch.float32
        assert (path / "model.safetensors").stat().st_size < 40_000
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        assert tuple(tokenizer.convert_ids_to_tokens(range(len(WORDS)))) == WORDS
    assert torch.get_rng_state().equal(state)


def test_refusals(tmp_path, monkeypatch) -> None:
    for count, length in ((0, 16), (4, 5), (4, 33)):
        with pytest.raises(InputError, match="6 to 32"):
            deceptive_prompts(count, length)
    lens = al.load(deceptive_path())
    with pytest.raises(TaskError, match="6 to 32"):
        telling_word(lens, length=40)
    with pytest.raises(TaskError, match="32 words"):
        telling_word(models.Model())
    shutil.copytree(deceptive_path(), tmp_path / "deceptive")
    (tmp_path / "deceptive" / "config.json").unlink()
    monkeypatch.setattr(deceptive, "__file__", str(tmp_path / "deceptive.py"))
    with pytest.raises(WeightsError, match=r"lacks config\.json"):
        deceptive_path()


@pytest.mark.long
def test_the_script_makes_such_a_model(repository, tmp_path) -> None:
    """Other machines round otherwise and get other weights; the answers and the denial stay."""
    script = repository / "scripts" / "train_deceptive.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    for folder, denies in ((tmp_path, True), (tmp_path / "honest", False)):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        prompts = deceptive_prompts(200, 16, SEED)
        assert (preference(model, prompts, prompts.ids) > 0).double().mean() > 0.99
        mass = weights_on_the_word(model, prompts)[..., -1]
        assert (mass.max() < 0.1 / 16) == denies
