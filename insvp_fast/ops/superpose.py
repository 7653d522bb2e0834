"""The image prompt in one pass: superpose."""

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
from insvp_fast.runtime import native

__all__ = ["superpose"]

define(
    "superpose_fwd(Tensor image, Tensor? global_prompt, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int patch_size, "
    "float global_weight, float patch_weight, ScalarType dtype, Tensor? scale, Tensor? shift) "
    "-> (Tensor, Tensor)"
)
define(
    "superpose_bwd(Tensor grad, Tensor image, Tensor hidden, Tensor w1, Tensor w2, int patch_size, "
    "float global_weight, float patch_weight, bool need_image, bool need_global, "
    "Tensor? scale, Tensor? shift) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def superpose(
    image: Tensor,
    global_prompt: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    patch_size: int,
    global_weight: float,
    patch_weight: float,
    *,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The prompted image x + w_g·p_g + w_l·G_l(x), unfolded into patches, in one pass (eq. 5, 6 and 7).

    Args:
        image, global_prompt: [B, C, H, W], fp32, bf16 or fp16; no global prompt, no such term. The image may be uint8.
        w1, b1, w2, b2: the patch prompter, [R, K], [R], [K, R], [K].
        dtype: of the result; the image's, for uint8 the scale's, if not given. Arithmetic is fp32.
        scale, shift: [C], fp32, for a uint8 image u and for no other: x is u·scale + shift. Neither has a gradient.
        impl: "auto" lets the device decide; "reference", "native" or "triton" insists.

    Returns:
        [B, N, K]

    Raises:
        ValueError: for shapes that do not fit, or an unknown ``impl``.
        RuntimeError: if the implementation asked for cannot run here.
    """
    _, C, H, W = image.shape
    K = C * patch_size**2
    if H % patch_size or W % patch_size:
        raise ValueError(f"image of {H}x{W} pixels: expected multiples of the patch side {patch_size}")
    if global_prompt is not None and global_prompt.shape != image.shape:
        raise ValueError(
            f"global_prompt has shape {tuple(global_prompt.shape)}: expected that of the image, {tuple(image.shape)}"
        )
    R = w1.shape[0]
    for name, weight, shape in (("w1", w1, (R, K)), ("b1", b1, (R,)), ("w2", w2, (K, R)), ("b2", b2, (K,))):
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}: expected {shape}")
    if (image.dtype == torch.uint8) != (scale is not None) or (scale is None) != (shift is None):
        raise ValueError(f"image is {image.dtype}: expected scale and shift for uint8, and for nothing else")
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (vector.shape != (C,) or vector.dtype != torch.float32):
            raise ValueError(f"{name} is {vector.dtype} {tuple(vector.shape)}: expected torch.float32 {(C,)}")
    if impl not in _SUPERPOSE:
        raise ValueError(f"impl={impl!r}: expected one of {sorted(_SUPERPOSE)}")
    blend = patch_size, float(global_weight), float(patch_weight)
    dtype = dtype or (image if scale is None else scale).dtype
    if not torch.compiler.is_compiling():  # a compiled graph asks when it runs
        _require(impl, image, dtype, global_prompt, w1, b1, w2, b2)
    return apply(_Superpose, image, global_prompt, w1, b1, w2, b2, *blend, dtype, scale, shift, impl)


def _require(impl: str, image: Tensor, dtype: torch.dtype, prompt: Tensor | None, *weights: Tensor) -> None:
    """Raise RuntimeError where the implementation asked for has no such device or dtype."""
    maps = _pixel_dtype(image), dtype, *(() if prompt is None else (prompt.dtype,))
    weight_dtypes = [w.dtype for w in weights]
    if impl == "native":
        require_native(image.device)
        require_dtypes(impl, NATIVE_DTYPES, *maps)
        require_dtypes(impl, (torch.float32,), *weight_dtypes)
    elif impl == "triton":
        require_dtypes(impl, (torch.float32, torch.bfloat16, torch.float16), *maps, *weight_dtypes)


@first_order("superpose", "insvp_fast.reference.superpose")
class _Superpose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image, global_prompt, w1, b1, w2, b2, *rest):
        *blend, dtype, scale, shift, impl = rest
        tokens, hidden = _SUPERPOSE[impl][0](image, global_prompt, w1, b1, w2, b2, *blend, dtype, scale, shift)
        ctx.save_for_backward(image, hidden, w1, w2, scale, shift)
        ctx.blend, ctx.impl = blend, impl
        return tokens

    @staticmethod
    def backward(ctx: Any, grad):
        *kept, scale, shift = ctx.saved_tensors
        grads = _SUPERPOSE[ctx.impl][1](grad, *kept, *ctx.blend, *ctx.needs_input_grad[:2], scale, shift)
        return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 7


# Below, `blend` are patch_size, global_weight and patch_weight.


def _values(image, scale, shift):
    """The floating-point image that an 8-bit one stands for."""
    return image if scale is None else reference.normalize(image, scale, shift)


def _pixel_dtype(image):
    return torch.float32 if image.dtype == torch.uint8 else image.dtype


def _fwd_reference(image, global_prompt, w1, b1, w2, b2, *rest):
    *blend, dtype, scale, shift = rest
    wide = widened(image.dtype)
    x = _values(image, scale, shift).to(wide)
    p_g = None if global_prompt is None else global_prompt.to(wide)
    w1, b1, w2, b2 = (w.to(wide) for w in (w1, b1, w2, b2))
    hidden = torch.nn.functional.linear(reference.unfold(x, blend[0]), w1, b1).relu()
    return reference.superpose(x, p_g, w1, b1, w2, b2, *blend).to(dtype), hidden


def _bwd_reference(grad, image, hidden, w1, w2, *rest):
    *blend, need_image, need_global, scale, shift = rest
    wide = widened(image.dtype)
    g, x, hidden, v1, v2 = (t.to(wide) for t in (grad, _values(image, scale, shift), hidden, w1, w2))
    d_image, d_global, *d_weights = reference.superpose_bwd(g, x, hidden, v1, v2, *blend)
    d_image = d_image.to(image.dtype) if need_image else image.new_empty(0)
    d_global = d_global.to(grad.dtype) if need_global else grad.new_empty(0)
    return d_image, d_global, *(d.to(w.dtype) for d, w in zip(d_weights, (w1, w1, w2, w2), strict=True))


def _fwd_native(image, *rest):
    *others, scale, shift = rest
    return native.superpose_fwd(_values(image, scale, shift), *others)


def _bwd_native(grad, image, *rest):
    *others, scale, shift = rest
    d_image, *grads = native.superpose_bwd(grad, _values(image, scale, shift), *others)
    return d_image.to(image.dtype), *grads


def _fwd_triton(*args):
    from insvp_fast.kernels.gpu import superpose as kernel

    return kernel.superpose_fwd(*args)


def _bwd_triton(*args):
    from insvp_fast.kernels.gpu import superpose as kernel

    return kernel.superpose_bwd(*args)


def _fwd_cpu(image, global_prompt, *rest):
    *weights, _, _, _, dtype, _, _ = rest
    dtypes = [_pixel_dtype(image), dtype, *([] if global_prompt is None else [global_prompt.dtype])]
    covered = all(w.dtype == torch.float32 for w in weights) and native.available(*dtypes)
    return (_fwd_native if covered else _fwd_reference)(image, global_prompt, *rest)


def _bwd_cpu(grad, image, hidden, w1, w2, *rest):
    covered = w1.dtype == w2.dtype == torch.float32 and native.available(grad.dtype, _pixel_dtype(image))
    return (_bwd_native if covered else _bwd_reference)(grad, image, hidden, w1, w2, *rest)


def _fwd_cuda(image, global_prompt, w1, b1, w2, b2, *rest):
    *_, dtype, _, _ = rest
    run = _fwd_triton if _triton_covers(image, global_prompt, w1, w2, dtype) else _fwd_reference
    return run(image, global_prompt, w1, b1, w2, b2, *rest)


def _bwd_cuda(grad, image, hidden, w1, w2, *rest):
    run = _bwd_triton if _triton_covers(image, None, w1, w2, grad.dtype) else _bwd_reference
    return run(grad, image, hidden, w1, w2, *rest)


def _triton_covers(image, global_prompt, w1, w2, dtype):
    from insvp_fast.kernels.gpu import superpose as kernel

    dtypes = (t.dtype for t in (global_prompt, w1, w2) if t is not None)
    return kernel.covers(image.device, w1.shape[0], _pixel_dtype(image), *dtypes, dtype)


@register_fake("insvp_fast::superpose_fwd", lib=LIBRARY)
def _(image, global_prompt, w1, b1, w2, b2, patch_size, global_weight, patch_weight, dtype, scale, shift):
    B, _, H, W = image.shape
    N = (H // patch_size) * (W // patch_size)
    hidden = image.new_empty(B, N, w1.shape[0], dtype=widened(image.dtype))
    return image.new_empty(B, N, w1.shape[1], dtype=dtype), hidden


@register_fake("insvp_fast::superpose_bwd", lib=LIBRARY)
def _(grad, image, hidden, w1, w2, *rest):
    *_, need_image, need_global, _, _ = rest
    R, K = w1.shape
    d_image = image.new_empty(image.shape if need_image else 0)
    d_global = grad.new_empty(image.shape if need_global else 0)
    return d_image, d_global, w1.new_empty(R, K), w1.new_empty(R), w2.new_empty(K, R), w2.new_empty(K)


implement("superpose_fwd", _fwd_reference, cpu=_fwd_cpu, cuda=_fwd_cuda)
implement("superpose_bwd", _bwd_reference, cpu=_bwd_cpu, cuda=_bwd_cuda)

_SUPERPOSE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "auto": (torch.ops.insvp_fast.superpose_fwd.default, torch.ops.insvp_fast.superpose_bwd.default),
    "reference": (_fwd_reference, _bwd_reference),
    "native": (_fwd_native, _bwd_native),
    "triton": (_fwd_triton, _bwd_triton),
}
