"""Residual addition, LayerNorm and placement of prompts in one pass: norm_insert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from insvp_fast.ops.registry import LIBRARY, apply, define, first_order, implement, widened
from insvp_fast.runtime import buffers, native

__all__ = ["norm_insert"]

define(
    "norm_insert_fwd(Tensor residual, Tensor? branch, Tensor? prompts, Tensor? weight, Tensor? bias, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    "norm_insert_bwd(Tensor? grad_total, Tensor grad_normed, Tensor xhat, Tensor rstd, Tensor? weight, "
    "int num_tokens, ScalarType stream_dtype, ScalarType branch_dtype) -> (Tensor, Tensor, Tensor)"
)


def norm_insert(
    residual: Tensor,
    branch: Tensor | None,
    prompts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition, then LayerNorm of tokens and prompts, placed in one buffer for the QKV product.

    Args:
        residual: [B, T, D], the stream; statistics are taken in at least fp32.
        branch: [B, T, D], what the preceding half-block adds to it, or None.
        prompts: [B, L, D], or None.
        weight, bias, eps: of the frozen LayerNorm; no weight, no affine map: it is folded into the next product.
        dtype: of the normalised buffer, the next product's; the residual's if not given.

    Returns:
        The new residual [B, T, D], and the normalised tokens and prompts [B, T+L, D]. Kept for backward: these before
        the affine map, which without one are no memory of their own, and 1/sigma of each row.
    """
    total, normed = apply(_NormInsert, residual, branch, prompts, weight, bias, eps, dtype or residual.dtype)
    return residual if branch is None else total, normed


@first_order("norm_insert", "insvp_fast.reference.norm_insert")
class _NormInsert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual, branch, prompts, weight, bias, eps, dtype):
        forward = torch.ops.insvp_fast.norm_insert_fwd.default
        total, normed, xhat, rstd = forward(residual, branch, prompts, weight, bias, eps, dtype)
        ctx.save_for_backward(normed if weight is None else xhat, rstd, weight)
        ctx.set_materialize_grads(False)
        dtypes = residual.dtype, (residual if branch is None else branch).dtype
        ctx.rest = residual.shape[1], *dtypes
        ctx.prompts_dtype = None if prompts is None else prompts.dtype
        return None if branch is None else total, normed

    @staticmethod
    def backward(ctx: Any, grad_total, grad_normed):
        xhat, rstd, weight = ctx.saved_tensors
        if grad_normed is None:
            grad_normed = torch.zeros_like(xhat)
        backward = torch.ops.insvp_fast.norm_insert_bwd.default
        d_residual, d_branch, d_prompts = backward(grad_total, grad_normed, xhat, rstd, weight, *ctx.rest)
        d_branch = d_branch if d_branch.numel() else d_residual  # empty where it would have the same bits
        d_prompts = None if ctx.prompts_dtype is None else d_prompts.to(ctx.prompts_dtype)
        return d_residual, d_branch if ctx.needs_input_grad[1] else None, d_prompts, None, None, None, None


def _fwd_reference(residual, branch, prompts, weight, bias, eps, dtype):
    B, T, D = residual.shape
    total = residual.new_empty(0) if branch is None else buffers.empty_like(residual)
    stream = residual if branch is None else torch.add(residual, branch, out=total)
    L = 0 if prompts is None else prompts.shape[1]
    parts = [stream] if prompts is None else [stream, prompts]
    normalised = [torch.native_layer_norm(part.to(widened(stream.dtype)), (D,), None, None, eps) for part in parts]
    xhat = buffers.empty((B, T + L, D), dtype, residual.device)
    torch.cat([x.to(dtype) for x, _, _ in normalised], dim=1, out=xhat)
    rstd = torch.cat([rstd for _, _, rstd in normalised], dim=1).squeeze(-1)
    if weight is None:
        return total, xhat, xhat.new_empty(0), rstd
    normed = torch.cat([x * weight if bias is None else x * weight + bias for x, _, _ in normalised], dim=1)
    return total, normed.to(dtype), xhat, rstd


