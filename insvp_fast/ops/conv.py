"""Convolutions with few channels, of the centre of a map: conv, and conv_pool with max-pooling fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from insvp_fast import reference
from insvp_fast.ops.registry import LIBRARY, apply, define, first_order, implement, widened
from insvp_fast.runtime import native

__all__ = ["conv", "conv_pool"]

define(
    "conv_fwd(Tensor x, Tensor weight, Tensor bias, int dilation, SymInt height, SymInt width, bool relu, "
    "ScalarType dtype) -> Tensor"
)
define(
    "conv_bwd(Tensor grad, Tensor x, Tensor? y, Tensor weight, int dilation, SymInt height, SymInt width, "
    "bool need_x) -> (Tensor, Tensor, Tensor)"
)
define(
    "conv_pool_fwd(Tensor x, Tensor weight, Tensor bias, SymInt height, SymInt width, SymInt pool, "
    "float negative_slope, ScalarType dtype) -> (Tensor, Tensor)"
)
define(
    "conv_pool_bwd(Tensor grad, Tensor x, Tensor y, Tensor chosen, Tensor weight, SymInt height, SymInt width, "
    "SymInt pool, float negative_slope, bool need_x) -> (Tensor, Tensor, Tensor)"
)


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
) -> Tensor:
    """The central ``height`` x ``width`` of a "same" convolution with stride 1, after ReLU if wanted.

    Args:
        x: [B, C, H, W].
        weight, bias: [O, C, kh, kw] and [O].
        dtype: of the result; that of x if not given. Arithmetic is fp32.

    Returns:
        [B, O, height, width]

    Raises:
        ValueError: for shapes that do not fit.
    """
    _check(x, weight, bias, height, width, 1)
    return apply(_Conv, x, weight, bias, dilation, height, width, relu, dtype or x.dtype)


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
) -> Tensor:
    """``conv`` without dilation, then max-pooling in windows of ``pool`` x ``pool``, then LeakyReLU.

    Args:
        x, weight, bias, dtype: as in ``conv``.
        pool: at most 16, and a divisor of height and width.
        negative_slope: of the LeakyReLU; not negative.

    Returns:
        [B, O, height / pool, width / pool]

    Raises:
        ValueError: for shapes that do not fit, or a slope below 0.
    """
    if not 1 <= pool <= 16:  # the place of a maximum is kept in 8 bits
        raise ValueError(f"windows of {pool}x{pool}: expected 1 to 16")
    if not negative_slope >= 0:  # else the sign of the result would not tell the sign of the maximum
        raise ValueError(f"negative_slope={negative_slope}: expected at least 0")
    _check(x, weight, bias, height, width, pool)
    return apply(_ConvPool, x, weight, bias, height, width, pool, float(negative_slope), dtype or x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, pool: int) -> None:
    C, H, W = x.shape[-3:]
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != C or bias.shape != weight.shape[:1]:
        shapes = tuple(x.shape), tuple(weight.shape), tuple(bias.shape)
        raise ValueError(f"x, weight and bias have shapes {shapes}: expected [B, C, H, W], [O, C, kh, kw] and [O]")
    if not (0 < height <= H and 0 < width <= W) or height % pool or width % pool:
        raise ValueError(f"a centre of {height}x{width}: expected at most {H}x{W}, in windows of {pool}x{pool}")


@first_order("conv", "insvp_fast.reference.conv")
class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, dilation, height, width, relu, dtype):
        y = torch.ops.insvp_fast.conv_fwd(x, weight, bias, dilation, height, width, relu, dtype)
        ctx.save_for_backward(x, y if relu else None, weight)
        ctx.geometry = dilation, height, width
        return y

    @staticmethod
    def backward(ctx: Any, grad):
        grads = torch.ops.insvp_fast.conv_bwd(grad, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[0])
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 5


@first_order("conv_pool", "insvp_fast.reference.conv_pool")
class _ConvPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, height, width, pool, negative_slope, dtype):
        geometry = height, width, pool, negative_slope
        y, chosen = torch.ops.insvp_fast.conv_pool_fwd(x, weight, bias, *geometry, dtype)
        ctx.save_for_backward(x, y, chosen, weight)
        ctx.geometry = geometry
        return y

    @staticmethod
    def backward(ctx: Any, grad):
        grads = torch.ops.insvp_fast.conv_pool_bwd(grad, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad[0])
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 5


def _conv_fwd_reference(x, weight, bias, dilation, height, width, relu, dtype):
    wide = widened(x.dtype)
    x, weight, bias = (t.to(wide) for t in (x, weight, bias))
    return reference.conv(x, weight, bias, dilation, height, width, relu).to(dtype).contiguous()


def _conv_bwd_reference(grad, x, y, weight, dilation, height, width, need_x):
    wide = widened(x.dtype)
    g = grad.to(wide) if y is None else torch.ops.aten.threshold_backward(grad.to(wide), y.to(wide), 0)
    d_x, d_weight, d_bias = reference.conv_bwd(g, x.to(wide), weight.to(wide), dilation, height, width)
    d_x = d_x.to(x.dtype).contiguous() if need_x else x.new_empty(0)
    return d_x, d_weight.to(weight.dtype).contiguous(), d_bias.to(weight.dtype)


def _conv_pool_fwd_reference(x, weight, bias, height, width, pool, negative_slope, dtype):
    wide = widened(x.dtype)
    x, weight, bias = (t.to(wide) for t in (x, weight, bias))
    y, chosen = reference.conv_pool(x, weight, bias, height, width, pool, negative_slope)
    return y.to(dtype).contiguous(), chosen.contiguous()


def _conv_pool_bwd_reference(grad, x, y, chosen, weight, height, width, pool, negative_slope, need_x):
    wide = widened(x.dtype)
    operands = grad.to(wide), x.to(wide), y, chosen, weight.to(wide)
    d_x, d_weight, d_bias = reference.conv_pool_bwd(*operands, height, width, pool, negative_slope)
    d_x = d_x.to(x.dtype).contiguous() if need_x else x.new_empty(0)
    return d_x, d_weight.to(weight.dtype).contiguous(), d_bias.to(weight.dtype)


def _covered(*dtypes: torch.dtype, weights: tuple[Tensor, ...]) -> bool:
    return all(w.dtype == torch.float32 for w in weights) and native.available(*dtypes)


def _finite(*tensors: Tensor) -> bool:
    """Whether the backward kernels may run: what is 0 times a number to them, and so left out or added, has to be 0.

    Behind max-pooling they leave out all positions but the chosen ones, and they fill up vectors with what lies beside.
    """
    return all(bool(t.sum().isfinite()) for t in tensors)  # a sum that overflows costs time alone


def _conv_fwd_cpu(x, weight, bias, dilation, height, width, relu, dtype):
    run = native.conv_fwd if _covered(x.dtype, dtype, weights=(weight, bias)) else _conv_fwd_reference
    return run(x, weight, bias, dilation, height, width, relu, dtype)


def _conv_bwd_cpu(grad, x, y, weight, *rest):
    covered = _covered(grad.dtype, x.dtype, weights=(weight,)) and _finite(grad, x)
    run = native.conv_bwd if covered else _conv_bwd_reference
    return run(grad, x, y, weight, *rest)


def _conv_pool_fwd_cpu(x, weight, bias, height, width, pool, negative_slope, dtype):
    run = native.conv_pool_fwd if _covered(x.dtype, dtype, weights=(weight, bias)) else _conv_pool_fwd_reference
    return run(x, weight, bias, height, width, pool, negative_slope, dtype)


def _conv_pool_bwd_cpu(grad, x, y, chosen, weight, *rest):
    covered = _covered(grad.dtype, x.dtype, weights=(weight,)) and _finite(grad, x)
    run = native.conv_pool_bwd if covered else _conv_pool_bwd_reference
    return run(grad, x, y, chosen, weight, *rest)


@register_fake("insvp_fast::conv_fwd", lib=LIBRARY)
def _(x, weight, bias, dilation, height, width, relu, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], height, width, dtype=dtype)


@register_fake("insvp_fast::conv_bwd", lib=LIBRARY)
def _(grad, x, y, weight, dilation, height, width, need_x):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


@register_fake("insvp_fast::conv_pool_fwd", lib=LIBRARY)
def _(x, weight, bias, height, width, pool, negative_slope, dtype):
    shape = x.shape[0], weight.shape[0], height // pool, width // pool
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.uint8)


@register_fake("insvp_fast::conv_pool_bwd", lib=LIBRARY)
def _(grad, x, y, chosen, weight, height, width, pool, negative_slope, need_x):
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


implement("conv_fwd", _conv_fwd_reference, cpu=_conv_fwd_cpu)
implement("conv_bwd", _conv_bwd_reference, cpu=_conv_bwd_cpu)
implement("conv_pool_fwd", _conv_pool_fwd_reference, cpu=_conv_pool_fwd_cpu)
implement("conv_pool_bwd", _conv_pool_bwd_reference, cpu=_conv_pool_bwd_cpu)
