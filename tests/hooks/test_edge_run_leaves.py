"""Runs with edges cut: padding, narrow types and odd factors change nothing; nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnlens as al
from attnlens.errors import UnsupportedModelError
from attnlens.hooks import seam
from attnlens.hooks.edge_gradients import ask
from attnlens.hooks.edge_run import Activations, EdgeRun, as_reference
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.hooks.test_session import condition
from tests.hooks.wired import cut, forward, heard, lens_of, new_lens, others, prompts


def some_masks(lens: Lens, *shares: float) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    exists = lens.wiring.network.exists
    return torch.stack([exists & (torch.rand(exists.shape, generator=draw) < s) for s in shares])


def ends(lens: Lens) -> Tensor:
    """All edges, and none."""
    exists = lens.wiring.network.exists
    return torch.stack([exists, torch.zeros_like(exists)])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt", "qwen3", "mixtral"])
@torch.no_grad()
def test_padded_prompts_are_those_alone(name: str) -> None:
    lens = lens_of(name)
    draw = torch.Generator().manual_seed(2)
    ids, theirs = torch.randint(5, 90, (2, 2, 9), generator=draw)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    masks = torch.cat([ends(lens), some_masks(lens, 0.5, 0.8)])

    def of(some: Tensor, rows: slice, length: int = 9) -> dict[str, Tensor]:
        own = {"input_ids": some[rows, :length], "attention_mask": mask[rows, :length]}
        return dict(lens.encode(own).inputs)

    both = slice(0, 2)
    together = cut(lens, of(ids, both), heard(lens, of(theirs, both))[0].written, masks)
    for prompt, length in ((slice(0, 1), 9), (slice(1, 2), 6)):
        written = heard(lens, of(theirs, prompt, length))[0].written
        alone = cut(lens, of(ids, prompt, length), written, masks)
        # Float64; where norms go by float32 what they are given differs in the 15th digit alone.
        assert torch.allclose(together[:, prompt, :length], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("multiplier", [0.22, 1.1])
def test_factors_that_no_narrow_type_holds(multiplier: float) -> None:
    model: Any = ARCHITECTURES["granite"].build()
    for layer in model.model.layers:
        layer.residual_multiplier = multiplier
    lens = al.load(model.double())
    inputs = prompts(lens)
    _, clean = heard(lens, inputs)
    theirs, other = heard(lens, others(inputs))
    found = cut(lens, inputs, theirs.written, ends(lens))
    assert torch.allclose(found[0], clean, atol=1e-10, rtol=0)
    assert torch.allclose(found[1], other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "t5", "mixtral"])
def test_narrow_types_give_the_model_but_for_their_rounding(name: str, dtype: torch.dtype) -> None:
    lens = new_lens(name, dtype)
    inputs = prompts(lens)
    _, clean = heard(lens, inputs)
    theirs, other = heard(lens, others(inputs))
    found = cut(lens, inputs, theirs.written, ends(lens))
    assert found.dtype == clean.dtype == dtype
    # Some tens of roundings on the way to each logit, each of half an eps of what is rounded.
    near = 20 * torch.finfo(dtype).eps * float(clean.abs().max())
    assert torch.allclose(found[0], clean, atol=near, rtol=0)
    assert torch.allclose(found[1], other, atol=near, rtol=0)


@pytest.fixture
def untouched() -> Iterator[Lens]:
    """A GPT-2 that is in the end what it was in the beginning."""
    lens = new_lens("gpt2")
    inputs = prompts(lens)
    _, logits = heard(lens, inputs)  # finds the wiring, too
    before = condition(lens.model)
    weights = {name: weight.clone() for name, weight in lens.model.state_dict().items()}
    yield lens
    assert condition(lens.model) == before
    assert not any("forward" in vars(module) for module in lens.model.modules())
    assert not seam._switched._held
    for name, weight in lens.model.state_dict().items():
        assert weight.equal(weights[name])
    assert all(w.grad is None and w.requires_grad for w in lens.model.parameters())
    assert forward(lens, inputs).equal(logits)


def reference_of(lens: Lens) -> Activations:
    inputs = prompts(lens)
    theirs, _ = heard(lens, others(inputs))
    return as_reference(lens.wiring, heard(lens, inputs)[0], theirs.written)


def last_logit(output: Any) -> Tensor:
    return output.logits[:, -1, 7]


def test_nothing_is_left_after_runs(untouched: Lens) -> None:
    inputs = prompts(untouched)
    theirs, _ = heard(untouched, others(inputs))
    cut(untouched, inputs, theirs.written, some_masks(untouched, 0.5))
    ask(untouched.wiring, inputs, last_logit)


FAILING = pytest.mark.parametrize(
    "module", ["transformer.h.1.mlp", "transformer.h.2.attn.c_proj", "lm_head"]
)
ERRORS = pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])


@FAILING
@ERRORS
def test_nothing_is_left_after_a_run_that_failed(
    untouched: Lens, module: str, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error

    run = EdgeRun(untouched.wiring, reference_of(untouched), some_masks(untouched, 0.5))
    handle = untouched.model.get_submodule(module).register_forward_pre_hook(fail)
    with pytest.raises(error):
        forward(untouched, prompts(untouched), run)
    with pytest.raises(error):
        ask(untouched.wiring, prompts(untouched), last_logit)
    handle.remove()


def test_nothing_is_left_after_a_metric_that_failed(untouched: Lens) -> None:
    def fail(_: Any) -> Tensor:
        raise ValueError("metric")

    with pytest.raises(ValueError, match="metric"):
        ask(untouched.wiring, prompts(untouched), fail)


def test_a_module_that_makes_more_is_refused_and_nothing_is_left(untouched: Lens) -> None:
    """A wiring in which the values of a fused module are nobody's."""
    wiring = untouched.wiring
    readers = tuple(r for r in wiring.readers if (r.part, r.kind) != ("L2", "v"))
    less = replace(wiring, readers=readers)
    run = EdgeRun(less, reference_of(untouched), less.network.exists[None])
    with pytest.raises(UnsupportedModelError, match="makes more than queries, keys and values"):
        forward(untouched, prompts(untouched), run)


def test_a_batch_that_is_not_whole_copies_fails_and_nothing_is_left(untouched: Lens) -> None:
    kept = some_masks(untouched, 0.5, 0.5, 0.5)
    run = EdgeRun(untouched.wiring, reference_of(untouched), kept)
    with pytest.raises(RuntimeError):
        forward(untouched, prompts(untouched), run)
