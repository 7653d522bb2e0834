"""Convolutions with few channels, of the center of a map: Triton kernels and launchers.

Letters: B images, C channels in, OUT channels out. A map has the size MAP = (H, W), of which the central CENTER is
convolved with TAPS = (KH, KW) taps, DILATION apart. MARGIN is the number of rows and columns by which the first tap of
the first pixel lies outside of the map; it is negative where that tap lies inside.

With few taps, forward and backward to the map, a program computes all channels of BLOCK pixels. Lanes run along the
rows, and every pixel that they load serves all OUT channels; that the taps load it again costs reads of the first cache
only. Backward to the weight is a matrix product over pixels, of which a program sums a fixed part; the parts are added
in order.

With many taps, a map is divided into windows of SIDE x SIDE pixels, of which a matrix product computes all positions at
once, as in conv_pool.py: the patches that they read, [M, K], by the weight moved to every position, [K, OUT·SIDE·SIDE],
which has zeros between. A row of a patch has WIDTH values, a multiple of 8 that begins SHIFT values early where that
aligns it, so that its values are loaded side by side. What has infinities or NaN is computed again, tap by tap.

Arithmetic: fp32, but for the operands of matrix products, which have the dtype COMPUTE: 16 bits if map or result have.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip, windows
from insvp_fast.kernels.gpu.windows import any_odd, corners, patches
from torch import Tensor

MAX_PRODUCTS = 1024  # C·OUT·KH·KW multiplications of a pixel, which are all unrolled
MAX_CHANNELS = 16  # whose sums are in registers
SIDE = 8  # of windows, where there are more


@triton.jit
def _conv_kernel(
    x_ptr, mask_ptr, weight_ptr, bias_ptr, y_ptr,
    C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, CENTER: tl.constexpr, TAPS: tl.constexpr,
    DILATION: tl.constexpr, MARGIN: tl.constexpr, X: tl.constexpr, WEIGHT: tl.constexpr, RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``mask_ptr``, with the strides of x, may be None: x counts only where the mask is above 0. So may the bias."""
    BLOCKS: tl.constexpr = (CENTER[0] * CENTER[1] + BLOCK - 1) // BLOCK
    KH: tl.constexpr = TAPS[0]
    KW: tl.constexpr = TAPS[1]
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    pixel = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    exists = pixel < CENTER[0] * CENTER[1]
    row, column = pixel // CENTER[1] - MARGIN[0], pixel % CENTER[1] - MARGIN[1]

    sums = ()
    for o in tl.static_range(OUT):
        first = tl.zeros((BLOCK,), tl.float32)
        if bias_ptr is not None:
            first += tl.load(bias_ptr + o).to(tl.float32)
        sums += (first,)  # type: ignore[assignment]  # a Triton tuple with an entry per unrolled iteration
    for c in tl.static_range(C):
        for i in tl.static_range(KH):
            for j in tl.static_range(KW):
                r, q = row + i * DILATION, column + j * DILATION
                inside = exists & (r >= 0) & (r < MAP[0]) & (q >= 0) & (q < MAP[1])
                place = image * X[0] + (c * X[1] + r * X[2] + q * X[3])
                x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
                if mask_ptr is not None:
                    x = tl.where(tl.load(mask_ptr + place, inside, 1.0).to(tl.float32) <= 0, 0.0, x)
                more = ()
                for o in tl.static_range(OUT):
                    w = tl.load(weight_ptr + (o * WEIGHT[0] + c * WEIGHT[1] + i * WEIGHT[2] + j * WEIGHT[3]))
                    more += (sums[o] + x * w.to(tl.float32),)  # type: ignore[assignment]
                sums = more
    for o in tl.static_range(OUT):
        y = tl.maximum(sums[o], 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else sums[o]
        place = (image * OUT + o) * (CENTER[0] * CENTER[1]) + pixel
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["M"])
def _conv_bwd_weight_kernel(
    grad_ptr, y_ptr, x_ptr, d_weight_ptr, d_bias_ptr, M,
    C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, CENTER: tl.constexpr, TAPS: tl.constexpr,
    DILATION: tl.constexpr, MARGIN: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums of split s of S, over every S-th block of the M pixels of all images; ``y_ptr`` may be None without ReLU."""
    split, N = tl.program_id(1), CENTER[0] * CENTER[1]
    tap, o = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_O)
    known, c = tap < C * TAPS[0] * TAPS[1], tap // (TAPS[0] * TAPS[1])
    down, right = tap // TAPS[1] % TAPS[0] * DILATION - MARGIN[0], tap % TAPS[1] * DILATION - MARGIN[1]

    d_weight = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    d_bias = tl.zeros((BLOCK_O,), tl.float32)
    for m0 in range(split * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        image = (m // N).to(tl.int64)
        # m % CENTER[1], not m % N % CENTER[1], of which the compiler believes that all are multiples of 4 if N is
        r, q = (m // CENTER[1] % CENTER[0])[None, :] + down[:, None], (m % CENTER[1])[None, :] + right[:, None]
        inside = known[:, None] & (m < M)[None, :] & (r >= 0) & (r < MAP[0]) & (q >= 0) & (q < MAP[1])
        x = tl.load(x_ptr + (image * X[0])[None, :] + (c[:, None] * X[1] + r * X[2] + q * X[3]), inside, 0.0)
        exists = (o < OUT)[:, None] & (m < M)[None, :]
        place = (image * (OUT * N) + m % N)[None, :] + o[:, None] * N
        grad = tl.load(grad_ptr + place, exists, 0.0)
        if y_ptr is not None:
            grad = tl.where(tl.load(y_ptr + place, exists, 1.0).to(tl.float32) <= 0, 0.0, grad)
        d_weight = tl.dot(x.to(COMPUTE), tl.trans(grad.to(COMPUTE)), d_weight, input_precision=PRECISION)
        d_bias += tl.sum(grad.to(tl.float32), 1)

    place = (split * OUT + o[None, :]) * (C * TAPS[0] * TAPS[1]) + tap[:, None]
    tl.store(d_weight_ptr + place, d_weight, known[:, None] & (o < OUT)[None, :])
    if tl.program_id(0) == 0:
        tl.store(d_bias_ptr + split * OUT + o, d_bias, o < OUT)


@triton.jit
def _tap_by_tap(x_ptr, weight_ptr, image, row, column, exists, o, C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr,
                TAPS: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr,
                BLOCK_M: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """The sums [BLOCK_M, GROUP] of channels o at the pixels whose first taps are at row and column."""
    sums = tl.zeros((BLOCK_M, GROUP), tl.float32)
    for tap in range(C * TAPS[0] * TAPS[1]):
        r, q = row + tap // TAPS[1] % TAPS[0], column + tap % TAPS[1]
        inside = exists & (r >= 0) & (r < MAP[0]) & (q >= 0) & (q < MAP[1])
        place = image * X[0] + (tap // (TAPS[0] * TAPS[1]) * X[1] + r * X[2] + q * X[3])
        x = tl.load(x_ptr + place, inside, 0.0).to(COMPUTE).to(tl.float32)
        w = tl.load(weight_ptr + o * (C * TAPS[0] * TAPS[1]) + tap, o < OUT, 0.0).to(COMPUTE).to(tl.float32)
        sums += x[:, None] * w[None, :]
    return sums


@triton.jit(do_not_specialize=["M"])
def _conv_windows_kernel(
    x_ptr, moved_ptr, weight_ptr, bias_ptr, y_ptr, M,
    C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, CENTER: tl.constexpr, TAPS: tl.constexpr,
    MARGIN: tl.constexpr, X: tl.constexpr, OFFSET: tl.constexpr, RELU: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """GROUP channels of BLOCK_M of the M windows; ``moved_ptr`` has the weight at every position, [K, OUT, SIDE·SIDE].

    The bias may be None.
    """
    GRID: tl.constexpr = (CENTER[0] // SIDE, CENTER[1] // SIDE)
    SIDES: tl.constexpr = (SIDE + TAPS[0] - 1, WIDTH)
    BEFORE: tl.constexpr = (MARGIN[0], MARGIN[1] + SHIFT)
    K: tl.constexpr = C * SIDES[0] * WIDTH
    N: tl.constexpr = OUT * SIDE * SIDE
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, GROUP * SIDE * SIDE)
    exists, first = m < M, tl.program_id(1) * GROUP
    image, row, column = corners(m, GRID, SIDE, BEFORE, OFFSET)
    moved = first * SIDE * SIDE + n

    sums = tl.zeros((BLOCK_M, GROUP * SIDE * SIDE), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = patches(x_ptr, image, row, column, exists, k, C, MAP, SIDES, X, COMPUTE)
        w = tl.load(moved_ptr + k[:, None] * N + moved[None, :], (k < K)[:, None] & (moved < N)[None, :], 0.0)
        sums = tl.dot(x, w.to(COMPUTE), sums, input_precision=PRECISION)
    again = any_odd(sums, BLOCK_M * GROUP * SIDE * SIDE)

    o = first + n // (SIDE * SIDE)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + o, o < OUT, 0.0).to(tl.float32)[None, :]
    y = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else sums
    row, column = row + BEFORE[0], column + BEFORE[1]
    start = image * (OUT * CENTER[0] * CENTER[1]) + (row * CENTER[1] + column)
    within = n // SIDE % SIDE * CENTER[1] + n % SIDE
    place = start[:, None] + (o * (CENTER[0] * CENTER[1]) + within)[None, :]
    known = exists[:, None] & (o < OUT * (1 - again))[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), known)

    own = first + tl.arange(0, GROUP)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + own, own < OUT, 0.0).to(tl.float32)[None, :]
    for position in range(again * SIDE * SIDE):
        down, right = position // SIDE, position % SIDE
        value = _tap_by_tap(x_ptr, weight_ptr, image, row - MARGIN[0] + down, column - MARGIN[1] + right, exists, own,
                            C, OUT, MAP, TAPS, X, COMPUTE, BLOCK_M, GROUP)  # fmt: skip
        if bias_ptr is not None:
            value += bias
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else value
        spot = (start + (down * CENTER[1] + right))[:, None] + own[None, :] * (CENTER[0] * CENTER[1])
        tl.store(y_ptr + spot, value.to(y_ptr.dtype.element_ty), exists[:, None] & (own < OUT)[None, :])


@triton.jit(do_not_specialize=["M"])
def _conv_windows_bwd_weight_kernel(
    grad_ptr, x_ptr, d_moved_ptr, M,
    C: tl.constexpr, OUT: tl.constexpr, MAP: tl.constexpr, CENTER: tl.constexpr, TAPS: tl.constexpr,
    MARGIN: tl.constexpr, X: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the moved weight: sums of split s of S, over every S-th block of windows."""
    GRID: tl.constexpr = (CENTER[0] // SIDE, CENTER[1] // SIDE)
    SIDES: tl.constexpr = (SIDE + TAPS[0] - 1, WIDTH)
    BEFORE: tl.constexpr = (MARGIN[0], MARGIN[1] + SHIFT)
    K: tl.constexpr = C * SIDES[0] * WIDTH
    N: tl.constexpr = OUT * SIDE * SIDE
    split, k = tl.program_id(2), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * (GROUP * SIDE * SIDE) + tl.arange(0, GROUP * SIDE * SIDE)
    o, r, q = n // (SIDE * SIDE), n // SIDE % SIDE, n % SIDE

    d_moved = tl.zeros((BLOCK_K, GROUP * SIDE * SIDE), tl.float32)
    for m0 in range(split * BLOCK_M, M, tl.num_programs(2) * BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        exists = m < M
        image, row, column = corners(m, GRID, SIDE, BEFORE, OFFSET)
        x = patches(x_ptr, image, row, column, exists, k, C, MAP, SIDES, X, COMPUTE)
        start = image * (OUT * CENTER[0] * CENTER[1]) + ((row + BEFORE[0]) * CENTER[1] + column + BEFORE[1])
        place = start[:, None] + (o * (CENTER[0] * CENTER[1]) + r * CENTER[1] + q)[None, :]
        grad = tl.load(grad_ptr + place, exists[:, None] & (o < OUT)[None, :], 0.0).to(COMPUTE)
        d_moved = tl.dot(tl.trans(x), grad, d_moved, input_precision=PRECISION)
    place = (split * K + k[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(d_moved_ptr + place, d_moved, (k < K)[:, None] & (n < N)[None, :])


MAP_LAUNCH = {"BLOCK": 512, **chip.launch_options(4, 1)}  # of the kernel of a map, with few taps


def weight_config(taps: int, OUT: int, arch: int | str) -> dict[str, int]:
    """Tiles, warps and stages of the kernel of a weight; ``taps``, which are few, are those of all channels."""
    BLOCK_T, BLOCK_O = min(64, max(16, triton.next_power_of_2(taps))), max(16, triton.next_power_of_2(OUT))
    tiles = {"BLOCK_T": BLOCK_T, "BLOCK_O": BLOCK_O, "BLOCK_M": 64}
    return tiles | chip.launch_options(1 if arch == "gfx942" else 2, 1)  # 64 lanes in a warp on AMD


def windows_config(kind: str, OUT: int, KW: int, margin: int, dtype: torch.dtype, arch: int | str) -> dict[str, int]:
    """Tiles, warps and stages of the kernels of windows, ``kind`` "map" or "weight"; ``dtype`` is that of COMPUTE."""
    wide = dtype == torch.float32
    columns = 256 if arch == 90 and not wide else 128
    groups = [group for group in (1, 2, 4) if group <= min(columns // SIDE**2, triton.next_power_of_2(OUT))]
    # loading a tile of patches costs about as much as multiplying it with 128 columns
    GROUP = min(reversed(groups), key=lambda group: triton.cdiv(OUT, group) * (group * SIDE**2 + 128))
    shift = -margin % 4  # the pixel from which a row of a patch begins at a multiple of 4
    tiles = {"SIDE": SIDE, "WIDTH": 8 * triton.cdiv(shift + SIDE + KW - 1, 8), "SHIFT": shift, "GROUP": GROUP}
    small = wide and arch == 80  # what fits into the shared memory of compute capability 8.6 and 8.9 too
    LONG = 64 if small else 128
    tiles |= {"BLOCK_M": LONG, "BLOCK_K": 32} if kind == "map" else {"BLOCK_M": 32, "BLOCK_K": LONG}
    return tiles | chip.launch_options(*((4, 2) if arch == "gfx942" else (8, 3 if small else 4)))


def covers(weight: Tensor, dilation: int, *sides: int) -> bool:
    """Whether the kernels compute with a weight [OUT, C, KH, KW], and maps and results with these sides."""
    return _has_few_taps(weight) or _has_windows(weight, dilation, *sides)


def _has_few_taps(weight: Tensor) -> bool:
    return 0 < weight.numel() <= MAX_PRODUCTS and max(weight.shape[:2]) <= MAX_CHANNELS


def _has_windows(weight: Tensor, dilation: int, *sides: int) -> bool:
    """Whether windows fit, at most three of four products are by zeros, and the moved weight is small."""
    OUT, C, KH, KW = weight.shape
    patch = (SIDE + KH - 1) * 8 * triton.cdiv(3 + SIDE + KW - 1, 8)
    few = dilation == 1 and weight.numel() > 0 and patch <= 4 * KH * KW and C * OUT * patch * SIDE**2 <= 2**24
    return few and all(side % SIDE == 0 for side in sides)


def _at_every_position(moved: Tensor, weight: Tensor, shift: int, width: int) -> Tensor:
    """Where each weight stands in [..., K, OUT, SIDE·SIDE], as a view [..., SIDE, SIDE, OUT, C, KH, KW] of it."""
    (OUT, C, KH, KW), ahead, column = weight.shape, moved.ndim - 3, len(weight) * SIDE**2
    row, channel = width * column, (SIDE + KH - 1) * width * column
    strides = *moved.stride()[:ahead], row + SIDE, column + 1, SIDE**2, channel, row, column
    sizes = *moved.shape[:ahead], SIDE, SIDE, OUT, C, KH, KW
    return moved.as_strided(sizes, strides, moved.storage_offset() + shift * column)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, dilation: int, margin: tuple[int, int], relu: bool,
    mask: Tensor | None = None,
) -> None:  # fmt: skip
    """Write to ``y``; the weight may have any strides. With few taps, x counts only where the mask is above 0."""
    (OUT, C, *taps), (*_, height, width), arch = weight.shape, y.shape, chip.require_arch("conv", x)
    sizes = {"C": C, "OUT": OUT, "MAP": tuple(x.shape[2:]), "CENTER": (height, width), "TAPS": tuple(taps)}
    sizes |= {"MARGIN": margin, "RELU": relu}
    if not y.numel():
        return
    if _has_few_taps(weight):
        with torch.cuda.device_of(x):
            _conv_kernel[(len(x) * triton.cdiv(height * width, MAP_LAUNCH["BLOCK"]),)](
                x, mask, weight, bias, y, DILATION=dilation, X=x.stride(), WEIGHT=weight.stride(), **sizes, **MAP_LAUNCH
            )
        return
    dtype, weight = _compute(x, y), weight.contiguous()
    config = windows_config("map", OUT, taps[1], margin[1], dtype, arch)
    K = C * (SIDE + taps[0] - 1) * config["WIDTH"]
    moved = torch.zeros(K, OUT, SIDE**2, dtype=dtype, device=x.device)
    _at_every_position(moved, weight, config["SHIFT"], config["WIDTH"]).copy_(weight)
    M = len(x) * (height // SIDE) * (width // SIDE)
    with torch.cuda.device_of(x):
        _conv_windows_kernel[(triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(OUT, config["GROUP"]))](
            x, moved, weight, bias, y, M, X=x.stride(), OFFSET=windows.offset_dtype(x, y), **sizes,
            **chip.operands(dtype, arch), **config,
        )  # fmt: skip


def _compute(x: Tensor, y: Tensor) -> torch.dtype:
    """The dtype of the operands of matrix products: 16 bits if one of map and result has, as under autocast."""
    narrow = {x.dtype, y.dtype} - {torch.float32}
    return narrow.pop() if len(narrow) == 1 else torch.float32


def conv_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, margin: tuple[int, int], height: int, width: int,
    relu: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The central ``height`` x ``width`` of a convolution with stride 1, after ReLU if wanted.

    Args:
        x: [B, C, H, W] in fp32, fp16 or bf16, with any strides.
        weight, bias: [OUT, C, KH, KW] and [OUT] in such dtypes.
        margin: rows and columns by which the first tap of the first pixel lies outside of the map.
        dtype: of the result.

    Returns:
        [B, OUT, height, width], contiguous.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
    """
    y = torch.empty(len(x), len(weight), height, width, dtype=dtype, device=x.device)
    _convolve(windows.near(x), weight, bias.contiguous(), y, dilation, margin, relu)
    return y


def conv_bwd(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, dilation: int, margin: tuple[int, int], need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``conv_fwd``, contiguous and deterministic, without atomics.

    Args:
        grad: [B, OUT, height, width]; the rest as in forward.
        y: the result, where it ended in ReLU, else None.

    Returns:
        d_x in the dtype of x, empty if not needed; d_weight and d_bias in that of the weight.

    Raises:
        RuntimeError: as forward does.
    """
    OUT, _, KH, KW = weight.shape
    x, grad, y = windows.near(x), grad.contiguous(), None if y is None else y.contiguous()
    d_x = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    few = _has_few_taps(weight)
    if y is not None and not few:
        grad, y = torch.ops.aten.threshold_backward(grad, y, 0), None
    if need_x:  # a convolution with the weight turned around
        turned = weight.transpose(0, 1).flip(2, 3)
        back = (KH - 1) * dilation - margin[0], (KW - 1) * dilation - margin[1]
        _convolve(grad, turned, None, d_x, dilation, back, False, mask=y)
    if not len(x):
        return d_x, torch.zeros_like(weight), weight.new_zeros(OUT)
    if few:
        d_weight, d_bias = _weight_sums(grad, x, y, weight, dilation, margin)
    else:
        d_weight, d_bias = _weight_sums_of_windows(grad, x, weight, margin)
    return d_x, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def _weight_sums(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, dilation: int, margin: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The gradients of a weight with few taps and of its bias, in fp32."""
    (OUT, C, *taps), (*_, height, width), arch = weight.shape, grad.shape, chip.require_arch("conv", grad)
    T, M, dtype = C * taps[0] * taps[1], len(x) * height * width, _compute(x, grad)
    config = weight_config(T, OUT, arch)
    blocks = triton.cdiv(T, config["BLOCK_T"])
    S = max(1, min(triton.cdiv(M, config["BLOCK_M"]), 4 * chip.MULTIPROCESSORS[arch] // blocks))
    partial = [torch.empty((S, *size), dtype=torch.float32, device=x.device) for size in (weight.shape, (OUT,))]
    with torch.cuda.device_of(grad):
        _conv_bwd_weight_kernel[(blocks, S)](
            grad, y, x, *partial, M, C=C, OUT=OUT, MAP=tuple(x.shape[2:]), CENTER=(height, width), TAPS=tuple(taps),
            DILATION=dilation, MARGIN=margin, X=x.stride(), **chip.operands(dtype, arch), **config,
        )  # fmt: skip
    return partial[0].sum(0), partial[1].sum(0)


def _weight_sums_of_windows(grad: Tensor, x: Tensor, weight: Tensor, margin: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The gradients of a weight with many taps and of its bias, in fp32."""
    (OUT, C, *taps), (*_, height, width), arch = weight.shape, grad.shape, chip.require_arch("conv", grad)
    dtype = _compute(x, grad)
    config = windows_config("weight", OUT, taps[1], margin[1], dtype, arch)
    K, M = C * (SIDE + taps[0] - 1) * config["WIDTH"], len(x) * (height // SIDE) * (width // SIDE)
    blocks = triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(OUT, config["GROUP"])
    S = max(1, min(triton.cdiv(M, config["BLOCK_M"]), 2 * chip.MULTIPROCESSORS[arch] // (blocks[0] * blocks[1])))
    d_moved = torch.empty(S, K, OUT, SIDE**2, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(grad):
        _conv_windows_bwd_weight_kernel[(*blocks, S)](
            grad, x, d_moved, M, C=C, OUT=OUT, MAP=tuple(x.shape[2:]), CENTER=(height, width), TAPS=tuple(taps),
            MARGIN=margin, X=x.stride(), OFFSET=windows.offset_dtype(x, grad), **chip.operands(dtype, arch), **config,
        )  # fmt: skip
    d_weight = _at_every_position(d_moved.sum(0), weight, config["SHIFT"], config["WIDTH"]).sum((0, 1))
    return d_weight, grad.sum((0, 2, 3), dtype=torch.float32)
