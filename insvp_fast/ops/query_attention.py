"""Softmax attention of few queries to all tokens: query_attention, and absorbed_attention without keys and values."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.heads import (
    add_bias,
    check_bias,
    check_num_keys,
    merge_heads,
    split_heads,
    split_packed,
    without_padding,
)
from insvp_fast.ops.linear import frozen_operands
from insvp_fast.ops.registry import call
from insvp_fast.runtime import buffers, torch_private
from insvp_fast.runtime.products import FrozenLinear
from insvp_fast.runtime.rows import rows_apart

__all__ = ["absorbed_attention", "query_attention"]


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
        ValueError: for shapes that do not fit, or a bias that would be trained.
    """
    if q.ndim != 3 or kv.shape != (len(q), *kv.shape[1:-1], 2 * q.shape[2]) or q.shape[2] % num_heads:
        shapes = tuple(q.shape), tuple(kv.shape)
        raise ValueError(f"q and kv have shapes {shapes}: expected [B, T, D] and [B, S, 2*D], D in {num_heads} heads")
    check_num_keys(num_keys, kv, q.shape[1])
    check_bias(bias, num_heads, q.shape[1], kv.shape[1])
    return cast(Tensor, apply(_QueryAttention, q, kv, num_heads, scale, num_keys, bias))


@first_order("query_attention", "attention_reference of the module insvp_fast.ops.attention")
class _QueryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, num_heads: int, scale: float, num_keys: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        out, p = _attended(q, kv, num_heads, scale, num_keys, bias)
        ctx.save_for_backward(q, kv, p)
        ctx.shape = num_heads, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_attended_bwd(grad, *ctx.saved_tensors, *ctx.shape), *(None,) * 4


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


def absorbed_attention(
    x: Tensor,
    num_queries: int,
    layer: FrozenLinear,
    num_heads: int,
    scale: float,
    *,
    num_keys: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``query_attention`` of the first tokens from ``project_q_kv``, without making keys and values.

    A score is q_h · W_k,h x = (W_k,h^T q_h) · x, and a result W_v,h (Σ p x): per head and query two products with a
    weight, instead of two per token. A bias of the keys is the same for all keys, and drops out of the softmax; one of
    the values is added once, since the probabilities sum to 1.

    Args:
        x: [B, S, E].
        num_queries: T, at most S.
        layer: the packed layer of queries, keys and values, [3·D, E], all of it, with ``num_heads`` equal heads in D.
        scale, num_keys, bias: as in ``query_attention``.

    Returns:
        [B, T, D]. Kept for backward: ``x``, and per head and query the probabilities [S] and a row [E].

    Raises:
        ValueError: for shapes that do not fit, or a weight or bias that requires a gradient.
    """
    *sources, first, last = frozen_operands(x, layer)
    if x.ndim != 3 or not 0 <= num_queries <= x.shape[1] or first or last % (3 * num_heads):
        found = f"x of shape {tuple(x.shape)}, num_queries={num_queries} and {last - first} outputs"
        raise ValueError(f"found {found}: expected [B, S, E], 0 to S, and 3*D with D in {num_heads} heads")
    check_num_keys(num_keys, x, num_queries)
    check_bias(bias, num_heads, num_queries, x.shape[1])
    return cast(Tensor, apply(_AbsorbedAttention, x, num_queries, *sources, num_heads, scale, num_keys, bias))


@first_order("absorbed_attention", "attention_reference of the module insvp_fast.ops.attention")
class _AbsorbedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, T: int, *rest: Any) -> Tensor:
        *weights, H, scale, num_keys, bias = rest
        out, rows, p = _absorbed(x, weights, T, H, scale, num_keys, bias)
        ctx.save_for_backward(x, rows, p, *weights)
        ctx.shape = T, H, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, p, *weights = ctx.saved_tensors
        return _absorbed_bwd(grad, x, rows, p, weights, *ctx.shape), *(None,) * 10


@rows_apart
def _absorbed(
    x: Tensor, weights: Any, T: int, H: int, scale: float, num_keys: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and per head and query the row that a token is multiplied by, and the probabilities."""
    D = weights[0].shape[0] // 3
    rows = _turned(_by_head(_product(x[:, :T], weights, 0, D), H), weights, D, 2 * D)  # [B, H·T, E]
    scores = add_bias(torch.unflatten(scale * rows @ x.mT, 1, (H, T)), bias)
    p = without_padding(scores, num_keys).softmax(dim=-1).flatten(1, 2)
    return _own_heads(_product(p @ x, weights, 2 * D, 3 * D), H), rows, p


@rows_apart
def _absorbed_bwd(
    grad: Tensor, x: Tensor, rows: Tensor, p: Tensor, weights: Any, T: int, H: int, scale: float
) -> Tensor:
    D = weights[0].shape[0] // 3
    d_mean = _turned(_by_head(grad, H), weights, 2 * D, 3 * D)
    d_scores = scale * torch_private.softmax_bwd(d_mean @ x.mT, p)
    d_x = torch.baddbmm(p.mT @ d_mean, d_scores.mT, rows)
    weight, _, gain, _, scale = weights  # nothing is added to a gradient
    d_q = _own_heads(_product(d_scores @ x, (weight, None, gain, None, scale), D, 2 * D), H)
    d_x[:, :T] += _turned(d_q, weights, 0, D)
    return d_x


def _product(x: Tensor, weights: Any, first: int, last: int) -> Tensor:
    return cast(Tensor, call("linear_fwd", x, *weights, first, last, "auto"))


def _turned(x: Tensor, weights: Any, first: int, last: int) -> Tensor:
    """The product with the rows of the weight, not with its columns."""
    return cast(Tensor, call("linear_bwd", x, *weights, first, last, "auto"))


def _by_head(x: Tensor, H: int) -> Tensor:  # [B, T, D] -> [B, H·T, D]
    """Each row once for each head, with zeros for all other heads."""
    heads, own = torch.unflatten(x, -1, (H, -1)), torch.eye(H, dtype=x.dtype, device=x.device)
    return (heads.unsqueeze(1) * own[:, None, :, None]).flatten(3).flatten(1, 2)


def _own_heads(x: Tensor, H: int) -> Tensor:  # [B, H·T, D] -> [B, T, D]
    """Of each row the columns of its head."""
    rows = torch.unflatten(torch.unflatten(x, -1, (H, -1)), 1, (H, -1))  # [B, H, T, H, d]
    return rows.diagonal(dim1=1, dim2=3).transpose(2, 3).flatten(2)
