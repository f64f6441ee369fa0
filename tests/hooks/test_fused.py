"""Fused blocks say what torch's blocks say, of the same calls."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by tests/kernels/test_triton_interpreter.py", allow_module_level=True)

import attnlens as al
from attnlens.anatomy import Site
from attnlens.errors import InputError
from attnlens.hooks.fused import QUANTITIES, can_fuse, fused_blocks, read_by, read_mask
from attnlens.hooks.measure import Measure, blocks
from attnlens.hooks.rows import Rows
from attnlens.hooks.seam import Call
from attnlens.hooks.session import Session
from attnlens.hooks.tokens import Layout, Sides
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES
from tests.gpu.dense import DEVICE, assert_near

TOLERANCE = 4e-6
ROWS = ("row_sums", "peak", "entropy", "distance")


class Taken(Measure):
    """Observer that keeps every call and its layout."""

    def __init__(self, lens: Lens, inputs: Any) -> None:
        super().__init__(lens.anatomy.sites, [], Sides.of(inputs))
        self.lens, self.inputs = lens, inputs
        self.calls: list[tuple[Rows, Layout]] = []

    def see(self, site: Site, call: Call) -> Call:
        rows = Rows.at(site, call)
        self.calls.append((rows, self._layout(site, rows)))
        return call


def calls(name: str, case: str = "plain", dtype: torch.dtype = torch.float32) -> Taken:
    """The calls of a small real model."""
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build().to(DEVICE, dtype)
    if case == "plain":
        inputs = architecture.inputs(model)
    else:
        assert architecture.padded is not None
        inputs = architecture.padded(model, case)
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    lens = Lens(model, example=inputs)
    taken = Taken(lens, inputs)
    with torch.no_grad(), Session(model, lens.anatomy, [taken]):
        model(**inputs)
    return taken


def exact(rows: Rows) -> Rows:
    """The same call in float64, the softmax too."""
    mask = rows.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double().masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
    return replace(
        rows,
        query=rows.query.double(),
        key=rows.key.double(),
        mask=mask,
        sinks=None if rows.sinks is None else rows.sinks.double(),
        softmax_dtype=None,
    )


@dataclass
class Said:
    """All that the blocks of a call say, put together."""

    layout: Layout
    values: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, block: Any, value: Tensor) -> None:
        shape = (self.layout.batch, self.layout.heads, self.layout.queries)
        room = self.values.setdefault(name, torch.zeros(shape, device=DEVICE, dtype=torch.float64))
        room[:, block.heads, block.rows] = value.double()

    def add(self, name: str, block: Any, value: Tensor, keys: slice) -> None:
        shape = (self.layout.batch, self.layout.heads, self.layout.keys)
        room = self.values.setdefault(name, torch.zeros(shape, device=DEVICE, dtype=torch.float64))
        room[:, block.heads, keys] += value.double()

    @classmethod
    def by(cls, found: Iterable[Any], layout: Layout) -> Said:
        said = cls(layout)
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(2, layout.batch, layout.keys, generator=generator).to(DEVICE)
        few = weights[0] * (weights[1] < 0.3)
        for block in found:
            for name in ROWS:
                said.put(name, block, getattr(block, name))
            said.put("largest", block, block.largest)
            height = block.rows.stop - block.rows.start
            said.put("first", block, block.at(layout.first_key()[:, None].expand(-1, height)))
            said.put("previous", block, block.at(block.partners - 1))
            said.put("mass_on", block, block.mass_on(few))
            said.put("mass_on_all", block, block.mass_on(weights[:1, 0]))
            said.put("mass_on_none", block, block.mass_on(torch.zeros_like(few)))
            pairs = torch.ones(layout.batch, height, 2, device=DEVICE).nonzero(as_tuple=True)
            key = (block.positions[pairs[1]] * 5 + 3 * pairs[2]) % (layout.keys + 1)
            said.put("mass_at", block, block.mass_at(pairs[0], pairs[1], key))
            said.add("columns", block, block.column_sums(), block.keys)
            said.add("band", block, block.band_sums(1, 3), slice(None))
            said.add("ahead", block, block.band_sums(-2, 0), slice(None))
            said.add("rows_seeing", block, block.rows_seeing()[:, None], block.keys)
        return said


def compare(rows: Rows, layout: Layout, height: int = 9) -> None:
    """Every quantity of a call against torch's blocks in float64."""
    assert can_fuse(rows)
    parts = fused_blocks(rows, layout, height=height)
    assert parts is not None
    with torch.no_grad():
        found = Said.by(parts, layout).values
        wanted = Said.by(blocks(exact(rows), layout, 1 << 14), layout).values
    blind = wanted["row_sums"] == 0
    for said in (found, wanted):
        said["largest"] = said["largest"].masked_fill(blind, 0)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_near(found[name], value, TOLERANCE, f"{layout.site.name} {name}")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("gpt2", "left"),
        ("llama", "plain"),
        ("mistral", "right"),
        ("gemma2", "plain"),
        ("gpt_oss", "left"),
        ("bert", "right"),
        ("bart", "left"),
    ],
)
def test_calls_of_real_models(name: str, case: str) -> None:
    """Causal, grouped, windowed, capped, with sinks, two-sided, cross; padded on either side."""
    seen: dict[tuple[str, bool, int | None], tuple[Rows, Layout]] = {}
    for rows, layout in calls(name, case).calls:
        site = layout.site
        seen.setdefault((site.kind, site.causal, site.window), (rows, layout))
    for rows, layout in seen.values():
        compare(rows, layout)


