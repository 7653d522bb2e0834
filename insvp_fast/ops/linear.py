"""The product with a frozen weight: linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_fake

from insvp_fast import frozen
from insvp_fast.ops.library import LIBRARY, define

__all__ = ["linear"]

define("linear(Tensor x, Tensor weight, Tensor? bias, int first, int last) -> Tensor")
define("linear_bwd(Tensor grad, Tensor weight, int first, int last) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[int, int] | None = None) -> Tensor:
    """x @ weight.T + bias with a frozen weight: no gradient for it, nothing of x kept, packed once (``frozen.py``).

    Args:
        x: [..., D_in]; its dtype is that of the product and of the result.
        weight, bias: [D_out, D_in] and [D_out] or None, in any floating dtype; they must not require a gradient.
            A weight of more dimensions, a convolution's, is flattened to two.
        rows: use only the outputs from the first to before the last of these two.

    Raises:
        ValueError: if the weight requires a gradient, which would be lost.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "ops.linear is for frozen weights: expected requires_grad=False, use torch.nn.functional.linear"
        )
    first, last = rows or (0, weight.shape[0])
    return _Linear.apply(x, weight, bias, first, last)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, first, last):
        ctx.save_for_backward(weight)
        ctx.rows = first, last
        return torch.ops.insvp_fast.linear.default(x, weight, bias, first, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        (weight,) = ctx.saved_tensors
        return torch.ops.insvp_fast.linear_bwd.default(grad, weight, *ctx.rows), None, None, None, None


@register_fake("insvp_fast::linear", lib=LIBRARY)
def _(x, weight, bias, first, last):
    return x.new_empty(*x.shape[:-1], last - first)


@register_fake("insvp_fast::linear_bwd", lib=LIBRARY)
def _(grad, weight, first, last):
    return grad.new_empty(*grad.shape[:-1], weight[0].numel())


LIBRARY.impl("linear", frozen.linear, "CompositeExplicitAutograd")
LIBRARY.impl("linear_bwd", frozen.linear_bwd, "CompositeExplicitAutograd")
