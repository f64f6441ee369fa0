import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.fusing import discard_lowest, fuse_heads
from attnlens.analyses.rollout import RolloutSettings, rollout, rollout_from, rollout_matrix
from attnlens.errors import InputError
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2

FUSED = ["mean", "max", "min"]


def patterns(layers: int, heads: int, length: int, causal: bool, seed: int = 0) -> Tensor:
    """Random float64 rows that sum to 1, `layer head query key`."""
    draw = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(layers, heads, length, length, generator=draw, dtype=torch.float64)
    if causal:
        scores.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.booleans())


@given(shapes, st.sampled_from(FUSED), st.floats(0, 0.9), st.floats(0, 0.9))
def test_rows_sum_to_one_and_see_no_future(
    shape: tuple[int, int, int, bool], fuse: str, residual: float, discard: float
) -> None:
    settings = RolloutSettings(fuse, residual, discard)  # type: ignore[arg-type]
    found = rollout_matrix(patterns(*shape), settings)
    assert torch.allclose(found.sum(-1), torch.ones_like(found.sum(-1)), atol=1e-12)
    assert found.min() >= 0
    if shape[3]:
        assert (found.triu(1) == 0).all()


def test_equals_the_sum_over_all_paths() -> None:
    attention = patterns(3, 2, 4, causal=False)
    share = 0.3
    steps = [(1 - share) * layer.mean(0) + share * torch.eye(4).double() for layer in attention]
    found = rollout_matrix(attention, RolloutSettings(residual=share))[-1]
    for target, source in itertools.product(range(4), repeat=2):
        total = 0.0
        for above, below in itertools.product(range(4), repeat=2):
            path = steps[2][target, above] * steps[1][above, below] * steps[0][below, source]
            total += float(path)
        assert abs(total - float(found[target, source])) < 1e-15


def test_is_the_jacobian_of_averaging_with_the_residual() -> None:
    attention = patterns(4, 3, 5, causal=True).mean(1)

    def mix(h: Tensor) -> Tensor:
        for layer in attention:
            h = (h + layer @ h) / 2
        return h

    jacobian = torch.autograd.functional.jacobian(mix, torch.randn(5, dtype=torch.float64))
    assert torch.allclose(rollout_matrix(attention[:, None])[-1], jacobian, atol=1e-15)


@given(st.integers(1, 8), st.integers(1, 9))
def test_even_attention_has_a_closed_form(layers: int, length: int) -> None:
    even = torch.full((layers, 2, length, length), 1 / length, dtype=torch.float64)
    wanted = 2.0**-layers * torch.eye(length, dtype=torch.float64)
    wanted = wanted + (1 - 2.0**-layers) / length
    assert torch.allclose(rollout_matrix(even)[-1], wanted, atol=1e-14)


def test_a_batch_is_its_prompts() -> None:
    batch = torch.stack([patterns(3, 2, 5, True, seed) for seed in range(3)])
    found = rollout_matrix(batch)
    assert torch.equal(found[1], rollout_matrix(batch[1]))
    with pytest.raises(InputError, match="as many queries as keys"):
        rollout_matrix(batch[:, :, :, :4])


def test_max_and_min_are_scaled_back_to_the_rows_that_were_fused() -> None:
    pattern = torch.tensor([[[[0.9, 0.1]], [[0.3, 0.7]]]], dtype=torch.float64)
    own = torch.tensor([1])
    largest = fuse_heads(pattern, own, RolloutSettings("max"))
    assert torch.allclose(largest, torch.tensor([0.9, 0.7], dtype=torch.float64) / 1.6)
    smallest = fuse_heads(pattern, own, RolloutSettings("min"))
    assert torch.allclose(smallest, torch.tensor([0.3, 0.1], dtype=torch.float64) / 0.4)
    # learned sinks: rows of mass .5 stay rows of mass .5
    assert torch.allclose(fuse_heads(pattern / 2, own, RolloutSettings("max")), largest / 2)
    # heads with nothing in common: the row's own token
    apart = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert fuse_heads(apart, own, RolloutSettings("min")).tolist() == [[[0.0, 1.0]]]


def test_the_lowest_weights_go_and_never_the_own_token() -> None:
    row = torch.tensor([[[[0.05, 0.1, 0.15, 0.7, 0.0]]]], dtype=torch.float64)
    diagonal = torch.tensor([[True, False, False, False, False]])
    half = discard_lowest(row, diagonal, 0.5)[0, 0, 0]  # the lowest two of four: own token stays
    assert torch.allclose(half, torch.tensor([0.05, 0, 0.15, 0.7, 0]).double() / 0.9)
    assert torch.equal(discard_lowest(row, diagonal, 0.24), row)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="residual=1"):
        RolloutSettings(residual=1.0)
    with pytest.raises(InputError, match="mean, max or min"):
        RolloutSettings("median")  # type: ignore[arg-type]


def test_rollout_of_a_trace_is_that_of_its_patterns(random_lens: Lens, ids: Tensor) -> None:
    trace = random_lens.run(ids, keep="pattern")
    found = rollout(trace)
    assert torch.equal(found.matrix, rollout_matrix(trace.pattern.stack()))
    assert torch.equal(found.maps, trace.pattern.stack().mean(2))
    assert found.layers == ("L0", "L1", "L2")
    frame = found.to_frame(prompt=1)
    assert len(frame) == 12 * 12
    assert frame["weight"].sum() == pytest.approx(12)


