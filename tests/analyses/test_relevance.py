"""AttnLRP and CP-LRP against relevance handed down by hand, and what must hold on any model."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import attnlens as al
from attnlens.analyses.attribution import Attribution
from attnlens.analyses.relevance import attnlrp, cp_lrp
from attnlens.analyses.target import Target
from attnlens.errors import BudgetError
from attnlens.hooks.backward import ATTNLRP, relevances
from attnlens.hooks.backward.again import blocks_again
from attnlens.hooks.backward.mode import Rules, activations
from attnlens.hooks.backward.tally import Tally
from attnlens.hooks.session import Observer, Session
from attnlens.lens import Lens
from attnlens.zoo import induction_model
from tests.architectures import ARCHITECTURES
from tests.oracles.relevance import Oracle

METHODS = pytest.mark.parametrize("method", [attnlrp, cp_lrp])


class ExactNorm(LlamaRMSNorm):
    """Llama's norm in the model's own dtype: the original goes through float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def exact(name: str) -> Lens:
    """A model of the catalogue in float64, whose norms are in float64 too."""
    model = ARCHITECTURES[name].build()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = ExactNorm
    return al.load(model.double())


def close(found: Tensor, expected: Tensor, atol: float = 1e-11) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("against", [None, 9])
@METHODS
def test_relevance_is_what_the_papers_rules_hand_down(
    name: str, method: Any, against: int | None
) -> None:
    lens = exact(name)
    ids = torch.randint(4, 90, (9,), generator=torch.Generator().manual_seed(4))
    expected = Oracle(lens.model, method is attnlrp).explain(ids, 7, 5, against)
    found = method(lens, ids[None], Target(5, against, at=-2), maps="L0,L1")
    assert float(found.value) == pytest.approx(expected.value, rel=1e-12)
    assert close(found.of(0), expected.tokens)
    assert found.heads is not None
    assert close(found.heads[0], torch.cat([z.sum(0) for z in expected.heads]))
    assert found.layers is not None
    assert close(found.layers[0], torch.stack(expected.streams))
    assert found.maps is not None
    # Maps of a llama are made again with the softmax of its eager code, which is in float32.
    rough = 1e-7 if name == "llama" else 1e-11
    for own, layer in zip(found.maps.values(), expected.maps, strict=False):
        assert close(own[0], layer, rough)
    assert found.ledger is not None
    for part, value in expected.entries.items():
        assert float(found.ledger.entries.get(part, 0.0)) == pytest.approx(value, abs=1e-11)


def opened(name: str, kernel: str | None = None) -> Lens:
    model = ARCHITECTURES[name].build().double()
    if kernel is not None:
        model.set_attn_implementation(kernel)
    return al.load(model)


def prompts(sizes: tuple[int, ...], side: str) -> dict[str, Tensor]:
    """Prompts of several lengths, padded on one side."""
    draw = torch.Generator().manual_seed(5)
    longest = max(sizes)
    ids = torch.ones(len(sizes), longest).long()
    mask = torch.zeros_like(ids)
    for row, size in enumerate(sizes):
        own = slice(longest - size, None) if side == "left" else slice(0, size)
        ids[row, own] = torch.randint(4, 90, (size,), generator=draw)
        mask[row, own] = 1
    return {"input_ids": ids, "attention_mask": mask}


def ledger(found: Attribution, prompt: int) -> dict[str, float]:
    assert found.ledger is not None
    return {name: float(entry[prompt]) for name, entry in found.ledger.entries.items()}


def third(output: Any) -> Tensor:
    """A number of the first position, of a model without logits of tokens."""
    return output[0][:, 0, 3]


