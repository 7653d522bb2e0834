"""Two frozen linear layers with GELU between: mlp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_fake

from insvp_fast import frozen
from insvp_fast.frozen import Frozen
from insvp_fast.ops.library import LIBRARY, define, implement
from insvp_fast.ops.linear import require_frozen

__all__ = ["KEEP", "mlp"]

KEEP = ("pre", "input")

define(
    "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gain, Tensor? shift, bool keep) "
    "-> (Tensor, Tensor)"
)
define(
    "mlp_bwd(Tensor grad, Tensor kept, Tensor w1, Tensor? b1, Tensor w2, Tensor? gain, Tensor? shift, bool is_pre) "
    "-> Tensor"
)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    keep: str = "pre",
) -> Tensor:
    """gelu((gain*x + shift) @ w1.T + b1) @ w2.T + b2, with the exact (erf) GELU and frozen weights.

    Args:
        x: [..., D]; its dtype is that of the products and of the result.
        w1, b1, w2, b2: [M, D], [M] or None, [D, M], [D] or None.
        gain, shift: [D], the affine map of the norm before, or None.
        keep: for backward, "pre", what GELU was applied to, [..., M]; or "input", x, to compute the former again.

    Raises:
        ValueError: if a weight requires a gradient, or for another ``keep``.
    """
    require_frozen(w1, b1, w2, b2, gain, shift)
    if keep not in KEEP:
        raise ValueError(f"keep={keep!r}: expected one of {KEEP}")
    keep_pre = keep == "pre" and torch.is_grad_enabled() and x.requires_grad
    return _Mlp.apply(x, w1, b1, w2, b2, gain, shift, keep_pre)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w2, b2, gain, shift, keep_pre):
        out, pre = torch.ops.insvp_fast.mlp_fwd.default(x, w1, b1, w2, b2, gain, shift, keep_pre)
        ctx.save_for_backward(pre if keep_pre else x, w1, b1, w2, gain, shift)
        ctx.keep_pre = keep_pre
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        return torch.ops.insvp_fast.mlp_bwd.default(grad, *ctx.saved_tensors, ctx.keep_pre), *(None,) * 7


def _mlp_fwd(x, w1, b1, w2, b2, gain, shift, keep):
    pre, hidden = frozen.linear_gelu(x, Frozen(w1, b1, gain, shift), keep)
    return frozen.linear(hidden, Frozen(w2, b2)), pre


def _mlp_bwd(grad, kept, w1, b1, w2, gain, shift, is_pre):
    fc1 = Frozen(w1, b1, gain, shift)
    pre = kept if is_pre else frozen.linear(kept, fc1)
    return frozen.linear_bwd(frozen.linear_gelu_bwd(grad, Frozen(w2), pre), fc1)


@register_fake("insvp_fast::mlp_fwd", lib=LIBRARY)
def _(x, w1, b1, w2, b2, gain, shift, keep):
    pre = x.new_empty((*x.shape[:-1], w1.shape[0]) if keep else 0)
    return x.new_empty(*x.shape[:-1], w2.shape[0]), pre


@register_fake("insvp_fast::mlp_bwd", lib=LIBRARY)
def _(grad, kept, w1, b1, w2, gain, shift, is_pre):
    return grad.new_empty(*grad.shape[:-1], w1.shape[1])


implement("mlp_fwd", _mlp_fwd)
implement("mlp_bwd", _mlp_bwd)
