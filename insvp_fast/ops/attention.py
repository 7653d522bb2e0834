"""Softmax attention from the packed product of queries, keys and values: attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.attention_by_image import attention_by_image, attention_by_image_bwd
from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.heads import (
    check_heads,
    check_num_keys,
    keys_exist,
    merge_heads,
    pack,
    split_heads,
    split_packed,
    without_padding,
)
from insvp_fast.ops.registry import (
    FLOATS,
    AnyTensor,
    Implementation,
    call,
    cpu_reason,
    dtype_reason,
    implementation,
    native_reason,
    register,
    require,
    triton_reason,
)
from insvp_fast.runtime import hardware, native, torch_private
from insvp_fast.runtime.dtypes import widened

__all__ = ["ATTENTION", "attention", "attention_bwd_reference", "attention_reference", "cpu_attention"]


def attention(
    qkv: Tensor,
    num_heads: int,
    num_queries: int,
    scale: float,
    *,
    num_keys: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of the first ``num_queries`` tokens to all S, from the packed product.

    Args:
        qkv: [B, S, 3·D], ``num_heads`` equal heads folded into D, in any floating dtype.
        num_queries: T, 0 to S.
        scale: of the scores before the softmax.
        num_keys: [B], int64, T to S and at least 1, on the device of ``qkv``: image b attends to its first
            ``num_keys[b]`` tokens, and not to the padding behind them, which must be finite. None for all S.
        impl: "auto" lets the device decide: on GPUs the forward pass of "sdpa" (PyTorch's choice) and, where it covers
            the operands, the backward pass of "triton", on CPUs "native", else the faster of "explicit" (PyTorch's
            products, image after image) and "flash" (PyTorch's fused kernel for CPUs, not where it loses NaN). One of
            these, "reference" or "xformers" insists, in both directions. "xformers", "triton" and "flash" do not take
            ``num_keys``.

    Returns:
        [B, T, D] in the dtype of ``qkv``. Kept for backward: ``qkv`` and what the implementation needs of the softmax.

    Raises:
        ValueError: for shapes that do not fit, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if impl not in ATTENTION:
        raise ValueError(f"impl={impl!r}: expected one of {sorted(ATTENTION)}")
    check_heads(num_heads)
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: expected [B, S, 3*D] with D in {num_heads} equal heads")
    if not 0 <= num_queries <= qkv.shape[1]:
        raise ValueError(f"num_queries={num_queries}: expected 0 to {qkv.shape[1]}, the number of tokens")
    check_num_keys(num_keys, qkv, num_queries)
    operands = _Fwd(qkv, num_heads, num_queries, float(scale), num_keys)
    require("attention_fwd", "auto" if impl in _COMPOSED else impl, operands)
    if impl == "auto" and qkv.device.type != "cpu" and _triton_reason(operands):
        impl = "sdpa"
    if impl in _COMPOSED:
        return _COMPOSED[impl](*operands)
    return cast(Tensor, apply(_Attention, *operands, impl))


def attention_reference(
    qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None = None
) -> Tensor:
    """The formula of ``attention``."""
    q, k, v = split_packed(qkv, num_heads)
    scores = without_padding(scale * q[:, :, :num_queries] @ k.mT, num_keys)
    return merge_heads(scores.softmax(dim=-1) @ v)


def attention_bwd_reference(
    grad: Tensor, qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None = None
) -> Tensor:
    """The gradient of ``attention_reference`` by the packed product, written out; 0 for queries that are not asked."""
    q, k, v = split_packed(qkv, num_heads)
    q, d_out = q[:, :, :num_queries], split_heads(grad, num_heads)
    p = without_padding(scale * q @ k.mT, num_keys).softmax(dim=-1)
    d_p = d_out @ v.mT
    d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * scale
    d_q = F.pad(d_scores @ k, (0, 0, 0, k.shape[2] - num_queries))
    return torch.cat([merge_heads(d) for d in (d_q, d_scores.mT @ q, p.mT @ d_out)], dim=-1)


# Composed of PyTorch's operations, which differentiates them itself.


def _sdpa(qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling() or torch_private.transforming(qkv):
        q, k, v = _Split.forward(None, qkv, num_heads, num_queries)  # PyTorch differentiates it, and fuses the copies
    else:
        q, k, v = _Split.apply(qkv, num_heads, num_queries)
    mask = None if num_keys is None else keys_exist(num_keys, qkv.shape[1])
    return merge_heads(F.scaled_dot_product_attention(q, k, v, mask, scale=scale))


class _Split(torch.autograd.Function):
    """Queries, keys and values as views, whose gradients are each copied once, to where they belong."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_packed(qkv, num_heads)
        return q[:, :, :num_queries], k, v

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        return pack(d_q, d_k, d_v), None, None


