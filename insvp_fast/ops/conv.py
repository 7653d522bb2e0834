"""Convolutions with few channels, of the center of a map: conv."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from insvp_fast.ops.autograd import apply, differentiates, first_order, only_needed
from insvp_fast.ops.registry import Implementation, Size, call, native_reason, register, require, triton_reason
from insvp_fast.runtime import native
from insvp_fast.runtime.dtypes import widened

__all__ = ["conv", "conv_bwd_reference", "conv_reference", "conv_triton_reason"]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dilation: int,
    height: int,
    width: int,
    relu: bool = False,
    *,
    dtype: torch.dtype | None = None,
    operands: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The central ``height`` x ``width`` of a "same" convolution with stride 1, after ReLU if wanted.

    Args:
        x: [B, C, H, W], in any floating dtype.
        weight, bias: [O, C, kh, kw] and [O].
        dilation: of the kernel, from 1 on.
        height, width: of the result, at most H and W.
        relu: whether to end in a ReLU.
        dtype: of the result; that of x if not given. Arithmetic is fp32 at least, but on GPUs the operands of matrix
            products have 16 bits if x or the result has. These compute the gradient of the weight, and all where the
            weight is large.
        operands: on CPUs, the dtype to which factors may be rounded where that is faster; None for none. With gradients
            those in front of the ReLU are not: it decides where gradients go.
        impl: "auto" lets the device decide; "reference", "native" or "triton" insists.

    Returns:
        [B, O, height, width]

    Raises:
        ValueError: for shapes or a dilation that do not fit, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    check_shapes(x, weight, bias, height, width, 1)
    if not 0 < dilation * max(weight.shape[2:]) < 2**24 or dilation != int(dilation):
        raise ValueError(
            f"dilation={dilation}: expected an integer from 1 on, with which a kernel spans < 2**24 pixels"
        )
    # rounding would decide on which side of the ReLU some sums are, and so where the gradient goes
    exact = relu and differentiates((x, weight, bias))
    rest = relu, dtype or x.dtype, None if exact else operands
    arguments = _Fwd(x, weight, bias, dilation, height, width, *rest)
    require("conv_fwd", impl, arguments)
    return cast(Tensor, apply(_Conv, *arguments, operands, impl))


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, pool: int) -> None:
    """Raise ValueError for operands that are not those of a convolution, or a center that is larger than the map."""
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1] or bias.shape != weight.shape[:1]:
        shapes = tuple(x.shape), tuple(weight.shape), tuple(bias.shape)
        raise ValueError(f"x, weight and bias have shapes {shapes}: expected [B, C, H, W], [O, C, kh, kw] and [O]")
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [O, C, kh, kw], each from 1 on")
    H, W = x.shape[-2:]
    if not (0 < height <= H and 0 < width <= W) or height % pool or width % pool:
        raise ValueError(f"a center of {height}x{width}: expected at most {H}x{W}, in windows of {pool}x{pool}")


def conv_reference(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [O, C, kh, kw]
    bias: Tensor,  # [O]
    dilation: int,
    height: Size,
    width: Size,
    relu: bool,
) -> Tensor:  # [B, O, height, width]
    """The formula of ``conv``."""
    y = F.conv2d(F.pad(x, same_margins(x, weight, dilation, height, width)), weight, bias, dilation=dilation)
    return y.relu() if relu else y


def conv_bwd_reference(
    grad: Tensor,  # [B, O, height, width], before the ReLU
    x: Tensor,
    weight: Tensor,
    dilation: int,
    height: Size,
    width: Size,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``conv_reference`` by x, weight and bias, written out."""
    margins = same_margins(x, weight, dilation, height, width)
    d_padded = F.conv_transpose2d(grad, weight, dilation=dilation)
    d_weight = conv2d_weight(F.pad(x, margins), weight.shape, grad, dilation=dilation)
    return F.pad(d_padded, [-margin for margin in margins]), d_weight, grad.sum((0, 2, 3))


def same_margins(x: Tensor, weight: Tensor, dilation: int, height: Size, width: Size) -> list[int]:
    """What "same" padding adds on the left, right, top and bottom of the center of a map, less what is cut off."""
    margins = []
    for side, size, kernel in zip(x.shape[:1:-1], (width, height), weight.shape[:1:-1], strict=True):
        reach = dilation * (kernel - 1)
        before = reach // 2 - (side - size) // 2
        margins += [before, size + reach - side - before]
    return margins


