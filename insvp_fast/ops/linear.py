"""The product with a frozen weight: linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from insvp_fast.ops.registry import LIBRARY, apply, define, first_order, implement
from insvp_fast.runtime import products
from insvp_fast.runtime.products import Frozen

__all__ = ["linear", "qkv_few"]

define("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? gain, Tensor? shift, int first, int last) -> Tensor")
define(
    "linear_bwd(Tensor grad, Tensor weight, Tensor? bias, Tensor? gain, Tensor? shift, int first, int last) -> Tensor"
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """(gain*x + shift) @ weight.T + bias, all frozen: no gradient for them, nothing of x kept, packed once.

    Args:
        x: [..., D_in]; its dtype is that of the product and of the result.
        weight, bias: [D_out, D_in] and [D_out] or None, in any floating dtype; they must not require a gradient.
            A weight of more dimensions, a convolution's, is flattened to two.
        gain, shift: [D_in], the affine map of the norm before, folded into the weight (``products.py``), or None.
        rows: use only the outputs from the first to before the last of these two.

    Raises:
        ValueError: if one of them requires a gradient, which would be lost.
    """
    require_frozen(weight, bias, gain, shift)
    first, last = rows or (0, weight.shape[0])
    return apply(_Linear, x, weight, bias, gain, shift, first, last)


def require_frozen(*weights: Tensor | None) -> None:
    """Raise ValueError if a weight is trained."""
    if any(w is not None and w.requires_grad for w in weights):
        raise ValueError(
            "ops.linear and ops.mlp are for frozen weights: expected requires_grad=False,"
            " use torch.nn.functional.linear"
        )


@first_order("linear", "torch.nn.functional.linear")
class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, gain, shift, first, last):
        ctx.save_for_backward(weight, bias, gain, shift)
        ctx.rows = first, last
        return torch.ops.insvp_fast.linear.default(x, weight, bias, gain, shift, first, last)

    @staticmethod
    def backward(ctx: Any, grad):
        return torch.ops.insvp_fast.linear_bwd.default(grad, *ctx.saved_tensors, *ctx.rows), *(None,) * 6


def qkv_few(
    x: Tensor,
    num_queries: int,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear`` for the attention of few tokens to all: queries of the first, keys and values of all.

    Args:
        x: [B, S, D].
        weight, bias: [3·D, D] and [3·D] or None, of the packed product; with gain and shift as in ``linear``.

    Returns:
        Queries [B, num_queries, D], and keys and values [B, S, 2·D].

    Raises:
        ValueError: as ``linear``.
    """
    require_frozen(weight, bias, gain, shift)
    return apply(_QKVFew, x, num_queries, weight, bias, gain, shift)


@first_order("qkv_few", "torch.nn.functional.linear")
class _QKVFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, num_queries, weight, bias, gain, shift):
        ctx.save_for_backward(weight, bias, gain, shift)
        ctx.num_queries, (last, D) = num_queries, weight.shape
        run, rest = torch.ops.insvp_fast.linear.default, (weight, bias, gain, shift)
        return run(x[:, :num_queries], *rest, 0, D), run(x, *rest, D, last)

    @staticmethod
    def backward(ctx: Any, d_q, d_kv):
        weights = ctx.saved_tensors
        last, D = weights[0].shape
        run = torch.ops.insvp_fast.linear_bwd.default
        d_x = run(d_kv, *weights, D, last)
        d_x[:, : ctx.num_queries] += run(d_q, *weights, 0, D)
        return d_x, *(None,) * 5


def _linear(x, weight, bias, gain, shift, first, last):
    return products.linear(x, Frozen(weight, bias, gain, shift, first, last))


def _linear_bwd(grad, weight, bias, gain, shift, first, last):
    return products.linear_bwd(grad, Frozen(weight, bias, gain, shift, first, last))


@register_fake("insvp_fast::linear", lib=LIBRARY)
def _(x, weight, bias, gain, shift, first, last):
    return x.new_empty(*x.shape[:-1], last - first)


@register_fake("insvp_fast::linear_bwd", lib=LIBRARY)
def _(grad, weight, bias, gain, shift, first, last):
    return grad.new_empty(*grad.shape[:-1], weight[0].numel())


implement("linear", _linear)
implement("linear_bwd", _linear_bwd)
