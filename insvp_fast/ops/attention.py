"""Softmax attention from the packed product: attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from insvp_fast import cpu, memory, native, reference, torch_private
from insvp_fast.ops.library import (
    LIBRARY,
    NATIVE_DTYPES,
    apply,
    define,
    first_order,
    implement,
    require_dtypes,
    require_native,
    widened,
)

__all__ = ["ATTENTION", "attention", "attention_few", "require_attention"]

define("attention_fwd(Tensor qkv, int num_heads, int num_queries, float scale, str impl) -> (Tensor, Tensor)")
define(
    "attention_bwd(Tensor grad, Tensor qkv, Tensor? out, Tensor logsumexp, int num_heads, int num_queries, "
    "float scale, str impl) -> Tensor"
)


def attention(qkv: Tensor, num_heads: int, num_queries: int, scale: float, *, impl: str = "auto") -> Tensor:
    """Softmax attention of the first ``num_queries`` tokens to all S, from the packed product.

    Args:
        qkv: [B, S, 3·D], heads folded into D.
        scale: of the scores before the softmax.
        impl: "auto" lets the device decide; "reference", "native", "sdpa", "triton" or "xformers" insists.

    Returns:
        [B, num_queries, D]. Kept for backward: ``qkv`` and what the implementation needs of the softmax.

    Raises:
        ValueError: for an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if impl not in _ATTENTION:
        raise ValueError(f"impl={impl!r}: expected one of {sorted(_ATTENTION)}")
    require_attention(impl, qkv.dtype, qkv.device)
    return _ATTENTION[impl](qkv, num_heads, num_queries, scale)


def require_attention(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise RuntimeError where an implementation of ``attention`` that was asked for has no such dtype or device."""
    if torch.compiler.is_compiling():  # a compiled graph asks when it runs
        return
    if impl in _COVERED:
        require_dtypes(impl, _COVERED[impl], dtype)
    if impl == "native":
        require_native(device)


def attention_few(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Softmax attention of few queries, whose probabilities are cheaper to keep than to make again.

    Args:
        q, kv: [B, T, D] and, packed, [B, S, 2·D], heads folded into D.
        scale: of the scores before the softmax.

    Returns:
        [B, T, D]. Kept for backward: ``q``, ``kv`` and the probabilities, [B, heads, T, S].
    """
    return apply(_AttentionFew, q, kv, num_heads, scale)


@first_order("attention_few", "insvp_fast.reference.attention")
class _AttentionFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, kv, num_heads, scale):
        k, v = map(_contiguous, _split_kv(kv, num_heads))
        p = (scale * _heads(q, num_heads) @ k.mT).softmax(dim=-1)
        ctx.save_for_backward(q, kv, p)
        ctx.shape = num_heads, scale
        return reference.merge_heads(p @ v)

    @staticmethod
    def backward(ctx: Any, grad):
        q, kv, p = ctx.saved_tensors
        num_heads, scale = ctx.shape
        k, v = map(_contiguous, _split_kv(kv, num_heads))
        q, grad = _heads(q, num_heads), _heads(grad, num_heads)
        d_scores = scale * torch_private.softmax_bwd(grad @ v.mT, p)
        d_kv, d_head = memory.empty_like(kv), memory.empty(v.shape, v.dtype, v.device)
        # each part is written where it belongs: stacking them would cost another buffer of their size
        for part, product in zip(_split_kv(d_kv, num_heads), ((d_scores, q), (p, grad)), strict=True):
            part.copy_(torch.matmul(product[0].mT, product[1], out=d_head))
        return reference.merge_heads(d_scores @ k), d_kv, None, None


