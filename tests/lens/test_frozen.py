"""Frozen ablation against two runs by hand: dense patterns of the first put into the second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import attnlens as al
from attnlens.errors import BudgetError, HeadError
from attnlens.lens import Lens
from attnlens.zoo import induction_model
from tests.architectures import ARCHITECTURES, Inputs
from tests.test_architectures import own_eager

NAMES = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "bert", "t5", "vit"]


def opened(name: str) -> tuple[Lens, Inputs]:
    model = ARCHITECTURES[name].build().double()
    inputs = ARCHITECTURES[name].inputs(model)
    return Lens(model, example=inputs), inputs


class ByHand:
    """An attention function of the test's own: its first run keeps weights, others use them."""

    def __init__(self) -> None:
        self.patterns: dict[nn.Module, Tensor] = {}
        self.held: set[nn.Module] = set()
        self.zeroed: dict[nn.Module, list[int]] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        z, pattern = own_eager(type(module))(module, query, key, value, mask, **rest)
        self.patterns.setdefault(module, pattern)
        if module in self.held:
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            z = (self.patterns[module] @ value).transpose(1, 2)
        z = z.clone()
        z[:, :, self.zeroed.get(module, [])] = 0
        return z, pattern


@pytest.fixture
def by_hand() -> Iterator[ByHand]:
    """Registered as the attention named `by_hand`."""
    own = ByHand()
    AttentionInterface.register("by_hand", own.attend)
    AttentionMaskInterface.register("by_hand", eager_mask)
    yield own
    del AttentionInterface._global_mapping["by_hand"]
    del AttentionMaskInterface._global_mapping["by_hand"]


def outcome(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("name", NAMES)
def test_frozen_is_two_runs(name: str, by_hand: ByHand) -> None:
    lens, inputs = opened(name)
    model: Any = lens.model
    stack = "enc." if name == "t5" else ""
    heads = f"{stack}L0H1,{stack}L0H3"
    plain = outcome(model, inputs)
    edits = al.frozen(lens, heads, inputs)
    with lens.edit(*edits):
        found = outcome(model, inputs)
    with lens.edit(edits[0]):
        zeroed = outcome(model, inputs)
    before = model.config._attn_implementation
    model.set_attn_implementation("by_hand")
    outcome(model, inputs)
    modules = [model.get_submodule(site.module) for site in lens.anatomy.sites]
    by_hand.zeroed = {modules[0]: [1, 3]}
    by_hand.held = set(modules[1:])
    wanted = outcome(model, inputs)
    model.set_attn_implementation(before)
    # Models that take the softmax in float32 do so in both.
    close = 1e-5 if any(site.upcast for site in lens.anatomy.sites) else 1e-11
    torch.testing.assert_close(found, wanted, atol=close, rtol=close)
    assert not torch.allclose(found, zeroed, atol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_later_patterns_are_the_clean_ones_and_padding_is_no_matter() -> None:
    lens, _ = opened("llama")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    batch = {"input_ids": torch.arange(20, 44).view(2, 12), "attention_mask": mask}
    clean = lens.run(batch, keep="pattern").pattern
    edits = al.frozen(lens, "L0", batch)
    assert [str(edit) for edit in edits] == [
        "Zero of L0",
        "Patch q of L1",
        "Patch k of L1",
    ]
    assert [list(edit.values) for edit in edits if isinstance(edit, al.Patch)] == [["L1"], ["L1"]]
    with lens.edit(*edits):
        held = lens.run(batch, keep="pattern").pattern
    assert torch.equal(held["L0"], clean["L0"])
    assert torch.equal(held["L1"][0], clean["L1"][0])
    assert torch.equal(held["L1"][1, :, :7], clean["L1"][1, :, :7])
    alone = {"input_ids": batch["input_ids"][1:, :7]}
    with lens.edit(*edits):
        together = outcome(lens.model, batch)
    with lens.edit(*al.frozen(lens, "L0", alone)):
        torch.testing.assert_close(together[1:, :7], outcome(lens.model, alone))


def test_all_above_the_lowest_head_is_held() -> None:
    lens, inputs = opened("diffllama")
    edits = al.frozen(lens, "L1H2,L0H0", inputs)
    names = [site.name for site in lens.anatomy.sites][1:]
    assert len(names) > 1
    assert [str(edit) for edit in edits[1:]] == [f"Patch {k} of {','.join(names)}" for k in "qk"]


def test_above_the_last_layer_nothing_is_held() -> None:
    lens, inputs = opened("llama")
    (only,) = al.frozen(lens, "L1H2", inputs)
    assert isinstance(only, al.Zero)


def test_induction_loses_its_copy_and_not_its_place() -> None:
    """Without its previous-token head induction goes astray; frozen, it finds, and copies, all."""
    lens = Lens(induction_model())
    ids = torch.tensor([[0, 5, 9, 3, 7, 5, 9, 3, 7]])

    def right() -> float:
        guesses = outcome(lens.model, {"input_ids": ids}).argmax(-1)
        return float((guesses[0, 5:-1] == ids[0, 6:]).double().mean())

    assert right() == 1
    with lens.edit(al.Zero("L0H1")):
        assert right() < 0.5
    with lens.edit(*al.frozen(lens, "L0H1", ids)):
        assert right() == 1
    with lens.edit(*al.frozen(lens, "L1H2", ids)):
        assert right() < 0.5


def test_what_is_too_much_or_not_there_is_told() -> None:
    lens, inputs = opened("llama")
    with pytest.raises(BudgetError, match="Keeping q takes"):
        al.frozen(lens, "L0H1", inputs, budget=100)
    with pytest.raises(HeadError, match="L0H9"):
        al.frozen(lens, "L0H9", inputs)
