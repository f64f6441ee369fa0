"""Leave-one-out against shorter prompts, other prompts and other embeddings, run by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import attnlens as al
from attnlens.analyses.erasure import Eraser, leave_one_out, random_attribution
from attnlens.analyses.replacement import Replacement
from attnlens.analyses.target import Target
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.lens import Lens
from attnlens.zoo import induction_model, small_path
from tests.analyses.conftest import architecture
from tests.architectures import ARCHITECTURES
from tests.tasks.models import gpt2_like

ASKED = Target(5, 6)
WAYS = (Replacement("padding"), Replacement("mean"), Replacement("neutral", token=9))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bert() -> Lens:
    torch.manual_seed(0)
    tokenizer = gpt2_like().tokenizer
    tokenizer.add_special_tokens({"mask_token": "<mask>", "unk_token": "<unk>"})
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return al.load(BertForSequenceClassification(config).double().eval(), tokenizer)


def contrast(lens: Lens, **inputs: Any) -> Tensor:
    """The contrast of 5 and 6 at the last position, by the plain model."""
    with torch.no_grad():
        logits = lens.model(**inputs, use_cache=False).logits[:, -1]
    return (logits[:, 5] - logits[:, 6]).double()


def drops(lens: Lens, ids: Tensor, without: Any, places: range) -> Tensor:
    """M(x) - M(x without i) for each place, M without it as given."""
    whole = contrast(lens, input_ids=ids)
    return torch.stack([whole - without(place) for place in places], dim=1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox", "qwen3"])
def test_a_hidden_token_is_a_token_that_is_not_there(name: str, ids: Tensor) -> None:
    """The model reads the prompt without the token; others keep their positions."""
    lens = architecture(name)
    found = leave_one_out(lens, ids, ASKED, Replacement("padding", special=True))

    def cut(place: int) -> Tensor:
        kept = [other for other in range(7) if other != place]
        positions = torch.tensor([kept] * 2)
        # With the mask left out transformers takes a gap for the start of another text.
        mask = torch.ones_like(positions)
        rest = {"position_ids": positions, "attention_mask": mask}
        return contrast(lens, input_ids=ids[:, kept], **rest)

    wanted = drops(lens, ids, cut, range(6))
    assert torch.allclose(found.scores[:, :6], wanted, atol=1e-9)
    assert wanted.abs().min() > 1e-4
    assert bool((found.scores[:, 6] == 0).all())  # its logits are read
    assert torch.allclose(found.value, contrast(lens, input_ids=ids))


@pytest.mark.parametrize("name", ["gpt2", "gemma", "bert", "modernbert", "t5", "bart"])
def test_a_mean_embedding_and_another_token_are_those_of_the_plain_model(
    name: str, ids: Tensor
) -> None:
    lens = architecture(name)
    model = lens.model
    text: dict[str, Any] = {"input_ids": ids}
    if lens.anatomy.sites[-1].kind == "cross":
        text["decoder_input_ids"] = ids[:, :3].flip(1)

    def metric(output: Any) -> Tensor:
        states = output.logits if "logits" in output else output.last_hidden_state
        return states[:, -1, 5] - states[:, -1, 6]

    def plain(**inputs: Any) -> Tensor:
        with torch.no_grad():
            return metric(model(**inputs))

    table = model.get_input_embeddings()
    mean = table(torch.arange(table.num_embeddings)).mean(0)
    for way in WAYS[1:]:
        found = leave_one_out(lens, text, metric, replace(way, special=True))
        assert found.scores.shape == (2, 7 + 3 * ("decoder_input_ids" in text))
        for place in (0, 3, 6):
            other = ids.clone()
            other[:, place] = 9
            changed = {"input_ids": other}
            if way.kind == "mean":
                embeddings = table(ids).detach().clone()
                embeddings[:, place] = mean
                changed = {"inputs_embeds": embeddings}
            rest = {k: v for k, v in text.items() if k != "input_ids"}
            wanted = plain(**text) - plain(**changed, **rest)
            assert torch.allclose(found.scores[:, place], wanted.double(), atol=1e-9), (way, place)


def test_tokens_of_a_decoder_are_erased_too() -> None:
    lens = architecture("t5")
    ids, own = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 8, 9]])
    inputs = {"input_ids": ids, "decoder_input_ids": own}
    found = leave_one_out(lens, inputs, ASKED, Replacement("neutral", token=11, special=True))
    whole = contrast(lens, **inputs)
    for place in range(3):
        other = own.clone()
        other[0, place] = 11
        wanted = whole - contrast(lens, input_ids=ids, decoder_input_ids=other)
        assert torch.allclose(found.scores[:, 3 + place], wanted, atol=1e-9)
    hidden = leave_one_out(lens, inputs, ASKED, Replacement("padding", special=True))
    assert hidden.scores[0, 5] == 0  # read
    assert bool((hidden.scores[0, :5] != 0).all())


@given(
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    left=st.booleans(),
    way=st.sampled_from(WAYS),
    tokens=st.sampled_from([1, 20, 4096]),
)
def test_batches_and_padding_change_nothing(
    random_lens: Lens, lengths: list[int], left: bool, way: Replacement, tokens: int
) -> None:
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(1, 40, (length,), generator=draw).tolist() for length in lengths]
    width = max(lengths)
    spare = [[0] * (width - len(row)) for row in rows]
    both = [(pad, row) if left else (row, pad) for pad, row in zip(spare, rows, strict=True)]
    mask = [([0] * len(p), [1] * len(r)) for p, r in zip(spare, rows, strict=True)]
    batch = {
        "input_ids": torch.tensor([one + other for one, other in both]),
        "attention_mask": torch.tensor([p + r if left else r + p for p, r in mask]),
    }
    together = leave_one_out(random_lens, batch, ASKED, way, tokens)
    chance = random_attribution(random_lens, batch, ASKED)
    for prompt, row in enumerate(rows):
        alone = leave_one_out(random_lens, [row], ASKED, way)
        assert torch.allclose(together.of(prompt), alone.of(0), atol=1e-9)
        assert torch.allclose(together.value[prompt], alone.value[0])
        assert bool((together.scores[prompt, len(row) :] == 0).all())
        assert torch.equal(chance.of(prompt), random_attribution(random_lens, [row], ASKED).of(0))


def test_a_function_of_the_output_gets_all_prompts_in_their_order(random_lens: Lens) -> None:
    ids = torch.tensor([[3, 7, 9, 4], [0, 0, 8, 2], [0, 5, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask}

    def metric(output: Any) -> Tensor:
        return output.logits[:, -1, 5] - output.logits[:, -1, 6]

    for way in WAYS[1:]:
        one = leave_one_out(random_lens, inputs, metric, way)
        assert torch.allclose(one.scores, leave_one_out(random_lens, inputs, ASKED, way).scores)


def test_the_source_and_the_token_that_finds_it_are_all_that_the_circuit_needs() -> None:
    """START a b c d a b: c follows b by the pair (b, c); either gone, the logit of 16 is."""
    lens = al.load(induction_model())
    prompt = [0, 11, 12, 13, 14, 11, 12]
    found = leave_one_out(lens, [prompt], Target(13, 14), Replacement("neutral", token=20))
    needed = {2, 3, 6}
    for place, score in enumerate(found.of(0).tolist()):
        assert score == pytest.approx(16 if place in needed else 0, abs=0.01), place
    # Heads that look for a hidden token spread their attention, which costs the circuit its zeros.
    hidden = leave_one_out(lens, [prompt], Target(13, 14)).of(0)
    assert set(hidden.topk(2).indices.tolist()) == {2, 3}
    assert hidden[[2, 3]].tolist() == pytest.approx([16, 16], abs=0.2)


def test_a_mean_of_several_tables_is_refused() -> None:
    """A mean is of one table; T5 whose decoder reads another one has two."""
    lens = architecture("t5")
    ids = torch.tensor([[5, 6, 7]])
    leave_one_out(lens, {"input_ids": ids}, ASKED, "mean")
    model = lens.model
    own = torch.nn.Embedding.from_pretrained(model.decoder.embed_tokens.weight.detach().clone())
    model.decoder.set_input_embeddings(own)
    with pytest.raises(UnsupportedModelError, match=r"2 tables.*replacement='padding'"):
        leave_one_out(lens, {"input_ids": ids}, ASKED, "mean")


def test_special_tokens_stay_unless_they_are_asked_for(bert: Lens) -> None:
    start = bert.tokenizer.mask_token
    text = f"{start} Ann and Ben went home"
    kept = leave_one_out(bert, text, Target(0), "padding")
    assert kept.scores[0, 0] == 0
    assert any("score 0: 1 here" in note for note in kept.notes)
    assert leave_one_out(bert, text, Target(0), Replacement(special=True)).scores[0, 0] != 0


def test_the_neutral_token_is_named(bert: Lens) -> None:
    found = leave_one_out(bert, "Ann and Ben", Target(0), "neutral")
    assert found.settings["in place"].startswith("the mask token '<mask>'")
    assert found.settings["replacement"] == {"kind": "neutral", "token": None, "special": False}
    small = al.load(small_path())
    eraser = Eraser(small, "Ann and Ben", None, "neutral")
    space = small.tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert eraser.said == f"the token ' ' (id {space[0]})"
    by_text = Eraser(small, "Ann and Ben", None, Replacement("neutral", token=" "))
    assert by_text.said == eraser.said


def test_random_scores_are_the_seeds(random_lens: Lens, ids: Tensor) -> None:
    one, other = (random_attribution(random_lens, ids, ASKED, seed) for seed in (0, 1))
    assert torch.equal(one.scores, random_attribution(random_lens, ids, ASKED).scores)
    assert not torch.allclose(one.scores, other.scores)
    assert not torch.allclose(one.scores[0], one.scores[1])
    assert torch.allclose(one.value, contrast(random_lens, input_ids=ids))


def test_what_cannot_be_erased_is_refused(random_lens: Lens, bert: Lens, ids: Tensor) -> None:
    def refused(match: str, lens: Lens, inputs: Any, way: Any) -> None:
        with pytest.raises(InputError, match=match):
            leave_one_out(lens, inputs, lambda output: output[0].flatten(1)[:, 0], way)

    refused("choose padding, mean, neutral", random_lens, ids, "blank")
    refused("no tokenizer to take a neutral", random_lens, ids, "neutral")
    refused("no tokenizer to read", random_lens, ids, Replacement("neutral", token="a"))
    refused("ids are 0 to 39", random_lens, ids, Replacement("neutral", token=40))
    refused("is 3 tokens", bert, "Ann", Replacement("neutral", token="a, "))
    with pytest.raises(InputError, match="'mean' takes none"):
        Replacement("mean", token=3)
    refused("Every token of a prompt would be hidden", bert, [[5]], Replacement(special=True))
    vision = architecture("vit")
    refused("no token ids", vision, vision._example, "mean")
    with pytest.raises(InputError, match="one finite number a prompt"):
        leave_one_out(random_lens, ids, lambda output: output.logits[:, -1], "padding")
    with pytest.raises(InputError, match="give 1 or more"):
        leave_one_out(random_lens, ids, ASKED, tokens=0)
    refused("counts positions by its attention mask", architecture("qwen2_vl"), ids, "padding")


def test_places_of_an_image_stay_where_nothing_is_hidden() -> None:
    made = ARCHITECTURES["llava"]
    model = made.build()
    inputs = made.inputs(model)
    lens = al.load(model, example=inputs)
    image = inputs["input_ids"] == model.config.image_token_id
    assert bool(image.any())
    for way in WAYS[1:]:
        found = leave_one_out(lens, inputs, ASKED, replace(way, special=True))
        assert bool((found.scores[image] == 0).all())
        assert bool((found.scores[~image] != 0).any())


def test_nothing_stays_on_the_model(random_lens: Lens, ids: Tensor) -> None:
    before = contrast(random_lens, input_ids=ids)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in random_lens.model.modules()]

    def broken(output: Any) -> Tensor:
        raise RuntimeError("in the metric")

    for way in WAYS:
        with pytest.raises(RuntimeError, match="in the metric"):
            leave_one_out(random_lens, ids, broken, way)
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in random_lens.model.modules()
    ]
    assert torch.equal(contrast(random_lens, input_ids=ids), before)
