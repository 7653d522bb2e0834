"""Two frozen linear layers with GELU between: mlp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from insvp_fast import reference
from insvp_fast.ops.linear import require_frozen
from insvp_fast.ops.registry import LIBRARY, apply, define, first_order, implement
from insvp_fast.runtime import products
from insvp_fast.runtime.products import Frozen

__all__ = ["KEEP", "mlp"]

KEEP = ("pre", "code", "input")

define(
    "mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gain, Tensor? shift, str keep) "
    "-> (Tensor, Tensor)"
)
define(
    "mlp_bwd(Tensor grad, Tensor kept, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gain, Tensor? shift, "
    "str keep) -> Tensor"
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
        keep: for backward, "pre", what GELU was applied to, [..., M]; "code", GELU's derivative there rounded to 8 bits
            (``reference.gelu_code``), so that gradients are off by up to 0.25 %; or "input", x, to compute "pre" again.

    Raises:
        ValueError: if a weight requires a gradient, or for another ``keep``.
    """
    require_frozen(w1, b1, w2, b2, gain, shift)
    if keep not in KEEP:
        raise ValueError(f"keep={keep!r}: expected one of {KEEP}")
    needed = torch.is_grad_enabled() and x.requires_grad
    return apply(_Mlp, x, w1, b1, w2, b2, gain, shift, keep if needed else "nothing")


@first_order("mlp", "torch.nn.functional.linear and gelu")
class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w2, b2, gain, shift, keep):
        out, kept = torch.ops.insvp_fast.mlp_fwd.default(x, w1, b1, w2, b2, gain, shift, keep)
        ctx.save_for_backward(x if keep == "input" else kept, w1, b1, w2, b2, gain, shift)
        ctx.keep = keep
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        return torch.ops.insvp_fast.mlp_bwd.default(grad, *ctx.saved_tensors, ctx.keep), *(None,) * 7


def _fwd(x, w1, b1, w2, b2, gain, shift, keep):
    pre, hidden = products.linear_gelu(x, Frozen(w1, b1, gain, shift), keep in ("pre", "code"))
    return products.linear(hidden, Frozen(w2, b2)), _code(pre) if keep == "code" else pre


CODE_OF_NAN = 255  # those of numbers are 1 to 254


def _code(pre: Tensor) -> Tensor:
    """``reference.gelu_code`` with one for NaN, which the derivative is where ``pre`` is not finite."""
    return reference.gelu_code(pre).masked_fill_(~pre.isfinite(), CODE_OF_NAN)


def _from_code(code: Tensor) -> Tensor:
    return reference.gelu_from_code(code).masked_fill_(code == CODE_OF_NAN, torch.nan)


def _bwd(grad, kept, w1, b1, w2, b2, gain, shift, keep):
    fc1, fc2 = Frozen(w1, b1, gain, shift), Frozen(w2, b2)
    if keep == "code":
        d_pre = products.linear_bwd(grad, fc2).mul_(_from_code(kept))
    else:
        d_pre = products.linear_gelu_bwd(grad, fc2, products.linear(kept, fc1) if keep == "input" else kept)
    return products.linear_bwd(d_pre, fc1)


def _fwd_cuda(x, w1, b1, w2, b2, gain, shift, keep):
    from insvp_fast.kernels.gpu import gelu as kernel

    if not kernel.covers(x.device, x.dtype):
        return _fwd(x, w1, b1, w2, b2, gain, shift, keep)
    pre = products.linear(x, Frozen(w1, b1, gain, shift))
    hidden, code = kernel.gelu_fwd_code(pre) if keep == "code" else (kernel.gelu_fwd(pre), None)
    kept = code if code is not None else pre if keep == "pre" else x.new_empty(0)
    return products.linear(hidden, Frozen(w2, b2)), kept


def _bwd_cuda(grad, kept, w1, b1, w2, b2, gain, shift, keep):
    from insvp_fast.kernels.gpu import gelu as kernel

    if not kernel.covers(grad.device, grad.dtype):
        return _bwd(grad, kept, w1, b1, w2, b2, gain, shift, keep)
    fc1, d_hidden = Frozen(w1, b1, gain, shift), products.linear_bwd(grad, Frozen(w2, b2))
    if keep == "code":
        d_pre = kernel.gelu_bwd_code(d_hidden, kept, out=d_hidden)
    else:
        d_pre = kernel.gelu_bwd(d_hidden, products.linear(kept, fc1) if keep == "input" else kept, out=d_hidden)
    return products.linear_bwd(d_pre, fc1)


@register_fake("insvp_fast::mlp_fwd", lib=LIBRARY)
def _(x, w1, b1, w2, b2, gain, shift, keep):
    kept = x.new_empty(
        (*x.shape[:-1], w1.shape[0]) if keep in ("pre", "code") else 0, dtype=torch.uint8 if keep == "code" else x.dtype
    )
    return x.new_empty(*x.shape[:-1], w2.shape[0]), kept


@register_fake("insvp_fast::mlp_bwd", lib=LIBRARY)
def _(grad, kept, w1, b1, w2, b2, gain, shift, keep):
    return grad.new_empty(*grad.shape[:-1], w1.shape[1])


implement("mlp_fwd", _fwd, cuda=_fwd_cuda)
implement("mlp_bwd", _bwd, cuda=_bwd_cuda)
