"""Edits come back from JSON as they were; nothing is run on loading; damage is told."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnlens as al
from attnlens.anatomy import Head
from attnlens.errors import AttnlensError, InputError
from attnlens.hooks.edits import Edit, HeadEdit
from attnlens.lens import Lens
from tests.architectures import ARCHITECTURES


def even(ids: Tensor) -> Tensor:
    return ids % 2 == 0


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"L0": values.to(dtype), "cross.L1": values.mul(3).to(dtype)}


EDITS: list[Edit] = [
    al.Zero("L3H5", queries=slice(0, 5), phase="decode"),
    al.Zero(["L3H5", (4, 0), Head("cross", 1, 2)], queries=[0, -1], phase="prefill"),
    al.Scale((4, 0), 0.1, queries=-1),
    al.Mean("L0:", tensors(4, 8)),
    al.Mean("L0", tensors(9, 4, 8, dtype=torch.bfloat16), queries=torch.tensor([0, 3])),
    al.Uniform("all", queries=torch.eye(3, 5).bool()),
    al.Identity("L0", 1 / 3, queries=even),
    al.Bias("L0", -math.inf, keys=slice(None, -1, 2)),
    al.Hide("L0", keys=(1, 2), queries=even),
    al.Drop("L0", keys=torch.ones(5).bool()),
    al.Patch("L0", "q", tensors(1, 4, 5, 8)),
    al.Patch("L0", "k", tensors(2, 2, 5, 8, dtype=torch.float16), keys=3),
    al.Patch("L0", "pattern", tensors(1, 4, 5, 5, dtype=torch.float64), keys=3, queries=4),
    al.Steer("L0", "v", tensors(2, 8), 0.7),
    al.PatchStream([0, 3], values=tensors(1, 5, 32)),
    al.SteerStream(3, stream="mlp", vectors=tensors(32), factor=-2.0, queries=slice(2, None)),
]


def same(one: Any, two: Any) -> bool:
    """Equal, tensors bit for bit; lists and tuples of positions mean the same."""
    if isinstance(one, Mapping):
        return list(one) == list(two) and all(same(one[name], two[name]) for name in one)
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, list | tuple):
        return list(one) == list(two)
    return one == two


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_an_edit_comes_back(edit: Edit) -> None:
    text = al.edits_to_json([edit])
    (found,) = al.edits_from_json(text, functions={"even": even})
    assert type(found) is type(edit)
    assert str(found) == str(edit)
    for field in fields(edit):
        one, two = getattr(edit, field.name), getattr(found, field.name)
        if field.name not in ("heads", "layers"):
            assert same(one, two), field.name
    assert al.edits_to_json([found]) == text


def test_edits_come_back_in_their_order_and_do_the_same() -> None:
    model = ARCHITECTURES["llama"].build()
    lens = Lens(model, example=ARCHITECTURES["llama"].inputs(model))
    ids = torch.arange(20, 32)[None]
    theirs = lens.run(ids + 12, keep=("k", "residual"))
    edits = [
        al.Patch("L1H0", "k", theirs.k, keys=slice(2, 5)),
        al.Scale([(0, 1), "L1H2"], 0.5),
        al.Mean("L0H1", lens.mean_z(ids), queries=even),
        al.PatchStream([1], values=theirs.residual, queries=[0, -1]),
    ]
    found = al.edits_from_json(al.edits_to_json(edits), functions={"even": even})
    for edit, back in zip(edits, found, strict=True):
        assert edit.sites(lens.anatomy) == back.sites(lens.anatomy)
        if isinstance(edit, HeadEdit) and isinstance(back, HeadEdit):
            assert edit.moved(lens.anatomy) == back.moved(lens.anatomy)
    with torch.no_grad():
        with lens.edit(*edits):
            one = model(input_ids=ids).logits
        with lens.edit(*found):
            two = model(input_ids=ids).logits
    assert torch.equal(one, two)


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), max_size=6),
    factor=st.floats(allow_nan=False),
    places=st.none() | st.integers(-50, 50) | st.lists(st.integers(-50, 50), max_size=4),
)
def test_numbers_come_back_exactly(bits: list[int], factor: float, places: Any) -> None:
    """Every float32 there is, NaN with its payload and both zeros included; no number at all."""
    raw = struct.pack(f"<{len(bits)}I", *bits)
    vector = torch.frombuffer(bytearray(raw), dtype=torch.float32) if raw else torch.empty(0)
    edit = al.Steer("L0", "q", {"L0": vector}, factor, queries=places)
    (found,) = al.edits_from_json(al.edits_to_json([edit]))
    assert isinstance(found, al.Steer)
    assert found.vectors["L0"].numpy().tobytes() == raw
    assert found.factor == factor
    assert same(found.queries, places)


def test_functions_are_names_and_nothing_is_run() -> None:
    text = al.edits_to_json([al.Zero("L0", queries=even)])
    assert json.loads(text)[0]["queries"] == {"function": "even"}
    with pytest.raises(InputError, match=r"are the function 'even': give it as functions="):
        al.edits_from_json(text)
    (found,) = al.edits_from_json(text, functions={"even": len})  # type: ignore[dict-item]
    assert found.queries is len
    for function in (lambda ids: ids > 3, partial(even)):
        with pytest.raises(InputError, match="a function without a name"):
            al.edits_to_json([al.Zero("L0", queries=function)])


def test_what_json_cannot_hold_is_refused() -> None:
    @dataclass(frozen=True)
    class Mine(al.Zero):
        pass

    with pytest.raises(InputError, match="Mine is no edit of attnlens"):
        al.edits_to_json([Mine("L0")])
    Mine.__name__ = "Zero"
    with pytest.raises(InputError, match="Zero is no edit of attnlens"):
        al.edits_to_json([Mine("L0")])
    with pytest.raises(InputError, match="no tensors of complex64"):
        al.edits_to_json([al.Mean("L0", {"L0": torch.ones(2, 2, dtype=torch.complex64)})])


@pytest.mark.filterwarnings("error")
def test_tensors_come_back_to_be_written_to_whatever_they_were() -> None:
    wide = torch.arange(12.0).view(3, 4).requires_grad_()
    text = al.edits_to_json([al.Mean("L0", {"L0": wide.T})])
    assert "phase" not in text
    (found,) = al.edits_from_json(text)
    assert isinstance(found, al.Mean)
    assert torch.equal(found.means["L0"], wide.T)
    found.means["L0"].add_(1)


TENSOR = {"dtype": "float32", "shape": [1], "data": "AACAPw=="}


@pytest.mark.parametrize(
    ("read", "says"),
    [
        ("[{", "no JSON of edits"),
        ("[" * 100_000, "no JSON of edits"),
        ('{"edit": "Zero"}', "a list of objects"),
        ("[3]", "An edit in JSON is an object"),
        ([{"edit": "Zap", "heads": "L0"}], "no edit 'Zap' in attnlens; there is Zero, Scale"),
        ([{"edit": ["Zero"], "heads": "L0"}], r"no edit \['Zero'\]"),
        ([{"heads": "L0"}], "no edit None"),
        ([{"edit": "Zero"}], "Zero in the JSON is damaged: .*heads"),
        ([{"edit": "Zero", "heads": 5}], "5 stands where a name belongs"),
        ([{"edit": "Zero", "heads": "L0", "head": 1}], "Zero has no head"),
        ([{"edit": "Zero", "heads": "L0", "phase": "answer"}], "no phase 'answer'"),
        ([{"edit": "Zero", "heads": "L0", "queries": "last"}], "Zero in the JSON is damaged"),
        ([{"edit": "Zero", "heads": "L0", "queries": [1.5]}], "Zero in the JSON is damaged"),
        ([{"edit": "Zero", "heads": "L0", "queries": {"slice": [1, 2]}}], "a slice has a start"),
        ([{"edit": "Zero", "heads": "L0", "queries": {"slice": 3}}], "is damaged"),
        ([{"edit": "Zero", "heads": "L0", "queries": {"function": ["a"]}}], "is damaged"),
        ([{"edit": "Scale", "heads": "L0", "factor": "2"}], "'2' stands where a number belongs"),
        ([{"edit": "Scale", "heads": "L0", "factor": True}], "True stands where a number belongs"),
        ([{"edit": "Mean", "heads": "L0", "means": [1]}], "Mean in the JSON is damaged"),
        ([{"edit": "Mean", "heads": "L0", "means": {"L0": 1}}], "Mean in the JSON is damaged"),
        ([{"edit": "Patch", "heads": "L0", "kind": "w", "values": {}}], "There is no 'w'"),
    ],
)
def test_damage_is_told(read: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        al.edits_from_json(read if isinstance(read, str) else json.dumps(read))


@pytest.mark.parametrize(
    "damage",
    [
        {"dtype": "float33"},
        {"dtype": 3},
        {"shape": [2]},
        {"shape": [-1]},
        {"shape": [-1, -1]},
        {"shape": [2], "data": ""},
        {"data": "AACA*Pw=="},
        {"shape": "1"},
        {"data": "AACAPw"},
        {"data": "AACA*w=="},
        {"data": "AACAP5=="[:-4]},
        {"data": 7},
        {"data": None},
    ],
)
def test_a_damaged_tensor_is_told(damage: dict[str, Any]) -> None:
    edit = {"edit": "Mean", "heads": "L0", "means": {"L0": TENSOR | damage}}
    with pytest.raises(InputError, match="Mean in the JSON is damaged"):
        al.edits_from_json(json.dumps([edit]))


@given(st.data())
def test_a_torn_file_is_an_error_of_attnlens_or_the_same_edits(data: st.DataObject) -> None:
    """A character lost or changed anywhere."""
    text = al.edits_to_json(EDITS[:3] + EDITS[12:14])
    place = data.draw(st.integers(0, len(text) - 1))
    with_other = data.draw(st.sampled_from(["", '"', "}", "0", "[", "x", "null"]))
    try:
        found = al.edits_from_json(text[:place] + with_other + text[place + 1 :])
    except AttnlensError:
        return
    assert all(isinstance(edit, Edit) for edit in found)
