"""The hand-wired induction circuit meets its figures, read from transformers alone."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers import GPT2LMHeadModel

import attnlens as al
from attnlens.zoo import induction_model
from attnlens.zoo.induction import (
    INDUCTION_HEAD,
    PREVIOUS_TOKEN_HEAD,
    START,
    TOKEN,
    _code,
    undo_norm,
)

PERIOD = 15
SECOND = slice(1 + PERIOD, 2 * PERIOD)  # rows that announce the second copy's tokens but the first
CIRCUIT = [(0, 1, "key", 1, 2)]  # L0H1 -> L1H2 key


def repeated(prompts: int, seed: int, low: int = 1, high: int = 32) -> Tensor:
    """START, then distinct random tokens twice: `prompt position`."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.stack([torch.randperm(high - low, generator=draw) for _ in range(prompts)])
    blocks = blocks[:, :PERIOD] + low
    return torch.cat([torch.full((prompts, 1), START), blocks, blocks], dim=1)


def answers(logits: Tensor, ids: Tensor) -> Tensor:
    """Log probability of the second copy's tokens but the first, `prompt position`."""
    found = logits[:, SECOND].log_softmax(-1)
    return found.gather(-1, ids[:, 2 + PERIOD :, None])[..., 0]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def model(request: pytest.FixtureRequest) -> GPT2LMHeadModel:
    made = induction_model().to(request.param)
    made.set_attn_implementation("eager")
    return made


@pytest.fixture
def ids() -> Tensor:
    return repeated(16, seed=0)


@torch.no_grad()
def test_answers_all_of_the_second_copy_and_knows_it(model: GPT2LMHeadModel, ids: Tensor) -> None:
    logits = model(ids).logits
    assert logits[:, SECOND].argmax(-1).equal(ids[:, 2 + PERIOD :])
    assert answers(logits, ids).min() > -1e-4
    assert logits[:, 1:PERIOD].argmax(-1).eq(START).all()  # nothing to say yet: the sink


@torch.no_grad()
def test_heads_attend_as_designed(model: GPT2LMHeadModel, ids: Tensor) -> None:
    first, second = model(ids, output_attentions=True).attentions
    previous = first[:, 1].diagonal(-1, dim1=-2, dim2=-1)
    assert previous.min() == 1.0
    induction = second[:, 2].diagonal(1 - PERIOD, dim1=-2, dim2=-1)[:, 2:]
    assert induction.min() > 0.9999
    sink = second[:, 2, 1 : 1 + PERIOD, START]
    assert sink.mean() == pytest.approx(0.9999, abs=5e-5)


@torch.no_grad()
def test_norms_are_the_identity(model: GPT2LMHeadModel, ids: Tensor) -> None:
    norms = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    seen: dict[str, float] = {}

    def compare(name: str, before: Tensor, after: Tensor) -> None:
        seen[name] = float((before - after).abs().max())

    for name, norm in norms.items():
        norm.register_forward_hook(lambda _, given, out, name=name: compare(name, given[0], out))
    model(ids)
    assert seen.keys() == norms.keys()
    tails = {"transformer.h.1.ln_2", "transformer.ln_f"}  # of L1H2's softmax, beside the ones
    assert max(seen[name] for name in seen.keys() - tails) < 1e-6
    assert max(seen[name] for name in tails) < 1e-4


def test_undone_norm_with_another_count_is_not_the_identity() -> None:
    norm = torch.nn.LayerNorm(128)
    ones = torch.zeros(128)
    ones[:3] = 1
    with torch.no_grad():
        undo_norm(norm, ones=3)
        assert norm(ones).allclose(ones, atol=1e-6)
        undo_norm(norm, ones=2)
        assert not norm(ones).allclose(ones, atol=1e-2)


@torch.no_grad()
def test_every_other_head_writes_nothing(model: GPT2LMHeadModel, ids: Tensor) -> None:
    silent = {0: (0, 2, 3), 1: (0, 1, 3)}
    written: dict[tuple[int, int], float] = {}

    def keep(layer: int, z: Tensor, weight: Tensor) -> None:
        for head in range(4):
            own = slice(32 * head, 32 * head + 32)
            written[layer, head] = float((z[..., own] @ weight[own]).abs().max())

    for layer, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_pre_hook(
            lambda module, given, layer=layer: keep(layer, given[0], module.weight)
        )
    model(ids)
    assert all(written[layer, head] == 0 for layer in silent for head in silent[layer])
    assert written[0, 1] > 0.99
    assert written[1, 2] > 0.99
    assert all(not block.mlp.c_proj.weight.any() for block in model.transformer.h)


