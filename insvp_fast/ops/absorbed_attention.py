"""Softmax attention of few queries to all tokens, whose keys and values are not made: absorbed_attention."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order, save, saved
from insvp_fast.ops.heads import add_bias, check_bias, check_heads, check_num_keys, without_padding
from insvp_fast.ops.linear import frozen_operands, require_all_outputs
from insvp_fast.ops.registry import AnyTensor, Implementation, call, native_reason, register, require
from insvp_fast.runtime import buffers, native, torch_private
from insvp_fast.runtime.elementwise import put
from insvp_fast.runtime.products import FrozenLinear
from insvp_fast.runtime.rows import rows_apart

__all__ = ["absorbed_attention"]


def absorbed_attention(
    x: Tensor,
    num_queries: int,
    layer: FrozenLinear,
    num_heads: int,
    scale: float,
    *,
    num_keys: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
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
        impl: of what is between the products with the weight: "auto" lets the device decide; "reference" or "native",
            which takes no ``bias``, insists.

    Returns:
        [B, T, D]. Kept for backward: ``x``, and per head and query the probabilities [S] and a row [E].

    Raises:
        TypeError: for a layer that is no ``FrozenLinear``.
        ValueError: for shapes that do not fit, a weight or bias that requires a gradient, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    check_heads(num_heads)
    scale = float(scale)
    *sources, first, last = frozen_operands(x, layer)
    require("linear_fwd", "auto", (x, *sources, first, last))  # checks the layer, of which the operator below sees none
    if x.ndim != 3 or not 0 <= num_queries <= x.shape[1] or first or last % (3 * num_heads):
        found = f"x of shape {tuple(x.shape)}, num_queries={num_queries} and {last - first} outputs"
        raise ValueError(f"found {found}: expected [B, S, E], 0 to S, and 3*D with D in {num_heads} heads")
    require_all_outputs(layer=layer)
    check_num_keys(num_keys, x, num_queries)
    check_bias(bias, num_heads, num_queries, x.shape[1])
    require("absorbed_attention_fwd", impl, _Fwd(x[:, :0], x, num_heads, scale, num_keys, bias))
    return cast(Tensor, apply(_AbsorbedAttention, x, num_queries, *sources, num_heads, scale, num_keys, bias, impl))


@first_order("absorbed_attention", "attention_reference of the module insvp_fast.ops.attention")
class _AbsorbedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, T: int, *rest: Any) -> Tensor:
        *weights, H, scale, num_keys, bias, impl = rest
        D = weights[0].shape[0] // 3
        rows = _turned(_by_head(_product(x[:, :T], weights, 0, D), H), weights, D, 2 * D)  # [B, H·T, E]
        means, p = call("absorbed_attention_fwd", rows, x, H, scale, impl, num_keys, bias)
        save(ctx, x, rows, p, weights=weights)
        ctx.shape = H, scale, impl
        return _own_heads(_product(means, weights, 2 * D, 3 * D), H)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, rows, p, *weights), (H, scale, impl) = saved(ctx), ctx.shape
        D = weights[0].shape[0] // 3
        d_means = _turned(_by_head(grad, H), weights, 2 * D, 3 * D)
        d_rows, d_products = call("absorbed_attention_bwd_rows", d_means, x, p, scale, impl)
        weight, _, gain, _, own_scale = weights  # nothing is added to a gradient
        d_q = _own_heads(_product(d_rows, (weight, None, gain, None, own_scale), D, 2 * D), H)
        d_first = _turned(d_q, weights, 0, D)
        return call("absorbed_attention_bwd_tokens", d_means, p, d_products, rows, d_first, impl), *(None,) * 11


def _product(x: Tensor, weights: Any, first: int, last: int) -> Tensor:
    return cast(Tensor, call("linear_fwd", x, *weights, first, last, "auto"))


def _turned(x: Tensor, weights: Any, first: int, last: int) -> Tensor:
    """The product with the rows of the weight, not with its columns."""
    return cast(Tensor, call("linear_bwd", x, *weights, first, last, "auto"))


def _by_head(x: Tensor, H: int) -> Tensor:  # [B, T, D] -> [B, H·T, D]
    """Each row once for each head, with zeros for all other heads."""
    B, T, D = x.shape
    rows = buffers.empty((B, H, T, H, D // H), x.dtype, x.device)
    put(rows, None)
    put(_diagonal(rows), torch.unflatten(x, -1, (H, -1)))
    return rows.view(B, H * T, D)


def _own_heads(x: Tensor, H: int) -> Tensor:  # [B, H·T, D] -> [B, T, D]
    """Of each row the columns of its head."""
    B, rows, D = x.shape
    heads = buffers.empty((B, rows // H, H, D // H), x.dtype, x.device)
    put(heads, _diagonal(x.view(B, H, rows // H, H, D // H)))
    return heads.flatten(2)


def _diagonal(x: Tensor) -> Tensor:  # [B, H, T, H, d] -> [B, T, H, d]
    return x.diagonal(dim1=1, dim2=3).transpose(2, 3)


# What is between the products with the weight: R rows, one for each head and query, and the tokens.


class _Fwd(NamedTuple):
    rows: Tensor  # [B, R, E]
    x: Tensor  # [B, S, E]
    num_heads: int
    scale: float
    num_keys: AnyTensor | None = None
    bias: Tensor | None = None


class _BwdRows(NamedTuple):
    d_means: Tensor  # [B, R, E]
    x: Tensor
    p: Tensor  # [B, R, S]
    scale: float


class _BwdTokens(NamedTuple):
    d_means: Tensor
    p: Tensor
    d_products: Tensor  # [B, R, S]
    rows: Tensor
    d_first: Tensor  # [B, T, E], what else is the gradient of the first tokens


@rows_apart
def _fwd_formula(
    rows: Tensor, x: Tensor, num_heads: int, scale: float, num_keys: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For each row the mean of the tokens, and their probabilities."""
    scores = add_bias(torch.unflatten(scale * rows @ x.mT, 1, (num_heads, -1)), bias)
    p = without_padding(scores, num_keys).softmax(dim=-1).flatten(1, 2)
    return p @ x, p