def test_layers_and_heads_are_chosen(random_lens: Lens, ids: Tensor) -> None:
    trace = random_lens.run(ids, keep="pattern")
    upper = rollout(trace, RolloutSettings(layers="L1:", heads="L0H1,L1H0,L1H3,L2H2"))
    wanted = [trace.pattern[1][:, [0, 3]].mean(1), trace.pattern[2][:, 2]]
    eye = torch.eye(12)
    assert torch.allclose(upper.last, (wanted[1] + eye) / 2 @ ((wanted[0] + eye) / 2))
    skipped = rollout(trace, RolloutSettings(heads="L0,L2H1"))
    assert skipped.layers == ("L0", "L2")
    assert "L1" in skipped.notes[0]


def test_what_was_not_kept_is_named(random_lens: Lens, ids: Tensor) -> None:
    with pytest.raises(InputError, match="L0H0 was not kept"):
        rollout(random_lens.run(ids, keep="pattern", heads="L0H1,L1"))
    with pytest.raises(InputError, match="rollout_from"):
        rollout(random_lens.run(ids, keep="pattern", rows=-1))
    with pytest.raises(InputError, match="stack 'enc'"):
        rollout(random_lens.run(ids, keep="pattern"), stack="enc")


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("fuse", FUSED)
def test_one_row_streamed_is_the_row_of_the_dense_one(name: str, fuse: str) -> None:
    lens = architecture(name)
    inputs = padded("left")
    settings = RolloutSettings(fuse, 0.4, 0.3)  # type: ignore[arg-type]
    dense = rollout(lens.run(inputs, keep="pattern"), settings)
    for target in (-1, 3):
        found = rollout_from(lens, inputs, target, settings)
        for prompt, place in enumerate(found.target):
            assert torch.allclose(found.row[prompt], dense.last[prompt, place], atol=1e-12)
            assert found.tokens == dense.tokens
    with pytest.raises(InputError, match="target=12"):
        rollout_from(lens, inputs, 12, settings)


@pytest.mark.parametrize("fuse", FUSED)
def test_blocks_that_begin_inside_a_window(fuse: str, request: pytest.FixtureRequest) -> None:
    lens = architecture("gpt_oss")
    settings = RolloutSettings(fuse, 0.4, 0.5)  # type: ignore[arg-type]
    dense = rollout(lens.run(padded("left"), keep="pattern"), settings)
    request.getfixturevalue("small_blocks")
    found = rollout_from(lens, padded("left"), settings=settings)
    for prompt, place in enumerate(found.target):
        assert torch.allclose(found.row[prompt], dense.last[prompt, place], atol=1e-12)


def padded(side: str) -> dict[str, Tensor]:
    """One prompt of 12 tokens and one of 7, padded on a side."""
    real = torch.ones(2, 12, dtype=torch.long)
    real[1, slice(7, None) if side == "right" else slice(0, 5)] = 0
    tokens = torch.arange(5, 29).view(2, 12)
    ids = torch.zeros(2, 12, dtype=torch.long)
    ids[0], ids[1, real[1].bool()] = tokens[0], tokens[1, :7]
    return {"input_ids": ids, "attention_mask": real}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_padding_on_either_side_is_left_out(name: str) -> None:
    lens = architecture(name)
    left, right = (rollout(lens.run(padded(side), keep="pattern")) for side in ("left", "right"))
    if name == "gpt2":  # BERT counts positions over padding, so its attention differs
        assert torch.allclose(left.matrix, right.matrix, atol=1e-12)
    alone = rollout(lens.run(padded("right")["input_ids"][1:, :7], keep="pattern"))
    assert torch.allclose(right.of(1), alone.matrix[0], atol=1e-12)
    assert (left.matrix[1, :, 7:] == 0).all()
    assert (left.matrix[1, :, :, 7:] == 0).all()
    assert torch.allclose(left.of(1).sum(-1), torch.ones(7).double())
    assert left.lengths == (12, 7)


def test_learned_sinks_keep_what_they_take() -> None:
    lens = architecture("gpt_oss")
    found = rollout(lens.run(padded("right"), keep="pattern"))
    assert found.last[0].sum(-1).max() < 0.999
    assert any("Learned sinks" in note for note in found.notes)


def test_many_causal_layers_are_warned_of() -> None:
    lens = al.load(tiny_gpt2(layers=14, sharp=0.0))
    found = rollout_from(lens, [list(range(1, 9))])
    assert "first token" in found.notes[0]
    assert float(found.row[0, 0]) > 0.9


def test_encoder_decoder_stacks_are_named() -> None:
    lens = architecture("t5")
    inputs = padded("right") | {"decoder_input_ids": torch.arange(3, 9).view(2, 3)}
    trace = lens.run(inputs, keep="pattern")
    with pytest.raises(InputError, match='stack="enc" or stack="dec"'):
        rollout(trace)
    assert rollout(trace, stack="enc").last.shape == (2, 12, 12)
    decoder = rollout(trace, stack="dec")
    assert decoder.tokens == (("3", "4", "5"), ("6", "7", "8"))
    assert (decoder.last.triu(1) == 0).all()
    one = rollout_from(lens, inputs, stack="dec")
    assert torch.allclose(one.row, decoder.last[:, -1], atol=1e-12)
