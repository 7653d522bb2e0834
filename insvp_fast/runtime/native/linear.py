"""linear and mlp in C++: the product with a packed weight, alone or with an activation."""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import (
    TYPE_CODES,
    address,
    array,
    call,
    contiguous,
    function,
    i32,
    i64,
    launch,
    native_status,
    pointer,
    ptr,
    require,
    require_dtype,
    require_kind,
)

__all__ = ["linear", "linear_activation", "linear_activation_bwd", "pack_linear"]

_PACK = [*array * 2, *[i64] * 4]
_LINEAR = [*array * 2, ptr, *array * 2, i32, i32, *[i64] * 6]
_NONE, _ACTIVATE, _ACTIVATE_BWD = range(3)


def _packed_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight for operands in ``dtype``: bfloat16 where the instruction set multiplies it."""
    pairs = dtype == torch.bfloat16 and native_status().isa in ("avx512_bf16", "amx")
    return torch.bfloat16 if pairs else torch.float32


def _packed_size(dtype: torch.dtype, out_features: int, in_features: int) -> int:
    size: int = function("linear_packed_size", [i32, i64, i64], i64)(TYPE_CODES[dtype], out_features, in_features)
    return size


def pack_linear(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pack a weight [D_out, D_in] for products with operands in ``dtype``; returns a flat tensor.

    weight in float32 or bfloat16, of any strides. The layout depends on the instruction set in use. A result in
    bfloat16 multiplies bfloat16 operands, one in float32 those of both dtypes. Errors: see ``native``.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [D_out, D_in]")
    require_kind("weight", weight, *TYPE_CODES)
    require_dtype("operands", dtype)
    dtype = _packed_type(dtype)
    packed = torch.empty(_packed_size(dtype, *weight.shape), dtype=dtype, device="cpu")
    call("linear_pack", _PACK, *pointer(packed), *pointer(weight), *weight.shape, *weight.stride())
    return packed


def _product(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype | None,
    epilogue: int = _NONE,
    activation: int = 0,
    pre: Tensor | None = None,
) -> Tensor:
    if x.ndim not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}: expected [M, D_in] or [B, T, D_in]")
    require_kind("x", x, *TYPE_CODES)
    *rows, K = x.shape
    dtype = x.dtype if dtype is None else dtype
    require_dtype("the product", dtype)
    kinds = {torch.float32, _packed_type(x.dtype)}
    require_kind("packed", packed, *kinds)
    packed = require("packed", packed, (_packed_size(packed.dtype, out_features, K),), *kinds)
    if bias is not None:
        bias = require("bias", bias, (out_features,), torch.float32)
    if x.stride(-1) != 1:
        x = contiguous(x)
    batch_stride, row_stride = (0, *x.stride()[:-1])[-2:]
    y = buffers.empty((*rows, out_features), dtype)
    launch(
        "linear",
        _LINEAR,
        *(*pointer(x), *pointer(packed), address(bias), *pointer(y), *pointer(pre), epilogue, activation),
        *(y.numel() // max(out_features, 1), out_features, K, rows[-1], batch_stride, row_stride),
    )
    return y


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``x @ weight.T + bias`` in ``dtype``, that of x by default, for the weight that ``pack_linear`` packed.

    x [M, D_in] or [B, T, D_in] in float32 or bfloat16, of any strides, without a copy where the last one is 1; bias
    [out_features] in float32. Returns a contiguous tensor [..., out_features], summed in float32, the same bits for
    every number of threads. Errors: see ``native``.
    """
    return _product(x, packed, bias, out_features, dtype)


def linear_activation(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, activation: int = 0, *, keep: bool = True
) -> tuple[Tensor | None, Tensor]:
    """``pre = linear(x, ...)`` and its activation, both in the dtype of x.

    activation is the code of one: its place in ``activations.ACTIVATIONS``. ``pre`` is None unless it is to be kept for
    backward; the activation is computed before it is rounded. Errors: see ``native``.
    """
    pre = buffers.empty((*x.shape[:-1], out_features), x.dtype) if keep else None
    return pre, _product(x, packed, bias, out_features, None, _ACTIVATE, activation, pre)


def linear_activation_bwd(grad: Tensor, packed: Tensor, pre: Tensor, activation: int = 0) -> Tensor:
    """The gradient of an activation and the next product by ``pre``: ``linear(grad, packed)`` times its derivative.

    grad [..., D_out] of the results of the next product, packed its transposed weight, pre [..., D_in] in float32 or
    bfloat16, activation as in ``linear_activation``. The result has grad's dtype. Errors: see ``native``.
    """
    pre = require("pre", pre, (*grad.shape[:-1], *pre.shape[-1:]), *TYPE_CODES)
    return _product(grad, packed, None, pre.shape[-1], None, _ACTIVATE_BWD, activation, pre)
