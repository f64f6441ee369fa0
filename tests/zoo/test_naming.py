"""The hand-wired name-copying circuit: its edges, and no others, carry an effect."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import attnlens as al
from attnlens.errors import InputError, TaskError
from attnlens.tasks import Task
from attnlens.tasks.other_name import other_name
from attnlens.zoo import induction_model, name_circuit, name_model, name_prompts
from attnlens.zoo.naming import (
    ASK,
    BYSTANDERS,
    DUPLICATE_HEAD,
    IDLE,
    INDUCTION_HEAD,
    INHIBITION_HEADS,
    MOVERS,
    NAMES,
    PREVIOUS_HEAD,
    START,
    Edge,
    copy,
)
from tests.oracles import paths

NECESSARY = (DUPLICATE_HEAD, PREVIOUS_HEAD, INDUCTION_HEAD, *INHIBITION_HEADS)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return name_model().double()


@pytest.fixture(scope="module")
def lens(model: GPT2LMHeadModel) -> al.Lens:
    return al.load(model)


@pytest.fixture(scope="module")
def task(lens: al.Lens) -> Task:
    return other_name(lens, prompts=4, length=12)


@pytest.fixture(scope="module")
def effects(model: GPT2LMHeadModel, task: Task) -> dict[paths.Edge, Tensor]:
    """Change of the logit difference of each prompt with an edge as in the corrupt run."""
    return edge_effects(model, task)


@torch.no_grad()
def edge_effects(
    model: GPT2LMHeadModel, task: Task, sender: str | None = None
) -> dict[paths.Edge, Tensor]:
    logits, known = paths.run(model, task.clean)
    _, other = paths.run(model, task.corrupt)
    base = graded(task, logits)
    return {
        edge: graded(task, paths.run(model, task.clean, edge, other, known=known)[0]) - base
        for edge in paths.edges_of(model)
        if sender in (None, edge[0])
    }


def graded(task: Task, logits: Tensor) -> Tensor:
    return task.score(task.at_reads(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [9, 14, 32])
@torch.no_grad()
def test_answers_the_name_said_once(dtype: torch.dtype, length: int) -> None:
    model = name_model().to(dtype)
    prompts = name_prompts(64, length, seed=1)
    clean, corrupt = model(prompts.clean).logits[:, -1], model(prompts.corrupt).logits[:, -1]
    assert clean.argmax(-1).equal(prompts.answers)
    assert corrupt.argmax(-1).equal(prompts.wrong)
    rows = torch.arange(64)
    margin = clean[rows, prompts.answers] - clean[rows, prompts.wrong]
    assert margin.min() > {9: 5.1, 14: 4.3, 32: 1.3}[length]
    assert (corrupt[rows, prompts.wrong] - corrupt[rows, prompts.answers]).min() > 15


def test_prompts_are_as_described() -> None:
    prompts = name_prompts(64, 9, seed=2)
    names = torch.tensor(NAMES)
    clean, corrupt = (torch.isin(x, names) for x in (prompts.clean, prompts.corrupt))
    assert clean.sum(1).eq(3).all()
    assert corrupt.sum(1).eq(3).all()
    assert (prompts.places.diff(dim=1) >= 2).all()
    assert prompts.clean[:, 0].eq(START).all()
    assert prompts.clean[:, -1].eq(ASK).all()
    twice = prompts.clean.eq(prompts.wrong[:, None]).sum(1)
    assert twice.eq(2).all()
    assert prompts.clean.eq(prompts.answers[:, None]).sum(1).eq(1).all()
    assert prompts.corrupt.eq(prompts.wrong[:, None]).sum(1).eq(1).all()
    outside = ~(clean | corrupt)
    assert prompts.clean[outside].equal(prompts.corrupt[outside])
    said_first = prompts.clean.gather(1, prompts.places[:, :1])[:, 0] == prompts.wrong
    assert 0.2 < said_first.double().mean() < 0.8  # A B A and B A A
    again = name_prompts(64, 9, seed=2)
    assert all(getattr(again, f.name).equal(getattr(prompts, f.name)) for f in fields(prompts))


def test_refusals() -> None:
    for count, length in ((0, 14), (4, 8), (4, 33)):
        with pytest.raises(InputError, match="9 to 32"):
            name_prompts(count, length)
    lens = al.load(name_model())
    with pytest.raises(TaskError, match="9 to 32"):
        other_name(lens, length=8)
    words = al.load(al.zoo.honest_path())
    with pytest.raises(TaskError, match="name_model"):
        other_name(words)


@torch.no_grad()
def test_the_oracle_is_the_model(model: GPT2LMHeadModel, task: Task) -> None:
    logits, written = paths.run(model, task.clean)
    assert torch.allclose(logits, model(task.clean).logits, atol=1e-12)
    other = induction_model().double()
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(paths.run(other, ids)[0], other(ids).logits, atol=1e-12)
    edge = ("L1H0", "L2H1", "v")
    _, changed = paths.run(model, task.corrupt)
    whole, known = (
        paths.run(model, task.clean, edge, changed, known=k)[0] for k in (None, written)
    )
    assert whole.equal(known)


def test_the_listed_edges_matter_and_no_others(effects: dict[paths.Edge, Tensor]) -> None:
    circuit = name_circuit()
    assert len(set(circuit)) == len(circuit) == 25
    assert set(circuit) <= effects.keys()
    assert len(effects) == 353  # 12 (1 + 5 + 9 + 13) + 17
    for edge, effect in effects.items():
        if edge in circuit:
            assert effect.max() < -2, edge
        else:
            assert effect.abs().max() < 1e-11, edge  # rounding


def test_gradients_see_every_edge(
    model: GPT2LMHeadModel, task: Task, effects: dict[paths.Edge, Tensor]
) -> None:
    found = paths.gradient_estimates(model, task.clean, task.corrupt, lambda x: graded(task, x))
    keys_of_movers = [Edge("embed", mover, "k") for mover in MOVERS]
    for edge, estimate in found.items():
        if edge not in name_circuit():
            assert estimate.abs().max() < 1e-11, edge
        elif edge in keys_of_movers:
            assert estimate.min() > 2  # the wrong sign: A's key goes from one place to another
        else:
            assert estimate.max() < -1, edge
    for edge in (Edge(mover, "logits", "") for mover in MOVERS):  # a linear input: exact
        assert torch.allclose(found[edge], effects[edge], atol=1e-10)


@torch.no_grad()
def test_each_head_of_the_circuit_alone_and_no_other_is_missed(lens: al.Lens) -> None:
    task = other_name(lens, prompts=64)
    base = graded(task, lens.model(**task.clean_inputs()).logits)
    for head in map(str, lens.anatomy.heads):
        with lens.edit(al.Zero(head)):
            without = graded(task, lens.model(**task.clean_inputs()).logits)
        if head in NECESSARY:
            assert without.max() < -2, head  # the other name
        elif head in MOVERS:  # the answer stays, at half the margin
            assert torch.allclose(without, base / 2, atol=1e-9), head
        elif head in IDLE:
            assert without.equal(base), head
        else:
            assert head in BYSTANDERS
            assert torch.allclose(without, base, atol=1e-11), head
    with lens.edit(al.Zero(",".join((*IDLE, *BYSTANDERS)))):
        without = graded(task, lens.model(**task.clean_inputs()).logits)
    assert torch.allclose(without, base, atol=1e-11)


@torch.no_grad()
def test_heads_look_where_they_should(lens: al.Lens) -> None:
    prompts = name_prompts(64, seed=4)
    pattern = lens.run(prompts.clean, keep=("pattern",)).pattern
    rows = torch.arange(64)
    third = prompts.places[:, 2]
    said = prompts.clean.eq(prompts.wrong[:, None]).int().argmax(1)  # the first of the two

    def weight(head: str, query: Tensor | int, key: Tensor) -> float:
        return float(pattern[int(head[1])][rows, int(head[3]), query, key].min())

    assert weight(DUPLICATE_HEAD, third, said) > 0.9
    assert weight(PREVIOUS_HEAD, said + 1, said) > 0.96
    assert weight(INDUCTION_HEAD, third, said + 1) > 0.9
    for head in INHIBITION_HEADS:
        assert weight(head, -1, third) > 0.9
    for head in MOVERS:
        answer = prompts.clean.eq(prompts.answers[:, None]).int().argmax(1)
        assert weight(head, -1, answer) > 0.5


@torch.no_grad()
def test_norms_are_the_identity_whatever_heads_write(model: GPT2LMHeadModel, task: Task) -> None:
    seen: list[float] = []
    hooks = [
        m.register_forward_hook(
            lambda _, given, out: seen.append(float((given[0] - out).abs().max()))
        )
        for m in model.modules()
        if isinstance(m, torch.nn.LayerNorm)
    ]
    model(task.clean)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 9
    assert max(seen) < 1e-11


def test_an_edge_wired_beside_the_list_is_seen(task: Task) -> None:
    broken = name_model().double()
    with torch.no_grad():  # a bystander that writes where the movers' queries read
        target = slice(4 * 32, 5 * 32)
        copy(broken.transformer.h[1].attn, 2, slice(0, 32), target, torch.eye(32).double())
    effects = edge_effects(broken, task, sender="L1H2")
    stray = {edge for edge, effect in effects.items() if effect.abs().max() > 1e-6}
    assert stray == {("L1H2", mover, "q") for mover in MOVERS}


def test_is_deterministic_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = name_model()
    assert torch.rand(3).equal(expected)
    other = name_model().state_dict()
    assert all(tensor.equal(other[name]) for name, tensor in one.state_dict().items())
    assert one.dtype == torch.float32
    assert not one.training
