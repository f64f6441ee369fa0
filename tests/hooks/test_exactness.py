"""Rows equal the model's own eager weights, and looking changes nothing, on every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnlens as al
from attnlens.anatomy import Anatomy
from attnlens.hooks import seam
from attnlens.hooks.keep import Keep, Request
from attnlens.hooks.measure import Measure
from attnlens.hooks.probe import examine, output_tensors
from attnlens.hooks.session import Session
from attnlens.hooks.tokens import Sides
from tests.architectures import ARCHITECTURES, Architecture, Inputs, names
from tests.oracles.attention import Recorder, compare_with_eager

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
# A model that takes its softmax in float32 whatever its dtype sums each row in float32; a block
# that leaves out hidden keys sums in another order, which moves the last places: by 2.4e-7 on one
# processor, 3.6e-7 on another, of the 16 x 6e-8 that sums of 16 numbers may differ by.
LAST_PLACE = 4.8e-7


@pytest.mark.parametrize("name", names())
def test_every_architecture(name: str) -> None:
    """One model, built once: exact rows in both precisions, and an output that stays as it is."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    inputs = architecture.inputs(model)
    anatomy = examine(model, inputs)
    assert_looking_changes_nothing(model, anatomy, inputs)
    assert_rows_are_the_eager_weights(model, anatomy, architecture)
    assert_rows_are_the_eager_weights(model.double(), anatomy, architecture)


def cases(architecture: Architecture, model: Any) -> Iterator[tuple[str, Inputs]]:
    yield "plain", architecture.inputs(model)
    if architecture.padded is not None:
        for side in ("left", "right"):
            yield side, architecture.padded(model, side)


def assert_rows_are_the_eager_weights(
    model: nn.Module, anatomy: Anatomy, architecture: Architecture
) -> None:
    dtype = next(model.parameters()).dtype
    for case, inputs in cases(architecture, model):
        found = compare_with_eager(model, anatomy, inputs, block_bytes=500)
        if dtype == torch.float64 and any(seen.eager.isnan().any() for seen in found):
            # A float64 mask is -inf to a float32 softmax, so a padded row that sees no key is NaN
            # in the model itself, and spoils what is above it.
            assert case != "plain"
            assert any(seen.site.upcast for seen in found)
            continue
        for seen in found:
            where = (case, dtype, seen.site.name)
            assert seen.dense.dtype == dtype, where
            assert seen.error(seen.dense) <= TOLERANCE[dtype], where
            bound = max(TOLERANCE[dtype], LAST_PLACE if seen.site.upcast else 0)
            assert seen.error(seen.streamed) <= bound, where
            assert case != "plain" or not (seen.dense.sum(-1) == 0).any(), where
            assert seen.padded is None or seen.blind_real_rows == 0, where


def assert_looking_changes_nothing(model: nn.Module, anatomy: Anatomy, inputs: Inputs) -> None:
    plain = run(model, inputs)
    with Session(model, anatomy, []):
        same(run(model, inputs), plain)
    sides = Sides.of(inputs)
    reducers = [al.Entropy(), al.MeanDistance(), al.FirstTokenMass(), al.ColumnMass(), al.ArgMax()]
    heads = {site.name: tuple(range(site.heads)) for site in anatomy.sites}
    kinds = ["q", "k", "v", "scores", "pattern", "z", "residual"]
    if all(site.output for site in anatomy.sites):
        kinds.append("result")
    keep = Keep(anatomy, Request(tuple(kinds), anatomy.sites, heads), 10**9)
    with Session(model, anatomy, [Measure(anatomy.sites, reducers, sides, 500), keep]):
        same(run(model, inputs), plain)
    same(run(model, inputs), plain)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(model(**inputs))


def same(found: list[Tensor], plain: list[Tensor]) -> None:
    """Bit for bit, NaN included."""
    assert plain
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


# How transformers' own tuples lie beside the sites, stack by stack.
RETURNED = {"": "attentions", "enc": "encoder_attentions", "dec": "decoder_attentions"}
FAMILIES = {
    "gpt2": ("",),
    "llama": ("",),
    "gpt_neox": ("",),
    "opt": ("",),
    "phi3": ("",),
    "mistral": ("",),
    "gemma2": ("",),
    "gpt_oss": ("",),
    "deepseek_v3": ("",),
    "bert": ("",),
    "modernbert": ("",),
    "vit": ("",),
    "t5": ("enc", "dec", "cross"),
    "bart": ("enc", "dec", "cross"),
    "whisper": ("enc", "dec", "cross"),
}


@pytest.mark.parametrize("kernel", ["eager", "default"])
@pytest.mark.parametrize("name", FAMILIES)
def test_patterns_are_what_transformers_returns(name: str, kernel: str) -> None:
    """Another run, transformers' own eager code, and no part of the instrument in it."""
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build()
    inputs = architecture.inputs(model)
    lens = al.Lens(model, example=inputs)
    if kernel == "eager":
        model.set_attn_implementation("eager")
    trace = lens.run(inputs, keep="pattern")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    # Under its own kernel the layers below leave other rounding errors.
    tolerance = 2e-6 if kernel == "eager" else 2e-5
    for stack in FAMILIES[name]:
        returned = output[RETURNED.get(stack, "cross_attentions")]
        sites = [site for site in trace.anatomy.sites if site.stack == stack]
        assert len(sites) == len(returned) > 0
        for site, weights in zip(sites, returned, strict=True):
            assert (trace.pattern[site.name] - weights).abs().max() <= tolerance


CACHED = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "llama4_text", "phi3", "deepseek_v3"]


@pytest.mark.parametrize("name", CACHED)
def test_rows_while_decoding_with_a_cache(name: str) -> None:
    """A prompt, three single tokens, and a chunk: windows have filled and old keys are gone."""
    model: Any = ARCHITECTURES[name].build()
    ids = ARCHITECTURES[name].inputs(model)["input_ids"]
    anatomy = examine(model, {"input_ids": ids})
    sites = frozenset(site.name for site in anatomy.sites)
    cache, place, queries = None, 0, []
    for size in (9, 1, 1, 1, 3):
        recorder = Recorder(sites)
        with torch.no_grad(), seam.kernel(model, "eager"), Session(model, anatomy, [recorder]):
            part = ids[:, place : place + size]
            cache = model(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
        place += size
        for site in sites:
            eager, rows = recorder.weights[site], recorder.rows[site]
            assert eager is not None
            assert (rows - eager).abs().max() <= 2e-6, (site, size)
            queries.append(rows.shape[2])
    assert set(queries) == {9, 1, 3}


def test_rows_of_t5_while_decoding() -> None:
    """A position bias of one row, and cross-attention to a cached source."""
    model: Any = ARCHITECTURES["t5"].build()
    inputs = ARCHITECTURES["t5"].inputs(model)
    anatomy = examine(model, inputs)
    sites = frozenset(site.name for site in anatomy.sites if site.stack != "enc")
    source, target = model.get_encoder()(inputs["input_ids"]), inputs["decoder_input_ids"]
    cache = None
    for place in range(4):
        recorder = Recorder(sites)
        with torch.no_grad(), seam.kernel(model, "eager"), Session(model, anatomy, [recorder]):
            part = target[:, place : place + 1]
            output = model(
                encoder_outputs=source,
                decoder_input_ids=part,
                past_key_values=cache,
                use_cache=True,
            )
        cache = output.past_key_values
        for site in sites:
            eager = recorder.weights[site]
            assert eager is not None
            assert (recorder.rows[site] - eager).abs().max() <= 2e-6, (site, place)
