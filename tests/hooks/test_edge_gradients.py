"""Edge attribution is what a small step along each edge changes, and what autograd says of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import attnlens as al
from attnlens.errors import InputError
from attnlens.hooks import edge_gradients
from attnlens.hooks.edge_gradients import Asked, ask, edge_scores, node_scores
from attnlens.lens import Lens
from attnlens.tasks import Task
from attnlens.zoo import name_model, name_prompts
from tests.architectures import Inputs, randomise
from tests.hooks.tiny import Tiny, wide_norms
from tests.hooks.wired import cut, heard, new_lens, others, prompts
from tests.oracles import edges, paths

STEP = 1e-5


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        wide_norms(patch)
        yield


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(request.param)


def measure(logits: Tensor) -> Tensor:
    """A metric that is curved and reads two positions: of `... position vocab`, one each."""
    chances = logits.log_softmax(-1)
    return chances[..., 2, 5] + 0.5 * chances[..., -1, 7] ** 2


def asked_of(lens: Lens, inputs: Inputs) -> Asked:
    return ask(lens.wiring, inputs, lambda made: measure(made.logits))


def change_of(lens: Lens, inputs: Inputs, other: Inputs) -> dict[str, Tensor]:
    clean, corrupt = (heard(lens, own)[0].written for own in (inputs, other))
    return {name: corrupt[name] - clean[name] for name in clean}


def by_steps(lens: Lens, inputs: Inputs, change: dict[str, Tensor], without: Tensor) -> Tensor:
    """The metric's slope along the edges that each choice lacks: `choice batch`."""
    clean, _ = heard(lens, inputs)

    def at(step: float) -> Tensor:
        moved = {name: own + step * change[name] for name, own in clean.written.items()}
        return measure(cut(lens, inputs, moved, without))

    with torch.no_grad():
        return (at(STEP) - at(-STEP)) / (2 * STEP)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "gpt_neox", "phi", "persimmon", "opt", "gpt_bigcode", "starcoder2"),
        *("llama", "whisper", "mbart", "t5"),
    ],
)
def test_scores_are_slopes(name: str) -> None:
    lens = new_lens(name)
    wiring, inputs = lens.wiring, prompts(lens)
    network = wiring.network
    change = change_of(lens, inputs, others(inputs))
    asked = asked_of(lens, inputs)
    scores = edge_scores(wiring, change, asked, {})
    assert not scores[:, ~network.exists].any()
    # Of every receiver one edge, and as many again at random.
    draw = torch.Generator().manual_seed(1)
    firsts = [int((network.edges[:, 1] == n).nonzero()[-1]) for n in range(len(network.receivers))]
    chosen = [*firsts[::2], *torch.randperm(len(network), generator=draw)[:20].tolist()]
    without = torch.stack([network.exists & ~network.mask([number]) for number in chosen])
    pairs = network.edges[chosen]
    found = scores[:, pairs[:, 0], pairs[:, 1]].T
    wanted = by_steps(lens, inputs, change, without)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    # A node is all edges that leave it.
    whole = network.exists.repeat(len(network.senders), 1, 1)
    whole[range(len(whole)), range(len(whole))] = False
    wanted = by_steps(lens, inputs, change, whole)
    nodes = node_scores(wiring, change, asked, {}).T
    assert (nodes - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_scores_are_gradients_of_the_oracle(tiny: Tiny) -> None:
    """All edges, those of MLPs and of shared keys and values, too: a backward each receiver."""
    network, wiring = tiny.network, tiny.lens.wiring
    change = change_of(tiny.lens, tiny.inputs, tiny.others)
    asked = asked_of(tiny.lens, tiny.inputs)
    found = edge_scores(wiring, change, asked, {})
    with torch.no_grad():
        _, written = edges.run(tiny.oracle, tiny.ids)

    def oracle(without: list[str]) -> dict[str, Tensor]:
        """`sum (u' - u) . dM/du` along edges that are left out, by sender."""
        same = {name: own.clone().requires_grad_() for name, own in written.items()}
        kept = set(network.edge_names) - set(without)
        logits, _ = edges.run(tiny.oracle, tiny.ids, kept, same)
        gradients = torch.autograd.grad(
            measure(logits).sum(), list(same.values()), materialize_grads=True, allow_unused=True
        )
        return {
            name: ((tiny.written[name] - written[name]) * gradient).sum((1, 2))
            for name, gradient in zip(same, gradients, strict=True)
        }

    wanted = torch.zeros_like(found)
    for column, receiver in enumerate(network.receivers):
        into = [name for name in network.edge_names if name.endswith(f"->{receiver.name}")]
        for row, value in enumerate(oracle(into).values()):
            wanted[:, row, column] = value
    assert torch.allclose(found, wanted, atol=1e-12 * float(wanted.abs().max()), rtol=1e-10)
    assert (found[:, network.exists] != 0).all()
    nodes = node_scores(wiring, change, asked, {})
    for row, sender in enumerate(network.senders):
        out = [name for name in network.edge_names if name.startswith(f"{sender.name}->")]
        own = oracle(out)[sender.name]
        assert torch.allclose(nodes[:, row], own, atol=1e-12 * float(nodes.abs().max()), rtol=1e-10)


@pytest.mark.parametrize("which", ["random", "name model"])
def test_scores_are_the_estimates_of_paths(which: str) -> None:
    own = name_prompts(3, 10, seed=1)
    if which == "random":
        model = Tiny("gpt2").lens.model
        clean, corrupt = torch.randint(4, 40, (2, 3, 7), generator=torch.Generator().manual_seed(4))
    else:
        model, clean, corrupt = name_model().double(), own.clean, own.corrupt
    lens: Lens = al.load(model)
    change = change_of(lens, {"input_ids": clean}, {"input_ids": corrupt})
    scores = edge_scores(lens.wiring, change, asked_of(lens, {"input_ids": clean}), {})
    wanted = paths.gradient_estimates(model, clean, corrupt, measure)
    network = lens.wiring.network
    size = max(float(value.abs().max()) for value in wanted.values())
    assert size > 1e-3
    for (sender, receiver, kind), value in wanted.items():
        name = f"{sender}->{receiver}<{kind}>" if kind else f"{sender}->{receiver}"
        a, b = network.edges[int(network.find(name))].tolist()
        assert (scores[:, a, b] - value).abs().max() < 1e-12 * size


def linear_model() -> GPT2LMHeadModel:
    """Norms are only a change of scale, attention is even, MLPs are silent: logits are linear."""
    eps = 2.0**60
    config = GPT2Config(
        vocab_size=40,
        n_positions=12,
        n_embd=24,
        n_layer=3,
        n_head=3,
        layer_norm_epsilon=eps,
        bos_token_id=1,
        eos_token_id=1,
    )
    model: Any = GPT2LMHeadModel(config).eval().double()
    randomise(model, seed=8)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :48] = 0
            block.mlp.c_proj.weight.zero_()
            for norm in (block.ln_1, block.ln_2):
                norm.weight.fill_(eps**0.5)
        model.transformer.ln_f.weight.fill_(eps**0.5)
    return model


