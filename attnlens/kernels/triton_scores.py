"""What the Triton kernels share: the scores of a tile of rows and keys, in base 2.

Every kernel here reads q and k tile by tile and writes sums alone. A row sees one span of keys,
`first[t] <= s < stop[t]`. That covers causal and two-sided attention, windows, chunks, packed
texts, cached decoding and padding on either side, and lets a kernel skip the tiles that nobody sees
and compare positions only in the tiles that a span ends in.

Scores are in units of ln 2, so that a weight is one exp2 (the GPU has no other exponential). All
arithmetic is float32 whatever the dtype of q and k; float32 inputs are multiplied in float32, not
TF32.
"""

# Triton's language is not typed: a kernel's parameters are pointers, numbers, tuples of them and,
# in capitals, what is known when it is compiled; its loops run over what Python cannot iterate.
# pyright: reportMissingParameterType=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))


class Tile(NamedTuple):
    """One step of a kernel, and how the GPU runs it."""

    held: int
    """Rows (or keys) that a program holds from its start to its end."""
    moving: int
    """Keys (or rows) that it meets at a step."""
    warps: int = 8
    stages: int = 2


@dataclass(frozen=True)
class Spans:
    """q and k of one call whose rows each see one span of keys."""

    query: Float[Tensor, "batch head row d_qk"]
    key: Float[Tensor, "batch group key d_qk"]
    scaling: float
    cap: float | None
    first: Int[Tensor, "#batch row"]
    """First key that a row sees."""
    stop: Int[Tensor, "#batch row"]
    """One past the last; at most `first` where a row sees none."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """batch, heads, rows, keys."""
        return (*self.query.shape[:3], self.key.shape[2])  # type: ignore[return-value]

    @property
    def factors(self) -> tuple[float, float]:
        """Scale and cap; from a product to a score in base 2: `scale x`, or `cap tanh(scale x)`."""
        if self.cap is None:
            return self.scaling / math.log(2), 0.0
        return self.scaling / self.cap, self.cap / math.log(2)

    @property
    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]:
        """Elements from one batch, head and row to the next: of q, of k; of `first` and `stop`."""
        ends = batch_stride(self.first), batch_stride(self.stop)
        return self.query.stride()[:3], self.key.stride()[:3], ends

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """heads, heads of a group, rows, keys."""
        _, heads, rows, keys = self.shape
        return heads, heads // self.key.shape[1], rows, keys

    @property
    def widths(self) -> dict[str, int | bool]:
        """The compile-time arguments that every kernel takes."""
        width = self.query.shape[-1]
        block = max(triton.next_power_of_2(width), 16)
        # Triton's interpreter (CPU tensors) multiplies the bits of bf16 as integers.
        upcast = self.query.device.type == "cpu"
        return {"CAP": self.cap is not None, "WIDTH": width, "BLOCK_D": block, "UPCAST": upcast}

    def tile(self) -> Tile:
        """A tile that fits a GPU's registers and shared memory at this head width.

        By the compiler's own count none of the kernels spills registers on compute capability 8.0
        or 9.0; no tile was timed.
        """
        width = self.query.shape[-1]
        if self.query.element_size() == 2:
            return Tile(128, 64, 8, 3) if width <= 128 else Tile(64, 64 if width <= 256 else 32, 4)
        return Tile(32, 32 if width <= 256 else 16)


def prepared(
    query: Float[Tensor, "batch head row d_qk"],
    key: Float[Tensor, "batch group key d_qk"],
    scaling: float,
    cap: float | None,
    first: Int[Tensor, "#batch row"],
    stop: Int[Tensor, "#batch row"],
) -> Spans:
    """The arguments in the layout that the kernels read: channels and rows next to each other."""
    if query.stride(-1) != 1:
        query = query.contiguous()
    if key.stride(-1) != 1:
        key = key.contiguous()
    return Spans(query, key, scaling, cap, first.int().contiguous(), stop.int().contiguous())


def batch_stride(values: Tensor) -> int:
    """The stride of the first axis; 0 where all prompts share one row of values."""
    return values.stride(0) if values.shape[0] > 1 else 0


def kernel(function: Any) -> Any:
    """triton.jit, for what is launched with a grid: a form of call that Python's types lack."""
    return triton.jit(function)


@triton.jit
def load_tile(base, index, stride, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The vectors at `index`, filled up with zeros to a power of two."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    place = base + index.to(tl.int64)[:, None] * stride + channel
    if BLOCK_D == WIDTH:
        return tl.load(place)
    else:
        return tl.load(place, mask=channel < WIDTH, other=0.0)


@triton.jit
def batch_and_head(heads):
    """Which prompt and head a program is of, and their place in `batch head ...`."""
    pair = tl.program_id(1).to(tl.int64)
    return pair // heads, pair % heads, pair


@triton.jit
def tile_scores(a, b, factors, CAP: tl.constexpr, UPCAST: tl.constexpr):
    """Scores in base 2 of each vector of a with each of b."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return scores_of(tl.dot(a, tl.trans(b), input_precision="ieee"), factors, CAP)


@triton.jit
def scores_of(products, factors, CAP: tl.constexpr):
    """Scores in base 2 from products of q and k."""
    x = products * factors[0]
    if CAP:
        # tanh: by its series near 0, where the quotient would cancel.
        square = x * x
        series = 62.0 / 2835 * square - 17.0 / 315
        series = series * square + 2.0 / 15
        series = series * square - 1.0 / 3
        near = x + x * square * series
        small = tl.exp2(-2.8853900817779268 * tl.abs(x))
        far = (1.0 - small) / (1.0 + small)
        far = tl.where(x < 0, -far, far)
        x = factors[1] * tl.where(square < 0.0625, near, far)
    return x


@triton.jit
def whole_tiles(begin, low, high, SIZE: tl.constexpr):
    """Of the tiles that start at `begin`, those inside [low, high): where they start and end."""
    start = begin + tl.cdiv(tl.maximum(low - begin, 0), SIZE) * SIZE
    return start, start + tl.maximum(high - start, 0) // SIZE * SIZE


@triton.jit
def stretch(part: tl.constexpr, begin, whole_from, whole_to, end):
    """The three stretches of [begin, end): before, inside and after the whole tiles."""
    if part == 0:
        return begin, tl.minimum(whole_from, end)
    elif part == 1:
        return whole_from, whole_to
    else:
        return whole_to, end