def _xformers(qkv: Tensor, num_heads: int, num_queries: int, scale: float, num_keys: Tensor | None) -> Tensor:
    if num_keys is not None:
        raise RuntimeError(f'impl="xformers" {_TAKES_NO_NUM_KEYS}')
    if not torch.compiler.is_compiling() and (reason := dtype_reason(FLOATS, qkv.dtype)):
        raise RuntimeError(f'impl="xformers" {reason}')
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise RuntimeError('impl="xformers" needs the package xformers') from error
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # [B, S, heads, d]
    attended: Tensor = memory_efficient_attention(q[:, :num_queries], k, v, scale=scale)
    return attended.flatten(2)


_TAKES_NO_NUM_KEYS = "cannot leave out keys: it does not take num_keys"

_COMPOSED: dict[str, Callable[[Tensor, int, int, float, Tensor | None], Tensor]] = {
    "reference": attention_reference,
    "sdpa": _sdpa,
    "xformers": _xformers,
}
ATTENTION = ("auto", "native", "explicit", "flash", "triton", *_COMPOSED)


class _Fwd(NamedTuple):
    qkv: Tensor
    num_heads: int
    num_queries: int
    scale: float
    num_keys: AnyTensor | None = None


class _Bwd(NamedTuple):
    grad: Tensor
    qkv: Tensor
    out: Tensor | None
    logsumexp: Tensor  # of the softmax; empty but for "flash", which alone needs it and the result
    num_heads: int
    num_queries: int
    scale: float
    num_keys: Tensor | None = None


@first_order("attention", "attention_reference of the module insvp_fast.ops.attention")
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *arguments: Any) -> Tensor:
        *ctx.shape, num_keys, impl = arguments
        out, logsumexp = call("attention_fwd", qkv, *ctx.shape, impl, num_keys)
        ctx.save_for_backward(qkv, out if logsumexp.numel() else None, logsumexp, num_keys)
        ctx.impl = impl
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, num_keys = ctx.saved_tensors
        d_qkv = call("attention_bwd", grad, *kept, *ctx.shape, ctx.impl, num_keys)
        return d_qkv, *(None,) * 5


def _fwd_auto(a: _Fwd) -> Sequence[str]:
    if a.qkv.device.type != "cpu":
        return ["sdpa"]
    return [*_native_first(), *(["explicit"] if _prefers_explicit(a.qkv.dtype) else ["flash", "explicit"])]


def _bwd_auto(a: _Bwd) -> Sequence[str]:
    if a.qkv.device.type != "cpu":
        return ["triton"]
    return ["flash"] if a.out is not None else [*_native_first(), "explicit"]


def _native_first() -> Sequence[str]:
    return [] if native.native_status().isa == "generic" else ["native"]


def _prefers_explicit(dtype: torch.dtype) -> bool:
    """Whether the plain products beat PyTorch's fused attention, whose backward has no 16-bit products, or that makes
    numbers of NaN."""
    wins = hardware.wide_vectors() and hardware.has_products(dtype)
    return wins or not torch_private.FLASH_KEEPS_NAN


def cpu_attention(dtype: torch.dtype) -> str:
    """The implementation that ``impl="auto"`` takes on this CPU."""
    return implementation("attention_fwd", "auto", _Fwd(torch.empty(1, 1, 3, dtype=dtype, device="cpu"), 1, 1, 1.0))


def _nothing(a: _Fwd) -> Tensor:
    return a.qkv.new_empty(0, dtype=widened(a.qkv.dtype))


def _fwd_reference(a: _Fwd) -> tuple[Tensor, Tensor]:
    return attention_reference(*a), _nothing(a)


def _bwd_reference(a: _Bwd) -> Tensor:
    return attention_bwd_reference(a.grad, a.qkv, a.num_heads, a.num_queries, a.scale, a.num_keys)


def _fwd_native(a: _Fwd) -> tuple[Tensor, Tensor]:
    return native.attention_fwd(*a), _nothing(a)


def _bwd_native(a: _Bwd) -> Tensor:
    return native.attention_bwd(a.grad, a.qkv, a.num_heads, a.num_queries, a.scale, a.num_keys)


def _native_reason(a: _Fwd | _Bwd) -> str | None:
    return native_reason(a.qkv.device, a.qkv.dtype)


def _multiplied(x: Tensor) -> Tensor:
    """``x`` in a dtype in which the CPU multiplies."""
    return x if hardware.has_products(x.dtype) else x.float()


def _fwd_explicit(a: _Fwd) -> tuple[Tensor, Tensor]:
    out = attention_by_image(_multiplied(a.qkv), a.num_heads, a.num_queries, a.scale, a.num_keys)
    return out.to(a.qkv.dtype), _nothing(a)


