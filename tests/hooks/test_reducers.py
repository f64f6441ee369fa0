"""Streamed statistics equal those of the dense map, taken one weight at a time in float64."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.anatomy import Site
from attnlens.errors import InputError
from attnlens.hooks.edits import Editor
from attnlens.hooks.measure import Measure
from attnlens.hooks.reducers import TokenMass
from attnlens.hooks.session import Session
from attnlens.hooks.tokens import Sides
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES, Inputs
from tests.oracles import statistics as oracle
from tests.oracles.attention import Seen, compare_with_eager

OFFSETS = (0, 1, 3, -1)
CHOSEN = frozenset(range(4, 30))
REDUCERS = (
    al.FirstTokenMass(),
    al.Entropy(),
    al.MeanDistance(),
    al.OffsetMass(OFFSETS),
    al.ColumnMass(),
    al.ArgMax(),
)
TOKEN_REDUCERS = (TokenMass(CHOSEN), al.InductionMass(), al.DuplicateMass())
# Causal, two-sided, windowed, soft-capped, learned sinks, position bias, encoder-decoder, images.
NAMES = ("gpt2", "bert", "mistral", "gemma2", "gpt_oss", "modernbert", "t5", "bart", "vit", "swin")


@cache
def lens(name: str) -> Lens:
    model = ARCHITECTURES[name].build().double()
    return Lens(model, example=ARCHITECTURES[name].inputs(model))


def few_ids(inputs: Inputs) -> Inputs:
    """The same shapes over eleven ids, so that tokens repeat."""
    return {
        name: value % 11 + 20 if name.endswith("input_ids") else value
        for name, value in inputs.items()
    }


def measured(
    lens: Lens, inputs: Inputs, reducers: Any = REDUCERS, block_bytes: int = 1 << 22
) -> dict[str, dict[str, Tensor]]:
    observer = Measure(lens.anatomy.sites, reducers, Sides.of(inputs), block_bytes)
    with torch.no_grad(), Session(lens.model, lens.anatomy, [observer]):
        lens.model(**inputs)
    return observer.results


def visible(site: Site, rows: int, keys: int) -> Tensor:
    """Which keys a row sees, padding cut out, from the definition of the mask."""
    t, s = torch.arange(rows)[:, None], torch.arange(keys)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if site.causal:
        seen &= s <= t
    return seen


def expected(seen: Seen, prompt: int, sides: Sides) -> dict[str, Tensor]:
    """Every statistic of one prompt by brute force; positions count from its first real token."""
    queries, keys = sides.queries(seen.site), sides.keys(seen.site)
    queries, keys = queries.cut(seen.eager.shape[2]), keys.cut(seen.eager.shape[3])
    maps = oracle.prompts(seen.eager, queries.real, keys.real)[prompt]
    each = oracle.each_head
    found = {
        "first_token": each(oracle.first_token, maps),
        "entropy": each(oracle.entropy, maps),
        "distance": each(oracle.distance, maps),
        "offset": torch.stack([each(oracle.offset(back), maps) for back in OFFSETS], -1),
        "argmax": each(oracle.argmax, maps),
    }
    if seen.site.window is None:
        found["columns"] = each(oracle.columns(visible(seen.site, *maps.shape[1:])), maps)
    if keys.ids is not None and seen.site.kind != "cross":
        ids = keys.ids[prompt] if keys.real is None else keys.ids[prompt][keys.real[prompt]]
        words = ids.tolist()
        found["tokens"] = each(oracle.token_mass(words, set(CHOSEN)), maps)
        found["induction"] = each(oracle.copies(words, 1), maps)
        found["duplicate"] = each(oracle.copies(words, 0), maps)
    return found


def assert_equal(found: Tensor, wanted: Tensor, where: object, tolerance: float = 2e-6) -> None:
    """Equal where wanted; what lies past the prompt's end is NaN or -1."""
    if found.ndim == wanted.ndim and found.ndim > 1:
        rest = found[..., wanted.shape[-1] :]
        assert bool((rest.isnan() if rest.is_floating_point() else rest == -1).all()), where
        found = found[..., : wanted.shape[-1]]
    torch.testing.assert_close(
        found.double(), wanted.double(), rtol=0, atol=tolerance, equal_nan=True, msg=str(where)
    )


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in NAMES
        for case in ("plain", "left", "right")
        if case == "plain" or ARCHITECTURES[name].padded
    ],
)
def test_every_reducer_is_its_definition(name: str, case: str) -> None:
    architecture, subject = ARCHITECTURES[name], lens(name)
    model: Any = subject.model.double()
    inputs = architecture.inputs(model)
    if case != "plain":
        assert architecture.padded is not None
        model = model.float()  # in float64 some models are NaN beside their padding
        inputs = architecture.padded(model, case)
    if "input_ids" in inputs:
        inputs = few_ids(inputs)
    sides = Sides.of(inputs)
    reducers = REDUCERS + (TOKEN_REDUCERS if "input_ids" in inputs else ())
    eager = compare_with_eager(model, subject.anatomy, inputs)
    results = measured(subject, inputs, reducers)
    compared = 0
    for seen in eager:
        for prompt in range(seen.eager.shape[0]):
            for statistic, wanted in expected(seen, prompt, sides).items():
                found = results[statistic][seen.site.name][prompt]
                tolerance = 2e-6 if case == "plain" else 2e-5
                assert_equal(found, wanted, (statistic, seen.site.name, prompt), tolerance)
                compared += 1
    assert compared >= 10


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    block_bytes=st.sampled_from([1, 300, 2000, 1 << 20]),
    side=st.sampled_from(["left", "right"]),
    name=st.sampled_from(["llama", "mistral", "bert", "gpt2"]),
    seed=st.integers(0, 99),
)
def test_padding_and_blocks_change_nothing(
    lengths: list[int], block_bytes: int, side: str, name: str, seed: int
) -> None:
    """A prompt in a padded batch, in any blocks, has the numbers that it has alone."""
    subject = lens(name)
    subject.model.float()
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(20, 30, (length,), generator=generator) for length in lengths]
    width = max(lengths)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    batch = subject.encode({"input_ids": ids, "attention_mask": mask})
    reducers = REDUCERS + TOKEN_REDUCERS
    together = measured(subject, dict(batch.inputs), reducers, block_bytes)
    for row, text in enumerate(texts):
        if name == "bert" and side == "left":
            continue  # its learned positions count padding, so the text alone is another input
        alone = measured(subject, {"input_ids": text[None]}, reducers)
        for statistic, sites in alone.items():
            for site, wanted in sites.items():
                found = together[statistic][site][row]
                assert_equal(found, wanted[0], (statistic, site), 3e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert", "mistral", "gpt_oss", "t5"])
def test_small_blocks_are_big_blocks(name: str) -> None:
    subject = lens(name)
    subject.model.double()
    inputs = few_ids(ARCHITECTURES[name].inputs(subject.model))
    reducers = REDUCERS + TOKEN_REDUCERS
    whole = measured(subject, inputs, reducers)
    for size in (1, 700, 2500):
        for statistic, sites in measured(subject, inputs, reducers, size).items():
            for site, found in sites.items():
                assert_equal(found, whole[statistic][site], (size, statistic, site), 1e-6)


def uniform(name: str, rows: int) -> tuple[Lens, dict[str, dict[str, Tensor]]]:
    """Statistics of a model whose heads all attend evenly."""
    subject = lens(name)
    subject.model.double()
    ids = torch.arange(20, 20 + rows)[None]
    editor = Editor(subject.anatomy, [al.Uniform("all")])
    with torch.no_grad(), Session(subject.model, subject.anatomy, [editor]):
        return subject, measured(subject, {"input_ids": ids})


def all_equal(values: Tensor, wanted: float) -> None:
    torch.testing.assert_close(values.double(), torch.full_like(values, wanted).double())


@pytest.mark.parametrize("rows", [1, 2, 9, 16])
def test_even_causal_attention_in_closed_form(rows: int) -> None:
    _, results = uniform("gpt2", rows)
    seen = range(1, rows + 1)
    for site in ("L0", "L1"):
        all_equal(results["entropy"][site], sum(math.log(n) for n in seen) / rows)
        all_equal(results["distance"][site], sum((n - 1) / 2 for n in seen) / rows)
        all_equal(results["first_token"][site], sum(1 / n for n in seen) / rows)
        for key in range(rows):
            column = results["columns"][site][..., key]
            all_equal(column, sum(1 / n for n in range(key + 1, rows + 1)) / (rows - key))
        if rows > 1:
            previous = sum(1 / n for n in range(2, rows + 1)) / (rows - 1)
            all_equal(results["offset"][site][..., 1], previous)
            all_equal(results["offset"][site][..., 3], 0.0)
        assert results["argmax"][site].eq(0).all()


def test_even_two_sided_attention_in_closed_form() -> None:
    n = 12
    _, results = uniform("bert", n)
    all_equal(results["entropy"]["L0"], math.log(n))
    all_equal(results["distance"]["L0"], (n * n - 1) / (3 * n))
    all_equal(results["offset"]["L0"], 1 / n)
    all_equal(results["columns"]["L0"], 1 / n)


@pytest.mark.parametrize(
    ("ids", "induction", "duplicate"),
    [
        # Rows 3, 4, 5 repeat rows 0, 1, 2; the keys after the copies are 1, 2, 3.
        ([20, 21, 22, 20, 21, 22], (1 / 4 + 1 / 5 + 1 / 6) / 3, (1 / 4 + 1 / 5 + 1 / 6) / 3),
        # A run: row 1 has a copy at 0, whose next token is row 1 itself and is not counted.
        ([20, 20, 20], 1 / 3, (1 / 2 + 2 / 3) / 2),
        ([20, 21, 22], math.nan, math.nan),
        # Row 3 has two copies; after the second comes row 3 itself, which is not counted.
        ([20, 25, 20, 20], (1 / 3 + 1 / 4) / 2, (1 / 3 + 2 / 4) / 2),
    ],
)
def test_copies_under_even_attention(ids: list[int], induction: float, duplicate: float) -> None:
    subject = lens("gpt2")
    subject.model.double()
    editor = Editor(subject.anatomy, [al.Uniform("all")])
    with torch.no_grad(), Session(subject.model, subject.anatomy, [editor]):
        results = measured(subject, {"input_ids": torch.tensor([ids])}, TOKEN_REDUCERS)
    for name, wanted in (("induction", induction), ("duplicate", duplicate)):
        found = results[name]["L1"]
        torch.testing.assert_close(
            found, torch.full_like(found, wanted), equal_nan=True, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_bfloat16_within_its_rounding(name: str) -> None:
    """Eight bits of mantissa: q and k are rounded to 1/256, weights to .4 % of themselves."""
    half = ARCHITECTURES[name].build().bfloat16()
    inputs = few_ids(ARCHITECTURES[name].inputs(half))
    opened = Lens(half, example=inputs)
    eager = compare_with_eager(half, opened.anatomy, inputs)
    results = measured(opened, inputs, REDUCERS)
    for seen in eager:
        maps = oracle.prompts(seen.eager)
        for prompt, own in enumerate(maps):
            for statistic, definition, bound in (
                ("first_token", oracle.first_token, 0.01),
                ("entropy", oracle.entropy, 0.03),
                ("distance", oracle.distance, 0.1),
            ):
                wanted = oracle.each_head(definition, own)
                found = results[statistic][seen.site.name][prompt]
                assert (found - wanted).abs().max() < bound, (statistic, seen.site.name)


def test_token_statistics_of_images_are_refused() -> None:
    subject = lens("vit")
    model = subject.model.double()
    inputs = ARCHITECTURES["vit"].inputs(model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'induction' compares tokens"):
        subject.measure(inputs, al.InductionMass())


def test_measure_orders_and_fills_prompts() -> None:
    """Prompts run by length, batch by batch, and come back in the order that was given."""
    subject = lens("gpt2")
    subject.model.double()
    mask = torch.ones(5, 12, dtype=torch.long)
    for row, length in enumerate((7, 12, 3, 9, 5)):
        mask[row, length:] = 0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 60, (5, 12), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask}
    one = subject.measure(inputs, REDUCERS, batch_size=1)
    two = subject.measure(inputs, REDUCERS, batch_size=2)
    for statistic in one.values:
        for site, found in two[statistic].items():
            wanted = one[statistic][site]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, equal_nan=True)
    last = two["argmax"]["L0"]
    assert last[2, :, 3:].eq(-1).all()
    assert last[2, :, :3].ge(0).all()
    alone = subject.measure({"input_ids": ids[2:3, :3]}, REDUCERS)
    assert_equal(two["columns"]["L1"][2], alone["columns"]["L1"][0], "columns")


def test_nan_that_a_model_makes_of_padding_stays_there() -> None:
    # In float64 the eager kernel turns rows of a window that holds nothing but padding into NaN.
    lens = al.load(ARCHITECTURES["gemma2"].build().double(), check=False)
    ids = torch.randint(4, 40, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    both = lens.measure({"input_ids": ids, "attention_mask": mask}, al.ColumnMass())["columns"]
    alone = lens.measure(ids[1:, :3], al.ColumnMass())["columns"]
    for site in lens.anatomy.sites:
        assert torch.allclose(both[site.name][1, :, :3], alone[site.name][0], atol=1e-6)


def test_two_reducers_of_one_name_are_refused() -> None:
    subject = lens("gpt2")
    with pytest.raises(InputError, match="Two reducers are named 'offset'"):
        subject.measure([20, 21], [al.OffsetMass((1,)), al.OffsetMass((2,))])
    with pytest.raises(InputError, match="No reducer"):
        subject.measure([20, 21], [])