def _bwd_reference(grad_total, grad_normed, xhat, rstd, weight, num_tokens, stream_dtype, branch_dtype):
    wide = rstd.dtype
    g, x = grad_normed.to(wide), xhat.to(wide)
    g = g if weight is None else g * weight.to(wide)
    d = rstd.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - x * (g * x).mean(-1, keepdim=True))
    d_residual = d[:, :num_tokens] if grad_total is None else d[:, :num_tokens] + grad_total
    d_residual = d_residual.to(stream_dtype).contiguous()
    d_branch = d_residual.new_empty(0) if branch_dtype == stream_dtype else d_residual.to(branch_dtype)
    return d_residual, d_branch, d[:, num_tokens:].to(stream_dtype).contiguous()


def _fwd_cpu(residual, branch, prompts, weight, bias, eps, dtype):
    dtypes = [t.dtype for t in (residual, branch, prompts) if t is not None]
    run = native.norm_insert_fwd if native.available(*dtypes, dtype) else _fwd_reference
    return run(residual, branch, prompts, weight, bias, eps, dtype)


def _bwd_cpu(grad_total, grad_normed, xhat, rstd, weight, num_tokens, stream_dtype, branch_dtype):
    covered = native.available(grad_normed.dtype, xhat.dtype, stream_dtype, branch_dtype)
    run = native.norm_insert_bwd if covered else _bwd_reference
    return run(grad_total, grad_normed, xhat, rstd, weight, num_tokens, stream_dtype, branch_dtype)


def _fwd_cuda(residual, branch, prompts, weight, bias, eps, dtype):
    from insvp_fast.kernels.gpu import norm_insert as kernel

    covered = kernel.covers(residual.device, residual.shape[-1], residual.dtype, dtype)
    run = kernel.norm_insert_fwd if covered else _fwd_reference
    return run(residual, branch, prompts, weight, bias, eps, dtype)


def _bwd_cuda(grad_total, grad_normed, xhat, rstd, weight, num_tokens, stream_dtype, branch_dtype):
    from insvp_fast.kernels.gpu import norm_insert as kernel

    covered = kernel.covers(xhat.device, xhat.shape[-1], stream_dtype, xhat.dtype)
    run = kernel.norm_insert_bwd if covered else _bwd_reference
    return run(grad_total, grad_normed, xhat, rstd, weight, num_tokens, stream_dtype, branch_dtype)


@register_fake("insvp_fast::norm_insert_fwd", lib=LIBRARY)
def _(residual, branch, prompts, weight, bias, eps, dtype):
    B, T, D = residual.shape
    S = T + (0 if prompts is None else prompts.shape[1])
    normed = residual.new_empty(B, S, D, dtype=dtype)
    return (
        residual.new_empty(0 if branch is None else residual.shape),
        normed,
        normed.new_empty(0 if weight is None else normed.shape),
        residual.new_empty(B, S, dtype=widened(residual.dtype)),
    )


@register_fake("insvp_fast::norm_insert_bwd", lib=LIBRARY)
def _(grad_total, grad_normed, xhat, rstd, weight, num_tokens, stream_dtype, branch_dtype):
    B, S, D = xhat.shape
    d_residual = xhat.new_empty(B, num_tokens, D, dtype=stream_dtype)
    d_branch = xhat.new_empty(0 if branch_dtype == stream_dtype else d_residual.shape, dtype=branch_dtype)
    return d_residual, d_branch, d_residual.new_empty(B, S - num_tokens, D)


implement("norm_insert_fwd", _fwd_reference, cpu=_fwd_cpu, cuda=_fwd_cuda)
implement("norm_insert_bwd", _bwd_reference, cpu=_bwd_cpu, cuda=_bwd_cuda)