def _bwd_explicit(a: _Bwd) -> Tensor:
    shape = a.num_heads, a.num_queries, a.scale
    d_qkv = attention_by_image_bwd(_multiplied(a.grad), _multiplied(a.qkv), *shape, a.num_keys)
    return d_qkv.to(a.qkv.dtype)


def _fwd_flash(a: _Fwd) -> tuple[Tensor, Tensor]:
    q, k, v = split_packed(_multiplied(a.qkv), a.num_heads)
    out, logsumexp = torch_private.flash_attention(q[:, :, : a.num_queries], k, v, a.scale)
    return merge_heads(out).to(a.qkv.dtype), logsumexp


def _bwd_flash(a: _Bwd) -> Tensor:
    if a.out is None:  # of an empty batch
        return torch.zeros_like(a.qkv)
    q, k, v = split_packed(_multiplied(a.qkv), a.num_heads)
    d_out, out = (split_heads(t, a.num_heads) for t in (_multiplied(a.grad), a.out.to(q.dtype)))
    grads = torch_private.flash_attention_bwd(d_out, q[:, :, : a.num_queries], k, v, out, a.logsumexp, a.scale)
    return pack(*grads).to(a.qkv.dtype)


def _flash_reason(a: _Fwd | _Bwd) -> str | None:
    absent = None if torch_private.HAS_FLASH else "cannot run here: this PyTorch has no fused attention for CPUs"
    return cpu_reason(a.qkv.device) or absent or _num_keys_reason(a)


def _num_keys_reason(a: _Fwd | _Bwd) -> str | None:
    return None if a.num_keys is None else _TAKES_NO_NUM_KEYS


def _fwd_sdpa(a: _Fwd) -> tuple[Tensor, Tensor]:
    return _sdpa(*a).contiguous(), _nothing(a)


def _fwd_triton(a: _Fwd) -> tuple[Tensor, Tensor]:
    from insvp_fast.kernels.gpu import attention as kernel

    return kernel.attention_fwd(a.qkv, a.num_heads, a.num_queries, a.scale), _nothing(a)


def _bwd_triton(a: _Bwd) -> Tensor:
    from insvp_fast.kernels.gpu import attention as kernel

    return kernel.attention_bwd(a.grad, a.qkv, a.num_heads, a.num_queries, a.scale)


def _triton_reason(a: _Fwd | _Bwd) -> str | None:
    device, dtype = a.qkv.device, a.qkv.dtype
    if reason := _device_reason(device, dtype) or _num_keys_reason(a):
        return reason
    from insvp_fast.kernels.gpu import attention as kernel

    T, S, d = a.num_queries, a.qkv.shape[1], a.qkv.shape[2] // (3 * a.num_heads)
    fits = 1 <= T <= S <= kernel.MOST_KEYS and 1 <= d <= kernel.WIDEST_HEAD
    return None if fits else f"does not cover {T} of {S} tokens of {d} numbers in {dtype} on {device}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # no compiler can trace questions to a device
def _device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := triton_reason(device, dtype, covered=(torch.bfloat16, torch.float16)):
        return reason
    from insvp_fast.kernels.gpu import attention as kernel

    return None if kernel.covers(device, 1, 1, dtype) else f"cannot run here: {device} has too little shared memory"


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor]:
    B, _, D3 = a.qkv.shape
    return a.qkv.new_empty(B, a.num_queries, D3 // 3), _nothing(a)


def _fwd_flash_fake(a: _Fwd) -> tuple[Tensor, Tensor]:
    out, _ = _fwd_fake(a)
    logsumexp = out.new_empty(len(out), a.num_queries, a.num_heads, dtype=widened(out.dtype))
    return out, logsumexp.transpose(1, 2)


register(
    "attention_fwd",
    _Fwd,
    "(Tensor, Tensor)",
    fake=_fwd_fake,
    reference=_fwd_reference,
    auto=_fwd_auto,
    native=Implementation(_fwd_native, _native_reason, recordable=True),
    explicit=Implementation(_fwd_explicit, lambda a: cpu_reason(a.qkv.device)),
    flash=Implementation(_fwd_flash, _flash_reason, fake=_fwd_flash_fake),
    sdpa=Implementation(_fwd_sdpa, lambda a: None),
    triton=Implementation(_fwd_triton, _triton_reason),
)
register(
    "attention_bwd",
    _Bwd,
    "Tensor",
    fake=lambda a: a.qkv.new_empty(a.qkv.shape),
    reference=_bwd_reference,
    auto=_bwd_auto,
    native=Implementation(_bwd_native, _native_reason, recordable=True),
    explicit=Implementation(_bwd_explicit, lambda a: cpu_reason(a.qkv.device)),
    flash=Implementation(_bwd_flash, _flash_reason),
    triton=Implementation(_bwd_triton, _triton_reason),
)
