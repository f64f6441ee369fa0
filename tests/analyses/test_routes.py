"""Routes against all parts taken apart at once, every path followed, and the hand-wired circuit."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

import attnlens as al
from attnlens.analyses.block_parts import BlockParts
from attnlens.analyses.contributions import Shares, proximity, weighted_proximity
from attnlens.analyses.routes import Routes, route_scores, routes
from attnlens.anatomy import Head
from attnlens.errors import InputError, UnsupportedModelError
from attnlens.graphs.routes import KINDS
from attnlens.hooks.sublayers import Sublayers
from attnlens.lens import Lens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES
from tests.oracles import routes as oracle


def tiny_llama(groups: int = 2) -> LlamaForCausalLM:
    """A random float64 Llama of 40 tokens with biases on its projections."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        attention_bias=True,
        max_position_embeddings=48,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 or not bool((parameter == 1).all()):
                    parameter.normal_(std=0.3)
    return model


def edges_of(found: Routes, prompt: int = 0) -> list[dict[oracle.Edge, float]]:
    """The weights of the kept edges, layer by layer."""
    layers: list[dict[oracle.Edge, float]] = []
    for edges in found.edges[prompt]:
        columns = (edges.step, edges.kind, edges.head, edges.query, edges.source, edges.weight)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        layers.append({(step, KINDS[kind], h, t, s): w for step, kind, h, t, s, w in rows})
    return layers


MODELS = {"gpt2": lambda: tiny_gpt2(layers=2), "llama": tiny_llama}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.2, 0.9])
def test_routes_are_those_of_brute_force(name: str, threshold: float) -> None:
    # In eager attention as the oracle: Llama's norms are in float32, and turn the last bit of
    # another kernel into 1e-8.
    model = MODELS[name]()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[3, 17, 8, 25, 8, 11]])
    found = routes(al.load(model), ids, target=4, threshold=threshold)
    wanted = oracle.trace(oracle.layers_of(model, ids[0]), 4, threshold)
    for own, expected in zip(edges_of(found), wanted.edges, strict=True):
        assert set(own) == set(expected)
        assert own == pytest.approx(expected, abs=1e-10)
    tokens = torch.tensor([wanted.tokens[s] for s in range(6)])
    assert torch.allclose(found.of().float(), tokens, atol=1e-6)  # kept in float32
    assert float(found.lost) == pytest.approx(wanted.lost, abs=1e-10)
    heads = [wanted.heads[head.layer, head.head] for head in found.head_names]
    assert torch.allclose(found.heads[0], torch.tensor(heads), atol=1e-6)


def every_share(lens: Lens, inputs: object) -> list[Shares]:
    """Importances of all parts of all sums at all rows of all prompts."""
    batch = lens.encode(inputs)
    anatomy = lens.anatomy_for(batch)
    sites = [site for site in anatomy.sites if site.stack == anatomy.sites[-1].stack]
    watched = Sublayers(anatomy, sites, lens.mlps)
    lens.observe(batch, watched)
    found: list[Shares] = []
    for run in watched.runs.values():
        for prompt in range(run.entering.shape[0]):
            rows = torch.arange(run.entering.shape[1])
            with torch.no_grad():
                found += BlockParts(lens.model, run, prompt).importances(rows)
    return found


FAMILIES = [
    "gpt2", "llama", "gpt_neox", "phi", "gemma2", "olmo2", "glm4", "minicpm3", "mixtral",
    "gpt_oss", "bert", "albert", "modernbert", "cohere", "deepseek_v2",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_sum_to_the_stream_and_importances_to_one(name: str) -> None:
    # That the parts sum to what the model's blocks return is checked at every row as it is taken
    # apart; float64 leaves rounding alone.
    lens = architecture(name)
    shares = every_share(lens, ARCHITECTURES[name].inputs(lens.model))
    for one in shares:
        assert torch.allclose(one.total, torch.ones_like(one.total), atol=1e-12)
        parts = [one.residual, one.mlp, one.bias, one.attention.flatten()]
        assert all(bool((part >= 0).all()) for part in parts)


def test_factors_of_what_is_written_are_found() -> None:
    config = GraniteConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, residual_multiplier=0.22,
    )  # fmt: skip
    torch.manual_seed(0)
    lens = al.load(GraniteForCausalLM(config).double().eval())
    batch = lens.encode(torch.tensor([[5, 6, 7, 8, 9]]))
    watched = Sublayers(lens.anatomy, lens.anatomy.sites, lens.mlps)
    lens.observe(batch, watched)
    for run in watched.runs.values():
        first, second = run.sums
        assert (first.kept, second.kept) == (1, 1)
        assert first.attention == pytest.approx(0.22, abs=1e-10)
        assert second.mlp == pytest.approx(0.22, abs=1e-10)