def test_bfloat16_is_exact_for_its_own_numbers() -> None:
    compare(*calls("llama", dtype=torch.bfloat16).calls[0])


def some(rows: int = 12, keys: int = 12, **changes: Any) -> tuple[Rows, Layout]:
    """A call of a real model cut or filled to this shape."""
    rule, layout = calls("llama").calls[0]
    batch, heads, _, width = rule.query.shape
    torch.manual_seed(0)
    rule = replace(
        rule,
        query=torch.randn(batch, heads, rows, width, device=DEVICE),
        key=torch.randn(batch, rule.key.shape[1], keys, width, device=DEVICE),
        mask=None,
    )
    rule = replace(rule, **changes)
    return rule, replace(layout, queries=rows, keys=keys, offset=rule.offset)


def test_decoding_with_a_cache() -> None:
    compare(*some(1, 30, causal=False))
    tail = torch.ones(3, 30, dtype=torch.bool, device=DEVICE).tril(27)
    compare(*some(3, 30, mask=tail[None, None].expand(2, 1, 3, 30), causal=False))


def test_chosen_heads() -> None:
    rows, layout = some()
    chosen = rows.select(torch.tensor([2, 0, 3], device=DEVICE))
    compare(chosen, replace(layout, heads=3), height=12)


def test_floating_mask_of_the_eager_kernel() -> None:
    hidden = ~torch.ones(12, 12, dtype=torch.bool, device=DEVICE).tril().triu(-4)
    for value in (torch.finfo(torch.float32).min, -torch.inf):
        mask = torch.zeros(1, 1, 12, 12, device=DEVICE).masked_fill(hidden, value)
        compare(*some(mask=mask, causal=False), height=12)


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, layout = some()
    assert can_fuse(rows)
    dots = torch.zeros(1, 1, 12, 12, device=DEVICE)
    holes = torch.ones(1, 1, 12, 12, dtype=torch.bool, device=DEVICE)
    holes[..., 7, 5] = False
    for other in (
        replace(rows, bias=dots),
        replace(rows, mask=dots + 0.5, causal=False),
        replace(rows, mask=holes, causal=False),
        replace(rows, mask=~holes.expand(1, 4, 12, 12).contiguous(), causal=False),
        replace(rows, pattern_edits=(lambda pattern, seen, view: pattern,)),
        replace(rows, score_edits=(lambda scores, view: scores,)),
        replace(rows, query=rows.query.double(), key=rows.key.double()),
        calls("t5").calls[0][0],
    ):
        assert not can_fuse(other)
        assert fused_blocks(other, layout) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert can_fuse(rows) == (DEVICE == "cuda")


