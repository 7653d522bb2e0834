"""The product with a weight that was packed once, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.native.library import address, call, function, i64, ptr, require, require_kind

__all__ = ["linear", "pack_linear"]

_PACK = [ptr, ptr, *[i64] * 4]
_LINEAR = [*[ptr] * 4, *[i64] * 3]


def _packed_size(out_features: int, in_features: int) -> int:
    return function("linear_packed_size", [i64] * 2, i64)(out_features, in_features)


def pack_linear(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float32 weight [D_out, D_in], of any strides, in the form that `linear` wants: a flat tensor.

    The form depends on the instruction set in use. Raises as `superpose_fwd`.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [D_out, D_in]")
    if dtype != torch.float32:
        raise RuntimeError
    weight = weight.float()
    require_kind("weight", weight, torch.float32)
    packed = torch.empty(_packed_size(*weight.shape), dtype=torch.float32, device="cpu")
    call("linear_pack", _PACK, packed.data_ptr(), weight.data_ptr(), *weight.shape, *weight.stride())
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`x @ weight.T + bias` in float32, for x [M, D_in] and the weight [out_features, D_in] that `pack_linear` packed.

    The same bits for every number of threads. Raises as `superpose_fwd`.
    """
    if x.ndim != 2:
        return linear(x.reshape(-1, x.shape[-1]), packed, bias, out_features).view(*x.shape[:-1], out_features)
    M, K = x.shape
    x = require("x", x, (M, K), torch.float32)
    packed = require("packed", packed, (_packed_size(out_features, K),), torch.float32)
    if bias is not None:
        bias = require("bias", bias, (out_features,), torch.float32)
    y = torch.empty((M, out_features), dtype=torch.float32, device="cpu")
    pointers = (x.data_ptr(), packed.data_ptr(), address(bias), y.data_ptr())
    call("linear", _LINEAR, *pointers, M, out_features, K)
    return y


def linear_gelu(x, packed, bias, n, *, keep=True):
    pre = linear(x, packed, bias, n)
    return pre, torch.nn.functional.gelu(pre)


def linear_gelu_bwd(grad, packed, pre):
    return torch.ops.aten.gelu_backward(linear(grad, packed, None, pre.shape[-1]), pre)
