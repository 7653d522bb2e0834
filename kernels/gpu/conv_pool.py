"""A convolution, max-pooling and LeakyReLU in one pass over a map: Triton kernels and launchers.

Letters: B images, C channels in, OUT channels out, TAPS = (KH, KW) of the weight, windows of POOL x POOL pixels, GRID =
(rows, columns) of windows in an image, M windows of all images, MARGIN as in conv.py. The patch of a window has all
pixels that its convolution reads, SIDES = (POOL + KH - 1, POOL + KW - 1) of each channel, K in all.

A convolution with few channels is too narrow a matrix product, so all positions of a window are computed in one. The
patches, [M, K], are multiplied by the weight moved to every position, [K, POOL·POOL·OUT], which has zeros between. A
program has the sums of all positions of a window in registers, so that only maxima leave it. Backward to the weight
multiplies the same patches by the gradients, each at the position of its maximum, and adds up what belongs to the same
weight. Backward to the map writes them at these positions first, with zeros between, and is a convolution of that with
windows of its own.

A zero times an infinity would give NaN to positions whose taps do not reach that pixel. A program that sees sums that
are not finite therefore computes its windows again, tap by tap.

Arithmetic: sums are in fp32; the operands of the matrix products have the dtype of the map, COMPUTE.
"""

import math

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip, windows
from insvp_fast.kernels.gpu.windows import any_odd, corners, patches
from torch import Tensor


@triton.jit
def _larger(a, i, b, j):
    """The larger of two values and its index: as PyTorch, the first among equals, and the last NaN if there is one."""
    nan_a, nan_b = a != a, b != b
    second = (nan_b & (~nan_a | (j > i))) | (~nan_a & ((b > a) | ((b == a) & (j < i))))
    return tl.where(second, b, a), tl.where(second, j, i)


@triton.jit
def _cells(image, m, o, OUT: tl.constexpr, GRID: tl.constexpr):
    """Places of the channels o of windows m in maps [B, OUT, rows, columns], [BLOCK_M, BLOCK_O]."""
    N: tl.constexpr = GRID[0] * GRID[1]
    return (image * (OUT * N) + m % N)[:, None] + o[None, :] * N


