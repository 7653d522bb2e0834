"""Softmax attention inside windows of tokens, with a bias for each pair and prompts for all: window_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.heads import check_heads, merge_heads, split_heads, split_packed
from insvp_fast.ops.registry import AnyTensor, Implementation, call, native_reason, register, require
from insvp_fast.runtime import native
from insvp_fast.runtime.dtypes import widened

__all__ = ["WINDOW_ATTENTION", "window_attention", "window_attention_bwd_reference", "window_attention_reference"]

WINDOW_ATTENTION = ("auto", "native", "reference", "sdpa")


def window_attention(
    qkv: Tensor,
    num_heads: int,
    windows: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    *,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of each window's tokens to one another and to all prompts, from the packed product.

    The scores are scale·q·k; those of two tokens get ``bias`` and ``mask``. A window may be any set of tokens: Swin's
    shifted windows are other sets than those before, and nothing is moved.

    Args:
        qkv: [B, T+L, 3·D], ``num_heads`` equal heads folded into D, in any floating dtype. The first T rows are the
            tokens of the image, the last L its prompts.
        windows: int32 [n, w], the tokens of each window. Each of the T = n·w tokens stands in one window.
        bias: [heads, w, w], frozen, the same in all windows; None adds nothing.
        mask: [n, w, w], frozen, the same for all heads; None adds nothing.
        scale: of the scores before bias and mask.
        impl: "auto" lets the device decide: on GPUs "sdpa", on CPUs "native" where it is there, else "reference". One
            of ``WINDOW_ATTENTION`` insists.

    Returns:
        [B, T, D] in the dtype of ``qkv``, without the prompts, which do not ask. Kept for backward: the arguments.

    Raises:
        ValueError: for shapes that do not fit, a bias or mask that would be trained, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if impl not in WINDOW_ATTENTION:
        raise ValueError(
            f"impl={impl!r}: expected one of {sorted(WINDOW_ATTENTION)} for attention in windows or with a bias"
        )
    check_heads(num_heads)
    _check(qkv, num_heads, windows, bias, mask)
    require("window_attention_fwd", "auto", _Fwd(qkv, num_heads, windows, bias, mask, scale))
    bias, mask = (None if x is None else x.to(widened(x.dtype)) for x in (bias, mask))
    operands = _Fwd(qkv, num_heads, windows, bias, mask, float(scale))
    if impl == "auto" and qkv.device.type != "cpu":
        impl = "sdpa"
    if impl == "sdpa":
        return _sdpa(operands)
    require("window_attention_fwd", impl, operands)
    return cast(Tensor, apply(_WindowAttention, *operands, impl))


def _check(qkv: Tensor, num_heads: int, windows: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: expected [B, T+L, 3*D] with D in {num_heads} equal heads")
    if windows.ndim != 2 or windows.dtype != torch.int32 or windows.numel() > qkv.shape[1]:
        raise ValueError(
            f"windows is {windows.dtype} {tuple(windows.shape)}: expected int32 [n, w], n*w up to {qkv.shape[1]} tokens"
        )
    w = windows.shape[1]
    for name, x, shape in (("bias", bias, (num_heads, w, w)), ("mask", mask, (*windows.shape, w))):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}")
        if x is not None and x.requires_grad:
            raise ValueError(f"ops.window_attention is for a frozen {name}: expected requires_grad=False")


class _Fwd(NamedTuple):
    qkv: Tensor
    num_heads: int
    windows: AnyTensor
    bias: Tensor | None
    mask: Tensor | None
    scale: float


class _Bwd(NamedTuple):
    grad: Tensor
    qkv: Tensor
    num_heads: int
    windows: Tensor
    bias: Tensor | None
    mask: Tensor | None
    scale: float


def window_attention_reference(
    qkv: Tensor, num_heads: int, windows: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """The formula of ``window_attention``."""
    q, k, v = _gather(qkv, num_heads, windows)
    probabilities = _probabilities(q, k, _summands(bias, mask, k.shape[-2] - q.shape[-2]), scale)
    return _scatter(probabilities @ v, windows)


def window_attention_bwd_reference(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    windows: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The gradient of ``window_attention_reference`` by the packed product, written out."""
    q, k, v = _gather(qkv, num_heads, windows)
    d_out = split_heads(grad, num_heads)[:, :, windows]
    p = _probabilities(q, k, _summands(bias, mask, k.shape[-2] - q.shape[-2]), scale)
    d_p = d_out @ v.mT
    d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * scale
    w, L = windows.shape[1], qkv.shape[1] - windows.numel()
    d_q = F.pad(_scatter(d_scores @ k, windows), (0, 0, 0, L))  # prompts do not ask
    d_k, d_v = d_scores.mT @ q, p.mT @ d_out
    # a token is in one window, a prompt in all
    d_k, d_v = (torch.cat([_scatter(d[..., :w, :], windows), merge_heads(d[..., w:, :].sum(2))], 1) for d in (d_k, d_v))
    return torch.cat([d_q, d_k, d_v], dim=-1)