def _split_kv(kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:  # [B, S, 2·D] -> two [B, heads, S, d]
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return k, v


def _contiguous(x: Tensor) -> Tensor:  # matmul would do so itself, in fresh memory
    return memory.empty(x.shape, x.dtype, x.device).copy_(x)


def _heads(x: Tensor, num_heads: int) -> Tensor:  # [B, T, D] -> [B, heads, T, d]
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


@first_order("attention", "insvp_fast.reference.attention")
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, *rest):  # num_heads, num_queries, scale, impl
        out, logsumexp = torch.ops.insvp_fast.attention_fwd.default(qkv, *rest)
        ctx.save_for_backward(qkv, out if logsumexp.numel() else None, logsumexp)
        ctx.rest = rest
        return out

    @staticmethod
    def backward(ctx: Any, grad):
        return torch.ops.insvp_fast.attention_bwd.default(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 4


def _auto(qkv, num_heads, num_queries, scale):
    if qkv.device.type == "cpu":
        return apply(_Attention, qkv, num_heads, num_queries, scale, "auto")
    return _sdpa(qkv, num_heads, num_queries, scale)


def _sdpa(qkv, num_heads, num_queries, scale):
    q, k, v = reference.split_heads(qkv, num_heads)
    return reference.merge_heads(
        torch.nn.functional.scaled_dot_product_attention(q[:, :, :num_queries], k, v, scale=scale)
    )


def _xformers(qkv, num_heads, num_queries, scale):
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise RuntimeError('impl="xformers" needs the package xformers') from error
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # [B, S, heads, d]
    return memory_efficient_attention(q[:, :num_queries], k, v, scale=scale).flatten(2)


def _native_fwd(qkv, num_heads, num_queries, scale):
    return native.attention_fwd(qkv, num_heads, num_queries, scale), qkv.new_empty(0)


def _native_bwd(grad, qkv, out, logsumexp, *shape):
    return native.attention_bwd(grad, qkv, *shape)


def _triton_fwd(qkv, num_heads, num_queries, scale):
    from insvp_fast.kernels.gpu import attention as kernel

    _, S, D3 = qkv.shape
    d = D3 // (3 * num_heads)
    if not kernel.covers(qkv.device, S, d, qkv.dtype):
        raise RuntimeError(f'impl="triton" does not cover {S} tokens of {d} numbers in {qkv.dtype} on {qkv.device}')
    return kernel.attention_fwd(qkv, num_heads, num_queries, scale), qkv.new_empty(0)


def _triton_bwd(grad, qkv, out, logsumexp, *shape):
    from insvp_fast.kernels.gpu import attention as kernel

    return kernel.attention_bwd(grad, qkv, *shape)


def _fwd(*arguments):
    return _KERNELS[arguments[-1]][0](*arguments[:-1])


def _bwd(*arguments):
    return _KERNELS[arguments[-1]][1](*arguments[:-1])


@register_fake("insvp_fast::attention_fwd", lib=LIBRARY)
def _(qkv, num_heads, num_queries, scale, impl):
    B, _, D3 = qkv.shape
    softmax = (B, num_queries, num_heads) if impl == "auto" and cpu.keeps_softmax(qkv.dtype) else 0
    logsumexp = qkv.new_empty(softmax, dtype=widened(qkv.dtype))
    return qkv.new_empty(B, num_queries, D3 // 3), logsumexp if logsumexp.ndim == 1 else logsumexp.transpose(1, 2)


@register_fake("insvp_fast::attention_bwd", lib=LIBRARY)
def _(grad, qkv, out, logsumexp, num_heads, num_queries, scale, impl):
    return qkv.new_empty(qkv.shape)


implement("attention_fwd", _fwd)
implement("attention_bwd", _bwd)

_KERNELS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "auto": (cpu.attention_fwd, cpu.attention_bwd),
    "native": (_native_fwd, _native_bwd),
    "triton": (_triton_fwd, _triton_bwd),
}
_ATTENTION: dict[str, Callable[..., Tensor]] = {
    "auto": _auto,
    "reference": reference.attention,
    "sdpa": _sdpa,
    "xformers": _xformers,
    "native": lambda *arguments: apply(_Attention, *arguments, "native"),
    "triton": lambda *arguments: apply(_Attention, *arguments, "triton"),
}
ATTENTION = tuple(_ATTENTION)
_COVERED = {
    "native": NATIVE_DTYPES,
    "triton": (torch.bfloat16, torch.float16),
    "xformers": (torch.float32, torch.bfloat16, torch.float16),
}
