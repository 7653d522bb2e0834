"""Residual addition, LayerNorm and placement of prompts in one pass: norm_insert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from insvp_fast import reference

__all__ = ["norm_insert"]


def norm_insert(
    residual: Tensor,
    branch: Tensor | None,
    prompts: Tensor | None,
    weight: Tensor,
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
        weight, bias, eps: of the frozen LayerNorm.
        dtype: of the normalised buffer, the next product's; the residual's if not given.

    Returns:
        The new residual [B, T, D], and the normalised tokens and prompts [B, T+L, D]. The residual is a view of the
        one buffer that is kept for backward.
    """
    dtype = dtype or residual.dtype
    # Inductor fuses the formula and writes the parts of its cat in place; torch 2.11 would lose a gradient of
    # _NormInsert, whose outputs include a view
    if torch.compiler.is_compiling():
        total, normed = reference.norm_insert(residual, branch, prompts, weight, bias, eps)
        return total.to(residual.dtype), normed.to(dtype)
    return _NormInsert.apply(residual, branch, prompts, weight, bias, eps, dtype)


class _NormInsert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual, branch, prompts, weight, bias, eps, dtype):
        tokens = _place(residual, branch, prompts)
        normed, mean, rstd = torch.native_layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(tokens, mean, rstd, weight, bias)
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.has_prompts = prompts is not None
        return tokens[:, : residual.shape[1]], normed.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual, grad_normed):
        tokens, mean, rstd, weight, bias = ctx.saved_tensors
        T, grad_normed = grad_residual.shape[1], grad_normed.to(tokens.dtype)
        d_tokens, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_normed, tokens, tokens.shape[-1:], mean, rstd, weight, bias, (True, False, False)
        )
        d_residual = d_tokens[:, :T].add_(grad_residual)
        d_branch = None if ctx.branch_dtype is None else d_residual.to(ctx.branch_dtype)
        return d_residual, d_branch, d_tokens[:, T:] if ctx.has_prompts else None, None, None, None, None


def _place(residual: Tensor, branch: Tensor | None, prompts: Tensor | None) -> Tensor:
    """The sum and, behind it, the prompts, in one new buffer [B, T+L, D]."""
    (B, T, D), L = residual.shape, 0 if prompts is None else prompts.shape[1]
    tokens = residual.new_empty(B, T + L, D)
    if branch is None:
        tokens[:, :T] = residual
    else:
        torch.add(residual, branch, out=tokens[:, :T])
    if prompts is not None:
        tokens[:, T:] = prompts
    return tokens