def _gather(qkv: Tensor, num_heads: int, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, heads, n, w, d], keys and values [B, heads, n, w+L, d] of each window."""
    q, k, v = split_packed(qkv, num_heads)
    prompts = torch.arange(windows.numel(), qkv.shape[1], device=qkv.device, dtype=windows.dtype)
    rows = torch.cat([windows, prompts.expand(windows.shape[0], -1)], dim=1)
    return q[:, :, windows], k[:, :, rows], v[:, :, rows]


def _scatter(x: Tensor, windows: Tensor) -> Tensor:  # [B, heads, n, w, d] -> [B, T, D]
    """The rows of all windows, in the order of the tokens."""
    return merge_heads(x.flatten(2, 3)[:, :, windows.flatten().argsort()])


def _summands(bias: Tensor | None, mask: Tensor | None, prompts: int) -> Tensor | None:
    """What is added to the scores: [heads or 1, n or 1, w, w+L], or None; the prompts, which are last, get 0."""
    both = [x for x in (None if bias is None else bias[:, None], mask) if x is not None]
    return F.pad(sum(both[1:], both[0]), (0, prompts)) if both else None


def _probabilities(q: Tensor, k: Tensor, summands: Tensor | None, scale: float) -> Tensor:
    scores = scale * q @ k.mT
    return (scores if summands is None else scores + summands).softmax(dim=-1).to(q.dtype)


def _sdpa(a: _Fwd) -> Tensor:
    """Composed of PyTorch's operations, which differentiates them itself."""
    q, k, v = _gather(a.qkv, a.num_heads, a.windows)
    n, w = a.windows.shape
    added = _summands(a.bias, a.mask, k.shape[-2] - w)
    if added is not None:
        added = added.expand(a.num_heads, n, w, -1).flatten(0, 1).to(q.dtype)
    # PyTorch's fused kernels take four dimensions: heads and windows become one
    q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=a.scale)
    return _scatter(out.unflatten(1, (a.num_heads, n)), a.windows)


@first_order("window_attention", "window_attention_reference of the module insvp_fast.ops.window_attention")
class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        given, ctx.impl = _Fwd(*arguments[:-1]), arguments[-1]
        ctx.save_for_backward(given.qkv, given.windows, given.bias, given.mask)
        ctx.num_heads, ctx.scale = given.num_heads, given.scale
        return cast(Tensor, call("window_attention_fwd", *arguments))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, windows, bias, mask = ctx.saved_tensors
        operands = _Bwd(grad, qkv, ctx.num_heads, windows, bias, mask, ctx.scale)
        return call("window_attention_bwd", *operands, ctx.impl), *(None,) * 6


def _fwd_native(a: _Fwd) -> Tensor:
    return native.window_attention_fwd(a.qkv, a.num_heads, native.Windows(a.windows, a.bias, a.mask), a.scale)


def _bwd_native(a: _Bwd) -> Tensor:
    windows = native.Windows(a.windows, a.bias, a.mask)
    return native.window_attention_bwd(a.grad, a.qkv, a.num_heads, windows, a.scale)


def _native_reason(a: _Fwd | _Bwd) -> str | None:
    return native_reason(a.qkv.device, a.qkv.dtype, weights=[a.bias, a.mask])


def _auto(a: _Fwd | _Bwd) -> Sequence[str]:
    """On CPUs; on GPUs "auto" is "sdpa", above. A program that was exported on a CPU comes here with other tensors."""
    return ["native"] if a.qkv.device.type == "cpu" and native.native_status().isa != "generic" else []


def _fwd_fake(a: _Fwd) -> Tensor:
    return a.qkv.new_empty(a.qkv.shape[0], a.windows.numel(), a.qkv.shape[2] // 3)


register(
    "window_attention_fwd",
    _Fwd,
    "Tensor",
    fake=_fwd_fake,
    reference=lambda a: window_attention_reference(*a),
    auto=_auto,
    native=Implementation(_fwd_native, _native_reason, recordable=True),
)
register(
    "window_attention_bwd",
    _Bwd,
    "Tensor",
    fake=lambda a: a.qkv.new_empty(a.qkv.shape),
    reference=lambda a: window_attention_bwd_reference(*a),
    auto=_auto,
    native=Implementation(_bwd_native, _native_reason, recordable=True),
)
