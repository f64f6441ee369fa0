"""Chefer's relevance against the papers' rules, written out in numpy on eager maps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.attribute import attribute
from attnlens.analyses.chefer import (
    Relevance,
    chefer,
    co_attended,
    cross_attended,
    normalised,
    relevance_rollout,
    self_attended,
)
from attnlens.analyses.target import settle
from attnlens.errors import BudgetError, InputError
from attnlens.lens import Lens
from tests.analyses.test_attention_gradient import opened, padded, tolerance
from tests.architectures import ARCHITECTURES
from tests.oracles import chefer as oracle
from tests.oracles.attention_gradients import eager_gradients, logit


def maps(seed: int, rows: int, keys: int, count: int = 1) -> list[Tensor]:
    """Random maps of numbers from 0 up, some of them 0, for two prompts."""
    draw = torch.Generator().manual_seed(seed)
    shape = (count, 2, rows, keys)
    return list(torch.randn(shape, generator=draw, dtype=torch.float64).clamp_min(0))


def prompts_of(lens: Lens, inputs: dict[str, Tensor]) -> list[oracle.Maps]:
    """Each prompt's maps without padding; the target is token 5 after its last."""
    batch = lens.encode(inputs)
    explained = settle(lens, batch, 5)
    assert explained.reads is not None
    found = eager_gradients(lens, batch, logit(5, explained.reads[:, 0]))
    text = batch.inputs["attention_mask"].bool()
    decoder = batch.inputs.get("decoder_attention_mask", text).bool()
    return [oracle.of_prompt(found, b, text[b], decoder[b]) for b in range(batch.size)]


@given(layers=st.integers(1, 5), length=st.integers(1, 6), seed=st.integers(0, 99))
def test_adding_layer_by_layer_is_the_product(layers: int, length: int, seed: int) -> None:
    relevance: Relevance = {}
    product = torch.eye(length, dtype=torch.float64)
    for attention in maps(seed, length, length, layers):
        relevance = self_attended(relevance, "s", attention)
        product = (torch.eye(length) + attention) @ product
    assert torch.allclose(relevance["s", "s"], product, rtol=1e-12)


def test_relevance_of_the_identity_is_no_nan() -> None:
    eye = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    assert torch.equal(normalised(eye), eye)
    mixed = eye.clone()
    mixed[0, 2] = torch.tensor([1.0, 0.0, 1.0, 3.0])
    found = normalised(mixed)
    assert torch.allclose(found[0, 2], torch.tensor([0.25, 0, 1, 0.75], dtype=torch.float64))
    assert torch.equal(found[0, [0, 1, 3]], eye[0, [0, 1, 3]])
    assert torch.equal(found[1], eye[1])
    attention = maps(0, 4, 3)[0]
    assert torch.equal(cross_attended({}, "s", "q", attention)["s", "q"], attention)
    given_ones = {("s", "s"): eye, ("q", "q"): torch.eye(3).double().expand(2, 3, 3)}
    assert torch.equal(cross_attended(given_ones, "s", "q", attention)["s", "q"], attention)