@rows_apart
def _bwd_rows_formula(d_means: Tensor, x: Tensor, p: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients by the rows, and by their products with the tokens."""
    d_products = scale * torch_private.softmax_bwd(d_means @ x.mT, p)
    return d_products @ x, d_products


@rows_apart
def _bwd_tokens_formula(d_means: Tensor, p: Tensor, d_products: Tensor, rows: Tensor, d_first: Tensor) -> Tensor:
    d_x = torch.baddbmm(p.mT @ d_means, d_products.mT, rows)
    d_x[:, : d_first.shape[1]] += d_first
    return d_x


def _fwd_native_reason(a: _Fwd) -> str | None:
    return native_reason(a.x.device, a.x.dtype) or (None if a.bias is None else "takes no bias of the scores")


def _bwd_native_reason(a: _BwdRows | _BwdTokens) -> str | None:
    return native_reason(a.p.device, a.p.dtype)


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor]:
    return a.rows.new_empty(a.rows.shape), a.rows.new_empty(*a.rows.shape[:2], a.x.shape[1])


def _bwd_rows_fake(a: _BwdRows) -> tuple[Tensor, Tensor]:
    return a.p.new_empty(a.d_means.shape), a.p.new_empty(a.p.shape)


def _bwd_tokens_fake(a: _BwdTokens) -> Tensor:
    return a.rows.new_empty(a.rows.shape[0], a.p.shape[2], a.rows.shape[2])


register(
    "absorbed_attention_fwd",
    _Fwd,
    "(Tensor, Tensor)",
    fake=_fwd_fake,
    reference=lambda a: _fwd_formula(*a),
    native=Implementation(
        lambda a: native.absorbed_attention_fwd(a.rows, a.x, a.scale, a.num_keys), _fwd_native_reason, recordable=True
    ),
)
register(
    "absorbed_attention_bwd_rows",
    _BwdRows,
    "(Tensor, Tensor)",
    fake=_bwd_rows_fake,
    reference=lambda a: _bwd_rows_formula(*a),
    native=Implementation(lambda a: native.absorbed_attention_bwd_rows(*a), _bwd_native_reason, recordable=True),
)
register(
    "absorbed_attention_bwd_tokens",
    _BwdTokens,
    "Tensor",
    fake=_bwd_tokens_fake,
    reference=lambda a: _bwd_tokens_formula(*a),
    native=Implementation(lambda a: native.absorbed_attention_bwd_tokens(*a), _bwd_native_reason, recordable=True),
)