@pytest.mark.parametrize("name", ["bert", "gemma2", "olmo2"])
def test_norms_are_the_linear_maps_that_they_are_in_the_run(name: str) -> None:
    """Proximity of each head and source, with the norm's map written out, float64."""
    lens = architecture(name)
    model = lens.model
    batch = lens.encode(torch.tensor([[5, 6, 7, 8, 9]]))
    anatomy = lens.anatomy_for(batch)
    watched = Sublayers(anatomy, anatomy.sites, lens.mlps)
    lens.observe(batch, watched)
    run = watched.runs[anatomy.sites[0].name]
    site = run.site
    weights = lens.weights(site.name).output
    pattern, stream = run.rows.dense()[0], run.entering[0]
    value = run.value[0].repeat_interleave(site.heads // run.value.shape[1], dim=0)
    parts = torch.einsum("hts,hsv,hvd->htsd", pattern, value, weights)
    bias = getattr(model.get_submodule(site.output or ""), "bias", None)
    whole = parts.sum((0, 2)) + (0 if bias is None else bias)
    first = run.sums[0]
    norm = model.get_submodule(first.norm or first.steps[0])
    if first.norm:  # BERT: the LayerNorm of stream + attention
        whole = whole + stream
        rate = (whole.var(-1, unbiased=False) + norm.eps).rsqrt()
        total = norm(whole)
        mapped = (parts - parts.mean(-1, keepdim=True)) * rate[None, :, None, None] * norm.weight
        kept = (stream - stream.mean(-1, keepdim=True)) * rate[:, None] * norm.weight
    else:
        gain = norm.weight + (1 if name == "gemma2" else 0)
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        rate = (whole.pow(2).mean(-1) + eps).rsqrt()
        total = stream + norm(whole)
        mapped, kept = parts * rate[None, :, None, None] * gain, stream
    wanted = proximity(total[None, :, None].expand_as(mapped), mapped)
    found = BlockParts(model, run, 0).importances(torch.arange(5))[0]
    scale = found.residual / proximity(total, kept)
    # RMS norms compute in float32 whatever the model's dtype.
    assert torch.allclose(found.attention, wanted * scale[:, None], atol=1e-6)


def test_the_route_of_the_hand_wired_circuit(induction_lens: Lens) -> None:
    ids = [0, 5, 9, 14, 7, 20, 3, 5, 9, 14, 7]
    found = routes(induction_lens, [ids])  # the second 7, at 10; the first is at 4
    attention = {
        (edge[0], edge[2:]): weight
        for edge, weight in ((e, w) for e in edges_of(found) for e, w in e.items())
        if edge[1] == "attention"
    }
    # L1H2 reads position 5, after the earlier copy, and L0H1 wrote there what stands at 4.
    assert set(attention) == {(0, (2, 10, 5)), (0, (1, 5, 4)), (0, (1, 10, 9))}
    # After layer 1 a stream holds four ones of which L1H2 wrote one; after layer 0 three, of which
    # L0H1 wrote one. The tail of the softmax is 1e-5.
    assert attention[0, (2, 10, 5)] == pytest.approx(1 / 4, abs=1e-5)
    assert attention[0, (1, 5, 4)] == pytest.approx(1 / 3, abs=1e-6)
    expected = torch.zeros(11)
    expected[[4, 5, 9, 10]] = torch.tensor([1 / 12, 1 / 6, 1 / 4, 1 / 2])
    assert torch.allclose(found.of(), expected, atol=1e-5)
    graph = found.graph()
    path = nx.shortest_path(graph, "L0P4", "L2P10")
    assert path == ["L0P4", "L1P5", "L2P10"]
    assert set(graph["L0P4"]["L1P5"]) == {"L0H1"}
    assert graph.edges["L1P5", "L2P10", "L1H2"]["kind"] == "attention"
    assert found.heads_frame().nlargest(2, "passing")["head"].tolist() == ["L0H1", "L1H2"]


def test_every_edge_of_the_graph_lies_on_a_path_to_the_target() -> None:
    found = routes(al.load(tiny_gpt2()), torch.arange(1, 13)[None], target=9, threshold=0.05)
    graph = found.graph()
    top = "L3P9"
    assert {node for node in graph if graph.out_degree(node) == 0} == {top}
    assert nx.ancestors(graph, top) | {top} == set(graph)
    assert {data["stage"] for _, data in graph.nodes(data=True)} == {"stream", "attended"}
    assert all(graph.in_degree(node) for node, d in graph.nodes(data=True) if d["layer"] > 0)
    frame = found.to_frame()
    assert len(frame) == graph.number_of_edges()
    for node in graph:  # what enters a node sums to 1, but for the bias
        shares = sum(data["weight"] for *_, data in graph.in_edges(node, data=True))
        assert shares <= 1 + 1e-9


@given(threshold=st.floats(0, 0.5), more=st.floats(0, 0.5))
@settings(max_examples=15, deadline=None)
def test_a_higher_threshold_keeps_fewer_edges(threshold: float, more: float) -> None:
    lens, ids = _lens(), torch.tensor([[3, 17, 8, 25, 8, 11, 2]])
    low, high = (edges_of(routes(lens, ids, threshold=t)) for t in (threshold, threshold + more))
    assert all(set(above) <= set(below) for above, below in zip(high, low, strict=True))


_LENSES: list[Lens] = []


def _lens() -> Lens:
    if not _LENSES:
        _LENSES.append(al.load(tiny_gpt2()))
    return _LENSES[0]


def test_threshold_0_keeps_every_part_that_counts() -> None:
    lens, ids = _lens(), torch.tensor([[3, 17, 8, 25, 8, 11, 2]])
    found = routes(lens, ids, threshold=0)
    first = every_share(lens, ids)[-2]  # the top layer's attention
    kept = sum(1 for edge in edges_of(found)[-1] if edge[1] == "attention")
    assert kept == int((first.attention[:, -1] > 0).sum())


@given(
    lengths=st.lists(st.integers(2, 9), min_size=2, max_size=3),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 50),
)
@settings(max_examples=12, deadline=None)
def test_a_batch_is_its_prompts_one_by_one(lengths: list[int], side: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 40, (n,), generator=generator) for n in lengths]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(prompts):
        place = slice(0, len(own)) if side == "right" else slice(-len(own), None)
        ids[row, place], mask[row, place] = own, 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    together = routes(_lens(), batch, threshold=0.03)
    for row, own in enumerate(prompts):
        alone = routes(_lens(), own[None], threshold=0.03)
        assert together.target[row] == len(own) - 1
        for a, b in zip(edges_of(together, row), edges_of(alone), strict=True):
            assert a == pytest.approx(b, abs=1e-9)
        assert torch.allclose(together.of(row), alone.of(), atol=1e-6)
        assert torch.allclose(together.heads[row], alone.heads[0], atol=1e-6)
        real = slice(0, len(own))
        for name in ("residual", "mlp", "bias"):
            ours, theirs = getattr(together, name)[row, :, real], getattr(alone, name)[0]
            assert torch.allclose(ours, theirs, atol=1e-6, equal_nan=True)


