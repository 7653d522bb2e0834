"""A convolution of the center of a map, max-pooling and LeakyReLU in one pass: conv_pool."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.autograd import apply, differentiates, first_order, only_needed
from insvp_fast.ops.conv import (
    bwd_native_reason,
    check_shapes,
    conv_bwd_reference,
    conv_reference,
    fake_grads,
    fwd_native_reason,
    margin,
    narrow_grads,
)
from insvp_fast.ops.registry import Implementation, Size, call, register, require, triton_reason
from insvp_fast.runtime import native
from insvp_fast.runtime.dtypes import widened

__all__ = ["conv_pool", "conv_pool_bwd_reference", "conv_pool_reference", "conv_pool_triton_reason"]


def conv_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    pool: int,
    negative_slope: float = 0.01,
    *,
    dtype: torch.dtype | None = None,
    operands: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """``conv`` without dilation, then max-pooling in windows of ``pool`` x ``pool``, then LeakyReLU.

    Args:
        x, weight, bias, dtype, impl: as in ``conv``, but on GPUs the operands of all products have the dtype of x.
        height, width: of the center that is convolved, at most H and W.
        pool: at most 16, and a divisor of height and width.
        negative_slope: of the LeakyReLU; not negative. With 0 the native kernel makes 0 of -infinity, as ReLU does,
            where the formula makes NaN.
        operands: on CPUs, the dtype to which x and weight may be rounded where that is faster; None for none. With
            gradients they are not: a maximum decides where those go.

    Returns:
        [B, O, height / pool, width / pool]

    Raises:
        ValueError: for shapes that do not fit, a slope below 0, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if not 1 <= pool <= 16:  # the index of a maximum in its window is kept in 8 bits
        raise ValueError(f"windows of {pool}x{pool}: expected 1 to 16")
    if not negative_slope >= 0:  # else the sign of the result would not tell the sign of the maximum
        raise ValueError(f"negative_slope={negative_slope}: expected at least 0")
    check_shapes(x, weight, bias, height, width, pool)
    # rounding would decide which of two neighbors is the largest, and so where the gradient goes
    operands = None if differentiates((x, weight, bias)) else operands
    arguments = _Fwd(x, weight, bias, height, width, pool, float(negative_slope), dtype or x.dtype, operands)
    require("conv_pool_fwd", impl, arguments)
    return cast(Tensor, apply(_ConvPool, *arguments, impl))


