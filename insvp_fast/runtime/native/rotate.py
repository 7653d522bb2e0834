"""rotate in C++: rotary position embedding of packed queries and keys, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import TYPE_CODES, address, array, i32, i64, launch, pointer, ptr, require

__all__ = ["rotate"]

_ROTATE = [*array * 2, *[i64] * 7, ptr, i64, i32, i32]


def rotate(x: Tensor, num_heads: int, rotation: Tensor, first: int, *, half: bool, forward: bool) -> Tensor:
    """``rotate_reference``, or ``rotate_bwd_reference``, of the module ``insvp_fast.ops.rotate``.

    x [B, S, 3·D] or [B, S, 2·D] in float32 or bfloat16, rotation [N, 2·d] or [num_heads, N, 2·d] in float32, d even.
    Computed in float32, rounded once. Errors: see ``native``.
    """
    N, d = rotation.shape[-2], rotation.shape[-1] // 2
    B, S, width = x.shape
    parts = width // (num_heads * d) - 1
    rotation = require("rotation", rotation, (*[num_heads] * (rotation.ndim - 2), N, 2 * d), torch.float32)
    x = require("x", x, (B, S, (parts + 1) * num_heads * d), *TYPE_CODES)
    if d % 2 or not 0 <= first <= first + N <= S:
        raise ValueError(f"first={first}, {N} rows and heads of width {d}: expected rows of {S} and an even width")
    y = buffers.empty(x.shape, x.dtype)
    if y.numel():
        sizes = B, S, first, N, parts, num_heads, d
        stride = 2 * d * N if rotation.ndim > 2 else 0
        launch("rotate", _ROTATE, *pointer(y), *pointer(x), *sizes, address(rotation), stride, half, forward)
    return y
