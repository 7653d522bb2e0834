"""Softmax attention of few queries to all tokens: query_attention."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.heads import (
    add_bias,
    check_bias,
    check_heads,
    check_num_keys,
    merge_heads,
    split_heads,
    split_packed,
    without_padding,
)
from insvp_fast.ops.registry import check_tensors, run_alone, tensor_fields
from insvp_fast.runtime import buffers, torch_private
from insvp_fast.runtime.rows import rows_apart

__all__ = ["query_attention"]


def query_attention(
    q: Tensor,
    kv: Tensor,
    num_heads: int,
    scale: float,
    *,
    num_keys: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention of few queries, whose probabilities are cheaper to keep than to make again.

    It has one implementation, PyTorch's products.

    Args:
        q, kv: [B, T, D] and, packed, [B, S, 2·D], ``num_heads`` equal heads folded into D, in one floating dtype.
        scale: of the scores before the softmax.
        num_keys: as in ``attention``.
        bias: [heads, T, up to S], frozen, added to the scores of the first keys; None adds nothing.

    Returns:
        [B, T, D]. Kept for backward: ``q``, ``kv`` and the probabilities, [B, heads, T, S].

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a bias that would be trained.
    """
    check_heads(num_heads)
    if q.ndim != 3 or kv.shape != (len(q), *kv.shape[1:-1], 2 * q.shape[2]) or q.shape[2] % num_heads:
        shapes = tuple(q.shape), tuple(kv.shape)
        raise ValueError(f"q and kv have shapes {shapes}: expected [B, T, D] and [B, S, 2*D], D in {num_heads} heads")
    check_num_keys(num_keys, kv, q.shape[1])
    check_bias(bias, num_heads, q.shape[1], kv.shape[1])
    check_tensors((q, kv, bias), FIELDS)
    if q.dtype != kv.dtype:
        raise ValueError(f"kv is {kv.dtype}: expected {q.dtype}, as q is")
    return cast(Tensor, apply(_QueryAttention, q, kv, num_heads, float(scale), num_keys, bias))


class _Tensors(NamedTuple):
    q: Tensor
    kv: Tensor
    bias: Tensor | None


FIELDS = tensor_fields(_Tensors)


@first_order("query_attention", "attention_reference of the module insvp_fast.ops.attention")
class _QueryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, num_heads: int, scale: float, num_keys: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        out, p = run_alone(lambda a: _attended(*a), (q, kv, num_heads, scale, num_keys, bias))
        ctx.save_for_backward(q, kv, p)
        ctx.shape = num_heads, scale
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = run_alone(lambda a: _attended_bwd(*a), (grad, *ctx.saved_tensors, *ctx.shape))
        return *grads, *(None,) * 4


@rows_apart
def _attended(
    q: Tensor, kv: Tensor, num_heads: int, scale: float, num_keys: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The result, and the probabilities."""
    k, v = map(_contiguous, split_packed(kv, num_heads, 2))
    scores = add_bias(scale * split_heads(q, num_heads) @ k.mT, bias)
    p = without_padding(scores, num_keys).softmax(dim=-1)
    return merge_heads(p @ v), p


@rows_apart
def _attended_bwd(
    grad: Tensor, q: Tensor, kv: Tensor, p: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    k, v = map(_contiguous, split_packed(kv, num_heads, 2))
    q, grad = split_heads(q, num_heads), split_heads(grad, num_heads)
    d_scores = scale * torch_private.softmax_bwd(grad @ v.mT, p)
    d_kv, d_head = buffers.empty_like(kv), buffers.empty(v.shape, v.dtype, v.device)
    # each half is written where it belongs: stacking them would cost another buffer of their size
    for half, product in zip(split_packed(d_kv, num_heads, 2), ((d_scores, q), (p, grad)), strict=True):
        half.copy_(torch.matmul(product[0].mT, product[1], out=d_head))
    return merge_heads(d_scores @ k), d_kv


def _contiguous(x: Tensor) -> Tensor:  # matmul would do so itself, in fresh memory
    return buffers.empty(x.shape, x.dtype, x.device).copy_(x)
