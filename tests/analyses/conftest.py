"""Tiny models whose attention is known, or random with sharp rows."""

from collections.abc import Iterator

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import attnlens as al
from attnlens.hooks.rows import Rows
from attnlens.lens import Lens
from attnlens.zoo import induction_model
from tests.architectures import ARCHITECTURES


def tiny_gpt2(layers: int = 3, heads: int = 4, sharp: float = 3.0) -> GPT2LMHeadModel:
    """A random float64 GPT-2 of 40 tokens and 48 positions; rows are sharp, or even for sharp=0."""
    config = GPT2Config(
        vocab_size=40, n_positions=48, n_embd=32, n_layer=layers, n_head=heads, bos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.normal_(generator=torch.Generator().manual_seed(1))
            block.attn.c_attn.weight[:, :64] *= sharp / 5
            block.attn.c_attn.bias[:64] = 0
            block.attn.c_proj.weight.mul_(10)
    return model


def architecture(name: str) -> Lens:
    """One model of the tests' catalogue, in float64."""
    return al.load(ARCHITECTURES[name].build().double())


@pytest.fixture(scope="session")
def random_lens() -> Lens:
    return al.load(tiny_gpt2())


@pytest.fixture(scope="session")
def even_lens() -> Lens:
    """Zero queries and keys: every head spreads its attention evenly over what it sees."""
    return al.load(tiny_gpt2(sharp=0.0))


@pytest.fixture(scope="session")
def induction_lens() -> Lens:
    return al.load(induction_model())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come one at a time, so that blocks of windowed layers begin after the first key."""
    whole = Rows.blocks

    def one_by_one(self: Rows, budget: int = 0, rows: slice | None = None) -> Iterator[slice]:
        return whole(self, 1, rows)

    monkeypatch.setattr(Rows, "blocks", one_by_one)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(3))
