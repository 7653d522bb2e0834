"""The image prompt in one pass: superpose."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from insvp_fast.ops.autograd import apply, first_order, only_needed, save, saved
from insvp_fast.ops.registry import (
    DTYPES,
    AnyTensor,
    Implementation,
    call,
    native_reason,
    register,
    require,
    triton_reason,
)
from insvp_fast.reference import fold, normalize, unfold
from insvp_fast.runtime import native
from insvp_fast.runtime.dtypes import widened

__all__ = ["Blend", "PatchWeights", "superpose", "superpose_bwd_reference", "superpose_reference"]


class PatchWeights(NamedTuple):
    """The patch prompter G_l, two fully connected layers on the K pixels of a patch."""

    w1: Tensor  # [R, K]
    b1: Tensor  # [R]
    w2: Tensor  # [K, R]
    b2: Tensor  # [K]


class Blend(NamedTuple):
    """How an image and its prompts become patches."""

    patch_size: int
    global_weight: float  # w_g
    patch_weight: float  # w_l


def superpose(
    image: Tensor,
    global_prompt: Tensor | None,
    weights: PatchWeights,
    blend: Blend,
    *,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    kept: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The prompted image x + w_g·p_g + w_l·G_l(x), unfolded into patches, in one pass (eq. 5, 6 and 7).

    Args:
        image, global_prompt: [B, C, H, W], of floating dtypes, the image also of uint8; no global prompt, no such term.
        weights, blend: trained weights of the patch prompter, and fixed numbers.
        dtype: of the result; the image's, for uint8 the scale's, if not given. Arithmetic is fp32 at least.
        scale, shift: [C], fp32, for a uint8 image u and for no other: x is u·scale + shift. Neither has a gradient.
        kept: [B, C, H, W], bool, dropout's mask: the patch prompt counts only where it is True. That what is left
            counts more, by 1 / (1 - p), is for ``patch_weight`` to say.
        impl: "auto" lets the device decide; "reference", "native" or "triton" insists.

    Returns:
        [B, N, K]

    Raises:
        ValueError: for shapes that do not fit, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    _check(image, global_prompt, weights, blend, scale, shift)
    if kept is not None and (kept.shape != image.shape or kept.dtype != torch.bool):
        raise ValueError(f"kept is {kept.dtype} {tuple(kept.shape)}: expected torch.bool {tuple(image.shape)}")
    dtype = dtype or (image if scale is None else scale).dtype
    numbers = blend.patch_size, float(blend.global_weight), float(blend.patch_weight)
    operands = _Fwd(image, global_prompt, *weights, *numbers, dtype, scale, shift, kept)
    require("superpose_fwd", impl, operands)
    return cast(Tensor, apply(_Superpose, *operands, impl))


def _check(
    image: Tensor,
    global_prompt: Tensor | None,
    weights: PatchWeights,
    blend: Blend,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if image.ndim != 4:
        raise ValueError(f"image has shape {tuple(image.shape)}: expected [B, C, H, W]")
    (_, C, H, W), P = image.shape, blend.patch_size
    if P < 1:
        raise ValueError(f"patch_size={P}: expected at least 1")
    K, R = C * P**2, weights.b1.numel()
    if H % P or W % P:
        raise ValueError(f"image of {H}x{W} pixels: expected multiples of the patch size {P}")
    if global_prompt is not None and global_prompt.shape != image.shape:
        raise ValueError(
            f"global_prompt has shape {tuple(global_prompt.shape)}: expected that of the image, {tuple(image.shape)}"
        )
    shapes = (R, K), (R,), (K, R), (K,)
    for name, weight, shape in zip(PatchWeights._fields, weights, shapes, strict=True):
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}: expected {shape}")
    if image.dtype not in (*DTYPES, torch.uint8):
        raise ValueError(f"image is {image.dtype}: expected floating-point numbers or torch.uint8")
    if (image.dtype == torch.uint8) != (scale is not None) or (scale is None) != (shift is None):
        raise ValueError(f"image is {image.dtype}: expected scale and shift for uint8, and for nothing else")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (vector.shape != (C,) or vector.dtype != torch.float32):
            raise ValueError(f"{name} is {vector.dtype} {tuple(vector.shape)}: expected torch.float32 {(C,)}")


def superpose_reference(
    image: Tensor, global_prompt: Tensor | None, weights: PatchWeights, blend: Blend, kept: Tensor | None = None
) -> Tensor:  # [B, N, K]
    """The formula of ``superpose``, of a floating-point image in its own dtype."""
    (w1, b1, w2, b2), (P, w_g, w_l) = weights, blend
    x = unfold(image, P)
    p_l = F.linear(F.linear(x, w1, b1).relu(), w2, b2)
    p_l = p_l if kept is None else p_l * unfold(kept, P)
    if global_prompt is None:
        return x + w_l * p_l
    return x + (w_g * unfold(global_prompt, P) + w_l * p_l)


def superpose_bwd_reference(
    grad: Tensor,  # [B, N, K]
    image: Tensor,
    hidden: Tensor,  # [B, N, R], after the ReLU
    w1: Tensor,
    w2: Tensor,
    blend: Blend,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``superpose_reference`` by image, global prompt, w1, b1, w2 and b2, written out."""
    (H, W), (P, w_g, w_l) = image.shape[-2:], blend
    d_patch = w_l * (grad if kept is None else grad * unfold(kept, P))
    d_hidden = torch.ops.aten.threshold_backward(d_patch @ w2, hidden, 0)
    d_image = fold(grad + d_hidden @ w1, P, H, W)
    d_global = fold(w_g * grad, P, H, W)
    x, hidden, d_hidden, d_patch = (t.flatten(0, 1) for t in (unfold(image, P), hidden, d_hidden, d_patch))
    return d_image, d_global, d_hidden.T @ x, d_hidden.sum(0), d_patch.T @ hidden, d_patch.sum(0)


