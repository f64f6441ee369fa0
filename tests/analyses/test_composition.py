"""Composition scores against dense matrices, and on circuits whose composition is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import attnlens as al
from attnlens.analyses.composition import Composition, pair_scores
from attnlens.errors import InputError
from attnlens.hooks.examples import example_inputs
from attnlens.hooks.folded import find_norms
from attnlens.views import show
from attnlens.zoo import induction_model, name_circuit, name_model, small_path
from tests.analyses.conftest import architecture

KINDS = ("q", "k", "v")


def random_gpt2(width: int = 64, heads: int = 4) -> GPT2LMHeadModel:
    """A float64 GPT-2 whose norms have gains and biases of their own."""
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=width, n_layer=3, n_head=heads)
    draw = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.weight.copy_(torch.rand(width, generator=draw) + 0.5)
            block.ln_1.bias.normal_(generator=draw)
    return model


def grouped_llama() -> LlamaForCausalLM:
    """A float64 Llama with two keys and values for four queries."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.uniform_(
                0.5, 1.5, generator=torch.Generator().manual_seed(2)
            )
    return model


def ratio(first: Tensor, second: Tensor) -> float:
    """The definition, of `d_model d_model` matrices."""
    return float(((first @ second).norm() / (first.norm() * second.norm())).detach())


def dense_gpt2(model: GPT2LMHeadModel, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """W_QK and W_OV with gain and centring of the norm before them, row vectors."""
    block, width = model.transformer.h[layer], model.config.n_embd
    d = width // model.config.n_head
    own = slice(head * d, (head + 1) * d)
    centre = torch.eye(width).double() - 1 / width
    norm = centre @ torch.diag(block.ln_1.weight)
    query, key, value = (norm @ w[:, own] for w in block.attn.c_attn.weight.chunk(3, 1))
    return query @ key.T, value @ block.attn.c_proj.weight[own]


def dense_llama(
    model: LlamaForCausalLM, layer: int, head: int, offset: int
) -> tuple[Tensor, Tensor]:
    """The same of a Llama, with the turn of a query `offset` tokens later written as a matrix."""
    block = model.model.layers[layer]
    attention = block.self_attn
    gain = torch.diag(block.input_layernorm.weight)
    own, group = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
    query, key = (
        gain @ attention.q_proj.weight.T[:, own],
        gain @ attention.k_proj.weight.T[:, group],
    )
    angles = offset * model.model.rotary_emb.inv_freq.double()
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    turn = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])  # of row vectors
    value = gain @ attention.v_proj.weight.T[:, group]
    return query @ turn @ key.T, value @ attention.o_proj.weight.T[own]


def check_dense(found: Composition, dense) -> None:
    """Every pair and kind equals the definition."""
    for kind, name in enumerate(found.kinds):
        for a, sender in enumerate(found.senders):
            for b, receiver in enumerate(found.receivers):
                score = float(found.score[kind, a, b])
                if sender.layer >= receiver.layer:
                    assert np.isnan(score)
                    continue
                writes = dense(sender.layer, sender.head)[1]
                qk, ov = dense(receiver.layer, receiver.head)
                reads = {"q": qk, "k": qk.T, "v": ov}[name]
                assert score == pytest.approx(ratio(writes, reads), rel=1e-9)


def test_scores_are_those_of_dense_matrices() -> None:
    model = random_gpt2()
    found = al.composition(al.load(model))
    assert found.kinds == KINDS
    assert found.score.shape == (3, 8, 8)
    check_dense(found, lambda layer, head: dense_gpt2(model, layer, head))


@pytest.mark.parametrize("offset", [0, 1, 7])
def test_under_rotary_embedding_scores_are_those_of_an_offset(offset: int) -> None:
    model = grouped_llama()
    found = al.composition(al.load(model), offset=offset)
    assert found.offset == offset
    check_dense(found, lambda layer, head: dense_llama(model, layer, head, offset))


def test_rotary_needs_an_offset_but_for_values() -> None:
    lens = al.load(grouped_llama())
    for kind in (None, "q", "k"):
        with pytest.raises(InputError, match=r'offset=1.*kind="v"'):
            al.composition(lens, kind)
    values = al.composition(lens, "v")
    assert values.offset is None
    turned = al.composition(lens, offset=3)
    assert torch.allclose(values.score[0], turned.score[2], rtol=1e-12, equal_nan=True)
    with pytest.raises(InputError, match="later key"):
        al.composition(lens, offset=-1)
    other = al.composition(lens, offset=4)
    assert not torch.allclose(other.score[0], turned.score[0], rtol=1e-3, equal_nan=True)


def test_the_hand_wired_circuit_composes_by_keys() -> None:
    found = al.composition(al.load(induction_model()))
    frame = found.to_frame()
    best = frame.iloc[0]
    assert (best["sender"], best["receiver"], best["kind"]) == ("L0H1", "L1H2", "k")
    # 31 of the 32 directions written are read: with the folded norm about sqrt(1 / 32).
    assert best["score"] == pytest.approx(32**-0.5, rel=1e-3)
    others = frame["score"][1:].dropna()
    assert others.max() < best["score"] / 20
    (note,) = found.notes  # its norms are identities, and yet each is told from the next
    assert "weights of 0" in note


