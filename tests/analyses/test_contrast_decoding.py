"""Contrastive decoding against naive full forwards, plain generate, and heads known to retrieve."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import attnlens as al
from attnlens.analyses.contrast_decoding import ContrastiveHeads, contrast, contrast_decode
from attnlens.errors import HeadError, InputError, UnsupportedModelError
from attnlens.lens import Lens
from attnlens.tasks import needle
from attnlens.zoo import retrieval_model, small_path
from tests.analyses.conftest import architecture, tiny_gpt2

INDUCTION = "L2H2,L2H5"
PROMPTS = ["What light through yonder", "It is the east, and Juliet is the sun. It is", "Speak"]


@cache
def trained() -> Lens:
    model = AutoModelForCausalLM.from_pretrained(small_path()).double()
    return al.load(model, tokenizer=AutoTokenizer.from_pretrained(small_path()))


def padded(lens: Lens) -> dict[str, Tensor]:
    return dict(lens.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left"))


def written(lens: Lens, inputs: dict[str, Tensor], *processors: LogitsProcessor, **how: Any) -> Any:
    """What generate returns, greedy where nothing else is asked."""
    settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, **how}
    model: Any = lens.model
    return model.generate(**inputs, logits_processor=list(processors), **settings)


class Anew(LogitsProcessor):
    """The formula by a full forward of every row at every step, without padding or a cache."""

    def __init__(self, lens: Lens, heads: str, mask: Tensor) -> None:
        self.lens, self.heads, self.mask = lens, heads, mask.bool()

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        mixed: list[Tensor] = []
        times = len(ids) // len(self.mask)
        for number, row in enumerate(ids):
            own = row[int((~self.mask[number // times]).sum()) :][None]
            with torch.no_grad(), self.lens.edit(al.Uniform(self.heads)):
                masked = self.lens.model(own).logits[0, -1].log_softmax(-1)
            base = scores[number].double().log_softmax(-1)
            a = -(base.exp() * base).sum()
            mixed.append((1 + a) * base - a * masked)
        return torch.stack(mixed)


def test_the_formula_on_numbers() -> None:
    base = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    masked = torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.8, 0.1]], dtype=torch.float64).log()
    mixed, strength = contrast(base, masked)
    a = 1.5 * math.log(2)
    assert strength.tolist() == pytest.approx([a, 0])
    first = [
        (1 + a) * math.log(p) - a * math.log(q) for p, q in ((0.5, 0.2), (0.25, 0.6), (0.25, 0.2))
    ]
    assert mixed[0].tolist() == pytest.approx(first)
    assert mixed[1].tolist() == [0, -math.inf, -math.inf]
    assert contrast(base, masked, cap=0.3)[1].tolist() == pytest.approx([0.3, 0])
    fixed, strength = contrast(base, masked, alpha=2.0)
    assert strength.tolist() == [2, 2]
    assert fixed[0, 0] == pytest.approx(3 * math.log(0.5) - 2 * math.log(0.2))
    assert fixed[1, 1] == -math.inf


def test_alpha_0_is_plain_greedy_generate() -> None:
    lens = trained()
    inputs = padded(lens)
    plain = written(lens, inputs, output_logits=True)
    processor = ContrastiveHeads(lens, INDUCTION, 0.0, attention_mask=inputs["attention_mask"])
    found = written(lens, inputs, processor, output_logits=True)
    assert found.sequences.equal(plain.sequences)
    for own, other in zip(found.logits, plain.logits, strict=True):
        assert own.equal(other)  # the base stream, bit for bit
    answers = contrast_decode(lens, PROMPTS, INDUCTION, steps=8, alpha=0.0)
    width = inputs["input_ids"].shape[1]
    assert [list(answer) for answer in answers.answers] == plain.sequences[:, width:].tolist()
    assert answers.notes == ("The base run alone would have written the same tokens.",)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral", "gemma2", "opt", "gpt_neox", "gpt_oss", "qwen3_moe"]
)
def test_every_step_equals_two_full_forwards(name: str) -> None:
    """Padding, the cache and (mistral, gemma2, gpt_oss) windows change no number."""
    lens = architecture(name)
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 40, (3, 9), generator=draw)
    mask = torch.ones_like(ids)
    if name != "gemma2":  # whose own attention makes NaN of padding
        mask[1, :4], mask[2, :7] = 0, 0
    processor = ContrastiveHeads(lens, "L1H1,L0H0", attention_mask=mask)
    anew = Anew(lens, "L1H1,L0H0", mask)
    for _ in range(5):
        scores = torch.randn(3, lens.vocab_size, generator=draw, dtype=torch.float64)
        found, wanted = processor(ids, scores), anew(ids, scores)
        assert torch.allclose(found, wanted, atol=1e-9)
        ids = torch.cat([ids, torch.randint(5, 40, (3, 1), generator=draw)], dim=1)


def test_padded_prompts_equal_one_at_a_time() -> None:
    lens = trained()
    together = contrast_decode(lens, PROMPTS, INDUCTION, steps=6)
    for number, prompt in enumerate(PROMPTS):
        alone = contrast_decode(lens, prompt, INDUCTION, steps=6)
        assert alone.answers[0] == together.answers[number]
        # generate hands its scores on in float32
        assert torch.allclose(alone.contrast[0], together.contrast[number], atol=1e-4)
    assert together.contrast.shape == (3, 6)
    by_two = contrast_decode(lens, PROMPTS, INDUCTION, steps=6, batch_size=2)
    assert by_two.answers == together.answers


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_beams_and_samples_are_those_of_the_formula(how: dict[str, Any]) -> None:
    lens = trained()
    inputs = padded(lens)
    mask = inputs["attention_mask"]
    runs: list[int] = []
    processor = ContrastiveHeads(lens, INDUCTION, attention_mask=mask)
    inner = processor._forward
    processor._forward = lambda ids, real: (runs.append(ids.shape[1]), inner(ids, real))[1]
    torch.manual_seed(0)
    found = written(lens, inputs, processor, **how)
    torch.manual_seed(0)
    wanted = written(lens, inputs, Anew(lens, INDUCTION, mask), **how)
    assert found.sequences.equal(wanted.sequences)
    assert runs == [mask.shape[1]] + [1] * 7  # re-ordered, not read again


def test_a_processor_can_be_used_again() -> None:
    lens = trained()
    inputs = padded(lens)
    processor = ContrastiveHeads(lens, INDUCTION, attention_mask=inputs["attention_mask"])
    first = written(lens, inputs, processor).sequences
    assert written(lens, inputs, processor).sequences.equal(first)


def test_contrast_raises_what_the_masked_heads_retrieve() -> None:
    """The trained model copies a needle by its induction heads."""
    lens = al.load(small_path())
    task = needle(lens, prompts=12, seed=3)
    for row, mask, read, answer in zip(
        task.clean, task.mask, task.reads[:, 0], task.answers[:, 0], strict=True
    ):
        ids = row[mask][: int(read) + 1][None]
        with torch.no_grad():
            base = lens.model(ids).logits[:, -1].double()
        mixed = ContrastiveHeads(lens, INDUCTION, cap=1.0)(ids, base).log_softmax(-1)
        assert mixed[0, answer] > base.log_softmax(-1)[0, answer]


def test_the_wired_retrieval_head_is_what_the_contrast_adds() -> None:
    lens = al.load(retrieval_model())
    ids = torch.tensor([[0, 7, 3, 9, 12, 5, 7]])
    found = contrast_decode(lens, ids, "L1H2", steps=3, alpha=0.5)
    assert found.answers == ((3, 9, 12),)
    assert bool((found.masked < found.base).all())
    assert bool((found.contrast >= found.base).all())
    # A head that writes nothing adds nothing.
    idle = contrast_decode(lens, ids, "L1H0", steps=3, alpha=0.5)
    assert torch.allclose(idle.base, idle.masked, atol=1e-6)


def test_results_are_told_token_by_token() -> None:
    lens = trained()
    found = contrast_decode(lens, PROMPTS, INDUCTION, steps=5, cap=2.0)
    frame = found.to_frame()
    assert list(frame.columns) == [
        "prompt", "step", "token", "strength", "base", "masked", "contrast", "changed",
    ]  # fmt: skip
    assert len(frame) == sum(map(len, found.answers))
    assert frame["strength"].max() <= 2
    assert found.edit == f"Uniform of {INDUCTION}"
    assert frame["changed"].any()
    assert (frame["base"] <= 0).all()


def test_answers_end_where_the_model_ends_them() -> None:
    lens = al.load(tiny_gpt2())
    ids = torch.tensor([[3, 4, 5]])
    free = contrast_decode(lens, ids, "L1H2", steps=6)
    config: Any = lens.model.generation_config
    before, config.eos_token_id = config.eos_token_id, free.answers[0][2]
    try:
        ended = contrast_decode(lens, ids, "L1H2", steps=6)
    finally:
        config.eos_token_id = before
    stop = free.answers[0].index(free.answers[0][2])
    assert ended.answers[0] == free.answers[0][:stop]
    assert ended.base.shape[1] == stop


def test_nothing_is_left_on_the_model_after_an_error() -> None:
    lens = trained()
    inputs = padded(lens)
    before = lens.model(**inputs).logits
    processor = ContrastiveHeads(lens, INDUCTION, attention_mask=inputs["attention_mask"])
    attention = lens.model.get_submodule(lens.anatomy.sites[3].module)

    def fail(*_: object) -> None:
        if lens.edited:
            raise RuntimeError("stop")

    hook = attention.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        written(lens, inputs, processor)
    hook.remove()
    assert not lens.edited
    assert lens.model(**inputs).logits.equal(before)
    fresh = ContrastiveHeads(lens, INDUCTION, attention_mask=inputs["attention_mask"])
    wanted = written(lens, inputs, fresh).sequences
    assert written(lens, inputs, processor).sequences.equal(wanted)


def test_a_step_that_broke_off_can_be_taken_again() -> None:
    lens = al.load(tiny_gpt2())
    ids = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(6))
    scores = torch.zeros(2, 40, dtype=torch.float64)
    processor = ContrastiveHeads(lens, "L1H2", alpha=1.0)
    processor(ids[:, :7], scores)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    hook = lens.model.get_submodule("lm_head").register_forward_hook(fail)  # caches are filled
    with pytest.raises(RuntimeError, match="stop"):
        processor(ids, scores)
    hook.remove()
    wanted = ContrastiveHeads(lens, "L1H2", alpha=1.0)(ids, scores)
    assert torch.allclose(processor(ids, scores), wanted, atol=1e-12)


def test_what_cannot_be_decoded_is_refused() -> None:
    lens = trained()
    with pytest.raises(InputError, match="No head"):
        ContrastiveHeads(lens, ())
    with pytest.raises(HeadError):
        ContrastiveHeads(lens, "L9H9")
    with pytest.raises(InputError, match="one of them"):
        ContrastiveHeads(lens, INDUCTION, alpha=1.0, cap=1.0)
    with pytest.raises(InputError, match="out of range"):
        ContrastiveHeads(lens, INDUCTION, alpha=-1.0)
    with pytest.raises(InputError, match="padding token"):
        written(lens, padded(lens), ContrastiveHeads(lens, INDUCTION))
    mask = torch.ones(2, 4)
    with pytest.raises(InputError, match="attention_mask has shape"):
        written(lens, padded(lens), ContrastiveHeads(lens, INDUCTION, attention_mask=mask))
    with pytest.raises(InputError, match="pass the context"):
        contrast_decode(lens, PROMPTS, INDUCTION, steps=600)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        ContrastiveHeads(architecture("t5"), "dec.L0H0")
