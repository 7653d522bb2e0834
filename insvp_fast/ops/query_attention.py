"""Softmax attention of few queries to all tokens: query_attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.heads import check_num_keys, merge_heads, split_heads, split_packed, without_padding
from insvp_fast.runtime import buffers, torch_private

__all__ = ["query_attention"]


def query_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float, *, num_keys: Tensor | None = None) -> Tensor:
    """Softmax attention of few queries, whose probabilities are cheaper to keep than to make again.

    It has one implementation, PyTorch's products.

    Args:
        q, kv: [B, T, D] and, packed, [B, S, 2·D], ``num_heads`` equal heads folded into D, in one floating dtype.
        scale: of the scores before the softmax.
        num_keys: as in ``attention``.

    Returns:
        [B, T, D]. Kept for backward: ``q``, ``kv`` and the probabilities, [B, heads, T, S].

    Raises:
        ValueError: for shapes that do not fit.
    """
    if q.ndim != 3 or kv.shape != (len(q), *kv.shape[1:-1], 2 * q.shape[2]) or q.shape[2] % num_heads:
        shapes = tuple(q.shape), tuple(kv.shape)
        raise ValueError(f"q and kv have shapes {shapes}: expected [B, T, D] and [B, S, 2*D], D in {num_heads} heads")
    check_num_keys(num_keys, kv, q.shape[1])
    return cast(Tensor, apply(_QueryAttention, q, kv, num_heads, scale, num_keys))


@first_order("query_attention", "attention_reference of the module insvp_fast.ops.attention")
class _QueryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, num_heads: int, scale: float, num_keys: Tensor | None) -> Tensor:
        k, v = map(_contiguous, split_packed(kv, num_heads, 2))
        p = without_padding(scale * split_heads(q, num_heads) @ k.mT, num_keys).softmax(dim=-1)
        ctx.save_for_backward(q, kv, p)
        ctx.shape = num_heads, scale
        return merge_heads(p @ v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, p = ctx.saved_tensors
        num_heads, scale = ctx.shape
        k, v = map(_contiguous, split_packed(kv, num_heads, 2))
        q, grad = split_heads(q, num_heads), split_heads(grad, num_heads)
        d_scores = scale * torch_private.softmax_bwd(grad @ v.mT, p)
        d_kv, d_head = buffers.empty_like(kv), buffers.empty(v.shape, v.dtype, v.device)
        # each half is written where it belongs: stacking them would cost another buffer of their size
        for half, product in zip(split_packed(d_kv, num_heads, 2), ((d_scores, q), (p, grad)), strict=True):
            half.copy_(torch.matmul(product[0].mT, product[1], out=d_head))
        return merge_heads(d_scores @ k), d_kv, None, None, None


def _contiguous(x: Tensor) -> Tensor:  # matmul would do so itself, in fresh memory
    return buffers.empty(x.shape, x.dtype, x.device).copy_(x)
