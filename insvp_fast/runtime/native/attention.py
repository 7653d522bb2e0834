"""attention in C++, forward and backward.

Letters: ``B`` images, ``S`` tokens of which the first ``T`` ask, ``D`` the width of all heads together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import TYPE_CODES, address, call, f32, i32, i64, pointer, ptr, require

__all__ = ["attention_bwd", "attention_fwd"]

_FWD = [ptr, i32, ptr, ptr, *[i64] * 5, f32]
_BWD = [ptr, ptr, i32, ptr, ptr, *[i64] * 5, f32]


def _sizes(qkv: Tensor, num_heads: int, num_queries: int) -> tuple[int, int, int, int, int]:
    """B, S, T, the number of heads, the width of one."""
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: expected [B, S, 3*D] with D in {num_heads} equal heads")
    B, S, D3 = qkv.shape
    if not 0 <= num_queries <= S:
        raise ValueError(f"num_queries is {num_queries}: expected 0 to {S}, the number of tokens")
    return B, S, num_queries, num_heads, D3 // (3 * num_heads)


def _num_keys(num_keys: Tensor | None, B: int, S: int, T: int) -> Tensor | None:
    """``num_keys``, after a check: other values would let C++ read and write anywhere."""
    if num_keys is None:
        return None
    num_keys = require("num_keys", num_keys, (B,), torch.int64)
    if B and not max(T, 1) <= int(num_keys.min()) <= int(num_keys.max()) <= S:
        raise ValueError(f"num_keys is {num_keys.tolist()}: expected {max(T, 1)} to {S}, queries to tokens")
    return num_keys


def attention_fwd(
    qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None = None
) -> Tensor:
    """Softmax attention of the first ``num_queries`` tokens to all, from the packed product.

    qkv [B, S, 3*D] in float32 or bfloat16. Returns [B, T, D] in its dtype; sums and the softmax are float32. The same
    bits for every number of threads. With num_keys [B], int64, image b has the bits of ``qkv[b, :num_keys[b]]`` alone.
    Errors: see ``native``.
    """
    sizes = _sizes(qkv, num_heads, num_queries)
    num_keys = _num_keys(num_keys, *sizes[:3])
    qkv = require("qkv", qkv, tuple(qkv.shape), *TYPE_CODES)
    out = buffers.empty((qkv.shape[0], num_queries, qkv.shape[2] // 3), qkv.dtype)
    call("attention_fwd", _FWD, *pointer(qkv), out.data_ptr(), address(num_keys), *sizes, scale)
    return out


def attention_bwd(
    grad: Tensor, qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None = None
) -> Tensor:
    """The gradient of ``attention_fwd`` for ``grad`` [B, T, D] of its result, in qkv's dtype as all here: [B, S, 3*D].

    Zero for the queries of tokens that do not ask, and behind the keys. The rest as in ``attention_fwd``.
    """
    sizes = _sizes(qkv, num_heads, num_queries)
    num_keys = _num_keys(num_keys, *sizes[:3])
    qkv = require("qkv", qkv, tuple(qkv.shape), *TYPE_CODES)
    grad = require("grad", grad, (qkv.shape[0], num_queries, qkv.shape[2] // 3), qkv.dtype)
    d_qkv = buffers.empty_like(qkv)
    call("attention_bwd", _BWD, grad.data_ptr(), *pointer(qkv), d_qkv.data_ptr(), address(num_keys), *sizes, scale)
    return d_qkv