def patched_logits(
    model: GPT2LMHeadModel, ids: Tensor, corrupt: Tensor, source: int, kind: str, target: int
) -> Tensor:
    """Logits when one L1 head's queries, keys or values see L0's head `source` as it was on
    `corrupt`; everything else stays clean."""
    block, projection = model.transformer.h[0], model.transformer.h[0].attn.c_proj
    own = slice(32 * source, 32 * source + 32)
    results: list[Tensor] = []
    streams: list[Tensor] = []
    hooks = [
        projection.register_forward_pre_hook(
            lambda module, given: results.append(given[0][..., own] @ module.weight[own])
        ),
        block.register_forward_hook(lambda _, given, out: streams.append(out)),
    ]
    model(ids)
    model(corrupt)
    for hook in hooks:
        hook.remove()
    norm, project = model.transformer.h[1].ln_1, model.transformer.h[1].attn.c_attn
    stream = streams[0] - results[0] + results[1]
    seen = layer_norm(stream, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    columns = slice(
        128 * ("query", "key", "value").index(kind) + 32 * target,
        128 * ("query", "key", "value").index(kind) + 32 * target + 32,
    )
    patch = seen @ project.weight[:, columns] + project.bias[columns]

    def put(_module: torch.nn.Module, _given: object, out: Tensor) -> Tensor:
        return torch.cat([out[..., : columns.start], patch, out[..., columns.stop :]], dim=-1)

    hook = project.register_forward_hook(put)
    logits = model(ids).logits
    hook.remove()
    return logits


@torch.no_grad()
def test_of_twelve_paths_into_the_induction_head_one_matters(model: GPT2LMHeadModel) -> None:
    ids, corrupt = repeated(4, seed=1, high=17), repeated(4, seed=2, low=17)
    clean = answers(model(ids).logits, ids)
    for source, kind in itertools.product(range(4), ("query", "key", "value")):
        patched = answers(patched_logits(model, ids, corrupt, source, kind, 2), ids)
        effect = (patched - clean).mean()
        if (source, kind) == (1, "key"):
            assert effect == pytest.approx(-15.95, abs=0.1)
        else:
            assert abs(effect) < 1e-6, (source, kind)


def test_is_deterministic_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = induction_model()
    assert torch.rand(3).equal(expected)
    other = induction_model().state_dict()
    assert all(tensor.equal(other[name]) for name, tensor in one.state_dict().items())
    assert one.dtype == torch.float32
    assert not one.training


def test_a_miswired_circuit_is_seen(ids: Tensor) -> None:
    broken = induction_model()
    with torch.no_grad():  # the induction head copies the token after the one it found
        broken.transformer.h[1].attn.c_proj.weight.copy_(
            broken.transformer.h[1].attn.c_proj.weight.roll(1, dims=1)
        )
        logits = broken(ids).logits
    assert not logits[:, SECOND].argmax(-1).eq(ids[:, 2 + PERIOD :]).any()


def test_the_lens_sees_the_same_heads(ids: Tensor) -> None:
    lens = al.load(induction_model())
    trace = lens.run(ids, keep=("pattern",))
    layer, head = int(PREVIOUS_TOKEN_HEAD[1]), int(PREVIOUS_TOKEN_HEAD[3])
    assert trace.pattern[layer][:, head].diagonal(-1, dim1=-2, dim2=-1).min() == 1.0
    layer, head = int(INDUCTION_HEAD[1]), int(INDUCTION_HEAD[3])
    assert trace.pattern[layer][:, head].diagonal(1 - PERIOD, -2, -1)[:, 2:].min() > 0.9999
    with lens.edit(al.Zero("L0H0,L0H2,L0H3,L1H0,L1H1,L1H3")), torch.no_grad():
        without = lens.model(ids).logits
    with torch.no_grad():
        clean = lens.model(ids).logits
    assert without.equal(clean)
    with lens.edit(al.Zero(PREVIOUS_TOKEN_HEAD)), torch.no_grad():
        killed = lens.model(ids).logits
    assert answers(killed, ids).mean() < -3


def test_tokens_are_one_hot() -> None:
    model = induction_model()
    assert model.transformer.wte.weight[:, TOKEN].equal(_code(model.lm_head.weight))