@pytest.mark.parametrize(
    ("name", "digits"),
    # Routers and sinks have their softmax in float32; in float64 padding is NaN in gemma2's own.
    [("gpt2", 1e-11), ("llama", 1e-11), ("mixtral", 1e-7), ("gpt_oss", 1e-7), ("gemma2", 3e-5)],
)
@pytest.mark.parametrize("side", ["left", "right"])
@METHODS
def test_padding_and_batches_change_nothing(
    name: str, digits: float, side: str, method: Any
) -> None:
    lens = al.load(ARCHITECTURES[name].build()) if name == "gemma2" else opened(name)
    batch = prompts((4, 9, 6), side)
    target = Target([5, 7, 9], 11, at=[-1, -2, -1])
    # The experts of gpt_oss have biases and mix the rows of prompts: it runs one by one.
    found = method(lens, batch, target, batch_size=2)
    for row in range(3):
        own = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = method(lens, own, Target([5, 7, 9][row], 11, at=[-1, -2, -1][row]))
        assert found.tokens[row] == alone.tokens[0]
        assert close(found.of(row), alone.of(0), digits)
        assert close(found.heads[row], alone.heads[0], digits)
        size = alone.layers.shape[-1]
        assert close(found.layers[row, :, :size], alone.layers[0], digits)
        assert found.layers[row, :, size:].eq(0).all()
        expected = ledger(alone, 0)
        assert ledger(found, row) == pytest.approx(expected, abs=digits)
        assert found.target[row] == alone.target[0]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit"])
@METHODS
def test_the_kernel_and_checkpoints_change_nothing(name: str, method: Any) -> None:
    fused = opened(name, "sdpa")
    inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in ARCHITECTURES[name].inputs(fused.model).items()
    }
    target = third if name in ("bert", "vit") else 5
    expected = method(fused, inputs, target)
    # Softmaxes of eager code are in float32 where a model's file says so.
    digits = 1e-12 if name in ("gpt2", "bert", "t5") else 1e-6
    again = method(fused, inputs, target, checkpoint=True)
    for found, rough in ((method(opened(name, "eager"), inputs, target), digits), (again, 1e-12)):
        assert close(found.scores, expected.scores, rough)
        assert close(found.heads, expected.heads, rough)
        assert close(found.layers, expected.layers, rough)
        for row in range(2):
            own, whole = ledger(found, row), ledger(expected, row)
            # A fused kernel does not tell what a bias of scores took from what its softmax kept.
            for each in (own, whole) if name == "t5" else ():
                each["softmax"] = each.pop("softmax", 0.0) + each.pop("positions", 0.0)
            assert own == pytest.approx(whole, abs=rough)
    assert (expected.scores != 0).any(-1).all()


