"""norm_insert in C++, forward and backward.

Letters: ``B`` images, ``T`` tokens, ``L`` prompts, ``S = T + L``, ``D`` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import (
    TYPE_CODES,
    address,
    array,
    f32,
    i32,
    i64,
    launch,
    pointer,
    ptr,
    require,
    require_dtype,
)

__all__ = ["norm_insert_bwd", "norm_insert_fwd"]

_FWD = [*array * 3, i64, ptr, ptr, f32, i32, *array * 3, ptr, *[i64] * 4]
_BWD = [*array * 3, ptr, ptr, i32, *array * 3, *[i64] * 4]


def norm_insert_fwd(
    residual: Tensor,
    branch: Tensor | None,
    prompts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    center: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of residual and branch, then LayerNorm, or RMSNorm, of it and of the prompts, in one buffer.

    residual, branch [B, T, D] and prompts [B, L, D] in float32 or bfloat16; weight, bias [D]; RMSNorm without
    ``center``. Returns the sum in the residual's dtype (of size 0 without a branch), the normalized [B, S, D] in
    ``dtype`` with and without the affine map (the latter of size 0 where there is no weight), and 1/sigma [B, S] in
    float32. Errors: see ``native``.
    """
    if residual.ndim != 3:
        raise ValueError(f"residual has shape {tuple(residual.shape)}: expected [B, T, D]")
    B, T, D = residual.shape
    L = 0 if prompts is None else prompts.shape[1]
    require_dtype("normed", dtype)
    residual = require("residual", residual, (B, T, D), *TYPE_CODES)
    if branch is not None:
        branch = require("branch", branch, (B, T, D), *TYPE_CODES)
    prompts_stride = 0
    if prompts is not None:
        if prompts.stride(0) or prompts.shape[0] == 0:
            prompts = require("prompts", prompts, (B, L, D), *TYPE_CODES)
            prompts_stride = L * D
        else:  # one image's prompts, expanded to all
            prompts = require("prompts", prompts[:1], (1, L, D), *TYPE_CODES)
    weight, bias = _affine("weight", weight, D), _affine("bias", bias, D)
    total = residual.new_empty(0) if branch is None else buffers.empty_like(residual)
    normed = buffers.empty((B, T + L, D), dtype)
    xhat = normed.new_empty(0) if weight is None else buffers.empty_like(normed)
    rstd = buffers.empty((B, T + L), torch.float32)
    launch(
        "norm_insert_fwd",
        _FWD,
        *(*pointer(residual), *pointer(branch), *pointer(prompts), prompts_stride),
        *(address(weight), address(bias), eps, center),
        *(*pointer(total), *pointer(normed), *pointer(xhat), address(rstd)),
        *(B, T, L, D),
    )
    return total, normed, xhat, rstd


def norm_insert_bwd(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    num_tokens: int,
    stream_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    center: bool = True,
    prompts_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``norm_insert_fwd`` by residual, branch and prompts.

    grad_total [B, T, D] or None, grad_normed and xhat [B, S, D], rstd [B, S]. The gradient by the residual is in
    ``stream_dtype``; that by the branch in ``branch_dtype``, of size 0 where this is the same; that by the prompts
    [B, L, D] in ``prompts_dtype``, or ``stream_dtype``. Errors: see ``native``.
    """
    if xhat.ndim != 3:
        raise ValueError(f"xhat has shape {tuple(xhat.shape)}: expected [B, S, D]")
    B, S, D = xhat.shape
    T = num_tokens
    xhat = require("xhat", xhat, (B, S, D), *TYPE_CODES)
    grad_normed = require("grad_normed", grad_normed, (B, S, D), *TYPE_CODES)
    rstd = require("rstd", rstd, (B, S), torch.float32)
    if grad_total is not None:
        grad_total = require("grad_total", grad_total, (B, T, D), *TYPE_CODES)
    weight = _affine("weight", weight, D)
    prompts_dtype = prompts_dtype or stream_dtype
    for name, dtype in (("d_residual", stream_dtype), ("d_branch", branch_dtype), ("d_prompts", prompts_dtype)):
        require_dtype(name, dtype)
    d_residual = buffers.empty((B, T, D), stream_dtype)
    d_branch = buffers.empty((0,) if branch_dtype == stream_dtype else (B, T, D), branch_dtype)
    d_prompts = buffers.empty((B, S - T, D), prompts_dtype)
    launch(
        "norm_insert_bwd",
        _BWD,
        *(*pointer(grad_total), *pointer(grad_normed), *pointer(xhat), address(rstd), address(weight)),
        center,
        *(*pointer(d_residual), *pointer(d_branch), *pointer(d_prompts)),
        *(B, T, S - T, D),
    )
    return d_residual, d_branch, d_prompts


def _affine(name: str, x: Tensor | None, D: int) -> Tensor | None:
    return None if x is None else require(name, x.float(), (D,), torch.float32)
