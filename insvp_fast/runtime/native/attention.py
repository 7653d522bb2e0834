"""attention and window_attention in C++, forward and backward: the former is the latter with one window, all tokens.

Letters: ``B`` images of ``T`` tokens and ``L`` prompts, ``n`` windows of ``w`` tokens, ``D`` the width of all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import (
    TYPE_CODES,
    address,
    checked_keys,
    f32,
    function,
    i32,
    i64,
    launch,
    pointer,
    ptr,
    require,
)

__all__ = ["Windows", "attention_bwd", "attention_fwd", "window_attention_bwd", "window_attention_fwd"]

_FWD = [ptr, i32, *[ptr] * 5, *[i64] * 6, f32]
_BWD = [ptr, ptr, i32, *[ptr] * 5, *[i64] * 6, f32]


class Windows(NamedTuple):
    """Which tokens attend to one another, and what their scores get: see ``insvp_fast.ops.window_attention``."""

    windows: Tensor  # int32 [n, w]
    bias: Tensor | None  # fp32 [heads, w, w]
    mask: Tensor | None  # fp32 [n, w, w]


def attention_fwd(
    qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None = None
) -> Tensor:
    """Softmax attention of the first ``num_queries`` tokens to all, from the packed product.

    qkv [B, S, 3*D] in float32 or bfloat16. Returns [B, T, D] in its dtype; sums and the softmax are float32. The same
    bits for every number of threads. With num_keys [B], int64, image b has the bits of ``qkv[b, :num_keys[b]]`` alone.
    Errors: see ``native``.
    """
    _check_queries(qkv, num_queries)
    return _fwd(qkv, num_heads, (1, num_queries), (None, None, None), scale, num_keys)


def attention_bwd(
    grad: Tensor, qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None = None
) -> Tensor:
    """The gradient of ``attention_fwd`` for ``grad`` [B, T, D] of its result, in qkv's dtype as all here: [B, S, 3*D].

    Zero for the queries of tokens that do not ask, and behind the keys. The rest as in ``attention_fwd``.
    """
    _check_queries(qkv, num_queries)
    return _bwd(grad, qkv, num_heads, (1, num_queries), (None, None, None), scale, num_keys)


def window_attention_fwd(qkv: Tensor, num_heads: int, windows: Windows, scale: float) -> Tensor:
    """Softmax attention of the tokens of each window to one another and to the last L rows, from the packed product.

    qkv [B, T+L, 3*D] in float32 or bfloat16, T = n*w. Returns [B, T, D]. The rest as in ``attention_fwd``.
    """
    windows = _checked(qkv, num_heads, windows)
    return _fwd(qkv, num_heads, tuple(windows.windows.shape), windows, scale)


def window_attention_bwd(grad: Tensor, qkv: Tensor, num_heads: int, windows: Windows, scale: float) -> Tensor:
    """The gradient of ``window_attention_fwd`` by qkv for ``grad`` [B, T, D] of its result; 0 for prompts' queries."""
    windows = _checked(qkv, num_heads, windows)
    return _bwd(grad, qkv, num_heads, tuple(windows.windows.shape), windows, scale)


def _fwd(
    qkv: Tensor,
    heads: int,
    shape: tuple[int, ...],
    windows: tuple[Tensor | None, ...],
    scale: float,
    num_keys: Tensor | None = None,
) -> Tensor:
    d = _head_width(qkv, heads)
    (B, S, _), (n, w) = qkv.shape, shape
    num_keys = checked_keys(num_keys, B, S, n * w)
    qkv = require("qkv", qkv, tuple(qkv.shape), *TYPE_CODES)
    out = buffers.empty((B, n * w, heads * d), qkv.dtype)
    sizes = B, n, w, S - n * w, heads, d
    pointers = *map(address, windows), address(num_keys), address(out)
    launch("attention_fwd", _FWD, *pointer(qkv), *pointers, *sizes, scale)
    return out


def _bwd(
    grad: Tensor,
    qkv: Tensor,
    heads: int,
    shape: tuple[int, ...],
    windows: tuple[Tensor | None, ...],
    scale: float,
    num_keys: Tensor | None = None,
) -> Tensor:
    d = _head_width(qkv, heads)
    (B, S, _), (n, w) = qkv.shape, shape
    num_keys = checked_keys(num_keys, B, S, n * w)
    qkv = require("qkv", qkv, tuple(qkv.shape), *TYPE_CODES)
    grad = require("grad", grad, (B, n * w, heads * d), qkv.dtype)
    d_qkv = buffers.empty_like(qkv)
    sizes = B, n, w, S - n * w, heads, d
    pointers = *map(address, windows), address(num_keys), address(d_qkv)
    launch("attention_bwd", _BWD, address(grad), *pointer(qkv), *pointers, *sizes, scale)
    return d_qkv


def _head_width(qkv: Tensor, num_heads: int) -> int:
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: expected [B, S, 3*D] with D in {num_heads} equal heads")
    return qkv.shape[2] // (3 * num_heads)


def _check_queries(qkv: Tensor, num_queries: int) -> None:
    if qkv.ndim == 3 and not 0 <= num_queries <= qkv.shape[1]:
        raise ValueError(f"num_queries is {num_queries}: expected 0 to {qkv.shape[1]}, the number of tokens")


def _checked(qkv: Tensor, num_heads: int, given: Windows) -> Windows:
    """The windows, contiguous, after a check that C++ will stay inside of the tensors and write all of the result."""
    _head_width(qkv, num_heads)
    windows, bias, mask = given
    shape = tuple(windows.shape)
    windows = require("windows", windows, shape, torch.int32)
    T = windows.numel()
    if len(shape) != 2 or qkv.shape[1] < T:
        raise ValueError(f"windows has shape {shape}: expected [n, w] with n*w up to {qkv.shape[1]}, the tokens of qkv")
    complete = function("attention_windows_hold_all", [ptr, i64])(address(windows), T)
    if complete < 0:
        raise MemoryError("window_attention: no memory for the workspace")
    if not complete:
        raise ValueError(f"windows has to hold each of the tokens 0 to {T - 1} once")
    if bias is not None:
        bias = require("bias", bias, (num_heads, shape[1], shape[1]), torch.float32)
    if mask is not None:
        mask = require("mask", mask, (*shape, shape[1]), torch.float32)
    return Windows(windows, bias, mask)