def task_of(lengths: tuple[int, ...]) -> Task:
    draw = torch.Generator().manual_seed(3)
    clean, corrupt = (
        [torch.randint(5, 40, (length,), generator=draw).tolist() for length in lengths]
        for _ in range(2)
    )
    last = [[length - 1] for length in lengths]
    return Task.from_prompts("random", clean, corrupt, last, [[5]] * len(last), [[6]] * len(last))


def test_where_the_metric_is_linear_gradients_are_exact() -> None:
    lens, task = al.load(linear_model()), task_of((8, 8, 8))
    network = lens.wiring.network
    exact, eap, integrated = (
        al.edges(lens, task, method, metric="logit_difference", resamples=2).by_prompt
        for method in ("exact", "eap", "eap-ig")
    )
    size = exact.abs().max()
    assert size > 0.1
    assert (eap - exact).abs().max() < 1e-10 * size
    assert (integrated - exact).abs().max() < 1e-10 * size
    # Of queries, keys and MLPs nothing comes; of values and the logits' inputs something does.
    senders = torch.tensor([sender.kind != "mlp" for sender in network.senders])
    heard_of = torch.tensor([r.kind in ("v", "logits") for r in network.receivers])
    alive = senders[network.edges[:, 0]] & heard_of[network.edges[:, 1]]
    assert not (exact[:, ~alive].abs() > 1e-10 * size).any()
    assert (exact[:, alive].abs() > 1e-10 * size).all()
    nodes = [
        al.nodes(lens, task, method, metric="logit_difference", resamples=2).by_prompt
        for method in ("exact", "eap", "eap-ig")
    ]
    for found in nodes[1:]:
        assert (found - nodes[0]).abs().max() < 1e-10 * nodes[0].abs().max()


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "phi", "llama"])
def test_prompts_of_several_lengths_are_those_alone(name: str, method: Any) -> None:
    lens, task = new_lens(name), task_of((9, 6, 8, 9))
    for scores in (al.edges, al.nodes):
        alone = [
            scores(lens, task.subset([n]), method, steps=3, resamples=2).by_prompt for n in range(4)
        ]
        for size in (1, 3, 4):
            found = scores(lens, task, method, steps=3, batch_size=size, resamples=2).by_prompt
            assert torch.allclose(found, torch.cat(alone), atol=1e-10, rtol=1e-8)


def test_positions_at_a_time_are_all_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    change = change_of(tiny.lens, tiny.inputs, tiny.others)
    asked = asked_of(tiny.lens, tiny.inputs)
    wanted = edge_scores(tiny.lens.wiring, change, asked, {})
    monkeypatch.setattr(edge_gradients, "_SPACE", 1)
    found = edge_scores(tiny.lens.wiring, change, asked, {})
    assert torch.allclose(found, wanted, atol=1e-12, rtol=0)


def test_the_model_keeps_no_gradient_and_its_mode() -> None:
    lens = new_lens("gpt2")
    lens.model.train()
    asked_of(lens, prompts(lens))
    assert lens.model.training
    assert all(weight.grad is None for weight in lens.model.parameters())


def test_metrics_without_a_finite_gradient_are_refused() -> None:
    lens = new_lens("gpt2")
    inputs = prompts(lens)
    with pytest.raises(InputError, match="no gradient"):
        ask(lens.wiring, inputs, lambda made: made.logits.argmax(-1).double())
    with pytest.raises(InputError, match="not finite"):
        ask(lens.wiring, inputs, lambda made: made.logits[:, -1, 0].mul(0).sqrt())
