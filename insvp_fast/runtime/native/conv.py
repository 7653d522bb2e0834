"""Convolutions with few channels in C++, forward and backward, with and without max-pooling behind them.

Letters: ``B`` images, ``C`` and ``O`` channels, ``H, W`` size of the map that is read, ``kh, kw`` of the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import (
    TYPE_CODES,
    address,
    array,
    call,
    f32,
    i32,
    i64,
    launch,
    pointer,
    ptr,
    require,
    require_dtype,
)

__all__ = ["conv_bwd", "conv_fwd", "conv_pool_bwd", "conv_pool_fwd"]

_FWD = [*array, ptr, ptr, *array, ptr, *[i64] * 11, f32, i32]
_BWD = [*array * 3, ptr, *array, ptr, ptr, *[i64] * 10, i32]
_POOL_BWD = [*array * 2, ptr, *array, ptr, *array, ptr, ptr, *[i64] * 10, f32]


def _sizes(x: Tensor, weight: Tensor, height: int, width: int, *, dilation: int = 1, pool: int = 1) -> tuple[int, ...]:
    """B, C, H, W, O, height, width, kh, kw."""
    if not 1 <= pool <= 16:
        raise ValueError(f"windows of {pool}x{pool}: expected 1 to 16")
    if x.ndim != 4 or weight.ndim != 4 or 0 in weight.shape:
        shapes = tuple(x.shape), tuple(weight.shape)
        raise ValueError(f"x and weight have shapes {shapes}: expected [B, C, H, W] and [O, C, kh, kw], not empty")
    H, W = x.shape[-2:]
    if not (0 < height <= H and 0 < width <= W) or height % pool or width % pool:
        raise ValueError(f"{height}x{width} is no center of {H}x{W} in windows of {pool}x{pool}")
    if not 0 < dilation * max(weight.shape[2:]) < 2**24:
        raise ValueError(f"dilation is {dilation}: expected 1 or more, with which a kernel spans < 2**24 pixels")
    return *x.shape, weight.shape[0], height, width, *weight.shape[2:]


def _weight_shape(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes[4], sizes[1], *sizes[7:]


def _operand_code(operands: torch.dtype | None) -> int:
    """Of the dtype to which factors may be rounded; one that no kernel has is none."""
    return TYPE_CODES.get(operands or torch.float32, TYPE_CODES[torch.float32])


def _run_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dilation: int,
    height: int,
    width: int,
    pool: int,
    negative_slope: float,
    dtype: torch.dtype,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    sizes = _sizes(x, weight, height, width, dilation=dilation, pool=pool)
    require_dtype("y", dtype)
    x = require("x", x, sizes[:4], *TYPE_CODES)
    weight = require("weight", weight, _weight_shape(sizes), torch.float32)
    bias = require("bias", bias, sizes[4:5], torch.float32)
    y = buffers.empty((sizes[0], sizes[4], height // pool, width // pool), dtype)
    indices = buffers.empty(y.shape, torch.uint8) if pool > 1 else None
    launch(
        "conv_fwd",
        _FWD,
        *(*pointer(x), address(weight), address(bias), *pointer(y), address(indices)),
        *(*sizes, dilation, pool, negative_slope, _operand_code(operands)),
    )
    return y, indices


def conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dilation: int,
    height: int,
    width: int,
    relu: bool,
    dtype: torch.dtype,
    operands: torch.dtype | None = None,
) -> Tensor:
    """The central ``height`` x ``width`` of a "same" convolution, after ReLU if wanted.

    x [B, C, H, W] in float32 or bfloat16, weight [O, C, kh, kw] and bias [O] in float32; returns [B, O, height, width]
    in ``dtype``. With ``operands`` in bfloat16, x and weight may be rounded to it where they are multiplied. Errors:
    see ``native``.
    """
    return _run_fwd(x, weight, bias, dilation, height, width, 1, 0.0 if relu else 1.0, dtype, operands)[0]


def conv_pool_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    pool: int,
    negative_slope: float,
    dtype: torch.dtype,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``conv_fwd``, then max-pooling in windows of ``pool`` x ``pool``, then LeakyReLU, and the indices of the maxima.

    Returns y [B, O, height / pool, width / pool] in ``dtype`` and, in uint8, the index of each maximum in its window,
    row by row: the first of equal ones, the last NaN. The arguments are those of ``conv_fwd``; ``pool`` is at most 16.
    """
    y, indices = _run_fwd(x, weight, bias, 1, height, width, pool, negative_slope, dtype, operands)
    return y, torch.zeros(y.shape, dtype=torch.uint8, device="cpu") if indices is None else indices


def _empty_grads(x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    d_x = buffers.empty(x.shape if need_x else (0,), x.dtype)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    return d_x, d_weight, torch.empty(len(weight), dtype=torch.float32, device="cpu")


def conv_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    dilation: int,
    height: int,
    width: int,
    need_x: bool,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``conv_fwd`` for ``grad`` of its result: d_x, d_weight, d_bias.

    grad and y [B, O, height, width] in float32 or bfloat16, the rest as in ``conv_fwd``; y is the result where that
    ended in ReLU, else None. d_x has the dtype of x, and size 0 where not needed; the others are float32, and the same
    bits for every number of threads. The caller makes sure that grad, x and weight are finite: 0 times a number counts
    as 0. Errors: see ``native``.
    """
    sizes = _sizes(x, weight, height, width, dilation=dilation)
    grad = require("grad", grad, (sizes[0], sizes[4], height, width), *TYPE_CODES)
    x = require("x", x, sizes[:4], *TYPE_CODES)
    y = None if y is None else require("y", y, grad.shape, *TYPE_CODES)
    weight = require("weight", weight, _weight_shape(sizes), torch.float32)
    d_x, d_weight, d_bias = _empty_grads(x, weight, need_x)
    call(
        "conv_bwd",
        _BWD,
        *(*pointer(grad), *pointer(y), *pointer(x), weight.data_ptr(), *pointer(d_x)),
        *(d_weight.data_ptr(), d_bias.data_ptr(), *sizes, dilation, _operand_code(operands)),
    )
    return d_x, d_weight, d_bias


def conv_pool_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    pool: int,
    negative_slope: float,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``conv_pool_fwd`` for ``grad`` of its y: d_x, d_weight, d_bias.

    Dtypes are those of ``conv_bwd``, y and indices those of ``conv_pool_fwd``. Errors: see ``native``.
    """
    sizes = _sizes(x, weight, height, width, pool=pool)
    grad = require("grad", grad, (sizes[0], sizes[4], height // pool, width // pool), *TYPE_CODES)
    x = require("x", x, sizes[:4], *TYPE_CODES)
    y = require("y", y, grad.shape, *TYPE_CODES)
    indices = require("indices", indices, tuple(grad.shape), torch.uint8)
    if indices.numel() and int(indices.max()) >= pool**2:  # C++ would read and write elsewhere
        raise ValueError(f"an index of a maximum is {int(indices.max())}: expected less than {pool**2}")
    weight = require("weight", weight, _weight_shape(sizes), torch.float32)
    d_x, d_weight, d_bias = _empty_grads(x, weight, need_x)
    call(
        "conv_pool_bwd",
        _POOL_BWD,
        *(*pointer(grad), *pointer(y), indices.data_ptr(), *pointer(x), weight.data_ptr(), *pointer(d_x)),
        *(d_weight.data_ptr(), d_bias.data_ptr(), *sizes, pool, negative_slope),
    )
    return d_x, d_weight, d_bias
