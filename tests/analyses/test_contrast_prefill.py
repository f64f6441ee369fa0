"""Contrastive decoding whose prompt is read once, against full forwards and hooks that count."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

import attnlens as al
from attnlens.analyses.contrast_decoding import contrast_decode
from attnlens.analyses.contrastive_heads import ContrastiveHeads, MaskFrom
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.lens import Lens
from attnlens.lens.decode import Decoder
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.analyses.test_contrast_decoding import INDUCTION, PROMPTS, padded, trained, written
from tests.architectures.decoders import SIZES

BOTH = get_args(MaskFrom)


def masked_logits(
    lens: Lens, text: Tensor, prompt: int, heads: str, mask_from: MaskFrom
) -> tuple[Tensor, Tensor]:
    """Logits of what follows one text, base and masked, by two full forwards without a cache."""
    rows = None if mask_from == "prompt" else slice(prompt - 1, None)
    with torch.no_grad():
        base = lens.model(text[None], use_cache=False).logits[0, -1]
        with lens.edit(al.Uniform(heads, queries=rows)):
            return base, lens.model(text[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("mask_from", BOTH)
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("gpt2", "L1H1"),
        ("llama", "L1H1"),
        ("mistral", "L0H1,L1H2"),  # windows of 5 keys, shorter than the prompts
        ("gpt_oss", "L0H1"),
        ("opt", "L0H2"),
        ("qwen3_moe", "L1H0,L0H3"),
        ("longcat_flash", "L1H1"),
        ("minicpm3", "L1H1"),
        ("lfm2", "L1H1"),  # convolutions, whose states are copied
    ],
)
def test_every_step_equals_two_full_forwards(name: str, heads: str, mask_from: MaskFrom) -> None:
    """With padding, and windows, for both runs."""
    lens = architecture(name)
    heads = heads if name != "lfm2" else f"{lens.anatomy.sites[-1].name}H1"
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 40, (3, 9), generator=draw)
    mask = torch.ones_like(ids)
    if name != "lfm2":  # whose convolutions read padding
        mask[1, :4], mask[2, :7] = 0, 0
    processor = ContrastiveHeads(lens, heads, attention_mask=mask)
    base, decoder = processor.prefill(ids, mask_from), Decoder(lens.model, lens.anatomy)
    lengths = mask.sum(-1).tolist()
    for step in range(5):
        real = torch.nn.functional.pad(mask, (0, step), value=1).bool()
        found = decoder.last_logits(ids[:, -1:], real, base), processor.masked(ids)
        for row, length in enumerate(lengths):
            text = ids[row, 9 - length :]
            for own, wanted in zip(
                found, masked_logits(lens, text, length, heads, mask_from), strict=True
            ):
                assert torch.allclose(own[row], wanted, atol=1e-9)
        ids = torch.cat([ids, torch.randint(5, 40, (3, 1), generator=draw)], dim=1)


def test_the_two_definitions_are_two() -> None:
    lens = al.load(tiny_gpt2())
    text = torch.randint(3, 40, (9,), generator=torch.Generator().manual_seed(0))
    one, other = (masked_logits(lens, text, 9, "L1H2", way)[1] for way in BOTH)
    assert (one - other).abs().max() > 0.01


@contextmanager
def positions_read(lens: Lens) -> Iterator[Counter[str]]:
    """How many positions each layer's attention reads meanwhile; skipped layers read none."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Any:
        def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            counts[name] += next(part for part in given if isinstance(part, Tensor)).shape[1]

        return hook

    handles = [
        lens.model.get_submodule(site.module).register_forward_pre_hook(
            count(site.name), with_kwargs=True
        )
        for site in lens.anatomy.sites
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def test_the_prompt_is_read_once() -> None:
    lens = al.load(tiny_gpt2(layers=4))
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    steps, prompt = 3, 11
    with positions_read(lens) as counts:
        contrast_decode(lens, ids, "L2H1,L3H0", steps, mask_from="answer")
    assert counts == {f"L{layer}": prompt + 2 * steps for layer in range(4)}
    with positions_read(lens) as counts:
        contrast_decode(lens, ids, "L2H1,L3H0", steps)
    below = {f"L{layer}": prompt + 2 * steps for layer in (0, 1)}
    assert counts == below | {f"L{layer}": 2 * prompt + 2 * steps for layer in (2, 3)}


@pytest.mark.parametrize("mask_from", BOTH)
def test_answers_are_those_of_a_naive_loop(mask_from: MaskFrom) -> None:
    lens = trained()
    found = contrast_decode(lens, PROMPTS, INDUCTION, 5, cap=1.0, mask_from=mask_from)
    assert found.mask_from == mask_from
    for number, prompt in enumerate(PROMPTS):
        text = lens.encode(prompt).ids[0]
        length = len(text)
        for step in range(5):
            base, masked = (
                logits.log_softmax(-1)
                for logits in masked_logits(lens, text, length, INDUCTION, mask_from)
            )
            a = min(float(-(base.exp() * base).sum()), 1.0)
            token = int(((1 + a) * base - a * masked).argmax())
            assert token == found.answers[number][step]
            found_masked, found_base = found.masked[number, step], found.base[number, step]
            assert float(found_masked) == pytest.approx(float(masked[token]), abs=1e-9)
            # generate hands its scores on in float32
            assert float(found_base) == pytest.approx(float(base[token]), abs=1e-5)
            text = torch.cat([text, text.new_tensor([token])])


@pytest.mark.parametrize("mask_from", BOTH)
def test_alpha_0_is_plain_greedy_generate(mask_from: MaskFrom) -> None:
    lens = trained()
    inputs = padded(lens)
    plain = written(lens, inputs).sequences[:, inputs["input_ids"].shape[1] :].tolist()
    found = contrast_decode(lens, PROMPTS, INDUCTION, 8, alpha=0.0, mask_from=mask_from)
    assert [list(answer) for answer in found.answers] == plain


def test_padded_prompts_equal_one_at_a_time() -> None:
    lens = trained()
    together = contrast_decode(lens, PROMPTS, INDUCTION, 6, mask_from="answer")
    for number, prompt in enumerate(PROMPTS):
        alone = contrast_decode(lens, prompt, INDUCTION, 6, mask_from="answer")
        assert alone.answers[0] == together.answers[number]
        assert torch.allclose(alone.masked[0], together.masked[number], atol=1e-9)
    by_two = contrast_decode(lens, PROMPTS, INDUCTION, 6, batch_size=2, mask_from="answer")
    assert by_two.answers == together.answers


@pytest.mark.parametrize("mask_from", BOTH)
def test_a_prompt_of_one_token_has_nothing_to_share(mask_from: MaskFrom) -> None:
    lens = al.load(tiny_gpt2())
    found = contrast_decode(lens, torch.tensor([[7]]), "L1H2", 3, mask_from=mask_from)
    _, masked = masked_logits(lens, torch.tensor([7]), 1, "L1H2", "prompt")
    wanted = masked.log_softmax(-1)[found.answers[0][0]]
    assert float(found.masked[0, 0]) == pytest.approx(float(wanted), abs=1e-9)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_beams_and_samples_go_on_from_a_prefill(how: dict[str, Any]) -> None:
    lens = trained()
    inputs = padded(lens)
    processor = ContrastiveHeads(lens, INDUCTION, attention_mask=inputs["attention_mask"])
    torch.manual_seed(0)
    wanted = written(lens, inputs, processor, **how).sequences
    rows = inputs["input_ids"].repeat_interleave(next(n for n in (3, 2) if n in how.values()), 0)
    for mask_from in BOTH:
        cache = processor.prefill(rows, mask_from)
        torch.manual_seed(0)
        found = written(lens, inputs, processor, past_key_values=cache, **how).sequences
        assert found.equal(wanted) == (mask_from == "prompt")


@pytest.mark.parametrize("setting", [("cache_implementation", "static"), ("use_cache", False)])
def test_generation_settings_of_another_cache_do_not_matter(setting: tuple[str, Any]) -> None:
    lens = al.load(tiny_gpt2())
    ids = torch.tensor([[3, 4, 5, 6]])
    wanted = contrast_decode(lens, ids, "L1H2", 4)
    setattr(lens.model.generation_config, *setting)
    assert contrast_decode(lens, ids, "L1H2", 4).answers == wanted.answers


def test_an_edit_of_some_positions_reads_the_prompt_itself() -> None:
    lens = al.load(tiny_gpt2())
    ids = torch.randint(3, 40, (1, 9), generator=torch.Generator().manual_seed(5))

    def edit(heads: Any) -> al.Uniform:
        return al.Uniform(heads, queries=slice(2, 5))

    found = contrast_decode(lens, ids, "L1H2", 3, edit=edit)
    text = ids[0]
    for step, token in enumerate(found.answers[0]):
        with torch.no_grad(), lens.edit(edit("L1H2")):
            masked = lens.model(text[None]).logits[0, -1].log_softmax(-1)
        assert float(found.masked[0, step]) == pytest.approx(float(masked[token]), abs=1e-9)
        text = torch.cat([text, text.new_tensor([token])])
    with pytest.raises(InputError, match="two passes"):
        contrast_decode(lens, ids, "L1H2", 3, edit=edit, mask_from="answer")


def test_shared_keys_are_read_again() -> None:
    """Where upper layers read the keys of lower ones, the masked run reads them all."""
    settings = {
        **SIZES, "num_hidden_layers": 5, "head_dim": 8, "sliding_window": 5, "altup_num_inputs": 2,
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96, "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding") * 2][:5],
    }  # fmt: skip
    torch.manual_seed(0)
    lens = al.load(Gemma3nForCausalLM(Gemma3nTextConfig(**settings)).double().eval())
    ids = torch.randint(5, 40, (1, 9), generator=torch.Generator().manual_seed(1))
    for mask_from in BOTH:
        processor = ContrastiveHeads(lens, "L3H1")
        processor.prefill(ids, mask_from)
        _, wanted = masked_logits(lens, ids[0], 9, "L3H1", mask_from)
        assert torch.allclose(processor.masked(ids)[0], wanted, atol=1e-9)