class _Fwd(NamedTuple):
    image: AnyTensor
    global_prompt: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    patch_size: int
    global_weight: float
    patch_weight: float
    dtype: torch.dtype
    scale: Tensor | None
    shift: Tensor | None
    kept: AnyTensor | None = None

    @property
    def weights(self) -> PatchWeights:
        return PatchWeights(self.w1, self.b1, self.w2, self.b2)

    @property
    def blend(self) -> Blend:
        return Blend(self.patch_size, self.global_weight, self.patch_weight)


class _Bwd(NamedTuple):
    grad: Tensor
    image: Tensor
    hidden: Tensor
    w1: Tensor
    w2: Tensor
    patch_size: int
    global_weight: float
    patch_weight: float
    need_image: bool
    need_global: bool
    scale: Tensor | None
    shift: Tensor | None
    kept: Tensor | None = None

    @property
    def blend(self) -> Blend:
        return Blend(self.patch_size, self.global_weight, self.patch_weight)


@first_order("superpose", "superpose_reference of the module insvp_fast.ops.superpose")
class _Superpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        a, impl = _Fwd(*arguments[:-1]), arguments[-1]
        patches, hidden = call("superpose_fwd", *a[:-1], impl, a.kept)
        save(ctx, a.image, hidden, a.scale, a.shift, a.kept, weights=[a.w1, a.w2])
        ctx.blend, ctx.impl = a.blend, impl
        return cast(Tensor, patches)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, hidden, scale, shift, kept, *weights = saved(ctx)
        a = _Bwd._make((grad, image, hidden, *weights, *ctx.blend, *ctx.needs_input_grad[:2], scale, shift, kept))
        grads = call("superpose_bwd", *a[:-1], ctx.impl, a.kept)
        return only_needed(ctx, grads)


def _pixels(a: _Fwd | _Bwd) -> Tensor:
    """The floating-point image that an 8-bit one stands for."""
    return a.image if a.scale is None or a.shift is None else normalize(a.image, a.scale, a.shift)


def _pixel_dtype(a: _Fwd | _Bwd) -> torch.dtype:
    return torch.float32 if a.image.dtype == torch.uint8 else a.image.dtype


def _fwd_reference(a: _Fwd) -> tuple[Tensor, Tensor]:
    wide = widened(a.image.dtype)
    x, weights = _pixels(a).to(wide), PatchWeights(*(w.to(wide) for w in a.weights))
    p_g = None if a.global_prompt is None else a.global_prompt.to(wide)
    hidden = F.linear(unfold(x, a.patch_size), weights.w1, weights.b1).relu()
    return superpose_reference(x, p_g, weights, a.blend, a.kept).to(a.dtype), hidden


