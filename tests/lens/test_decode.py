"""Decoding row by row: each row is that of a whole forward pass, and places are absolute."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, RobertaConfig, RobertaForCausalLM

import attnlens as al
from attnlens.anatomy import Site
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import _LISTENERS, Call
from attnlens.hooks.session import Observer
from attnlens.lens import Lens
from attnlens.lens import decode as decoding
from tests.architectures import ARCHITECTURES

STEPS = 7
# Learned positions, grouped keys, windows of 5 in all or half of the layers, soft cap, normed keys,
# learned sinks, chunks, latent keys, a state space beside attention.
NAMES = (
    "gpt2", "llama", "mistral", "ministral", "gemma2", "gemma3_text", "qwen3", "gpt_oss",
    "llama4_text", "deepseek_v3", "qwen3_next",
)  # fmt: skip


class Watch(Observer):
    """Keeps the dense rows that it is shown, of each site in order."""

    def __init__(self, lens: Lens, fail_at: int | None = None) -> None:
        self.sites = frozenset(site.name for site in lens.anatomy.sites)
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        self.fail_at = fail_at

    def see(self, site: Site, call: Call) -> Call:
        if len(self.rows[site.name]) == self.fail_at:
            raise RuntimeError("on purpose")
        self.rows[site.name].append(Rows.at(site, call).dense())
        return call


def opened(name: str, double: bool = True) -> tuple[Lens, Tensor]:
    made = ARCHITECTURES[name]
    model = made.build().double() if made.float64 and double else made.build()
    return al.load(model, check=False), made.inputs(model)["input_ids"]


def naive(model: nn.Module, ids: Tensor, steps: int) -> Tensor:
    """Greedy answers by one whole forward pass a token, without any cache."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            token = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
    return ids[:, start:]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_a_forward_pass_without_a_cache(name: str) -> None:
    lens, ids = opened(name)
    watch = Watch(lens)
    found = lens.decode(ids, STEPS, [watch], stop=())
    answers = torch.tensor(found.answers)
    assert answers.equal(naive(lens.model, ids, STEPS))
    whole = torch.cat([ids, answers], dim=1)[:, :-1]
    dense = lens.run(whole, keep=("pattern",)).pattern
    prompt = ids.shape[1]
    for site, rows in watch.rows.items():
        assert len(rows) == found.rows == STEPS
        for number, row in enumerate(rows):
            place = prompt - 1 + number
            expected = dense[site][:, :, place, : place + 1]
            assert row.shape[2:] == (1, place + 1)
            assert row[:, :, 0].allclose(expected, atol=2e-6)
            # Absolute places, where the window has left old keys behind too.
            assert row[:, :, 0].argmax(-1).equal(expected.argmax(-1))


def test_windows_hide_old_keys_and_do_not_shift_places() -> None:
    lens, ids = opened("mistral")
    assert lens.anatomy["L0"].window == 5
    watch = Watch(lens)
    lens.decode(ids, 3, [watch], stop=())
    for rows in watch.rows.values():
        for row in rows:
            assert not row[..., :-5].any()
            assert (row[..., -5:] > 0).all()


def test_agrees_with_generate() -> None:
    lens, ids = opened("gemma2")
    lens.model.generation_config.pad_token_id = 0
    ids = ids[:1]
    wanted = lens.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )[0, ids.shape[1] :].tolist()
    found = lens.decode(ids, 20)
    assert list(found.answers[0]) == [token for token in wanted if token != 3]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "opt"])
def test_prompts_of_different_lengths_answer_as_each_alone(name: str) -> None:
    lens, ids = opened(name, double=False)  # padding is NaN in Gemma 2's own float64
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0  # padded on the right, as texts are
    watch = Watch(lens)
    both = lens.decode({"input_ids": ids, "attention_mask": mask}, STEPS, [watch], stop=())
    assert both.padding == (0, ids.shape[1] - 9)
    for prompt, own in enumerate((ids[:1], ids[1:, :9])):
        alone = Watch(lens)
        single = lens.decode(own, STEPS, [alone], stop=())
        assert both.prompts[prompt] == single.prompts[0] == tuple(own[0].tolist())
        assert both.answers[prompt] == single.answers[0]
        for site, rows in watch.rows.items():
            for row, expected in zip(rows, alone.rows[site], strict=True):
                assert not row[prompt, :, :, : both.padding[prompt]].any()
                kept = row[prompt, :, :, both.padding[prompt] :]
                assert kept.allclose(expected[0], atol=1e-5)


def test_padding_moves_no_position_of_a_model_that_counts_from_behind_padding() -> None:
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40, is_decoder=True, initializer_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    lens = al.load(RobertaForCausalLM(config).eval(), check=False)
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    alone = [lens.decode([ids], 4, stop=()).answers[0] for ids in prompts]
    ids = torch.tensor([prompts[0], [*prompts[1], 1, 1, 1]])
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    both = lens.decode({"input_ids": ids, "attention_mask": mask}, 4, stop=())
    assert list(both.answers) == alone


