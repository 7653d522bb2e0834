"""Residual addition, LayerNorm or RMSNorm, and placement of prompts in one pass: norm_insert."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order, only_needed, save, saved
from insvp_fast.ops.registry import Implementation, call, native_reason, register, require, triton_reason
from insvp_fast.runtime import buffers, native
from insvp_fast.runtime.dtypes import widened

__all__ = ["norm_insert", "norm_insert_bwd_reference", "norm_insert_reference"]


def norm_insert(
    residual: Tensor,
    branch: Tensor | None,
    prompts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    center: bool = True,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual addition, then LayerNorm or RMSNorm of tokens and prompts, placed in one buffer for the QKV product.

    Args:
        residual: [B, T, D], the stream, in any floating dtype; statistics are taken in at least fp32.
        branch: [B, T, D], what the preceding half-block adds to it, or None.
        prompts: [B, L, D], or None.
        weight, bias, eps: of the frozen norm; no weight, no affine map: it is folded into the next product.
        center: subtract the mean, as LayerNorm does; RMSNorm (Zhang and Sennrich 2019, equation 4) does not.
        dtype: of the normalized buffer, the next product's; the residual's if not given.
        impl: "auto" lets the device decide; "reference", "native" or "triton" insists.

    Returns:
        The new residual [B, T, D] in its dtype, and the normalized tokens and prompts [B, T+L, D] in ``dtype``. For
        backward it keeps the normalized rows before the affine map (without a map that is the result itself), and
        1/sigma of each row.

    Raises:
        ValueError: for shapes that do not fit, an eps below 0, a norm that requires a gradient, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    if not eps >= 0:
        raise ValueError(f"eps={eps}: expected at least 0")
    _check(residual, branch, prompts, weight, bias)
    operands = _Fwd(residual, branch, prompts, weight, bias, eps, dtype or residual.dtype, center)
    require("norm_insert_fwd", impl, operands)
    total, normed = apply(_NormInsert, *operands, impl)
    return residual if total is None else total, normed


def _check(
    residual: Tensor, branch: Tensor | None, prompts: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    if residual.ndim != 3:
        raise ValueError(f"residual has shape {tuple(residual.shape)}: expected [B, T, D]")
    B, _, D = residual.shape
    if branch is not None and branch.shape != residual.shape:
        raise ValueError(
            f"branch has shape {tuple(branch.shape)}: expected that of the residual, {tuple(residual.shape)}"
        )
    if prompts is not None and (prompts.ndim != 3 or prompts.shape != (B, prompts.shape[1], D)):
        raise ValueError(f"prompts have shape {tuple(prompts.shape)}: expected [{B}, L, {D}]")
    if weight is None and bias is not None:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected None, as no weight was given")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.shape != (D,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {(D,)}")
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient: ops.norm_insert is for frozen norms, use F.layer_norm")


def norm_insert_reference(
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D]
    prompts: Tensor | None,  # [B, L, D]
    weight: Tensor,  # [D]
    bias: Tensor | None,  # [D]
    eps: float,
    center: bool = True,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, S, D]
    """The formula of ``norm_insert``.

    The prompts stand behind the tokens and not between them: attention does not care for the order of its keys, and the
    T queries stay one strided block.
    """
    residual = residual if branch is None else residual + branch
    tokens = residual if prompts is None else torch.cat([residual, prompts.to(residual.dtype)], dim=1)
    if center:
        return residual, F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)
    normed = F.rms_norm(tokens, tokens.shape[-1:], weight, eps)
    return residual, normed if bias is None else normed + bias


def norm_insert_bwd_reference(
    grad_residual: Tensor,  # [B, T, D]
    grad_normed: Tensor,  # [B, S, D]
    normalized: Tensor,  # [B, S, D], before the affine map
    rstd: Tensor,  # [B, S, 1]
    weight: Tensor,
    center: bool = True,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``norm_insert_reference`` by the residual (and so by the branch) and by the prompts."""
    T = grad_residual.shape[1]
    d = _normalize_bwd(grad_normed * weight, normalized, rstd, center)
    return grad_residual + d[:, :T], d[:, T:]


