"""Copies and sums that may be part of a program of native calls; where they cannot be, PyTorch computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import buffers, native, torch_private

__all__ = ["put", "put_sum", "sum_of"]


def put(to: Tensor, x: Tensor | None) -> None:
    """``to.copy_(x)``, or ``to.zero_()`` without ``x``, which has the shape and the dtype of ``to``."""
    if _is_plain(to, x):
        native.copy(to, x)
    else:
        native.interrupt()
        to.zero_() if x is None else to.copy_(x)


def put_sum(to: Tensor, a: Tensor, w_a: float, b: Tensor | None, w_b: float) -> None:
    """``to.copy_(w_a * a + w_b * b)``, of [B, ...] each, or w_a * a without ``b``; ``to`` has the dtype of the result.

    a and b may have one image for all.
    """
    covered = (x is None or (x.dtype in native.DTYPES and x[:1].is_contiguous()) for x in (a, b))
    if _is_plain(to, a, b) and to.dtype in native.DTYPES and all(covered):
        total = to if to[:1].is_contiguous() else buffers.empty(to.shape, to.dtype)
        native.weighted_sum(total, a, w_a, b, w_b)
        if total is not to:
            native.copy(to, total)
        return
    native.interrupt()
    to.copy_(a if w_a == 1 else w_a * a)
    if b is not None:
        to.add_(b if w_b == 1 else w_b * b)


def sum_of(residual: Tensor, branch: Tensor) -> Tensor:
    """``residual + branch``, on CPUs without gradients as a call that a program can hold."""
    if torch.is_grad_enabled() or not residual.is_cpu:
        return residual + branch
    total = buffers.empty(residual.shape, torch.promote_types(residual.dtype, branch.dtype))
    put_sum(total, residual, 1, branch, 1)
    return total


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether the native library may read and write these."""
    if torch.compiler.is_compiling() or torch_private.dispatches(tensors) or not native.available():
        return False
    return all(x is None or x.is_cpu for x in tensors)
