"""Softmax attention inside windows of tokens, with a bias for each pair and prompts for all: window_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order
from insvp_fast.ops.heads import merge_heads, split_heads, split_packed
from insvp_fast.ops.registry import Implementation, native_reason, register, require, widened
from insvp_fast.runtime import native

__all__ = ["WINDOW_ATTENTION", "window_attention", "window_attention_bwd_reference", "window_attention_reference"]

WINDOW_ATTENTION = ("auto", "native", "reference", "sdpa")
MASKED = -100.0  # what Swin adds to the score of two tokens that a shifted window brought together; not minus infinity


def window_attention(
    qkv: Tensor,
    num_heads: int,
    windows: Tensor,
    bias: Tensor | None,
    regions: Tensor | None,
    scale: float,
    *,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of each window's tokens to one another and to all prompts, from the packed product.

    The scores are scale·q·k; those of two tokens get ``bias``, and -100 where their regions differ. So a window may be
    any set of tokens: Swin's shifted windows are others than those before, and nothing is moved.

    Args:
        qkv: [B, T+L, 3·D], ``num_heads`` equal heads folded into D, in any floating dtype. The first T rows are the
            tokens of the image, the last L its prompts.
        windows: int32 [n, w], the tokens of each window. Each of the T = n·w tokens stands in one window.
        bias: [heads, w, w], frozen; None adds nothing.
        regions: int32 [n, w], the region of each token of ``windows``; None is one region.
        scale: of the scores before the bias.
        impl: "auto" lets the device decide: on GPUs "sdpa", on CPUs "native" where it is there, else "reference". One
            of ``WINDOW_ATTENTION`` insists.

    Returns:
        [B, T, D] in the dtype of ``qkv``, without the prompts, which do not ask. Kept for backward: the arguments.

    Raises:
        ValueError: for shapes that do not fit, a bias that would be trained, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if impl not in WINDOW_ATTENTION:
        raise ValueError(f"impl={impl!r}: expected one of {sorted(WINDOW_ATTENTION)}")
    _check(qkv, num_heads, windows, bias, regions)
    bias = None if bias is None else bias.to(widened(bias.dtype))
    operands = _Fwd(qkv, num_heads, windows, bias, regions, scale)
    if impl == "auto" and qkv.device.type != "cpu":
        impl = "sdpa"
    if impl == "sdpa":
        return _sdpa(operands)
    require("window_attention_fwd", impl, operands)
    return cast(Tensor, apply(_WindowAttention, *operands, impl))


def _check(qkv: Tensor, num_heads: int, windows: Tensor, bias: Tensor | None, regions: Tensor | None) -> None:
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: expected [B, T+L, 3*D] with D in {num_heads} equal heads")
    if windows.ndim != 2 or windows.dtype != torch.int32 or windows.numel() > qkv.shape[1]:
        raise ValueError(
            f"windows is {windows.dtype} {tuple(windows.shape)}: expected int32 [n, w], n*w up to {qkv.shape[1]} tokens"
        )
    w = windows.shape[1]
    if bias is not None and tuple(bias.shape) != (num_heads, w, w):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected {(num_heads, w, w)}")
    if bias is not None and bias.requires_grad:
        raise ValueError("ops.window_attention is for a frozen bias: expected requires_grad=False")
    if regions is not None and (regions.shape != windows.shape or regions.dtype != torch.int32):
        raise ValueError(
            f"regions is {regions.dtype} {tuple(regions.shape)}: expected int32 {tuple(windows.shape)}, as windows"
        )


class _Fwd(NamedTuple):
    qkv: Tensor
    num_heads: int
    windows: Tensor
    bias: Tensor | None
    regions: Tensor | None
    scale: float


class _Bwd(NamedTuple):
    grad: Tensor
    qkv: Tensor
    num_heads: int
    windows: Tensor
    bias: Tensor | None
    regions: Tensor | None
    scale: float


def window_attention_reference(
    qkv: Tensor, num_heads: int, windows: Tensor, bias: Tensor | None, regions: Tensor | None, scale: float
) -> Tensor:
    """The formula of ``window_attention``."""
    q, k, v = _gather(qkv, num_heads, windows)
    mask = _mask(num_heads, windows, bias, regions, k.shape[-2])
    probabilities = _probabilities(q, k, mask, scale)
    return _scatter(probabilities @ v, windows)


def window_attention_bwd_reference(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    windows: Tensor,
    bias: Tensor | None,
    regions: Tensor | None,
    scale: float,
) -> Tensor:
    """The gradient of ``window_attention_reference`` by the packed product, written out."""
    q, k, v = _gather(qkv, num_heads, windows)
    d_out = split_heads(grad, num_heads)[:, :, windows]
    p = _probabilities(q, k, _mask(num_heads, windows, bias, regions, k.shape[-2]), scale)
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


def _mask(heads: int, windows: Tensor, bias: Tensor | None, regions: Tensor | None, keys: int) -> Tensor | None:
    """What is added to the scores: [heads, n or 1, w, w+L], or None; prompts, the last keys, get 0."""
    w, mask = windows.shape[1], None
    if bias is not None:
        mask = bias[:, None]
    if regions is not None:
        apart = regions[:, :, None] != regions[:, None, :]
        dtype = torch.float32 if mask is None else mask.dtype
        masked = torch.zeros((), device=windows.device, dtype=dtype).masked_fill(apart, MASKED)
        mask = masked.expand(heads, -1, -1, -1) if mask is None else mask + masked
    return None if mask is None else F.pad(mask, (0, keys - w))


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = scale * q @ k.mT
    return (scores if mask is None else scores + mask).softmax(dim=-1).to(q.dtype)


def _sdpa(a: _Fwd) -> Tensor:
    """Composed of PyTorch's operations, which differentiates them itself."""
    q, k, v = _gather(a.qkv, a.num_heads, a.windows)
    n, w = a.windows.shape
    mask = _mask(a.num_heads, a.windows, a.bias, a.regions, k.shape[-2])
    if mask is not None:  # of every head and window, for all images
        mask = mask.expand(a.num_heads, n, w, -1).flatten(0, 1).to(q.dtype)
    # PyTorch's fused kernels take four dimensions: heads and windows become one
    out = F.scaled_dot_product_attention(*(t.flatten(1, 2) for t in (q, k, v)), attn_mask=mask, scale=a.scale)
    return _scatter(out.unflatten(1, (a.num_heads, n)), a.windows)