class _Fwd(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    dilation: int
    height: Size
    width: Size
    relu: bool
    dtype: torch.dtype
    operands: torch.dtype | None = None


class _Bwd(NamedTuple):
    grad: Tensor
    x: Tensor
    y: Tensor | None  # the result, where it ended in ReLU
    weight: Tensor
    dilation: int
    height: Size
    width: Size
    need_x: bool
    operands: torch.dtype | None = None


@first_order("conv", "conv_reference of the module insvp_fast.ops.conv")
class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        a, operands, impl = _Fwd(*arguments[:-2]), *arguments[-2:]
        y = call("conv_fwd", *a[:-1], impl, a.operands)
        ctx.save_for_backward(a.x, y if a.relu else None, a.weight)
        ctx.geometry, ctx.operands, ctx.impl = (a.dilation, a.height, a.width), operands, impl
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a = _Bwd._make((grad, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[0], ctx.operands))
        grads = call("conv_bwd", *a[:-1], ctx.impl, a.operands)
        return only_needed(ctx, grads)


def _fwd_reference(a: _Fwd) -> Tensor:
    wide = widened(a.x.dtype)
    x, weight, bias = (t.to(wide) for t in (a.x, a.weight, a.bias))
    return conv_reference(x, weight, bias, a.dilation, a.height, a.width, a.relu).to(a.dtype).contiguous()


def _bwd_reference(a: _Bwd) -> tuple[Tensor, Tensor, Tensor]:
    wide = widened(a.x.dtype)
    grad = a.grad.to(wide)
    if a.y is not None:
        grad = torch.ops.aten.threshold_backward(grad, a.y.to(wide), 0)
    grads = conv_bwd_reference(grad, a.x.to(wide), a.weight.to(wide), a.dilation, a.height, a.width)
    return narrow_grads(grads, a.x, a.weight, a.need_x)


def narrow_grads(
    grads: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, weight and bias, contiguous and in their dtypes; the first empty where it is not needed."""
    d_x, d_weight, d_bias = grads
    d_x = d_x.to(x.dtype).contiguous() if need_x else x.new_empty(0)
    return d_x, d_weight.to(weight.dtype).contiguous(), d_bias.to(weight.dtype)


def not_finite_reason(*tensors: Tensor) -> str | None:
    """Why native backward kernels must not run: to them 0 times a number is 0, which is left out or added.

    Behind max-pooling they leave out all positions but the maxima, and they fill up vectors with what lies beside.
    """
    # a sum that overflows costs time alone
    return None if all(bool(t.sum().isfinite()) for t in tensors) else "cannot differentiate by infinities and NaN"


def fwd_native_reason(a: Any) -> str | None:
    """Why native kernels cannot convolve the operands of a forward pass."""
    return native_reason(a.x.device, a.x.dtype, a.dtype, weights=(a.weight, a.bias))


def bwd_native_reason(a: Any) -> str | None:
    """The same of a backward pass."""
    reason = native_reason(a.x.device, a.grad.dtype, a.x.dtype, weights=(a.weight,))
    return reason or not_finite_reason(a.grad, a.x, a.weight)


def margin(x: Tensor, weight: Tensor, dilation: int, height: Size, width: Size) -> tuple[int, int]:
    """Rows and columns by which the first tap of the center's first pixel lies outside of the map."""
    left, _, top, _ = same_margins(x, weight, dilation, height, width)
    return top, left


def _fwd_triton(a: _Fwd) -> Tensor:
    from insvp_fast.kernels.gpu import conv as kernel

    first = margin(a.x, a.weight, a.dilation, a.height, a.width)
    return kernel.conv_fwd(a.x, a.weight, a.bias, a.dilation, first, a.height, a.width, a.relu, a.dtype)


def _bwd_triton(a: _Bwd) -> tuple[Tensor, Tensor, Tensor]:
    from insvp_fast.kernels.gpu import conv as kernel

    first = margin(a.x, a.weight, a.dilation, a.height, a.width)
    return kernel.conv_bwd(a.grad, a.x, a.y, a.weight, a.dilation, first, a.need_x)


def _fwd_triton_reason(a: _Fwd) -> str | None:
    return conv_triton_reason(a.x, a.weight, a.dilation, a.height, a.width, a.bias.dtype, a.dtype)


def _bwd_triton_reason(a: _Bwd) -> str | None:
    return conv_triton_reason(a.x, a.weight, a.dilation, a.height, a.width, a.grad.dtype)


def conv_triton_reason(
    x: Tensor, weight: Tensor, dilation: int, height: Size, width: Size, *dtypes: torch.dtype
) -> str | None:
    """Why the Triton kernels cannot convolve x."""
    if reason := triton_reason(x.device, x.dtype, weight.dtype, *dtypes):
        return reason
    from insvp_fast.kernels.gpu import conv as kernel

    what = f"a weight of shape {tuple(weight.shape)} and a map of {x.shape[2]}x{x.shape[3]} pixels"
    covered = kernel.covers(weight, dilation, *x.shape[2:], height, width)
    return None if covered else f"does not cover {what}"


def _fwd_fake(a: _Fwd) -> Tensor:
    return a.x.new_empty(a.x.shape[0], a.weight.shape[0], a.height, a.width, dtype=a.dtype)


def fake_grads(x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients by x, weight and bias."""
    d_x = x.new_empty(x.shape if need_x else 0)
    return d_x, weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


register(
    "conv_fwd",
    _Fwd,
    "Tensor",
    fake=_fwd_fake,
    reference=_fwd_reference,
    native=Implementation(lambda a: native.conv_fwd(*a), fwd_native_reason, recordable=True),
    triton=Implementation(_fwd_triton, _fwd_triton_reason),
)
register(
    "conv_bwd",
    _Bwd,
    "(Tensor, Tensor, Tensor)",
    fake=lambda a: fake_grads(a.x, a.weight, a.need_x),
    reference=_bwd_reference,
    native=Implementation(lambda a: native.conv_bwd(*a), bwd_native_reason),
    triton=Implementation(_bwd_triton, _bwd_triton_reason),
)
