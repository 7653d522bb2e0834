"""Softmax attention from the packed product: attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_fake

from insvp_fast import cpu, reference
from insvp_fast.ops.library import LIBRARY, define, implement, widened

__all__ = ["attention"]

define("attention_fwd(Tensor qkv, int num_heads, int num_queries, float scale) -> (Tensor, Tensor)")
define(
    "attention_bwd(Tensor grad, Tensor qkv, Tensor? out, Tensor logsumexp, int num_heads, int num_queries, "
    "float scale) -> Tensor"
)


def attention(qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> Tensor:
    """Softmax attention of the first ``num_queries`` tokens to all S, from the packed product.

    Args:
        qkv: [B, S, 3·D], heads folded into D.
        scale: of the scores before the softmax.

    Returns:
        [B, num_queries, D]. Kept for backward: ``qkv`` and what the implementation needs of the softmax.
    """
    if qkv.device.type == "cpu":
        return _Attention.apply(qkv, num_heads, num_queries, scale)
    q, k, v = reference.split_heads(qkv, num_heads)
    return reference.merge_heads(
        torch.nn.functional.scaled_dot_product_attention(q[:, :, :num_queries], k, v, scale=scale)
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, num_heads, num_queries, scale):
        out, logsumexp = torch.ops.insvp_fast.attention_fwd.default(qkv, num_heads, num_queries, scale)
        ctx.save_for_backward(qkv, out if logsumexp.numel() else None, logsumexp)
        ctx.shape = num_heads, num_queries, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        return torch.ops.insvp_fast.attention_bwd.default(grad, *ctx.saved_tensors, *ctx.shape), None, None, None


@register_fake("insvp_fast::attention_fwd", lib=LIBRARY)
def _(qkv, num_heads, num_queries, scale):
    B, _, D3 = qkv.shape
    softmax = 0 if cpu.explicit_attention(qkv.dtype) else (B, num_queries, num_heads)
    logsumexp = qkv.new_empty(softmax, dtype=widened(qkv.dtype))
    return qkv.new_empty(B, num_queries, D3 // 3), logsumexp if logsumexp.ndim == 1 else logsumexp.transpose(1, 2)


@register_fake("insvp_fast::attention_bwd", lib=LIBRARY)
def _(grad, qkv, out, logsumexp, num_heads, num_queries, scale):
    return qkv.new_empty(qkv.shape)


implement("attention_fwd", cpu=cpu.attention_fwd)
implement("attention_bwd", cpu=cpu.attention_bwd)