@given(layers=st.integers(1, 4), s=st.integers(1, 5), q=st.integers(1, 5), seed=st.integers(0, 99))
def test_co_attention_follows_the_paper(layers: int, s: int, q: int, seed: int) -> None:
    shapes = [(s, q), (q, s), (s, s), (q, q)]
    steps = [[maps(seed + 7 * n, *shape)[0] for shape in shapes] for n in range(layers)]
    relevance: Relevance = {}
    for a_sq, a_qs, a_ss, a_qq in steps:
        relevance = co_attended(relevance, "s", "q", a_sq, a_qs)
        relevance = self_attended(self_attended(relevance, "s", a_ss), "q", a_qq)
    for prompt in range(2):
        own = [tuple(one[prompt].numpy() for one in step) for step in steps]
        wanted = oracle.co_attention(own)
        pairs = [("s", "s"), ("s", "q"), ("q", "s"), ("q", "q")]
        for pair, matrix in zip(pairs, wanted, strict=True):
            assert np.allclose(relevance[pair][prompt].numpy(), matrix, rtol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma2", "gpt_oss"])
def test_one_stack_is_the_papers(name: str, side: str) -> None:
    lens = opened(name)
    inputs = padded(lens, name, side)
    found = chefer(lens, inputs, 5)
    for prompt, own in enumerate(prompts_of(lens, inputs)):
        wanted = oracle.self_only(own)[-1]
        assert np.allclose(found.of(prompt).numpy(), wanted, atol=10 * tolerance(name), rtol=1e-4)
        assert wanted.sum() > 1.1
    assert (found.scores[1, len(found.tokens[1]) :] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_are_the_papers(name: str, side: str) -> None:
    lens = opened(name)
    inputs = padded(lens, name, side)
    found = chefer(lens, inputs, 5)
    for prompt, own in enumerate(prompts_of(lens, inputs)):
        r_tt, r_te = oracle.encoder_decoder(own)
        wanted = np.concatenate([r_te[-1], r_tt[-1]])
        assert np.allclose(found.of(prompt).numpy(), wanted, atol=1e-10)
        assert r_te[-1].max() > 1e-3
    assert found.layers is None


def test_layers_are_what_enters_each_site() -> None:
    lens = opened("bert")
    inputs = padded(lens, "bert", "right")
    found = chefer(lens, inputs, 5)
    assert found.layer_names == ("L0", "L1", "final")
    assert found.layers is not None
    assert torch.equal(found.layers[:, 0], found.scores)
    upper = chefer(lens, inputs, 5, layers="L1")
    assert torch.allclose(found.layers[:, 1], upper.scores, atol=1e-13)
    assert (found.layers[:, 2].sum(-1) == 1).all()


def test_heads_are_fused_from_those_chosen() -> None:
    lens = opened("gpt2")
    inputs = padded(lens, "gpt2", "right")
    found = chefer(lens, inputs, 5, heads="L0H1,L0H2,L2H3", maps=True)
    assert found.maps is not None
    eye = torch.eye(16, dtype=torch.float64)
    product = (found.maps["L2"].mean(1) + eye) @ (found.maps["L0"].mean(1) + eye)
    assert torch.allclose(found.scores[0], product[0, -1], atol=1e-12)
    assert found.heads is not None
    assert torch.allclose(found.heads[:, :2], found.maps["L0"].sum((2, 3)), atol=1e-12)
    assert [str(head) for head in found.head_names] == ["L0H1", "L0H2", "L2H3"]


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "bert", "t5"])
def test_padding_and_batches_change_nothing(name: str) -> None:
    lens = opened(name)
    for side in ("left", "right"):
        if side == "left" and name == "bert":
            continue  # BERT counts positions over padding
        inputs = padded(lens, name, side)
        alone = {"input_ids": inputs["input_ids"][1:, inputs["attention_mask"][1].bool()]}
        if "decoder_input_ids" in inputs:
            real = inputs["decoder_attention_mask"][1].bool()
            alone["decoder_input_ids"] = inputs["decoder_input_ids"][1:, real]
        both, one = chefer(lens, inputs, 5), chefer(lens, alone, 5)
        assert both.tokens[1] == one.tokens[0]
        assert torch.allclose(both.of(1), one.of(0), atol=tolerance(name), rtol=1e-5)


def test_the_attended_source_gets_the_relevance(induction_lens: Lens) -> None:
    ids = [0, 5, 9, 3, 7, 5, 9, 3]
    found = attribute(induction_lens, ids, 7, method="chefer")
    assert "its own token" in found.notes[0]
    without_the_row = found.of(0)[:-1]
    assert int(without_the_row.argmax()) == 4
    assert without_the_row[4] > 10 * without_the_row[[0, 1, 2, 3, 5, 6]].sum()
    assert found.heads_frame().set_index("head")["score"].idxmax() == "L1H2"
    frame = found.layers_frame()
    assert list(frame[frame["layer"] == "final"]["score"]) == [0.0] * 7 + [1.0]