def test_grouped_keys_are_keys_repeated() -> None:
    grouped = tiny_llama(groups=2)
    full = tiny_llama(groups=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.view(2, 8, *weight.shape[1:]).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    ids = torch.tensor([[3, 17, 8, 25, 8, 11, 2]])
    one, other = (routes(al.load(model), ids, threshold=0.02) for model in (grouped, full))
    for a, b in zip(edges_of(one), edges_of(other), strict=True):
        assert a == pytest.approx(b, abs=1e-10)


def test_weighted_proximity_is_that_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnlens.analyses.contributions.CHUNK_BYTES", 300)  # few parts at a time
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    total, weights, vectors = draw(5, 8), draw(3, 5, 7).abs(), draw(3, 7, 8)
    weights[:, 1] = 0
    parts = weights[..., None] * vectors[:, None]
    wanted = proximity(total[None, :, None].expand_as(parts), parts)
    assert torch.allclose(weighted_proximity(total, weights, vectors), wanted, atol=1e-12)


def test_a_sum_without_proximities_follows_the_residual() -> None:
    nothing = torch.zeros(1, dtype=torch.float64)
    shares = Shares(nothing, nothing, nothing, torch.zeros(2, 1, 3, dtype=torch.float64))
    assert shares.importance().residual.tolist() == [1.0]
    assert float(shares.importance().kept(0.5).total) == 1
    # y = 1 of parts 3 and -2: without either y would be further from 0.
    one = torch.ones(1, 1)
    assert proximity(one, 3 * one).tolist() == proximity(one, -2 * one).tolist() == [0.0]


def test_a_part_of_exactly_the_threshold_is_kept() -> None:
    quarter = torch.tensor([0.25], dtype=torch.float64)
    shares = Shares(2 * quarter, quarter, 0 * quarter, quarter[:, None, None])
    kept = shares.kept(0.25)
    assert (kept.residual, kept.mlp, kept.attention.flatten()) == (2 * quarter, quarter, quarter)
    bias = Shares(2 * quarter, quarter, quarter, torch.zeros(0, 1, 0, dtype=torch.float64))
    assert bias.kept(0.25).bias == quarter
    assert bias.kept(0.26).residual == 1  # the others are dropped, a weak bias among them


def test_scores_are_what_arrives_and_the_ledger_closes() -> None:
    lens, ids = _lens(), torch.tensor([[3, 17, 8, 25, 8, 11, 2], [5, 6, 7, 8, 9, 10, 11]])
    target = al.analyses.target.Target(7, at=4)
    found = al.attribute(lens, ids, target, method="routes", threshold=0.02)
    traced = routes(lens, ids, target, threshold=0.02)
    assert torch.equal(found.scores, traced.arriving[:, 0])
    assert traced.target == (4, 4)
    assert not bool(found.scores[:, 5:].any())
    assert found.ledger is not None
    assert float(found.ledger.error.max()) < 1e-12
    assert "biases" in found.ledger.entries
    logits = lens.logits(ids, torch.tensor([[4], [4]]))[:, 0, 7]
    assert torch.allclose(found.value, logits)
    assert found.graph(1).number_of_edges() == traced.graph(1).number_of_edges()
    assert found.head_names[0] == Head("", 0, 0)
    assert found.layers is not None
    assert found.layer_names == ("L0", "L1", "L2", "final")
    assert torch.allclose(found.layers[:, -1].sum(-1), torch.ones(2))


def test_a_function_is_explained_at_the_first_position_where_attention_looks_both_ways() -> None:
    lens, ids = architecture("bert"), torch.tensor([[5, 6, 7, 8, 9]])
    found = route_scores(lens, ids, lambda output: output.logits[:, 0, 5])
    assert found.settings["at"] == (0,)
    assert torch.equal(found.scores, routes(lens, ids, 0).arriving[:, 0])
    causal = route_scores(_lens(), ids, lambda output: output.logits[:, -1, 5])
    assert causal.settings["at"] == (4,)


def test_positions_may_be_numpys() -> None:
    ids = torch.tensor([[3, 17, 8, 25], [5, 6, 7, 8]])
    wanted = routes(_lens(), ids, [2, 2])
    for target in (np.int64(2), np.array([2, -2])):
        assert routes(_lens(), ids, target).target == wanted.target


def test_the_model_is_left_as_it_was() -> None:
    lens = al.load(tiny_gpt2())
    ids = torch.tensor([[3, 17, 8]])
    before = {name: tensor.clone() for name, tensor in lens.model.state_dict().items()}
    route_scores(lens, ids)
    with pytest.raises(InputError, match="target=7 is not in prompt 0"):
        routes(lens, ids, target=7)
    for module in lens.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(before[name], now) for name, now in lens.model.state_dict().items())


