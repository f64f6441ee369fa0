"""The Triton kernels compiled for GPUs that need not be here.

The interpreter takes what the compiler refuses. Compiling needs no GPU, and the machine code tells
whether a tile fits: a kernel that spills registers, or wants more shared memory than there is, is a
mistake in its tile.
"""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnlens.kernels import triton_columns, triton_pairs, triton_rows
from attnlens.kernels.triton_scores import Spans

KERNELS = {
    "row": triton_rows._row_kernel,
    "mass": triton_rows._mass_kernel,
    "column": triton_columns._column_kernel,
    "pair": triton_pairs._pair_kernel,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""A100 and H100."""
TUPLES = {
    "strides": (("i32",) * 3, ("i32",) * 3, ("i32",) * 2),
    "sizes": ("i32",) * 4,
    "factors": ("fp32",) * 2,
}
INTEGERS = ("near_stride", "value_stride", "limit_stride", "count")
INDICES = ("firsts", "stops", "nears", "limits", "largests")
PAIRS = ("prompts", "pair_rows", "pair_keys")


def signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, Any]:
    """The types that a launch would have."""
    pointers = dict.fromkeys(("query", "key"), f"*{dtype}")
    pointers |= dict.fromkeys(INDICES, "*i32") | dict.fromkeys(PAIRS, "*i64")
    found: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in constants:
            found[name] = "constexpr"
        elif name in TUPLES:
            found[name] = TUPLES[name]
        else:
            found[name] = "i32" if name in INTEGERS else pointers.get(name, "*fp32")
    return found


def alignment(kernel: Any, types: dict[str, Any]) -> dict[tuple[int, ...], Any]:
    """As a launch would find it: pointers and the strides of q and k divisible by 16."""
    sixteen = [["tt.divisibility", 16]]
    found: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(kernel.arg_names):
        if str(types[name]).startswith("*"):
            found[(place,)] = sixteen
        if name == "strides":
            found |= {(place, tensor, axis): sixteen for tensor in (0, 1) for axis in range(3)}
    return found


def check(name: str, dtype: str, width: int, arch: int, folder: Path, **constants: Any) -> None:
    """Compile a kernel with its default tile; it fits and spills nothing."""
    kernel = KERNELS[name]
    empty = torch.empty(1, 1, 1, width, dtype=DTYPES[dtype])
    index = torch.empty(1, 1)
    spans = Spans(empty, empty, 1.0, None, index, index)
    tile = spans.tile()
    constants = dict(spans.widths) | {"UPCAST": False} | constants
    if name == "pair":
        constants["BLOCK"] = triton_pairs.PAIRS
    else:
        held, moving = ("S", "T") if name == "column" else ("T", "S")
        constants |= {f"BLOCK_{held}": tile.held, f"BLOCK_{moving}": tile.moving}
    types = signature(kernel, dtype, constants)
    found = triton.compile(
        ASTSource(kernel, types, constants, alignment(kernel, types)),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    assert found.metadata.shared <= SHARED_BYTES[arch]
    binary = folder / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    )
    assert "STACK:0" in usage.stdout, usage.stdout


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles(name: str, tmp_path: Path) -> None:
    check(name, "bf16", 128, 90, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_width_and_dtype_compiles(name: str, arch: int, tmp_path: Path) -> None:
    for dtype in DTYPES:
        for width in (24, 64, 80, 128, 256, 512):
            check(name, dtype, width, arch, tmp_path)
    check(name, "bf16", 128, arch, tmp_path, CAP=True)


@pytest.mark.long
def test_row_kernel_without_what_nobody_asked_for(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("sinks", "nears", "entropies", "distances", "largests"))
    check("row", "bf16", 128, 90, tmp_path, **nothing)
