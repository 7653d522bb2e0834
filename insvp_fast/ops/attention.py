"""Softmax attention from the packed product: attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from insvp_fast import reference
from insvp_fast.ops.registry import (
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
from insvp_fast.runtime import buffers, hardware, native, torch_private

__all__ = ["ATTENTION", "attention", "attention_few", "keeps_softmax", "require_attention"]

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
        d_kv, d_head = buffers.empty_like(kv), buffers.empty(v.shape, v.dtype, v.device)
        # each part is written where it belongs: stacking them would cost another buffer of their size
        for part, product in zip(_split_kv(d_kv, num_heads), ((d_scores, q), (p, grad)), strict=True):
            part.copy_(torch.matmul(product[0].mT, product[1], out=d_head))
        return reference.merge_heads(d_scores @ k), d_kv, None, None


def _split_kv(kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:  # [B, S, 2·D] -> two [B, heads, S, d]
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return k, v


def _contiguous(x: Tensor) -> Tensor:  # matmul would do so itself, in fresh memory
    return buffers.empty(x.shape, x.dtype, x.device).copy_(x)


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


def keeps_softmax(dtype: torch.dtype) -> bool:
    """Whether attention keeps its result and the sums of its softmax for backward, or nothing besides qkv."""
    return not (_native_attention(dtype) or _explicit_attention(dtype))


def _native_attention(dtype: torch.dtype) -> bool:
    return native.available(dtype) and native.native_status().isa != "generic"


def _explicit_attention(dtype: torch.dtype) -> bool:
    """Whether the plain products beat PyTorch's fused attention, whose backward has no 16-bit products."""
    return (hardware.wide_vectors() and hardware.has_products(dtype)) or not torch_private.HAS_FLASH


def _cpu_fwd(qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> tuple[Tensor, Tensor]:
    """[B, S, 3·D] -> the attended values [B, num_queries, D] and what backward needs of the softmax."""
    if _native_attention(qkv.dtype):
        return native.attention_fwd(qkv, num_heads, num_queries, scale), qkv.new_empty(0)
    x = qkv if hardware.has_products(qkv.dtype) else qkv.float()
    if _explicit_attention(qkv.dtype):
        return _by_image_fwd(x, num_heads, num_queries, scale).to(qkv.dtype), qkv.new_empty(0)
    q, k, v = reference.split_heads(x, num_heads)
    out, logsumexp = torch_private.flash_attention(q[:, :, :num_queries], k, v, scale)
    return reference.merge_heads(out).to(qkv.dtype), logsumexp


def _cpu_bwd(
    grad: Tensor, qkv: Tensor, out: Tensor | None, logsumexp: Tensor, num_heads: int, num_queries: int, scale: float
) -> Tensor:
    """The gradient of ``_cpu_fwd`` by the packed product, [B, S, 3·D]."""
    if out is None and _native_attention(qkv.dtype):
        return native.attention_bwd(grad, qkv, num_heads, num_queries, scale)
    x, grad = (t if hardware.has_products(qkv.dtype) else t.float() for t in (qkv, grad))
    if out is None:
        return _by_image_bwd(grad, x, num_heads, num_queries, scale).to(qkv.dtype)
    q, k, v = reference.split_heads(x, num_heads)
    d_out, out = (_heads(t, num_heads) for t in (grad, out.to(x.dtype)))
    d_q, d_k, d_v = torch_private.flash_attention_bwd(d_out, q[:, :, :num_queries], k, v, out, logsumexp, scale)
    d_qkv = torch.empty_like(qkv)
    to_q, to_k, to_v = reference.split_heads(d_qkv, num_heads)
    to_q[:, :, :num_queries] = d_q
    to_q[:, :, num_queries:] = 0
    to_k.copy_(d_k)
    to_v.copy_(d_v)
    return d_qkv


def _by_image_fwd(qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> Tensor:
    """Image after image, so that the scores of one stay in the cache."""
    out = qkv.new_empty(qkv.shape[0], num_queries, qkv.shape[-1] // 3)
    scores = qkv.new_empty(num_heads, num_queries, qkv.shape[1])
    for q, k, v, o in zip(*reference.split_heads(qkv, num_heads), _heads(out, num_heads), strict=True):
        _probabilities(q[:, :num_queries], k, scale, scores)
        torch.bmm(scores, v, out=o)
    return out


def _by_image_bwd(grad: Tensor, qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> Tensor:
    d_qkv = torch.empty_like(qkv)
    p = qkv.new_empty(num_heads, num_queries, qkv.shape[1])
    d_p = torch.empty_like(p)
    operands = zip(
        *reference.split_heads(qkv, num_heads),
        *reference.split_heads(d_qkv, num_heads),
        _heads(grad, num_heads),
        strict=True,
    )
    for q, k, v, d_q, d_k, d_v, d_o in operands:
        q = q[:, :num_queries]
        _probabilities(q, k, scale, p)
        torch.bmm(p.mT, d_o, out=d_v)
        torch.bmm(d_o, v.mT, out=d_p)
        d_scores = torch_private.softmax_bwd(d_p, p)
        torch.baddbmm(q, d_scores, k, beta=0, alpha=scale, out=d_q[:, :num_queries])
        d_q[:, num_queries:] = 0
        torch.baddbmm(k, d_scores.mT, q, beta=0, alpha=scale, out=d_k)
    return d_qkv


def _probabilities(q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
    torch.baddbmm(out, q, k.mT, beta=0, alpha=scale, out=out)
    torch.softmax(out, -1, out=out)


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
    softmax = (B, num_queries, num_heads) if impl == "auto" and keeps_softmax(qkv.dtype) else 0
    logsumexp = qkv.new_empty(softmax, dtype=widened(qkv.dtype))
    return qkv.new_empty(B, num_queries, D3 // 3), logsumexp if logsumexp.ndim == 1 else logsumexp.transpose(1, 2)


@register_fake("insvp_fast::attention_bwd", lib=LIBRARY)
def _(grad, qkv, out, logsumexp, num_heads, num_queries, scale, impl):
    return qkv.new_empty(qkv.shape)


implement("attention_fwd", _fwd)
implement("attention_bwd", _bwd)

_KERNELS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "auto": (_cpu_fwd, _cpu_bwd),
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