def _normalize_bwd(g: Tensor, normalized: Tensor, rstd: Tensor, center: bool) -> Tensor:
    onward = g - normalized * (g * normalized).mean(-1, keepdim=True)
    return rstd * (onward - g.mean(-1, keepdim=True) if center else onward)


class _Fwd(NamedTuple):
    residual: Tensor
    branch: Tensor | None
    prompts: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    dtype: torch.dtype
    center: bool


class _Bwd(NamedTuple):
    grad_total: Tensor | None
    grad_normed: Tensor
    xhat: Tensor  # the normalized buffer before the affine map
    rstd: Tensor
    weight: Tensor | None
    num_tokens: int
    stream_dtype: torch.dtype
    branch_dtype: torch.dtype
    center: bool
    prompts_dtype: torch.dtype | None = None  # None is that of the stream


@first_order("norm_insert", "norm_insert_reference of the module insvp_fast.ops.norm_insert")
class _NormInsert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, Tensor]:
        a, impl = _Fwd(*arguments[:-1]), arguments[-1]
        total, normed, xhat, rstd = call("norm_insert_fwd", *a, impl)
        save(ctx, normed if a.weight is None else xhat, rstd, weights=[a.weight])
        ctx.set_materialize_grads(False)
        dtypes = a.residual.dtype, (a.residual if a.branch is None else a.branch).dtype
        ctx.rest = a.residual.shape[1], *dtypes, a.center, impl, None if a.prompts is None else a.prompts.dtype
        if a.branch is None:
            # as a result of this function: its gradient is added in backward here, and not by PyTorch
            handed_on = a.residual.requires_grad and not torch.compiler.is_compiling()
            return a.residual if handed_on else None, normed
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        xhat, rstd, weight = saved(ctx)
        if grad_normed is None:
            grad_normed = torch.zeros_like(xhat)
        kept = xhat, rstd, weight, *ctx.rest
        d_residual, d_branch, d_prompts = call("norm_insert_bwd", grad_total, grad_normed, *kept)
        d_branch = d_branch if d_branch.numel() else d_residual  # empty where it would have the same bits
        return only_needed(ctx, (d_residual, d_branch, d_prompts))


def _fwd_reference(a: _Fwd) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, D = a.residual.shape
    total = a.residual.new_empty(0) if a.branch is None else buffers.empty_like(a.residual)
    stream = a.residual if a.branch is None else torch.add(a.residual, a.branch, out=total)
    L = 0 if a.prompts is None else a.prompts.shape[1]
    parts = [stream] if a.prompts is None else [stream, a.prompts]
    normalized = [_normalize(part.to(widened(stream.dtype)), a.eps, a.center) for part in parts]
    xhat = buffers.empty((B, T + L, D), a.dtype, a.residual.device)
    torch.cat([x.to(a.dtype) for x, _ in normalized], dim=1, out=xhat)
    rstd = torch.cat([rstd for _, rstd in normalized], dim=1).squeeze(-1)
    if a.weight is None:
        return total, xhat, xhat.new_empty(0), rstd
    scaled = [x * a.weight if a.bias is None else x * a.weight + a.bias for x, _ in normalized]
    return total, torch.cat(scaled, dim=1).to(a.dtype), xhat, rstd


