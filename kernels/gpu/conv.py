"""Convolutions with few channels and taps, of the center of a map: Triton kernels and launchers.

Letters: B images, C channels in, OUT channels out. A map has the size MAP = (H, W), of which the central CENTER is
convolved with TAPS = (KH, KW) taps, DILATION apart. MARGIN is the number of rows and columns by which the first tap of
the first pixel lies outside of the map; it is negative where that tap lies inside.

Forward, and backward to the map, a program computes all channels of BLOCK pixels. Lanes run along the rows, and every
pixel that they load serves all OUT channels; that the taps load it again costs reads of the first cache only. Backward
to the weight is a matrix product over pixels, of which a program sums a fixed part; the parts are added in order.

Arithmetic: fp32, but for the operands of the matrix product, which have the dtype COMPUTE: 16 bits if map or gradient
have.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor

MAX_PRODUCTS = 1024  # C·OUT·KH·KW multiplications of a pixel, which are all unrolled
MAX_CHANNELS = 16  # whose sums are in registers


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
                    x = tl.where(tl.load(mask_ptr + place, inside, 1.0) <= 0, 0.0, x)
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
            grad = tl.where(tl.load(y_ptr + place, exists, 1.0) <= 0, 0.0, grad)
        d_weight = tl.dot(x.to(COMPUTE), tl.trans(grad.to(COMPUTE)), d_weight, input_precision=PRECISION)
        d_bias += tl.sum(grad.to(tl.float32), 1)

    place = (split * OUT + o[None, :]) * (C * TAPS[0] * TAPS[1]) + tap[:, None]
    tl.store(d_weight_ptr + place, d_weight, known[:, None] & (o < OUT)[None, :])
    if tl.program_id(0) == 0:
        tl.store(d_bias_ptr + split * OUT + o, d_bias, o < OUT)


def launch_config(kind: str, taps: int, OUT: int, arch: int | str) -> dict[str, int]:
    """Tiles, warps and stages of kernel ``kind`` ("map" or "weight"); ``taps`` are those of all channels."""
    if kind == "map":
        return {"BLOCK": 512, "num_warps": 4, "num_stages": 1}
    BLOCK_T, BLOCK_O = min(64, max(16, triton.next_power_of_2(taps))), max(16, triton.next_power_of_2(OUT))
    tiles = {"BLOCK_T": BLOCK_T, "BLOCK_O": BLOCK_O, "BLOCK_M": 64}
    return tiles | {"num_warps": 1 if arch == "gfx942" else 2, "num_stages": 1}  # 64 lanes in a warp on AMD


def covers(weight: Tensor) -> bool:
    """Whether the kernels compute with a weight [OUT, C, KH, KW] of this shape."""
    return 0 < weight.numel() <= MAX_PRODUCTS and max(weight.shape[:2]) <= MAX_CHANNELS


def _convolve(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor,
    dilation: int, margin: tuple[int, int], relu: bool,
) -> None:  # fmt: skip
    """Write to ``y``; the weight may have any strides."""
    (OUT, C, *taps), (*_, height, width), arch = weight.shape, y.shape, chip.require_arch("conv", x)
    config = launch_config("map", 0, OUT, arch)
    if y.numel():
        with torch.cuda.device_of(x):
            _conv_kernel[(len(x) * triton.cdiv(height * width, config["BLOCK"]),)](
                x, mask, weight, bias, y, C=C, OUT=OUT, MAP=tuple(x.shape[2:]), CENTER=(height, width),
                TAPS=tuple(taps), DILATION=dilation, MARGIN=margin, X=x.stride(), WEIGHT=weight.stride(), RELU=relu,
                **config,
            )  # fmt: skip


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
    _convolve(x, None, weight, bias.contiguous(), y, dilation, margin, relu)
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
    (OUT, C, KH, KW), (*_, height, width), arch = weight.shape, grad.shape, chip.require_arch("conv", grad)
    grad, y = grad.contiguous(), None if y is None else y.contiguous()
    d_x = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    if need_x:  # a convolution with the weight turned around
        turned = weight.transpose(0, 1).flip(2, 3)
        back = (KH - 1) * dilation - margin[0], (KW - 1) * dilation - margin[1]
        _convolve(grad, y, turned, None, d_x, dilation, back, False)
    taps, M, narrow = C * KH * KW, len(x) * height * width, {x.dtype, grad.dtype} - {torch.float32}
    dtype = narrow.pop() if len(narrow) == 1 else torch.float32  # 16 bits if one of them has, as under autocast
    config = launch_config("weight", taps, OUT, arch)
    blocks = triton.cdiv(taps, config["BLOCK_T"])
    S = max(1, min(triton.cdiv(M, config["BLOCK_M"]), 4 * chip.MULTIPROCESSORS[arch] // blocks))
    partial = [torch.empty((S, *size), dtype=torch.float32, device=x.device) for size in (weight.shape, (OUT,))]
    if M:
        with torch.cuda.device_of(grad):
            _conv_bwd_weight_kernel[(blocks, S)](
                grad, y, x, *partial, M, C=C, OUT=OUT, MAP=tuple(x.shape[2:]), CENTER=(height, width), TAPS=(KH, KW),
                DILATION=dilation, MARGIN=margin, X=x.stride(), **chip.operands(dtype, arch), **config,
            )  # fmt: skip
    d_weight, d_bias = (part.sum(0) if M else torch.zeros_like(part[0]) for part in partial)
    return d_x, d_weight.to(weight.dtype), d_bias.to(weight.dtype)