@first_order("window_attention", "window_attention_reference of the module insvp_fast.ops.window_attention")
class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        given, ctx.impl = _Fwd(*arguments[:-1]), arguments[-1]
        ctx.save_for_backward(given.qkv, given.windows, given.bias, given.regions)
        ctx.num_heads, ctx.scale = given.num_heads, given.scale
        return cast(Tensor, torch.ops.insvp_fast.window_attention_fwd.default(*arguments))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, *windows = ctx.saved_tensors
        operands = _Bwd(grad, qkv, ctx.num_heads, *windows, ctx.scale)
        return torch.ops.insvp_fast.window_attention_bwd.default(*operands, ctx.impl), *(None,) * 6


def _fwd_native(a: _Fwd) -> Tensor:
    return native.window_attention_fwd(a.qkv, a.num_heads, native.Windows(a.windows, a.bias, a.regions), a.scale)


def _bwd_native(a: _Bwd) -> Tensor:
    windows = native.Windows(a.windows, a.bias, a.regions)
    return native.window_attention_bwd(a.grad, a.qkv, a.num_heads, windows, a.scale)


def _native_reason(a: _Fwd | _Bwd) -> str | None:
    return native_reason(a.qkv.device, a.qkv.dtype, weights=[a.bias])


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
    native=Implementation(_fwd_native, _native_reason),
)
register(
    "window_attention_bwd",
    _Bwd,
    "Tensor",
    fake=lambda a: a.qkv.new_empty(a.qkv.shape),
    reference=lambda a: window_attention_bwd_reference(*a),
    auto=_auto,
    native=Implementation(_bwd_native, _native_reason),
)
