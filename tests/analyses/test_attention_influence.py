"""Scores of texts by masked heads, against two naive forwards and on a circuit that is known."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import attnlens as al
from attnlens.analyses.attention_influence import attention_influence
from attnlens.errors import HeadError, InputError, UnsupportedModelError
from attnlens.lens import Lens
from attnlens.lens.losses import next_token_loss
from attnlens.zoo import induction_model, small_path
from tests.analyses.conftest import architecture, tiny_gpt2

TEXTS = [
    "What light through yonder window breaks?",
    "It is the east, and Juliet is the sun. It is the east, and Juliet is the sun.",
    "Speak",
    "The key is under the third stone. Where is the key? The key is under the third stone.",
]


@pytest.fixture(scope="module")
def trained() -> Lens:
    model = AutoModelForCausalLM.from_pretrained(small_path()).double()
    return al.load(model, tokenizer=AutoTokenizer.from_pretrained(small_path()))


def naive_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean of -ln p of each token but the first, one text."""
    picked = [-logits[t].log_softmax(-1)[ids[t + 1]] for t in range(len(ids) - 1)]
    return torch.stack(picked).mean()


def evenly(model: GPT2LMHeadModel, ids: Tensor, layer: int, head: int) -> Tensor:
    """Logits of one text where one head writes the running mean of its values."""
    attention = model.transformer.h[layer].attn
    width = attention.head_dim
    own = slice(head * width, (head + 1) * width)
    values: list[Tensor] = []

    def mean(_: object, args: tuple[Tensor]) -> tuple[Tensor]:
        v = values[0].chunk(3, dim=-1)[2][..., own]
        z = args[0].clone()
        for t in range(z.shape[1]):
            z[:, t, own] = v[:, : t + 1].mean(1)
        return (z,)

    hooks = [
        attention.c_attn.register_forward_hook(lambda _, __, out: values.append(out)),
        attention.c_proj.register_forward_pre_hook(mean),
    ]
    try:
        with torch.no_grad():
            return model(ids[None]).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def test_equals_two_naive_forwards(ids: Tensor) -> None:
    model = tiny_gpt2()
    result = attention_influence(al.load(model), ids, "L1H2", batch_size=1)
    for text, row in enumerate(ids):
        with torch.no_grad():
            base = naive_loss(model(row[None]).logits[0], row)
        masked = naive_loss(evenly(model, row, 1, 2), row)
        assert result.base[text] == pytest.approx(float(base), rel=1e-12)
        assert result.masked[text] == pytest.approx(float(masked), rel=1e-12)
        assert result.score[text] == pytest.approx(float((masked - base) / base), rel=1e-9)
    assert result.tokens.tolist() == [11, 11]
    assert float(result.score.abs().min()) > 1e-3  # the head does something


def test_masking_the_induction_head_costs_repeated_tokens_and_no_others() -> None:
    """Nothing announces the first 13 of 24 tokens, ln 32 each; the other 11 are sure (loss 0).

    Without the induction head all 24 are guessed: the score is 24 / 13 - 1. A stream that the head
    did not write to is not quite one that the model's norm leaves alone: 2e-3 of a nat.
    """
    model = induction_model()
    with torch.no_grad():  # the sink's answer, START, is taken out: what is not known is guessed
        model.lm_head.weight[0] = 0
    lens = al.load(model)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(5)) + 1
    start = torch.tensor([0])
    repeated = torch.cat([start, order[:12], order[:12]])
    texts = torch.stack([torch.cat([start, order[:24]]), repeated])
    found = attention_influence(lens, texts, "L1H2", edit=al.Zero)
    assert found.base.tolist() == pytest.approx([math.log(32), math.log(32) * 13 / 24], abs=1e-4)
    assert found.masked.tolist() == pytest.approx([math.log(32)] * 2, abs=3e-3)
    assert found.score.tolist() == pytest.approx([0, 11 / 13], abs=3e-3)
    assert found.ranking.tolist() == [1, 0]
    assert attention_influence(lens, texts, "L1H0").score.abs().max() < 1e-6
    assert attention_influence(lens, texts, "L1H2").ranking.tolist() == [1, 0]


def test_batches_and_padding_change_no_number(trained: Lens) -> None:
    alone = attention_influence(trained, TEXTS, "L2H2,L2H5", batch_size=1)
    together = attention_influence(trained, TEXTS, "L2H2,L2H5", batch_size=4)
    assert torch.allclose(alone.score, together.score, rtol=1e-10, atol=1e-12)
    assert torch.allclose(alone.base, together.base, rtol=1e-10)
    ids = trained.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    left = attention_influence(trained, dict(ids), "L2H2,L2H5", batch_size=2)
    assert torch.allclose(alone.score, left.score, rtol=1e-10, atol=1e-12)
    assert left.tokens.equal(alone.tokens)