def conv_pool_reference(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [O, C, kh, kw]
    bias: Tensor,  # [O]
    height: Size,
    width: Size,
    pool: Size,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:  # twice [B, O, height / pool, width / pool]
    """The formula of ``conv_pool``, and the index of each maximum in its window, row by row, in 8 bits."""
    y, index = F.max_pool2d(conv_reference(x, weight, bias, 1, height, width, False), pool, return_indices=True)
    index = index // width % pool * pool + index % width % pool
    return F.leaky_relu(y, negative_slope), index.to(torch.uint8)


def conv_pool_bwd_reference(
    grad: Tensor,  # [B, O, height / pool, width / pool]
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    weight: Tensor,
    height: Size,
    width: Size,
    pool: Size,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``conv_pool_reference`` by x, weight and bias, written out."""
    grad = torch.where(y > 0, grad, negative_slope * grad)
    places = torch.arange(pool * pool, device=x.device).view(pool, pool)
    # [B, O, rows, columns, pool, pool]; zero beside the maximum also where the gradient is not finite
    windows = torch.where(indices[..., None, None] == places, grad[..., None, None], 0)
    d_conv = windows.transpose(-3, -2).reshape(*grad.shape[:2], height, width)
    return conv_bwd_reference(d_conv, x, weight, 1, height, width)


class _Fwd(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    height: Size
    width: Size
    pool: Size
    negative_slope: float
    dtype: torch.dtype
    operands: torch.dtype | None = None


class _Bwd(NamedTuple):
    grad: Tensor
    x: Tensor
    y: Tensor
    indices: Tensor  # of the maxima in their windows
    weight: Tensor
    height: Size
    width: Size
    pool: Size
    negative_slope: float
    need_x: bool


@first_order("conv_pool", "conv_pool_reference of the module insvp_fast.ops.conv_pool")
class _ConvPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        a, impl = _Fwd(*arguments[:-1]), arguments[-1]
        y, indices = call("conv_pool_fwd", *a[:-1], impl, a.operands)
        ctx.save_for_backward(a.x, y, indices, a.weight)
        ctx.geometry, ctx.impl = (a.height, a.width, a.pool, a.negative_slope), impl
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a = _Bwd._make((grad, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[0]))
        grads = call("conv_pool_bwd", *a, ctx.impl)
        return only_needed(ctx, grads)


def _fwd_reference(a: _Fwd) -> tuple[Tensor, Tensor]:
    wide = widened(a.x.dtype)
    x, weight, bias = (t.to(wide) for t in (a.x, a.weight, a.bias))
    y, indices = conv_pool_reference(x, weight, bias, a.height, a.width, a.pool, a.negative_slope)
    return y.to(a.dtype).contiguous(), indices.contiguous()


def _bwd_reference(a: _Bwd) -> tuple[Tensor, Tensor, Tensor]:
    wide = widened(a.x.dtype)
    operands = a.grad.to(wide), a.x.to(wide), a.y, a.indices, a.weight.to(wide)
    grads = conv_pool_bwd_reference(*operands, a.height, a.width, a.pool, a.negative_slope)
    return narrow_grads(grads, a.x, a.weight, a.need_x)


def _fwd_triton(a: _Fwd) -> tuple[Tensor, Tensor]:
    from insvp_fast.kernels.gpu import conv_pool as kernel

    first = margin(a.x, a.weight, 1, a.height, a.width)
    return kernel.conv_pool_fwd(a.x, a.weight, a.bias, first, a.height, a.width, a.pool, a.negative_slope, a.dtype)


def _bwd_triton(a: _Bwd) -> tuple[Tensor, Tensor, Tensor]:
    from insvp_fast.kernels.gpu import conv_pool as kernel

    first = margin(a.x, a.weight, 1, a.height, a.width)
    operands = a.grad, a.x, a.y, a.indices, a.weight, first, a.pool, a.negative_slope
    d_x = kernel.conv_pool_bwd_map(*operands) if a.need_x else a.x.new_empty(0)
    return d_x, *kernel.conv_pool_bwd_weight(*operands)


def _fwd_triton_reason(a: _Fwd) -> str | None:
    return conv_pool_triton_reason(a.x, a.weight, a.pool, a.bias.dtype, a.dtype)


def _bwd_triton_reason(a: _Bwd) -> str | None:
    return conv_pool_triton_reason(a.x, a.weight, a.pool, a.grad.dtype, a.y.dtype)


def conv_pool_triton_reason(x: Tensor, weight: Tensor, pool: Size, *dtypes: torch.dtype) -> str | None:
    """Why the Triton kernels cannot convolve and pool x."""
    if reason := triton_reason(x.device, x.dtype, weight.dtype, *dtypes):
        return reason
    from insvp_fast.kernels.gpu import conv_pool as kernel

    what = f"a weight of shape {tuple(weight.shape)} and windows of {pool}x{pool}"
    return None if kernel.covers(weight, pool) else f"does not cover {what}"


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor]:
    shape = a.x.shape[0], a.weight.shape[0], a.height // a.pool, a.width // a.pool
    return a.x.new_empty(shape, dtype=a.dtype), a.x.new_empty(shape, dtype=torch.uint8)


register(
    "conv_pool_fwd",
    _Fwd,
    "(Tensor, Tensor)",
    fake=_fwd_fake,
    reference=_fwd_reference,
    native=Implementation(lambda a: native.conv_pool_fwd(*a), fwd_native_reason, recordable=True),
    triton=Implementation(_fwd_triton, _fwd_triton_reason),
)
register(
    "conv_pool_bwd",
    _Bwd,
    "(Tensor, Tensor, Tensor)",
    fake=lambda a: fake_grads(a.x, a.weight, a.need_x),
    reference=_bwd_reference,
    native=Implementation(lambda a: native.conv_pool_bwd(*a), bwd_native_reason),
    triton=Implementation(_bwd_triton, _bwd_triton_reason),
)