@triton.jit(do_not_specialize=["M"])
def _conv_pool_fwd_kernel(
    x_ptr, moved_ptr, weight_ptr, bias_ptr, y_ptr, index_ptr, M, slope,
    C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, GRID: tl.constexpr, POOL: tl.constexpr, TAPS: tl.constexpr,
    MARGIN: tl.constexpr, X: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """``moved_ptr`` has the weight at every position, [K, POOL·POOL, BLOCK_O]; GROUP positions are computed at once."""
    SIDES: tl.constexpr = (POOL + TAPS[0] - 1, POOL + TAPS[1] - 1)
    K: tl.constexpr = C * SIDES[0] * SIDES[1]
    N: tl.constexpr = POOL * POOL * BLOCK_O
    m, o, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_O), tl.arange(0, GROUP * BLOCK_O)
    exists = m < M
    image, row, column = corners(m, GRID, POOL, MARGIN, OFFSET)

    top = tl.full((BLOCK_M, BLOCK_O), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK_M, BLOCK_O), tl.int32)
    for first in range(0, POOL * POOL, GROUP):
        sums = tl.zeros((BLOCK_M, GROUP * BLOCK_O), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = patches(x_ptr, image, row, column, exists, k, C, MAP, SIDES, X, COMPUTE)
            moved = first * BLOCK_O + n
            w = tl.load(moved_ptr + k[:, None] * N + moved[None, :], (k < K)[:, None] & (moved < N)[None, :], 0.0)
            sums = tl.dot(x, w.to(COMPUTE), sums, input_precision=PRECISION)
        values = tl.reshape(sums, (BLOCK_M, GROUP, BLOCK_O))
        position = (first + tl.arange(0, GROUP))[None, :, None]
        # so that the maximum shows what is not finite
        values = tl.where(values - values == 0, values, float("inf"))
        values = tl.where(position < POOL * POOL, values, float("-inf"))
        value = tl.max(values, 1)
        place = tl.min(tl.where(values == value[:, None, :], position, POOL * POOL), 1)
        top, at = _larger(top, at, value, place)

    bias = tl.load(bias_ptr + o, o < OUT, 0.0).to(tl.float32)[None, :]
    top += bias
    again = any_odd(top, BLOCK_M * BLOCK_O)
    top, at = tl.where(again > 0, float("-inf"), top), tl.where(again > 0, 0, at)
    for position in range(again * POOL * POOL):
        value = tl.zeros((BLOCK_M, BLOCK_O), tl.float32) + bias
        for tap in range(C * TAPS[0] * TAPS[1]):
            r = row + (position // POOL + tap // TAPS[1] % TAPS[0])
            q = column + (position % POOL + tap % TAPS[1])
            inside = exists & (r >= 0) & (r < MAP[0]) & (q >= 0) & (q < MAP[1])
            place = image * X[0] + (tap // (TAPS[0] * TAPS[1]) * X[1] + r * X[2] + q * X[3])
            w = tl.load(weight_ptr + o * (C * TAPS[0] * TAPS[1]) + tap, o < OUT, 0.0).to(COMPUTE).to(tl.float32)
            value += tl.load(x_ptr + place, inside, 0.0).to(tl.float32)[:, None] * w[None, :]
        top, at = _larger(top, at, value, position)

    top = tl.where(top > 0, top, slope * top)
    written = exists[:, None] & (o < OUT)[None, :]
    place = _cells(image, m, o, OUT, GRID)
    tl.store(y_ptr + place, top.to(y_ptr.dtype.element_ty), written)
    tl.store(index_ptr + place, at.to(tl.uint8), written)


@triton.jit(do_not_specialize=["M"])
def _conv_pool_bwd_weight_kernel(
    grad_ptr, y_ptr, index_ptr, x_ptr, d_moved_ptr, d_bias_ptr, M, slope,
    C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, GRID: tl.constexpr, POOL: tl.constexpr, TAPS: tl.constexpr,
    MARGIN: tl.constexpr, X: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The gradient of the moved weight: sums of split s of S, over every S-th block of windows."""
    SIDES: tl.constexpr = (POOL + TAPS[0] - 1, POOL + TAPS[1] - 1)
    K: tl.constexpr = C * SIDES[0] * SIDES[1]
    N: tl.constexpr = POOL * POOL * BLOCK_O
    split, o = tl.program_id(2), tl.arange(0, BLOCK_O)
    k, n = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.program_id(1) * GROUP * BLOCK_O
    position = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[None, :, None]

    d_moved = tl.zeros((BLOCK_K, GROUP * BLOCK_O), tl.float32)
    d_bias = tl.zeros((BLOCK_O,), tl.float32)
    for m0 in range(split * BLOCK_M, M, tl.num_programs(2) * BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        exists = m < M
        image, row, column = corners(m, GRID, POOL, MARGIN, OFFSET)
        x = patches(x_ptr, image, row, column, exists, k, C, MAP, SIDES, X, COMPUTE)
        known = exists[:, None] & (o < OUT)[None, :]
        place = _cells(image, m, o, OUT, GRID)
        grad = tl.load(grad_ptr + place, known, 0.0).to(tl.float32)
        grad = tl.where(tl.load(y_ptr + place, known, 1.0).to(tl.float32) > 0, grad, slope * grad)
        at = tl.load(index_ptr + place, known, 0).to(tl.int32)
        spread = tl.where(at[:, None, :] == position, grad[:, None, :], 0.0).to(COMPUTE)
        spread = tl.reshape(spread, (BLOCK_M, GROUP * BLOCK_O))
        d_moved = tl.dot(tl.trans(x), spread, d_moved, input_precision=PRECISION)
        d_bias += tl.sum(grad, 0)

    columns = n + tl.arange(0, GROUP * BLOCK_O)
    place = (split * K + k[:, None]).to(tl.int64) * N + columns[None, :]
    tl.store(d_moved_ptr + place, d_moved, (k < K)[:, None] & (columns < N)[None, :])
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(d_bias_ptr + split * OUT + o, d_bias, o < OUT)


@triton.jit
def _conv_pool_spread_kernel(
    grad_ptr, y_ptr, index_ptr, spread_ptr, slope, GRID: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of one channel of a convolution's result: that of the pooled one at the maxima, 0 beside them."""
    WIDTH: tl.constexpr = GRID[1] * POOL
    PIXELS: tl.constexpr = GRID[0] * POOL * WIDTH
    channel = (tl.program_id(0) // tl.cdiv(PIXELS, BLOCK)).to(tl.int64)
    pixel = tl.program_id(0) % tl.cdiv(PIXELS, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    row, column, exists = pixel // WIDTH, pixel % WIDTH, pixel < PIXELS
    cell = channel * (GRID[0] * GRID[1]) + (row // POOL * GRID[1] + column // POOL)
    at = tl.load(index_ptr + cell, exists, 0).to(tl.int32)
    chosen = exists & (at == row % POOL * POOL + column % POOL)
    grad = tl.load(grad_ptr + cell, chosen, 0.0).to(tl.float32)
    grad = tl.where(tl.load(y_ptr + cell, chosen, 1.0).to(tl.float32) > 0, grad, slope * grad)
    tl.store(spread_ptr + channel * PIXELS + pixel, grad.to(spread_ptr.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["M"])
def _conv_pool_bwd_map_kernel(
    spread_ptr, moved_ptr, weight_ptr, d_x_ptr, M,
    C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, CENTER: tl.constexpr, TAPS: tl.constexpr,
    MARGIN: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    SIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A convolution with the weight turned around; here windows, of SIDE x SIDE, divide the gradient of the map.

    ``moved_ptr`` has the turned weight at every position, [K, SIDE·SIDE, BLOCK_O]; ``weight_ptr`` has the weight.
    """
    TILES: tl.constexpr = ((MAP[0] + SIDE - 1) // SIDE, (MAP[1] + SIDE - 1) // SIDE)
    SIDES: tl.constexpr = (SIDE + TAPS[0] - 1, SIDE + TAPS[1] - 1)
    K: tl.constexpr = OUT * SIDES[0] * SIDES[1]
    N: tl.constexpr = SIDE * SIDE * BLOCK_O
    X: tl.constexpr = (OUT * CENTER[0] * CENTER[1], CENTER[0] * CENTER[1], CENTER[1], 1)
    m, c, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_O), tl.arange(0, GROUP * BLOCK_O)
    exists = m < M
    image, row, column = corners(m, TILES, SIDE, MARGIN, OFFSET)
    first = tl.program_id(1) * GROUP
    tl.static_assert(SIDE * SIDE % GROUP == 0)

    sums = tl.zeros((BLOCK_M, GROUP * BLOCK_O), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        grads = patches(spread_ptr, image, row, column, exists, k, OUT, CENTER, SIDES, X, COMPUTE)
        w = tl.load(moved_ptr + k[:, None] * N + (first * BLOCK_O + n)[None, :], (k < K)[:, None], 0.0)
        sums = tl.dot(grads, w.to(COMPUTE), sums, input_precision=PRECISION)

    position, channel = first + n // BLOCK_O, n % BLOCK_O
    known = exists[:, None] & (channel < C)[None, :]
    rows = (row + MARGIN[0])[:, None] + (position // SIDE)[None, :]
    columns = (column + MARGIN[1])[:, None] + (position % SIDE)[None, :]
    place = (image * (C * MAP[0] * MAP[1]))[:, None] + (channel[None, :] * (MAP[0] * MAP[1]) + rows * MAP[1] + columns)
    total = tl.sum(tl.reshape(sums, (BLOCK_M, GROUP, BLOCK_O)), 1)
    again = any_odd(total, BLOCK_M * BLOCK_O)
    known &= (rows < MAP[0] * (1 - again)) & (columns < MAP[1])
    tl.store(d_x_ptr + place, sums.to(d_x_ptr.dtype.element_ty), known)

    for one in range(first, first + again * GROUP):
        value = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        down, right = row + one // SIDE, column + one % SIDE
        for tap in range(OUT * TAPS[0] * TAPS[1]):
            o, i, j = tap // (TAPS[0] * TAPS[1]), tap // TAPS[1] % TAPS[0], tap % TAPS[1]
            r, q = down + i, right + j
            inside = exists & (r >= 0) & (r < CENTER[0]) & (q >= 0) & (q < CENTER[1])
            grad = tl.load(spread_ptr + image * X[0] + (o * X[1] + r * X[2] + q), inside, 0.0).to(COMPUTE)
            turned = (o * C + c) * (TAPS[0] * TAPS[1]) + (TAPS[0] - 1 - i) * TAPS[1] + TAPS[1] - 1 - j
            w = tl.load(weight_ptr + turned, c < C, 0.0).to(COMPUTE).to(tl.float32)
            value += grad.to(tl.float32)[:, None] * w[None, :]
        down, right = down + MARGIN[0], right + MARGIN[1]
        pixel = (image * (C * MAP[0] * MAP[1]) + (down * MAP[1] + right))[:, None] + c[None, :] * (MAP[0] * MAP[1])
        inside = (exists & (down < MAP[0]) & (right < MAP[1]))[:, None] & (c < C)[None, :]
        tl.store(d_x_ptr + pixel, value.to(d_x_ptr.dtype.element_ty), inside)


def launch_config(kind: str, OUT: int, pool: int, dtype: torch.dtype, arch: int | str) -> dict[str, int]:
    """Tiles, warps and stages of kernel ``kind`` ("fwd", "bwd_weight" or "bwd_map"); ``dtype`` is that of COMPUTE.

    Of "bwd_map", OUT and pool are the channels and the side of windows of the result, as for the others.
    """
    BLOCK_O, positions = max(16, triton.next_power_of_2(OUT)), pool * pool
    wide = dtype == torch.float32
    columns = 128 if wide or arch in (80, 100) else 256
    if kind == "fwd" and BLOCK_O > 16:
        columns = 64 if arch == "gfx942" else 128
    groups = [2**i for i in range(9) if 2**i <= max(1, min(columns // BLOCK_O, triton.next_power_of_2(positions)))]
    # loading a tile of patches costs about as much as multiplying it with 128 columns
    GROUP = min(reversed(groups), key=lambda group: triton.cdiv(positions, group) * (group * BLOCK_O + 128))
    if kind == "fwd" and not wide:
        BLOCK_M, BLOCK_K, num_warps, num_stages = 64, 32, 8 if arch == 80 else 4, 2
    elif kind == "bwd_map" and not wide:
        BLOCK_M, BLOCK_K, num_warps, num_stages = 64, 32 if arch == 100 else 64, 8, 2 if arch == "gfx942" else 3
    else:  # loads ahead were slower on an H200: there are too few registers for them
        BLOCK_M, BLOCK_K, num_warps, num_stages = (64, 32, 8, 1) if wide else (32, 64, 4, 1)
        if kind == "fwd" and arch == 80:
            BLOCK_K = 16
    if arch == "gfx942":  # 64 lanes in a warp
        num_warps //= 2
    tiles = {"GROUP": GROUP, "BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K, "BLOCK_O": BLOCK_O}
    return tiles | chip.launch_options(num_warps, num_stages)


def covers(weight: Tensor, pool: int) -> bool:
    """Whether the kernels compute with a weight [OUT, C, KH, KW], in windows of ``pool`` x ``pool``.

    They do where at most three of four products are by zeros, and the moved weights are small.
    """
    (OUT, C, KH, KW), patch = weight.shape, (pool + weight.shape[2] - 1) * (pool + weight.shape[3] - 1)
    few = 0 < OUT <= 64 and 0 < C <= 64 and weight.numel() > 0 and patch <= 4 * KH * KW
    return few and _moved_numel(weight, pool) <= 2**24 and _moved_numel(weight.transpose(0, 1), SIDE) <= 2**24


def _moved_numel(weight: Tensor, pool: int) -> int:
    return math.prod(_sizes(weight, pool, max(16, triton.next_power_of_2(len(weight)))))


def _at_every_position(moved: Tensor, weight: Tensor, pool: int) -> Tensor:
    """Where each weight stands in [..., K, POOL·POOL, BLOCK_O], as a view [..., POOL, POOL, OUT, C, KH, KW] of it."""
    (OUT, C, KH, KW), BLOCK_O, ahead = weight.shape, moved.shape[-1], moved.ndim - 3
    column = pool * pool * BLOCK_O  # from one value of a patch to the next
    row, channel = (pool + KW - 1) * column, (pool + KH - 1) * (pool + KW - 1) * column
    strides = row + pool * BLOCK_O, column + BLOCK_O, 1, channel, row, column
    return moved.as_strided((*moved.shape[:ahead], pool, pool, OUT, C, KH, KW), (*moved.stride()[:ahead], *strides))


SIDE = 4  # of the windows that divide the gradient of a map
SPREAD_LAUNCH = {"BLOCK": 1024, **chip.launch_options(4, 1)}  # of the kernel that writes the gradients of maxima


def _sizes(weight: Tensor, pool: int, BLOCK_O: int) -> tuple[int, int, int]:
    _, C, KH, KW = weight.shape
    return C * (pool + KH - 1) * (pool + KW - 1), pool * pool, BLOCK_O


def conv_pool_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, margin: tuple[int, int], height: int, width: int, pool: int,
    negative_slope: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The central ``height`` x ``width`` of a convolution, max-pooled in windows of ``pool`` x ``pool``, and LeakyReLU.

    Args:
        x, weight, bias, margin, dtype: as in ``conv.conv_fwd``; the weight is rounded to the dtype of x.

    Returns:
        [B, OUT, height / pool, width / pool] in ``dtype``, and in uint8 the index of each maximum in its window.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
    """
    arch, (OUT, C, *taps), x = chip.require_arch("conv_pool", x), weight.shape, windows.near(x)
    grid = height // pool, width // pool
    y = torch.empty(len(x), OUT, *grid, dtype=dtype, device=x.device)
    index = torch.empty_like(y, dtype=torch.uint8)
    config = launch_config("fwd", OUT, pool, x.dtype, arch)
    if M := len(x) * grid[0] * grid[1]:
        weight, bias = weight.contiguous(), bias.contiguous()
        moved = torch.zeros(_sizes(weight, pool, config["BLOCK_O"]), dtype=x.dtype, device=x.device)
        _at_every_position(moved, weight, pool).copy_(weight)
        with torch.cuda.device_of(x):
            _conv_pool_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
                x, moved, weight, bias, y, index, M, negative_slope, C=C, OUT=OUT, MAP=tuple(x.shape[2:]), GRID=grid,
                POOL=pool, TAPS=tuple(taps), MARGIN=margin, X=x.stride(), OFFSET=windows.offset_dtype(x, y),
                **chip.operands(x.dtype, arch), **config,
            )  # fmt: skip
    return y, index


def conv_pool_bwd_weight(
    grad: Tensor, x: Tensor, y: Tensor, index: Tensor, weight: Tensor, margin: tuple[int, int], pool: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of ``conv_pool_fwd`` by weight and bias, deterministic, without atomics.

    Args:
        grad, y, index: [B, OUT, height / pool, width / pool]; the rest as in forward.

    Returns:
        d_weight and d_bias in the dtype of the weight.

    Raises:
        RuntimeError: as forward does.
    """
    arch, (OUT, C, *taps), grid = chip.require_arch("conv_pool", grad), weight.shape, tuple(grad.shape[2:])
    config = launch_config("bwd_weight", OUT, pool, x.dtype, arch)
    K, positions, BLOCK_O = _sizes(weight, pool, config["BLOCK_O"])
    blocks = triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(positions, config["GROUP"])
    M = len(x) * grid[0] * grid[1]
    S = max(1, min(triton.cdiv(M, config["BLOCK_M"]), 2 * chip.MULTIPROCESSORS[arch] // (blocks[0] * blocks[1])))
    if not M:
        return torch.zeros_like(weight), weight.new_zeros(OUT)
    x = windows.near(x)
    d_moved = torch.empty(S, K, positions, BLOCK_O, dtype=torch.float32, device=x.device)
    d_bias = torch.empty(S, OUT, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(grad):
        _conv_pool_bwd_weight_kernel[(*blocks, S)](
            grad.contiguous(), y.contiguous(), index.contiguous(), x, d_moved, d_bias, M, negative_slope,
            C=C, OUT=OUT, MAP=tuple(x.shape[2:]), GRID=grid, POOL=pool, TAPS=tuple(taps), MARGIN=margin,
            X=x.stride(), OFFSET=windows.offset_dtype(x, y), **chip.operands(x.dtype, arch), **config,
        )  # fmt: skip
    d_weight = _at_every_position(d_moved.sum(0), weight, pool).sum((0, 1))
    return d_weight.to(weight.dtype), d_bias.sum(0).to(weight.dtype)


def conv_pool_bwd_map(
    grad: Tensor, x: Tensor, y: Tensor, index: Tensor, weight: Tensor, margin: tuple[int, int], pool: int,
    negative_slope: float,
) -> Tensor:  # fmt: skip
    """The gradient of ``conv_pool_fwd`` by x, contiguous, in its dtype; arguments and errors as the other one's."""
    arch, (OUT, C, *taps), weight = chip.require_arch("conv_pool", grad), weight.shape, weight.contiguous()
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config, grid = launch_config("bwd_map", C, SIDE, x.dtype, arch), tuple(grad.shape[2:])
    center = grid[0] * pool, grid[1] * pool
    if M := len(x) * triton.cdiv(x.shape[2], SIDE) * triton.cdiv(x.shape[3], SIDE):
        turned = weight.transpose(0, 1).flip(2, 3)
        moved = torch.zeros(_sizes(turned, SIDE, config["BLOCK_O"]), dtype=x.dtype, device=x.device)
        _at_every_position(moved, turned, SIDE).copy_(turned)
        spread = torch.empty(len(x), OUT, *center, dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(grad):
            _conv_pool_spread_kernel[(len(x) * OUT * triton.cdiv(center[0] * center[1], SPREAD_LAUNCH["BLOCK"]),)](
                grad.contiguous(), y.contiguous(), index.contiguous(), spread, negative_slope,
                GRID=grid, POOL=pool, **SPREAD_LAUNCH,
            )  # fmt: skip
            _conv_pool_bwd_map_kernel[(triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(SIDE**2, config["GROUP"]))](
                spread, moved, weight, d_x, M, C=C, OUT=OUT, MAP=tuple(x.shape[2:]), CENTER=center, TAPS=tuple(taps),
                MARGIN=(taps[0] - 1 - margin[0], taps[1] - 1 - margin[1]), SIDE=SIDE,
                OFFSET=windows.offset_dtype(d_x, spread), **chip.operands(x.dtype, arch), **config,
            )  # fmt: skip
    return d_x