@settings(max_examples=100)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 9),
    keys=st.integers(1, 9),
    floating=st.booleans(),
    height=st.integers(1, 9),
    seed=st.integers(0, 10_000),
)
def test_masks_are_read_exactly(
    batch: int, rows: int, keys: int, floating: bool, height: int, seed: int
) -> None:
    """Any spans are found again, and a hole in one is never overlooked."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, keys + 1, (2, batch, rows, 1), generator=generator).sort(0).values
    s = torch.arange(keys)
    seen = ((s >= ends[0]) & (s < ends[1]))[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnlens.hooks.fused.MASK_BYTES", height * batch * keys)
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if floating else seen
        found = read_mask(mask)
        assert found is not None
        first, stop = (end[:, None, :, None] for end in found)
        assert torch.equal((s >= first) & (s < stop), seen)
        inside = (seen[..., 1:-1] & seen[..., :-2] & seen[..., 2:]).nonzero()
        for b, _, t, s_hidden in inside[:3].tolist():
            broken = mask.clone()
            broken[b, 0, t, s_hidden + 1] = -torch.inf if floating else False
            assert read_mask(broken) is None


def test_one_row_of_mask_for_all_rows() -> None:
    real = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    found = read_mask(real[:, None, None].expand(-1, 1, 5, -1))
    assert found is not None
    assert [end.tolist() for end in found] == [[[0] * 5, [1] * 5], [[3] * 5, [4] * 5]]


@dataclass(frozen=True)
class Reads:
    reads: tuple[str, ...]


def test_what_reducers_read() -> None:
    assert read_by([Reads(("entropy",)), Reads(("at", "entropy"))]) == {"entropy", "at"}
    assert read_by([Reads(("entropy",)), Reads(("pattern",))]) is None
    assert read_by([Reads(("entropy",)), object()]) is None
    assert read_by([Reads(tuple(QUANTITIES))]) == QUANTITIES


def test_only_what_is_asked_is_computed() -> None:
    rows, layout = some()
    parts = fused_blocks(rows, layout, frozenset({"entropy"}))
    assert parts is not None
    (block,) = parts
    entropy = block.entropy
    assert sorted(block._found) == ["entropy", "lse", "peak", "row_sums"]
    assert block.entropy is entropy  # kept, not computed again
    assert block.distance.shape == entropy.shape
    for name in ("pattern", "scores", "visible"):
        with pytest.raises(InputError, match=f"no '{name}'"):
            getattr(block, name)


def test_reducers_give_the_same_numbers() -> None:
    """The reducers of a profile over fused blocks, and over torch's in float64."""
    reducers = (
        al.FirstTokenMass(),
        al.Entropy(),
        al.MeanDistance(),
        al.OffsetMass((0, 1, -1)),
        al.ColumnMass(),
        al.ArgMax(),
        al.InductionMass(),
    )
    rows, layout = calls("mistral", "left").calls[0]
    parts = fused_blocks(rows, layout, height=10)
    assert parts is not None
    results: list[list[Tensor]] = []
    for found in (parts, blocks(exact(rows), layout, 1 << 13)):
        states = [reducer.start(layout) for reducer in reducers]
        for block in found:
            for reducer, state in zip(reducers, states, strict=True):
                reducer.update(state, block)
        finished = [reducer.finish(state) for reducer, state in zip(reducers, states, strict=True)]
        results.append(finished)
    for fused, torch_s in zip(*results, strict=True):
        torch.testing.assert_close(fused, torch_s, rtol=0, atol=TOLERANCE, equal_nan=True)


def test_measure_takes_fused_blocks_where_every_reducer_allows_it() -> None:
    """One reducer that wants weights makes all take torch's; the numbers are the same."""

    @dataclass(frozen=True)
    class Kind(al.Entropy):
        """Which kind of block came."""

        name: str = "kind"

        def update(self, state: Any, block: Any) -> None:
            kinds.add(type(block).__name__)
            state.add(block, block.entropy)

    @dataclass(frozen=True)
    class Mute(Kind):
        reads: Any = None

    reducers = (al.Entropy(), al.FirstTokenMass(), al.ColumnMass())
    taken = calls("gpt_oss", "right")
    results: list[dict[str, dict[str, Tensor]]] = []
    for own, kind in ((Kind(), "FusedRows"), (Mute(), "TorchBlock")):
        kinds: set[str] = set()
        measure = Measure(taken.lens.anatomy.sites, (*reducers, own), Sides.of(taken.inputs))
        with torch.no_grad(), Session(taken.lens.model, taken.lens.anatomy, [measure]):
            taken.lens.model(**taken.inputs)
        assert kinds == {kind}
        results.append(measure.results)
    for name in (reducer.name for reducer in reducers):
        for site, fused in results[0][name].items():
            torch_s = results[1][name][site]
            torch.testing.assert_close(fused, torch_s, rtol=0, atol=2e-5, equal_nan=True)


def test_triton_waits_until_it_is_needed(repository: Path) -> None:
    """No module but the kernels imports them, or Triton, before a call needs them."""
    for path in (repository / "attnlens").rglob("*.py"):
        if path.name.startswith("triton_"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if "triton" in name], path