def test_texts_may_come_one_after_another(trained: Lens) -> None:
    given: list[int] = []
    most: list[int] = []

    def endless() -> Iterator[str]:
        for number in range(70):
            given.append(number)
            yield TEXTS[number % 4]

    def watch(done: int, _: int | None) -> None:
        most.append(len(given) - done)

    found = attention_influence(trained, endless(), "L2H2", batch_size=2, progress=watch)
    whole = attention_influence(trained, TEXTS, "L2H2", batch_size=2)
    assert found.prompts == 70
    assert torch.allclose(found.score[:4], whole.score, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.score[64:68], whole.score, rtol=1e-10, atol=1e-12)
    assert max(most) <= 32  # a window, not the corpus


def test_long_texts_are_refused_or_cut(trained: Lens) -> None:
    long = TEXTS[1] * 40
    with pytest.raises(InputError, match="at most 512"):
        attention_influence(trained, [long], "L2H2")
    cut = attention_influence(trained, [long, TEXTS[0]], "L2H2", max_tokens=64)
    assert cut.tokens[0] == 63
    assert any("1 of 2 texts were cut" in note for note in cut.notes)


def test_a_text_of_one_token_has_no_score() -> None:
    lens = al.load(tiny_gpt2())
    ids, mask = torch.tensor([[3, 4, 5], [7, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    for batch_size in (1, 2):
        found = attention_influence(lens, inputs, "L1H2", batch_size=batch_size)
        assert found.score.isnan().tolist() == [False, True]
        assert found.tokens.tolist() == [2, 0]
        assert found.ranking.tolist() == [0, 1]
        assert "1 of 2 texts have one token, so no loss and no score." in found.notes
    with pytest.raises(InputError, match="two tokens"):
        attention_influence(lens, torch.tensor([[3]]), "L1H2")


def test_results_tell_what_was_done(trained: Lens) -> None:
    found = attention_influence(trained, TEXTS, "L2H2", edit=al.Zero, seed=4)
    assert found.edit == "Zero of L2H2"
    frame = found.to_frame()
    assert list(frame.columns) == ["text", "score", "base", "masked", "tokens", "start"]
    assert frame["score"].is_monotonic_decreasing
    assert frame["text"].tolist() == found.ranking.tolist()
    assert found.starts[2] == "Speak"
    assert found.starts[0].startswith("What light")
    assert found.mean.low <= found.mean.mean <= found.mean.high
    assert found.mean.mean == pytest.approx(float(found.score.mean()))


@pytest.mark.parametrize("name", ["gemma2", "cohere", "llama", "mistral"])
def test_logits_by_the_chunk_are_those_of_the_model(name: str) -> None:
    """What a model does to its logits (a soft cap, a scale) is in the loss."""
    lens = architecture(name)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = lens.model(ids).logits
    wanted = torch.stack([naive_loss(*pair) for pair in zip(logits, ids, strict=True)])
    rows: list[int] = []
    ran: list[object] = []
    unembedding = lens.model.get_submodule(str(lens.anatomy.unembedding))
    first = lens.model.get_submodule(lens.anatomy.sites[0].module)
    hooks = [
        unembedding.register_forward_hook(lambda _, __, out: rows.append(out.shape[1])),
        first.register_forward_hook(lambda *_: ran.append(None)),
    ]
    found, counts = next_token_loss(lens, lens.encode(ids), logit_bytes=1)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(found, wanted, rtol=1e-10)
    assert counts.tolist() == [8, 8]
    assert rows == [1] * 8
    assert len(ran) == 1


def test_what_cannot_be_scored_is_refused(ids: Tensor) -> None:
    lens = al.load(tiny_gpt2())
    with pytest.raises(InputError, match="No head"):
        attention_influence(lens, ids, ())
    with pytest.raises(HeadError):
        attention_influence(lens, ids, "L9H9")
    for name in ("bert", "t5"):
        other = architecture(name)
        with pytest.raises((InputError, UnsupportedModelError), match=r"left to right|no logits"):
            attention_influence(other, ids, "L1H1" if name == "bert" else "dec.L1H1")


def test_nothing_is_left_on_the_model_after_an_error(ids: Tensor) -> None:
    model = tiny_gpt2()
    lens = al.load(model)
    with torch.no_grad():
        before = model(ids).logits
    unembedding = model.lm_head

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    hook = unembedding.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        attention_influence(lens, ids, "L1H2")
    hook.remove()
    assert "forward" not in vars(model.transformer)
    with torch.no_grad():
        assert model(ids).logits.equal(before)
