"""What a CPU does best: the products it has instructions for, and attention by the fastest of three ways."""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast import native, reference, torch_private

__all__ = ["attention_bwd", "attention_fwd", "has_products", "keeps_softmax", "wide_vectors"]


def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices in ``dtype`` at full speed.

    fp32 and wider always, 16 bits where oneDNN has instructions for it. Elsewhere PyTorch's 16-bit products are scalar
    code, a hundred times slower than widening the operands to fp32.
    """
    return torch_private.HAS_PRODUCTS.get(dtype, True)


def wide_vectors() -> bool:
    """Whether PyTorch runs its AVX-512 code here."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def keeps_softmax(dtype: torch.dtype) -> bool:
    """Whether attention keeps its result and the sums of its softmax for backward, or nothing besides qkv."""
    return not (_native_attention(dtype) or _explicit_attention(dtype))


def _native_attention(dtype: torch.dtype) -> bool:
    return native.available(dtype) and native.native_status().isa != "generic"


def _explicit_attention(dtype: torch.dtype) -> bool:
    """Whether the plain products beat PyTorch's fused attention, whose backward has no 16-bit products."""
    return (wide_vectors() and has_products(dtype)) or not torch_private.HAS_FLASH


def attention_fwd(qkv: Tensor, num_heads: int, num_queries: int, scale: float) -> tuple[Tensor, Tensor]:
    """[B, S, 3·D] -> the attended values [B, num_queries, D] and what backward needs of the softmax."""
    if _native_attention(qkv.dtype):
        return native.attention_fwd(qkv, num_heads, num_queries, scale), qkv.new_empty(0)
    x = qkv if has_products(qkv.dtype) else qkv.float()
    if _explicit_attention(qkv.dtype):
        return _by_image_fwd(x, num_heads, num_queries, scale).to(qkv.dtype), qkv.new_empty(0)
    q, k, v = reference.split_heads(x, num_heads)
    out, logsumexp = torch_private.flash_attention(q[:, :, :num_queries], k, v, scale)
    return reference.merge_heads(out).to(qkv.dtype), logsumexp


def attention_bwd(
    grad: Tensor, qkv: Tensor, out: Tensor | None, logsumexp: Tensor, num_heads: int, num_queries: int, scale: float
) -> Tensor:
    """The gradient of ``attention_fwd`` by the packed product, [B, S, 3·D]."""
    if out is None and _native_attention(qkv.dtype):
        return native.attention_bwd(grad, qkv, num_heads, num_queries, scale)
    x, grad = (t if has_products(qkv.dtype) else t.float() for t in (qkv, grad))
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


def _heads(x: Tensor, num_heads: int) -> Tensor:  # [B, T, D] -> [B, heads, T, d]
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