def _normalize(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """Rows of mean square 1, and the factor of each."""
    if center:
        normalized, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        return normalized, rstd
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _bwd_reference(a: _Bwd) -> tuple[Tensor, Tensor, Tensor]:
    wide = a.rstd.dtype
    g, x = a.grad_normed.to(wide), a.xhat.to(wide)
    g = g if a.weight is None else g * a.weight.to(wide)
    d = _normalize_bwd(g, x, a.rstd.unsqueeze(-1), a.center)
    d_tokens, d_prompts = d[:, : a.num_tokens], d[:, a.num_tokens :]
    d_residual = d_tokens if a.grad_total is None else d_tokens + a.grad_total
    d_residual = d_residual.to(a.stream_dtype).contiguous()
    d_branch = d_residual.new_empty(0) if a.branch_dtype == a.stream_dtype else d_residual.to(a.branch_dtype)
    return d_residual, d_branch, d_prompts.to(a.prompts_dtype or a.stream_dtype).contiguous()


def _fwd_native_reason(a: _Fwd) -> str | None:
    maps = [t.dtype for t in (a.residual, a.branch, a.prompts) if t is not None]
    return native_reason(a.residual.device, *maps, a.dtype)


def _bwd_native_reason(a: _Bwd) -> str | None:
    dtypes = a.grad_normed.dtype, a.xhat.dtype, a.stream_dtype, a.branch_dtype, a.prompts_dtype or a.stream_dtype
    return native_reason(a.xhat.device, *dtypes)


def _fwd_triton(a: _Fwd) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from insvp_fast.kernels.gpu import norm_insert as kernel

    return kernel.norm_insert_fwd(*a)


def _bwd_triton(a: _Bwd) -> tuple[Tensor, Tensor, Tensor]:
    from insvp_fast.kernels.gpu import norm_insert as kernel

    return kernel.norm_insert_bwd(*a)


def _fwd_triton_reason(a: _Fwd) -> str | None:
    operands = (t.dtype for t in (a.residual, a.branch, a.prompts, a.weight, a.bias) if t is not None)
    return _triton_reason(a.residual.device, a.residual.shape[-1], *operands, a.dtype)


def _bwd_triton_reason(a: _Bwd) -> str | None:
    dtypes = a.grad_normed.dtype, a.xhat.dtype, a.stream_dtype, a.branch_dtype, a.prompts_dtype or a.stream_dtype
    return _triton_reason(a.xhat.device, a.xhat.shape[-1], *dtypes)


@cache
def _triton_reason(device: torch.device, D: int, *dtypes: torch.dtype) -> str | None:
    if reason := triton_reason(device, *dtypes):
        return reason
    from insvp_fast.kernels.gpu import norm_insert as kernel

    return None if kernel.covers(D) else f"does not cover rows of {D} numbers"


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, D = a.residual.shape
    S = T + (0 if a.prompts is None else a.prompts.shape[1])
    normed = a.residual.new_empty(B, S, D, dtype=a.dtype)
    return (
        a.residual.new_empty(0 if a.branch is None else a.residual.shape),
        normed,
        normed.new_empty(0 if a.weight is None else normed.shape),
        a.residual.new_empty(B, S, dtype=widened(a.residual.dtype)),
    )


def _bwd_fake(a: _Bwd) -> tuple[Tensor, Tensor, Tensor]:
    B, S, D = a.xhat.shape
    d_residual = a.xhat.new_empty(B, a.num_tokens, D, dtype=a.stream_dtype)
    d_branch = a.xhat.new_empty(0 if a.branch_dtype == a.stream_dtype else d_residual.shape, dtype=a.branch_dtype)
    d_prompts = d_residual.new_empty(B, S - a.num_tokens, D, dtype=a.prompts_dtype or a.stream_dtype)
    return d_residual, d_branch, d_prompts


register(
    "norm_insert_fwd",
    _Fwd,
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    reference=_fwd_reference,
    native=Implementation(lambda a: native.norm_insert_fwd(*a), _fwd_native_reason, recordable=True),
    triton=Implementation(_fwd_triton, _fwd_triton_reason),
)
register(
    "norm_insert_bwd",
    _Bwd,
    "(Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    reference=_bwd_reference,
    native=Implementation(lambda a: native.norm_insert_bwd(*a), _bwd_native_reason, recordable=True),
    triton=Implementation(_bwd_triton, _bwd_triton_reason),
)
