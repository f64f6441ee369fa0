"""Direct shares of a logit against the formula by hand, the hand-wired circuit, and their sum."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnlens as al
from attnlens.analyses.logit_flow import LogitFlow, logit_flow
from attnlens.analyses.target import Target
from attnlens.errors import UnsupportedModelError
from attnlens.hooks.direct import norm_rule
from attnlens.lens import Lens
from attnlens.tasks import repeated_tokens
from tests.analyses.conftest import architecture, tiny_gpt2
from tests.architectures import ARCHITECTURES

EXACT = ("gpt2", "opt", "gpt_neox", "phi", "stablelm", "starcoder2", "persimmon", "t5", "bart")
# Their norms compute in float32 whatever the model's type.
ROUNDED = (
    "llama",
    "mixtral",
    "gemma2",
    "olmo2",
    "cohere",
    "granite",
    "gpt_oss",
    "deepseek_v3",
    "bitnet",
    "qwen3_next",
)
REFUSED = {
    "bert": "a transform before the unembedding",
    "jamba": "layers without attention",
    "longcat_flash": "No MLP was found",
}


def inputs_of(name: str, lens: Lens) -> dict[str, Any]:
    return ARCHITECTURES[name].inputs(lens.model)


def missing(found: LogitFlow) -> float:
    """The largest remainder as a share of the largest part."""
    return float(((found.value - found.shares.sum(1)) / found.shares.abs().amax(1)).abs().max())


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_parts_sum_to_the_logit(name: str) -> None:
    lens = architecture(name)
    found = logit_flow(lens, inputs_of(name, lens), Target(5, 9))
    assert missing(found) < (1e-9 if name in EXACT else 1e-6)
    assert found.ledger is not None
    # Patterns of some models are computed in float32, too.
    assert found.ledger.error.max() < 1e-6
    kinds = {part.kind for part in found.parts}
    assert {"embeddings", "head", "mlp"} <= kinds
    single = al.load(ARCHITECTURES[name].build())
    assert missing(logit_flow(single, inputs_of(name, single), Target(5, 9))) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_is_refused(name: str) -> None:
    lens = architecture(name)
    with pytest.raises(UnsupportedModelError, match="does not sum to the target") as error:
        logit_flow(lens, inputs_of(name, lens), Target(5))
    assert REFUSED[name] in str(error.value)


def test_the_formula_by_hand(random_lens: Lens, ids: Tensor) -> None:
    model = random_lens.model
    final = model.transformer.ln_f
    with torch.no_grad():
        final.weight.normal_(generator=torch.Generator().manual_seed(1))
        final.bias.normal_(generator=torch.Generator().manual_seed(2))
    try:
        written: list[Tensor] = []
        handles = [
            block.mlp.register_forward_hook(lambda *_: written.append(_[2][:, 7]))
            for block in model.transformer.h
        ]
        trace = random_lens.run(ids, keep=("result", "residual"))
        for handle in handles:
            handle.remove()
        found = logit_flow(random_lens, ids, Target(3, 8, at=7))
        direction = model.lm_head.weight[3] - model.lm_head.weight[8]
        stream = trace.residual["final"][:, 7]
        sigma = (stream.var(-1, unbiased=False) + final.eps).sqrt()
        scaled = final.weight * direction
        u = (scaled - scaled.mean()) / sigma[:, None]
        expected = {"embeddings": (trace.residual["L0"][:, 7] * u).sum(-1)}
        for layer, block in enumerate(model.transformer.h):
            shares = torch.einsum("bhd,bd->bh", trace.result[layer][:, :, 7], u)
            expected |= {f"L{layer}H{head}": shares[:, head] for head in range(4)}
            expected[f"L{layer}.mlp"] = (written[layer] * u).sum(-1)
            name = f"transformer.h.{layer}.attn.c_proj.bias"
            expected[name] = (block.attn.c_proj.bias * u).sum(-1)
        expected["transformer.ln_f.bias"] = (final.bias @ direction).expand(2)
    finally:
        with torch.no_grad():
            final.weight.fill_(1)
            final.bias.zero_()
    assert {part.name for part in found.parts} == set(expected)
    for column, part in enumerate(found.parts):
        assert torch.allclose(found.shares[:, column], expected[part.name], atol=1e-12), part
    heads = torch.stack([expected[str(head)] for head in found.head_names], 1)
    assert found.heads is not None
    assert torch.allclose(found.heads, heads, atol=1e-12)


def test_sources_of_grouped_keys_by_hand() -> None:
    lens = architecture("llama")
    ids = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    found = logit_flow(lens, ids, Target(5))
    trace = lens.run(ids, keep=("pattern", "v", "residual"))
    stream = trace.residual["final"][:, -1]
    norm = lens.model.model.norm
    u = norm.weight * lens.model.lm_head.weight[5]
    u = u / (stream.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    expected = torch.zeros(2, 9, dtype=torch.float64)
    expected[:, -1] = (trace.residual["L0"][:, -1] * u).sum(-1)
    for layer in range(2):
        values = trace.v[layer].repeat_interleave(2, 1)
        moved = torch.einsum("bhsv,hvd,bd->bhs", values, lens.weights(layer).output, u)
        expected += (trace.pattern[layer][:, :, -1] * moved).sum(1)
    # the model's norm computes in float32
    assert torch.allclose(found.scores, expected, atol=1e-6)
    assert found.layers is not None
    assert torch.allclose(found.layers.sum(1), found.scores, atol=1e-12)


def test_the_induction_head_carries_the_answer(induction_lens: Lens) -> None:
    task = repeated_tokens(induction_lens, prompts=3, period=8)
    found = logit_flow(induction_lens, task.clean, Target.of_task(task))
    assert torch.allclose(found.value, torch.full((3,), 16.0).double(), atol=0.05)
    frame = found.heads_frame(0).set_index("head")["score"]
    assert frame["L1H2"] == pytest.approx(16, abs=0.05)
    assert (frame.drop("L1H2").abs() < 1e-4).all()
    reads = task.reads[:, -1]
    for prompt in range(3):
        # The answer stands one after the earlier copy of the token that is read.
        own = task.clean[prompt].tolist()
        earlier = own.index(own[int(reads[prompt])])
        assert int(found.of(prompt).argmax()) == earlier + 1
        assert found.scores[prompt, earlier + 1] == pytest.approx(16, abs=0.05)
    table = found.parts_frame(0)
    assert table["accumulated"].iloc[-1] == pytest.approx(float(found.value[0]), abs=1e-4)
    assert list(table["part"][:2]) == ["embeddings", "L0H0"]


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(2, 7), min_size=2, max_size=3),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_padding_and_batches_change_nothing(
    random_lens: Lens, lengths: list[int], side: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 40, (length,), generator=draw).tolist() for length in lengths]
    longest = max(lengths)

    def put(row: list[int]) -> list[int]:
        fill = [0] * (longest - len(row))
        return fill + row if side == "left" else row + fill

    ids = torch.tensor([put(row) for row in rows])
    mask = torch.tensor([put([1] * len(row)) for row in rows])
    found = logit_flow(random_lens, {"input_ids": ids, "attention_mask": mask}, Target(3, 4))
    for prompt, row in enumerate(rows):
        alone = logit_flow(random_lens, [row], Target(3, 4))
        assert torch.allclose(found.shares[prompt], alone.shares[0], atol=1e-12)
        assert torch.allclose(found.of(prompt), alone.of(0), atol=1e-12)
        assert (found.scores[prompt, len(row) :] == 0).all()


def test_decoder_and_text_are_both_sources() -> None:
    lens = architecture("t5")
    draw = torch.Generator().manual_seed(1)
    text, own = (torch.randint(4, 90, (2, size), generator=draw) for size in (7, 5))
    found = logit_flow(lens, {"input_ids": text, "decoder_input_ids": own}, Target(11))
    assert [len(words) for words in found.tokens] == [12, 12]
    assert {head.stack for head in found.head_names} == {"dec", "cross"}
    cross = [column for column, head in enumerate(found.head_names) if head.stack == "cross"]
    assert found.heads is not None
    assert torch.allclose(found.scores[:, :7].sum(1), found.heads[:, cross].sum(1), atol=1e-12)


def test_a_capped_logit_is_explained_before_the_cap() -> None:
    lens = architecture("gemma2")
    ids = torch.randint(4, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    found = logit_flow(lens, ids, Target(5))
    cap = lens.model.config.final_logit_softcapping
    capped = lens.logits(ids, torch.full((2, 1), 5))[:, 0, 5]
    assert torch.allclose(cap * (found.value / cap).tanh(), capped, atol=1e-6)
    assert not torch.allclose(found.value, capped, atol=1e-3)
    assert "caps its logits" in found.notes[0]


def test_a_head_that_is_zeroed_has_no_share(random_lens: Lens, ids: Tensor) -> None:
    with random_lens.edit(al.Zero("L1H2")):
        found = logit_flow(random_lens, ids, Target(5))
    frame = found.heads_frame(0).set_index("head")["score"]
    assert frame["L1H2"] == 0
    assert (frame.drop("L1H2") != 0).all()
    assert missing(found) < 1e-12
    # Its row still says what it would have carried.
    assert found.ledger is not None
    assert (found.ledger.remainder != 0).all()
    assert "an edit of z" in found.notes[0]


def test_any_linear_function_of_the_output(random_lens: Lens, ids: Tensor) -> None:
    found = logit_flow(random_lens, ids, lambda output: output.logits[:, -1, 3])
    named = logit_flow(random_lens, ids, Target(3))
    assert torch.allclose(found.shares, named.shares, atol=1e-12)
    assert torch.allclose(found.scores, named.scores, atol=1e-12)
    with pytest.raises(UnsupportedModelError, match="not linear"):
        logit_flow(random_lens, ids, lambda output: output.logits[:, -1].softmax(-1)[:, 3])


def test_the_model_is_left_as_it_was(ids: Tensor) -> None:
    model = tiny_gpt2()
    lens = al.load(model)
    expected = logit_flow(al.load(copy.deepcopy(model).requires_grad_(False)), ids, Target(5))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    with torch.inference_mode():
        inside = logit_flow(lens, ids.clone(), Target(5))
    assert torch.equal(inside.shares, expected.shares)
    assert model.training
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())

    def fails(_: Any) -> Tensor:
        raise KeyError("no such metric")

    with pytest.raises(KeyError):
        logit_flow(lens, ids, fails)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms_are_known_by_their_numbers(kind: Any, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    norm = kind(width).double()
    with torch.no_grad():
        for weight in norm.parameters():
            weight.normal_(generator=draw)
    x = torch.randn(2, 5, width, generator=draw, dtype=torch.float64) + 1
    rule = norm_rule(norm, x, norm(x))
    assert rule is not None
    assert rule.centred == (kind is nn.LayerNorm)
    assert torch.allclose(rule.of(x) + rule.bias, norm(x), atol=1e-12)
    assert norm_rule(nn.Sequential(norm, nn.GELU()), x, nn.GELU()(norm(x))) is None