def test_rows_of_models_without_tokens_to_read() -> None:
    vit = ARCHITECTURES["vit"]
    model = vit.build().double()
    inputs = vit.inputs(model)
    lens = al.load(model, example=inputs)

    def first(output: object) -> Tensor:
        return output.last_hidden_state[:, 0, 3]  # type: ignore[attr-defined]

    found = chefer(lens, inputs, first)
    assert found.scores[0, 0] > 1  # the class token's own row
    assert (found.scores[0, 1:] < found.scores[0, 0]).all()
    other = chefer(lens, inputs, first, row=4)
    assert other.settings == {"row": 4}
    # No gradient reaches the last layer at another row.
    assert int(other.scores[0].argmax()) == 4
    with pytest.raises(InputError, match="row=17 is not in prompt 0, which has 17"):
        chefer(lens, inputs, first, row=17)


def test_layers_that_end_below_the_target_need_a_row() -> None:
    lens = opened("t5")
    inputs = padded(lens, "t5", "right")
    with pytest.raises(InputError, match=r"end with enc\.L1.*row=0"):
        chefer(lens, inputs, 5, layers="enc.L0:")
    found = chefer(lens, inputs, 5, layers="enc.L0:", row=0)
    assert found.tokens == tuple(lens.encode(inputs).tokens)


def test_what_cross_attention_reads_of_an_image_is_told() -> None:
    mllama = ARCHITECTURES["mllama"]
    model = mllama.build().double()
    inputs = mllama.inputs(model)
    found = chefer(al.load(model, example=inputs), inputs, 5)
    assert "outside the text" in found.notes[0]
    assert len(found.tokens[0]) == inputs["input_ids"].shape[1]


def test_relevance_is_priced_before_the_model_runs() -> None:
    lens = opened("t5")
    inputs = padded(lens, "t5", "right")
    runs: list[int] = []
    handle = lens.model.register_forward_pre_hook(lambda *_: runs.append(1))
    # four matrices of 16 x 16, 12 x 12 and 12 x 16 for two prompts
    with pytest.raises(BudgetError, match=r"37\.9 kB.*dec\.L0"):
        chefer(lens, inputs, 5, budget=30_000)
    with pytest.raises(BudgetError, match="map of every head"):
        chefer(opened("gpt2"), padded(lens, "gpt2", "right"), 5, maps=True, budget=1000)
    handle.remove()
    assert runs == []
    chefer(lens, inputs, 5, layers="dec.L0:", budget=30_000)


def test_beyond_attention_is_a_product_from_a_layer_on() -> None:
    lens = opened("bert")
    inputs = padded(lens, "bert", "right")
    batch = lens.encode(inputs)
    explained = settle(lens, batch, 5)
    assert explained.reads is not None
    eager = eager_gradients(lens, batch, logit(5, explained.reads[:, 0]))
    weights, gradients = zip(*eager.values(), strict=True)
    # With A in place of R_A it is the generic form.
    whole = relevance_rollout(gradients, weights)
    generic = chefer(lens, inputs, 5)
    rows = explained.reads[:, 0]
    assert torch.allclose(whole[torch.arange(2), rows][0], generic.scores[0], atol=1e-10)
    upper = relevance_rollout(gradients, weights, start=1)
    step = (gradients[1] * weights[1]).clamp_min(0).mean(1) + torch.eye(16).double()
    assert torch.equal(upper, step)
    for wrong in ((gradients, weights[:1]), ((), ())):
        with pytest.raises(InputError, match="both of every layer"):
            relevance_rollout(*wrong)
    with pytest.raises(InputError, match="start among them"):
        relevance_rollout(gradients, weights, start=2)
    with pytest.raises(InputError, match="as many queries as keys"):
        relevance_rollout([gradients[0][..., :3]], [weights[0][..., :3]])
