"""absorbed_attention in C++: what is between its products with a weight, forward and backward.

Letters: ``B`` images of ``S`` tokens of ``E`` numbers, and ``R`` rows, one for each head and query.
"""

from __future__ import annotations

from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import TYPE_CODES, address, checked_keys, f32, i32, i64, launch, ptr, require

__all__ = ["absorbed_attention_bwd_rows", "absorbed_attention_bwd_tokens", "absorbed_attention_fwd"]

_ROWS = [*[ptr] * 3, i32, ptr, f32, ptr, ptr, *[i64] * 4]
_TOKENS = [*[ptr] * 5, i32, ptr, *[i64] * 5]


def absorbed_attention_fwd(
    rows: Tensor, x: Tensor, scale: float, num_keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mean of the tokens for each row, and the weights in it: the softmax of ``scale`` times the products with it.

    rows [B, R, E] and x [B, S, E] in float32 or bfloat16, num_keys [B], int64: the tokens behind these do not count.
    Returns [B, R, E] and [B, R, S] in that dtype; arithmetic is float32. Errors: see ``native``.
    """
    return _rows(rows, x, None, num_keys, scale)


def absorbed_attention_bwd_rows(d_means: Tensor, x: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of ``absorbed_attention_fwd`` by ``rows`` and by the products, for those of the means.

    d_means [B, R, E], x [B, S, E], weights [B, R, S]; returns [B, R, E] and [B, R, S].
    """
    return _rows(d_means, x, weights, None, scale)


def _rows(
    rows: Tensor, x: Tensor, softmax: Tensor | None, num_keys: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    (B, S, E), R, dtype = x.shape, rows.shape[1], x.dtype
    x = require("x", x, (B, S, E), *TYPE_CODES)
    rows = require("rows", rows, (B, R, E), dtype)
    if softmax is not None:
        softmax = require("weights", softmax, (B, R, S), dtype)
    num_keys = checked_keys(num_keys, B, S, 1)
    means, weights = buffers.empty((B, R, E), dtype), buffers.empty((B, R, S), dtype)
    launch(
        "absorbed_attention_rows",
        _ROWS,
        *(address(rows), address(x), address(softmax), TYPE_CODES[dtype], address(num_keys), scale),
        *(address(weights), address(means), B, S, E, R),
    )
    return means, weights


def absorbed_attention_bwd_tokens(
    d_means: Tensor, weights: Tensor, d_products: Tensor, rows: Tensor, d_first: Tensor
) -> Tensor:
    """The gradient by ``x``: of the means and of the products; and d_first [B, T, E], of the first tokens, beside it.

    The rest as in the functions before. Returns [B, S, E].
    """
    (B, R, S), T, E, dtype = weights.shape, d_first.shape[1], rows.shape[2], rows.dtype
    rows = require("rows", rows, (B, R, E), *TYPE_CODES)
    d_means = require("d_means", d_means, (B, R, E), dtype)
    weights = require("weights", weights, (B, R, S), dtype)
    d_products = require("d_products", d_products, (B, R, S), dtype)
    d_first = require("d_first", d_first, (B, T, E), dtype)
    d_x = buffers.empty((B, S, E), dtype)
    pointers = map(address, (d_means, weights, d_products, rows, d_first))
    launch("absorbed_attention_tokens", _TOKENS, *pointers, TYPE_CODES[dtype], address(d_x), B, S, E, R, T)
    return d_x