def test_the_edges_of_the_name_circuit_are_found_by_weights() -> None:
    frame = al.composition(al.load(name_model())).to_frame()
    positive = frame[frame["over_baseline"] > 0]
    found = set(positive[["sender", "receiver", "kind"]].itertuples(index=False, name=None))
    wired = {tuple(e) for e in name_circuit() if e.sender.startswith("L") and e.kind}
    # The inhibition heads ask by a bias alone, which has no place in W_QK.
    unseen = {edge for edge in wired if edge[1].startswith("L2") and edge[2] == "k"}
    assert len(unseen) == 4
    assert found == wired - unseen
    rows = frame.set_index(["sender", "receiver", "kind"])["score"]
    assert all(np.isnan(rows[edge]) for edge in unseen)
    assert rows.dropna()[rows.dropna() > 0].size == len(found)


def test_random_weights_are_at_the_baseline() -> None:
    found = al.composition(al.load(random_gpt2(width=256)))
    pairs = ~found.score.isnan()
    assert found.over_baseline[pairs].mean().abs() < found.spread[pairs].mean()
    assert found.over_baseline[pairs].abs().max() < 0.01
    assert found.baseline[pairs].min() > 0.05


def test_scale_changes_nothing() -> None:
    plain, scaled = random_gpt2(), random_gpt2()
    with torch.no_grad():
        for number, block in enumerate(scaled.transformer.h):
            block.attn.c_attn.weight.mul_(3.0 + number)
            block.attn.c_proj.weight.mul_(0.25)
            block.ln_1.weight.mul_(7)
    one, other = (al.composition(al.load(model)) for model in (plain, scaled))
    assert torch.allclose(one.score, other.score, rtol=1e-9, equal_nan=True)


def test_a_part_of_the_heads_is_a_part_of_the_table() -> None:
    lens = al.load(random_gpt2())
    whole = al.composition(lens)
    part = al.composition(lens, "k", senders="L0H1,L1H3,L2", receivers="L2H2,L1H0,L0H0")
    assert [str(head) for head in part.senders] == ["L0H1", "L1H3"]
    assert [str(head) for head in part.receivers] == ["L2H2", "L1H0"]
    for a, sender in enumerate(part.senders):
        for b, receiver in enumerate(part.receivers):
            same = whole.score[1, whole.senders.index(sender), whole.receivers.index(receiver)]
            assert torch.allclose(part.score[0, a, b], same, rtol=1e-12, equal_nan=True)
    assert len(part.to_frame()) == 3  # L1H3 does not come before L1H0
    again = al.composition(lens, "k", senders="L0H1,L1H3", receivers="L2H2,L1H0")
    assert torch.equal(again.baseline.nan_to_num(), part.baseline.nan_to_num())


def test_refusals_and_notes() -> None:
    lens = al.load(random_gpt2())
    with pytest.raises(InputError, match='"q", "k" and "v"'):
        al.composition(lens, "z")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="later layer"):
        al.composition(lens, senders="L2", receivers="L0:2")
    with pytest.raises(InputError, match="draws=1"):
        al.composition(lens, draws=1)
    assert al.composition(lens).notes == ()
    assert "idle" in al.composition(lens, offset=1).notes[0]


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "bert", "t5", "gpt_neox", "whisper"])
def test_other_families(name: str) -> None:
    lens = architecture(name)
    before = {key: value.clone() for key, value in lens.model.state_dict().items()}
    found = al.composition(lens, offset=1)
    frame = found.to_frame()
    assert frame["score"].between(0.01, 0.99).all()
    assert all(tensor.equal(before[key]) for key, tensor in lens.model.state_dict().items())
    assert ("norm the stream itself" in " ".join(found.notes)) == (name == "bert")
    cross = frame["receiver"].str.startswith("cross")
    assert set(frame["kind"][cross]) <= {"q"}


def test_norms_before_and_after_attention_are_found() -> None:
    for name, before, after in (
        ("gemma2", "input_layernorm", "post_attention_layernorm"),
        ("olmo2", None, "post_attention_layernorm"),
        ("gpt2", "ln_1", None),
    ):
        lens = architecture(name)
        weights = {site.name: lens.weights(site.name) for site in lens.anatomy.sites}
        found = find_norms(lens.model, lens.anatomy, weights, example_inputs(lens.model))
        for site in lens.anatomy.sites:
            norms = found[site.name]
            wanted = None if before is None else f"{site.block}.{before}"
            assert {gain.module for gain in norms.reads.values()} == ({wanted} - {None})
            written = None if norms.written is None else norms.written.module
            assert written == (None if after is None else f"{site.block}.{after}")


def test_the_trained_model_reads_its_previous_token_heads_by_keys() -> None:
    """All heads of layer 2 are induction heads; L0H3 and L1H7 look at the token before."""
    found = al.composition(al.load(small_path()), "k", receivers="L2", offset=1)
    best = found.to_frame().head(16)
    assert list(best["sender"]) == ["L0H3"] * 8 + ["L1H7"] * 8


def test_pair_scores_of_nothing_are_nan() -> None:
    left = torch.zeros(2, 3, 8)
    left[1] = 1
    scores = pair_scores(left, torch.ones(1, 8, 3))
    assert scores.isnan().tolist() == [[True], [False]]
    assert float(scores[1, 0]) == pytest.approx(1)


def test_figure() -> None:
    found = al.composition(al.load(random_gpt2()))
    figure = show(found)
    grids = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(grids) == 3
    for kind, grid in enumerate(grids):
        shown = np.array(grid.z, dtype=float)
        assert np.allclose(shown, found.over_baseline[kind].numpy(), atol=1e-6, equal_nan=True)
    assert "L0H1 → L1H2" in grids[1].customdata[1][2]
    assert list(figure.layout.xaxis.ticktext) == [str(head) for head in found.receivers]
    one = dataclasses.replace(
        found, kinds=("k",), **{n: getattr(found, n)[1:2] for n in ("score", "baseline", "spread")}
    )
    assert len(show(one).data) == 1