def test_nan_is_no_answer() -> None:
    lens, ids = opened("gemma2")
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with pytest.raises(InputError, match="prompts of one length"):
        lens.decode({"input_ids": ids, "attention_mask": mask}, 2)


def test_no_observer_sees_the_prompt() -> None:
    lens, ids = opened("llama")
    seen: list[tuple[int, ...]] = []

    class Sizes(Watch):
        def see(self, site: Site, call: Call) -> Call:
            seen.append(tuple(call.query.shape))
            return call

    found = lens.decode(ids, STEPS, [Sizes(lens)], stop=())
    assert len(seen) == STEPS * len(lens.anatomy.sites) == found.rows * len(lens.anatomy.sites)
    assert {shape[2] for shape in seen} == {1}


@pytest.mark.parametrize("edit", [al.Zero("L0H1"), al.Uniform("L0H0,L1"), al.Scale("L1", 3.0)])
def test_edits_act_on_the_prompt_and_on_decoded_rows(edit: object) -> None:
    lens, ids = opened("mistral")
    clean = lens.decode(ids, STEPS, stop=())
    with lens.edit(edit):
        watch = Watch(lens)
        found = lens.decode(ids, STEPS, [watch], stop=())
        wanted = naive(lens.model, ids, STEPS)
        dense = lens.run(torch.cat([ids, wanted], 1)[:, :-1], keep=("pattern",)).pattern
    assert torch.tensor(found.answers).equal(wanted)
    assert found.answers != clean.answers
    for site, rows in watch.rows.items():
        for number, row in enumerate(rows):
            place = ids.shape[1] - 1 + number
            assert row[:, :, 0].allclose(dense[site][:, :, place, : place + 1], atol=2e-6)
    assert lens.decode(ids, STEPS, stop=()).answers == clean.answers


def test_an_answer_ends_at_a_given_token_and_the_others_go_on() -> None:
    lens, ids = opened("llama")
    free = lens.decode(ids, STEPS, stop=())
    assert free.stopped == (False, False)
    end = next(token for token in free.answers[0] if token not in free.answers[1])
    found = lens.decode(ids, STEPS, stop=[end])
    cut = free.answers[0].index(end)
    assert found.answers == (free.answers[0][:cut], free.answers[1])
    assert found.stopped == (True, False)
    assert found.rows == STEPS
    alone = lens.decode(ids[:1], STEPS, stop=[end])
    assert alone.rows == cut + 1
    lens.model.generation_config.eos_token_id = [end]
    assert lens.decode(ids, STEPS).answers == found.answers


def test_a_prompt_of_one_token_needs_no_prefill() -> None:
    lens, ids = opened("gpt2")
    found = lens.decode(ids[:, :1], 4, stop=())
    assert torch.tensor(found.answers).equal(naive(lens.model, ids[:, :1], 4))


def test_nothing_leaks_after_an_error_in_the_middle() -> None:
    lens, ids = opened("llama")
    before = lens.model.config._attn_implementation
    clean = lens.decode(ids, STEPS, stop=())
    lens.model.train()
    with pytest.raises(RuntimeError, match="on purpose"):
        lens.decode(ids, STEPS, [Watch(lens, fail_at=2)])
    assert lens.model.training
    lens.model.eval()
    assert lens.model.config._attn_implementation == before
    assert not any(_LISTENERS in module.__dict__ for module in lens.model.modules())
    assert not any(module._forward_pre_hooks for module in lens.model.modules())
    assert lens.decode(ids, STEPS, stop=()).answers == clean.answers


def test_the_context_is_kept() -> None:
    lens, ids = opened("gpt2")
    assert lens.context == 64
    lens.decode(ids, 64 - ids.shape[1] + 1)
    with pytest.raises(InputError, match="steps=49 or fewer"):
        lens.decode(ids, 64 - ids.shape[1] + 2)
    with pytest.raises(InputError, match="at least"):
        lens.decode(ids, 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("t5", "encoder beside its decoder"), ("bert", "no key/value cache"), ("minimax", "cache")],
)
def test_models_that_do_not_decode_are_refused(name: str, reason: str) -> None:
    lens, ids = opened(name)
    with pytest.raises(UnsupportedModelError, match=reason):
        lens.decode(ids, 2)


def test_images_beside_the_text_are_refused() -> None:
    lens, ids = opened("llava")
    images = torch.zeros(ids.shape[0], 3, 8, 8)
    with pytest.raises(InputError, match="pixel_values"):
        lens.decode({"input_ids": ids, "pixel_values": images}, 2)


def test_a_cache_that_drops_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, ids = opened("mistral")
    monkeypatch.setattr(decoding, "whole_cache", lambda model: DynamicCache(config=model.config))
    with pytest.raises(UnsupportedModelError, match="says nothing about its position"):
        lens.decode(ids, 2)