@pytest.mark.parametrize(("method", "share"), [(attnlrp, 0.5), (cp_lrp, 1.0)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_edges_sum_to_their_share_of_z(method: Any, share: float, side: str) -> None:
    for name in ("gpt2", "llama"):
        lens = exact(name)
        batch = prompts((5, 8), side)
        found = method(lens, batch, Target(5, 7), maps="L1:")
        assert found.maps is not None
        assert found.heads is not None
        for site, edges in found.maps.items():
            own = [head.site == site for head in found.head_names]
            whole = found.heads[:, own]
            # The map of a llama goes through the float32 softmax of its eager code.
            assert close(edges.sum((2, 3)), share * whole, 1e-11 if name == "gpt2" else 1e-6)
            assert edges.isfinite().all()
        alone = method(
            lens, batch["input_ids"][:1, batch["attention_mask"][0].bool()], Target(5, 7), maps="L1"
        )
        rows = batch["attention_mask"][0].bool()
        cut = found.maps["L1"][0][:, rows][:, :, rows]
        assert close(cut, alone.maps["L1"][0], 1e-11 if name == "gpt2" else 1e-6)


@pytest.mark.parametrize("name", ["gpt_oss", "granite_swa"])
def test_edges_of_learned_sinks_sum_to_their_share_of_z(name: str) -> None:
    found = attnlrp(exact(name), [[3, 8, 5, 11, 7, 2]], 7, maps=True)
    assert found.maps is not None
    assert found.heads is not None
    sums = torch.cat([edges.sum((2, 3)) for edges in found.maps.values()], dim=1)
    assert close(sums, found.heads / 2, 1e-6)  # granite's softmax is in float32


def test_maps_over_the_budget_are_refused(random_lens: Lens) -> None:
    ids = torch.randint(1, 40, (2, 12))
    with pytest.raises(BudgetError, match="maps='L2'"):
        attnlrp(random_lens, ids, 5, maps="L0:", budget=1000)
    # 3 layers, 2 prompts, 4 heads, 12 x 12 edges of 8 bytes.
    needed = 3 * 2 * 4 * 12 * 12 * 8
    assert attnlrp(random_lens, ids, 5, maps="L0:", budget=needed).maps is not None
    with pytest.raises(BudgetError):
        attnlrp(random_lens, ids, 5, maps="L0:", budget=needed - 1)


def test_layers_differ_by_what_biases_took_under_cp_lrp() -> None:
    ids = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    found = cp_lrp(exact("llama"), ids, 5)
    sums = found.layers.sum(-1)
    assert close(sums, found.value[:, None].expand_as(sums), 1e-12)
    assert close(found.scores, found.layers[:, 0], 0)
    model = ARCHITECTURES["gpt2"].build().double()
    found = cp_lrp(al.load(model), ids, 5)
    first = ledger(found, 1)
    assert float(found.layers[1, 0].sum()) == pytest.approx(first["tokens"] + first["positions"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
    found = cp_lrp(al.load(model), ids, 5)
    sums = found.layers.sum(-1)
    assert close(sums, found.value[:, None].expand_as(sums), 1e-12)


@METHODS
def test_targets_are_tokens_contrasts_and_functions(method: Any) -> None:
    lens = exact("llama")
    ids = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    one, other = method(lens, ids, 5), method(lens, ids, 9)
    both = method(lens, ids, (5, 9))
    # Relevance is linear in what is explained.
    assert close(both.scores, one.scores - other.scores, 1e-12)
    assert close(both.heads, one.heads - other.heads, 1e-12)
    named = method(lens, ids, lambda output: 2 * output.logits[:, -1, 5])
    assert close(named.scores, 2 * one.scores, 1e-12)
    assert "target" not in named.ledger.entries

    def probability(output: Any) -> Tensor:
        return output.logits[:, -1].softmax(-1)[:, 5]

    # What a function is not linear in is no sum of logits: the ledger says what it keeps.
    found = method(lens, ids, probability)
    assert found.ledger.entries["target"].abs().max() > 1e-4
    assert found.ledger.error.max() < 1e-12


@METHODS
def test_a_contrast_of_rounded_logits_hands_all_of_it_down(method: Any) -> None:
    ids = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        found = method(al.load(ARCHITECTURES["llama"].build().to(dtype)), ids, (5, 9))
        assert "target" not in found.ledger.entries


@METHODS
def test_an_encoder_and_a_decoder_are_both_scored(method: Any) -> None:
    lens = opened("t5")
    draw = torch.Generator().manual_seed(1)
    text, own = (torch.randint(4, 90, (2, size), generator=draw) for size in (7, 5))
    found = method(lens, {"input_ids": text, "decoder_input_ids": own}, 11)
    assert [len(words) for words in found.tokens] == [12, 12]
    assert (found.scores != 0).all()
    tokens = found.ledger.entries["tokens"]
    assert close(found.scores.sum(-1), tokens, 1e-12)
    same = method(lens, {"input_ids": text, "decoder_input_ids": text}, 11)
    assert same.scores.shape == (2, 14)
    assert close(same.scores.sum(-1), same.ledger.entries["tokens"], 1e-12)


# What rounding makes of some 20 steps in a row of the dtype's digits, against the largest score.
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@METHODS
def test_half_types_are_near_float32(
    name: str, dtype: torch.dtype, digits: float, method: Any
) -> None:
    ids = torch.randint(4, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    expected = method(al.load(ARCHITECTURES[name].build()), ids, 5)
    found = method(al.load(ARCHITECTURES[name].build().to(dtype)), ids, 5)
    assert found.scores.dtype == torch.float32
    for own, whole in ((found.scores, expected.scores), (found.heads, expected.heads)):
        assert torch.isfinite(own).all()
        assert (own - whole).abs().max() < digits * whole.abs().max()
    assert found.ledger.error.max() < digits


def test_small_gradients_survive_float16() -> None:
    ids = torch.randint(4, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    lens = al.load(ARCHITECTURES["llama"].build().half())
    expected = attnlrp(lens, ids, 5).scores
    # Slopes that float16 would hold with a digit or two, if any.
    found = attnlrp(lens, ids, lambda output: output.logits[:, -1, 5].float() * 2**-19).scores
    assert (found * 2**19 - expected).abs().max() < 0.02 * expected.abs().max()


def state_of(model: Any) -> Any:
    """All that a run could leave behind on a model."""
    return (
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [len(m._backward_hooks) for m in model.modules()],
        [
            {k: v for k, v in vars(m).items() if k in ("forward", "training")}
            for m in model.modules()
        ],
        [set(vars(m)) for m in model.modules()],
        [(p.requires_grad, p.grad, p._backward_hooks, type(p)) for p in model.parameters()],
        model.config._attn_implementation,
        len(torch.overrides._get_current_function_mode_stack()),
    )


def plain_gradients(model: Any, ids: Tensor) -> list[Tensor]:
    value = model(ids).logits[:, -1, 5].sum()
    return list(torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad]))


class Fails(Observer):
    """An observer that raises at its second call, or in the backward pass."""

    def __init__(self, lens: Lens, backward: bool) -> None:
        self.sites = frozenset([lens.anatomy.sites[1].name])
        self.backward = backward

    def see(self, site: Any, call: Any) -> Any:
        if not self.backward:
            raise KeyError("in the middle of the forward pass")

        def fail(_: Tensor) -> None:
            raise KeyError("in the middle of the backward pass")

        call.output.register_hook(fail)
        return call


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_nothing_is_left_behind(name: str, checkpoint: bool) -> None:
    model = ARCHITECTURES[name].build()
    model.lm_head.weight.requires_grad_(False)
    model.train()
    next(model.modules()).eval()
    lens, bystander = al.load(model), ARCHITECTURES[name].build()
    ids = torch.randint(4, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    for module in model.modules():  # dropout would be random
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before, other = state_of(model), state_of(bystander)
    plain, others = plain_gradients(model.eval(), ids), plain_gradients(bystander, ids)
    model.train()
    before = state_of(model)
    first = attnlrp(lens, ids, 5, maps="L0:", checkpoint=checkpoint)
    assert state_of(model) == before
    second = cp_lrp(lens, ids, 5, maps="L0:", checkpoint=checkpoint)
    again = attnlrp(lens, ids, 5, maps="L0:", checkpoint=checkpoint)
    assert not torch.equal(first.scores, second.scores)
    assert torch.equal(first.scores, again.scores)
    assert torch.equal(first.heads, again.heads)
    assert all(torch.equal(first.maps[site], again.maps[site]) for site in first.maps)
    batch = lens.encode(ids)
    for backward in (False, True):
        with pytest.raises(KeyError, match="backward" if backward else "forward"):
            relevances(
                model, lens.anatomy, batch.inputs, lambda output: output.logits[:, -1, 5],
                ATTNLRP, [Fails(lens, backward)], checkpoint=checkpoint,
            )  # fmt: skip
        assert state_of(model) == before
    assert state_of(bystander) == other
    assert all(map(torch.equal, plain_gradients(model.eval(), ids), plain))
    assert all(map(torch.equal, plain_gradients(bystander, ids), others))


def test_a_backward_pass_of_another_thread_runs_blocks_again_by_the_rules() -> None:
    """As CUDA's does, whose threads are not those that ran the forward."""
    lens = opened("gpt2")
    model = lens.model
    ids = torch.randint(4, 90, (1, 6), generator=torch.Generator().manual_seed(1))
    embedded = model.transformer.wte(ids).detach().requires_grad_()
    found: list[Tensor] = []
    for checkpoint in (False, True):
        rules = Rules(ATTNLRP, Tally(1, frozenset()))
        handles = activations(model, rules)
        handles += blocks_again(model, lens.anatomy, rules) if checkpoint else []
        with Session(model, lens.anatomy, []):
            with rules:
                value = model(inputs_embeds=embedded, use_cache=False).logits[0, -1, 5]

            def back(value: Tensor = value) -> None:
                found.append(torch.autograd.grad(value, embedded)[0])

            thread = threading.Thread(target=back)
            thread.start()
            thread.join()
        for handle in handles:
            handle.remove()
    assert close(found[1], found[0], 1e-13)


def test_other_threads_run_the_plain_model() -> None:
    lens = opened("gpt2")
    ids = torch.randint(4, 90, (1, 6), generator=torch.Generator().manual_seed(1))
    expected = plain_gradients(lens.model, ids)
    seen: list[bool] = []

    class Beside(Observer):
        sites = frozenset([lens.anatomy.sites[1].name])

        def see(self, site: Any, call: Any) -> Any:
            def run() -> None:
                seen.append(all(map(torch.equal, plain_gradients(lens.model, ids), expected)))

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return call

    relevances(
        lens.model, lens.anatomy, lens.encode(ids).inputs,
        lambda output: output.logits[:, -1, 5], ATTNLRP, [Beside()],
    )  # fmt: skip
    assert seen == [True]


@METHODS
def test_relevance_is_that_of_the_edited_model(method: Any) -> None:
    lens = opened("gpt2")
    ids = torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    plain = method(lens, ids, 5, maps="L0:")
    means = lens.mean_z(ids)
    silent = [str(head) for head in plain.head_names].index("L1H2")
    lens = opened("gpt2")
    for edit in (al.Zero("L1H2"), al.Mean("L1H2", means), al.Scale("L1H2", 2.0)):
        with lens.edit(edit):
            found = method(lens, ids, 5, maps="L0:")
            value = lens.model(ids).logits[:, -1, 5]
        assert close(found.value, value.detach(), 1e-12)
        assert not close(found.value, plain.value, 1e-3)
        assert found.ledger.error.max() < 1e-12
        if isinstance(edit, al.Zero):
            assert found.heads[:, silent].eq(0).all()
            assert found.maps["L1"][:, 2].eq(0).all()
    assert torch.equal(method(lens, ids, 5, maps="L0:").scores, plain.scores)


def test_edits_do_not_change_what_is_said_of_the_model() -> None:
    lens = opened("gpt2")
    expected = lens.conservation
    lens = opened("gpt2")
    steps: list[int] = []

    class Watched(al.Zero):
        def see(self, site: Any, call: Any, where: Any) -> Any:
            steps.append(1)
            return super().see(site, call, where)

    with lens.edit(Watched("L0H1")):
        assert lens.conservation == expected
        assert not steps
        lens.model(torch.arange(4, 9)[None])
    assert steps == [1]


@METHODS
def test_the_source_of_a_copied_token_is_the_largest_score(method: Any) -> None:
    lens = al.load(induction_model())
    draw = torch.Generator().manual_seed(0)
    count = lens.vocab_size
    hits = 0
    for _ in range(10):
        ids = torch.randperm(count - 2, generator=draw)[:10] + 2
        source = int(torch.randint(2, 9, (1,), generator=draw))
        prompt = torch.cat([ids, ids[source - 1 : source]])[None]
        found = method(lens, prompt, int(ids[source]))
        assert found.ledger.error.max() < 1e-6
        hits += int(found.of(0).abs().argmax()) == source
    assert hits == 10


@METHODS
def test_a_trained_model_closes(method: Any, shared_data: Any) -> None:
    lens = al.load(str(shared_data / "stories260K"))
    found = method(lens, "Once upon a time there was a little girl", maps="L0")
    assert lens.conservation.error < 1e-6
    assert found.ledger.error.max() < 1e-6
    assert found.maps["L0"].isfinite().all()
    assert (found.scores != 0).all()


def test_parts_counted_to_the_wrong_prompts_are_found_by_their_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lens = exact("gpt2")
    ids = torch.tensor([[3, 8, 5, 11], [9, 4, 4, 6]])
    expected = cp_lrp(lens, ids, 7).ledger
    add = Tally.add

    def mixed(self: Tally, name: str, products: Tensor, *rest: Any) -> None:
        add(self, name, products.flip(0) if name == "biases" else products, *rest)

    monkeypatch.setattr(Tally, "add", mixed)
    found = cp_lrp(lens, ids, 7).ledger  # prompts one by one
    assert expected is not None
    assert found is not None
    assert close(found.entries["biases"], expected.entries["biases"])


def test_what_leaves_the_last_run_of_a_shared_block_is_final() -> None:
    found = cp_lrp(exact("albert"), [[3, 8, 5, 11]], Target(7, at=2))
    assert found.layers is not None
    final = found.layers[0, found.layer_names.index("final")]
    assert final.nonzero()[:, 0].tolist() == [2]


def test_a_learned_sink_is_no_position() -> None:
    ledger = attnlrp(exact("gpt_oss"), [[3, 8, 5, 11, 7, 2]], 7).ledger
    assert ledger is not None
    assert set(ledger.entries) == {"tokens", "biases", "softmax"}
