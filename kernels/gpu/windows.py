"""What the kernels share that compute all positions of a window of pixels in one matrix product."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def any_odd(x, SIZE: tl.constexpr):
    """1 if x has an infinity or NaN, else 0. In one dimension: triton 3.6 fails to reduce two on sm_100.

    A mask takes it as a factor of a bound, since the interpreter of triton 3.9 refuses a scalar condition in masks.
    """
    return tl.max(tl.reshape((x - x != 0).to(tl.int32), (SIZE,)), 0)


@triton.jit
def corners(m, GRID: tl.constexpr, SIDE: tl.constexpr, MARGIN: tl.constexpr, OFFSET: tl.constexpr):
    """The images of windows of SIDE x SIDE, and row and column in the map where their patches begin."""
    row, column = m // GRID[1] % GRID[0] * SIDE - MARGIN[0], m % GRID[1] * SIDE - MARGIN[1]
    return (m // (GRID[0] * GRID[1])).to(OFFSET), row, column


@triton.jit
def patches(x_ptr, image, row, column, exists, k, C: tl.constexpr, MAP: tl.constexpr, SIDES: tl.constexpr,
            X: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """Values k = (channel, row, column) of the patches that begin at row and column, [BLOCK_M, BLOCK_K]."""
    c, r, q = k // (SIDES[0] * SIDES[1]), k // SIDES[1] % SIDES[0], k % SIDES[1]
    rows, columns = row[:, None] + r[None, :], column[:, None] + q[None, :]
    inside = exists[:, None] & (c < C)[None, :] & (rows >= 0) & (rows < MAP[0]) & (columns >= 0) & (columns < MAP[1])
    start = image * X[0] + (row * X[2] + column * X[3])
    return tl.load(x_ptr + start[:, None] + (c * X[1] + r * X[2] + q * X[3])[None, :], inside, 0.0).to(COMPUTE)


def near(x: Tensor) -> Tensor:
    """A map, copied if places within an image are beyond the reach of 32 bits: the kernels widen those of images."""
    return x if offset_dtype(x[:1]) is tl.int32 else x.contiguous()


def offset_dtype(*maps: Tensor) -> tl.dtype:
    """The dtype of places in maps, whatever their strides, and of places some rows outside of them."""
    spans = (sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) for x in maps)
    return tl.int32 if max(spans) < 2**31 - 2**24 else tl.int64