def test_patches_of_an_image_are_positions_without_texts() -> None:
    model = ARCHITECTURES["clip"].build()
    inputs = ARCHITECTURES["clip"].inputs(model)
    found = routes(al.load(model, example=inputs), inputs, target=0, stack="vision")
    assert found.tokens[0] == tuple(map(str, range(len(found.tokens[0]))))
    assert all(name.startswith("vision.") for name in found.layers)
    total = found.arriving[:, 0].sum(-1) + found.lost
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
    # a text as long as the image has patches, of which one is padding
    count = len(found.tokens[0])
    inputs["input_ids"] = torch.arange(2, 2 + count).expand(len(inputs["input_ids"]), -1) % 90
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][:, -1] = 0
    again = routes(al.load(model, example=inputs), inputs, target=0, stack="vision")
    assert again.tokens == found.tokens
    assert torch.equal(again.arriving, found.arriving)


def test_what_cannot_be_traced_is_refused() -> None:
    ids = torch.tensor([[3, 17, 8]])
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        routes(architecture("t5"), {"input_ids": ids, "decoder_input_ids": ids})
    with pytest.raises(UnsupportedModelError, match="no output projection"):
        routes(architecture("bitnet"), ids)
    with pytest.raises(UnsupportedModelError, match="blocks without attention"):
        routes(al.load(ARCHITECTURES["jamba"].build()), ids)
    with pytest.raises(UnsupportedModelError, match="do not sum to the stream"):
        routes(architecture("granite_swa"), ids)  # a sink that scales the output
    with pytest.raises(InputError, match='stack=""'):
        routes(_lens(), ids, stack="vision")
    with pytest.raises(InputError, match="threshold=2"):
        routes(_lens(), ids, threshold=2)
    with pytest.raises(InputError, match="names 2 positions for 1 prompts"):
        routes(_lens(), ids, target=[0, 1])
    with pytest.raises(InputError, match="prompt=3"):
        routes(_lens(), ids).graph(3)