def _bwd_reference(a: _Bwd) -> tuple[Tensor, ...]:
    wide = widened(a.image.dtype)
    grad, x, hidden, w1, w2 = (t.to(wide) for t in (a.grad, _pixels(a), a.hidden, a.w1, a.w2))
    d_image, d_global, *d_weights = superpose_bwd_reference(grad, x, hidden, w1, w2, a.blend, a.kept)
    d_image = d_image.to(a.image.dtype) if a.need_image else a.image.new_empty(0)
    d_global = d_global.to(a.grad.dtype) if a.need_global else a.grad.new_empty(0)
    return d_image, d_global, *(d.to(w.dtype) for d, w in zip(d_weights, (a.w1, a.w1, a.w2, a.w2), strict=True))


def _fwd_native(a: _Fwd) -> tuple[Tensor, Tensor]:
    return native.superpose_fwd(_pixels(a), a.global_prompt, *a.weights, *a.blend, a.dtype, a.kept)


def _bwd_native(a: _Bwd) -> tuple[Tensor, ...]:
    needs = a.need_image, a.need_global
    d_image, *grads = native.superpose_bwd(a.grad, _pixels(a), a.hidden, a.w1, a.w2, *a.blend, *needs, a.kept)
    return d_image.to(a.image.dtype), *grads


def _fwd_native_reason(a: _Fwd) -> str | None:
    maps = _pixel_dtype(a), a.dtype, *(() if a.global_prompt is None else (a.global_prompt.dtype,))
    return native_reason(a.image.device, *maps, weights=a.weights)


def _bwd_native_reason(a: _Bwd) -> str | None:
    return native_reason(a.image.device, a.grad.dtype, _pixel_dtype(a), weights=(a.w1, a.w2))


def _fwd_triton(a: _Fwd) -> tuple[Tensor, Tensor]:
    from insvp_fast.kernels.gpu import superpose as kernel

    return kernel.superpose_fwd(*a)


def _bwd_triton(a: _Bwd) -> tuple[Tensor, ...]:
    from insvp_fast.kernels.gpu import superpose as kernel

    return kernel.superpose_bwd(*a)


def _fwd_triton_reason(a: _Fwd) -> str | None:
    return _triton_reason(a, a.dtype, *(t.dtype for t in (a.global_prompt, *a.weights) if t is not None))


def _bwd_triton_reason(a: _Bwd) -> str | None:
    return _triton_reason(a, a.grad.dtype, a.w1.dtype, a.w2.dtype)


def _triton_reason(a: _Fwd | _Bwd, *dtypes: torch.dtype) -> str | None:
    if reason := triton_reason(a.image.device, _pixel_dtype(a), *dtypes):
        return reason
    from insvp_fast.kernels.gpu import superpose as kernel

    R = a.w1.shape[0]
    return None if kernel.covers(R) else f"does not cover a patch prompter of {R} hidden units"


def _fwd_fake(a: _Fwd) -> tuple[Tensor, Tensor]:
    B, _, H, W = a.image.shape
    N, (R, K) = (H // a.patch_size) * (W // a.patch_size), a.w1.shape
    hidden = a.image.new_empty(B, N, R, dtype=widened(a.image.dtype))
    return a.image.new_empty(B, N, K, dtype=a.dtype), hidden


def _bwd_fake(a: _Bwd) -> tuple[Tensor, ...]:
    R, K = a.w1.shape
    d_image = a.image.new_empty(a.image.shape if a.need_image else 0)
    d_global = a.grad.new_empty(a.image.shape if a.need_global else 0)
    return d_image, d_global, a.w1.new_empty(R, K), a.w1.new_empty(R), a.w2.new_empty(K, R), a.w2.new_empty(K)


register(
    "superpose_fwd",
    _Fwd,
    "(Tensor, Tensor)",
    fake=_fwd_fake,
    reference=_fwd_reference,
    native=Implementation(_fwd_native, _fwd_native_reason, recordable=True),
    triton=Implementation(_fwd_triton, _fwd_triton_reason),
)
register(
    "superpose_bwd",
    _Bwd,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    reference=_bwd_reference,
    native=Implementation(_bwd_native, _bwd_native_reason),
    triton=Implementation(_bwd_triton, _bwd_triton_reason),
)