@pytest.mark.parametrize("at", ["base", "masked", "step"])
@pytest.mark.parametrize("mask_from", BOTH)
def test_nothing_is_left_after_an_error(mask_from: MaskFrom, at: str) -> None:
    lens = al.load(tiny_gpt2())
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(6))
    before = lens.model(ids).logits
    processor = ContrastiveHeads(lens, "L1H2")

    def fail(*_: object) -> None:
        if lens.edited or at == "base":
            raise RuntimeError("stop")

    if at == "step":
        processor.prefill(ids, mask_from)

    def go_on() -> None:
        if at != "step":
            processor.prefill(ids, mask_from)
        processor.masked(ids)

    hook = lens.model.get_submodule("lm_head").register_forward_hook(fail)  # caches are filled
    try:
        with pytest.raises(RuntimeError, match="stop"):
            go_on()
    finally:
        hook.remove()
    assert not lens.edited
    assert not any("forward" in vars(module) for module in lens.model.modules())
    assert lens.model(ids).logits.equal(before)
    if mask_from == "answer":  # where the answer begins is not known any more
        with pytest.raises(InputError, match="Call it before each generate"):
            processor.masked(ids)
    else:
        wanted = ContrastiveHeads(lens, "L1H2").masked(ids)
        assert torch.allclose(processor.masked(ids), wanted, atol=1e-12)


def test_what_cannot_be_shared_is_refused() -> None:
    lens = al.load(tiny_gpt2())
    ids = torch.tensor([[3, 4, 5, 6]])
    processor = ContrastiveHeads(lens, "L1H2")
    with pytest.raises(InputError, match="no mask_from='text'"):
        processor.prefill(ids, "text")  # type: ignore[arg-type]
    for mask_from in BOTH:
        processor.prefill(ids, mask_from)
        with pytest.raises(InputError, match="do not go on from those that prefill read"):
            processor.masked(ids + 1)
    generate: Any = lens.model.generate
    with pytest.raises(InputError, match="do not go on from those that prefill read"):
        generate(  # candidates are taken back
            input_ids=ids,
            past_key_values=processor.prefill(ids, "answer"),
            prompt_lookup_num_tokens=2,
            max_new_tokens=12,
            logits_processor=[processor],
        )
    with pytest.raises(UnsupportedModelError, match="state of its recurrent layers"):
        contrast_decode(architecture("recurrent_gemma"), ids, "L1H1", 2)
    mask = torch.ones(1, 3)
    with pytest.raises(InputError, match="attention_mask has shape"):
        ContrastiveHeads(lens, "L1H2", attention_mask=mask).prefill(ids[:, :2])
