"""superpose in C++, forward and backward.

Letters: ``B`` images, ``C`` channels, ``H, W`` image size, ``P`` patch size, ``N`` patches, ``K = C*P*P``, ``R`` hidden
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import (
    TYPE_CODES,
    address,
    array,
    call,
    f32,
    i64,
    launch,
    pointer,
    ptr,
    require,
    require_dtype,
)

__all__ = ["superpose_bwd", "superpose_fwd"]

_FWD = [*array * 2, *[ptr] * 5, *array, ptr, *[i64] * 6, f32, f32]
_BWD = [*array * 2, *[ptr] * 4, *array * 2, *[ptr] * 4, *[i64] * 6, f32, f32]


def _sizes(image: Tensor, w1: Tensor, patch_size: int) -> tuple[int, int, int, int, int, int, int, int]:
    """B, C, H, W, P, R, N, K."""
    if image.ndim != 4 or w1.ndim != 2:
        raise ValueError(f"expected image [B, C, H, W] and w1 [R, K], got {tuple(image.shape)} and {tuple(w1.shape)}")
    B, C, H, W = image.shape
    R, P = w1.shape[0], patch_size
    if P < 1 or H % P or W % P:
        raise ValueError(f"image size {H}x{W} is not a multiple of the patch size {P}")
    return B, C, H, W, P, R, (H // P) * (W // P), C * P * P


def _mask(kept: Tensor | None, image: Tensor) -> Tensor | None:
    return None if kept is None else require("kept", kept, tuple(image.shape), torch.bool)


def superpose_fwd(
    image: Tensor,
    global_prompt: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    patch_size: int,
    global_weight: float,
    patch_weight: float,
    dtype: torch.dtype,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Unfolded ``image + global_weight * global_prompt + patch_weight * mlp(image)``, and the hidden layer of the MLP.

    With ``kept`` [B, C, H, W], bool, the MLP's result is multiplied by it.

    image, global_prompt [B, C, H, W] in float32 or bfloat16; w1 [R, K], b1 [R], w2 [K, R], b2 [K] in float32. Returns
    tokens [B, N, K] in ``dtype`` and hidden [B, N, R] in float32. Errors: see ``native``.
    """
    B, C, H, W, P, R, N, K = _sizes(image, w1, patch_size)
    require_dtype("tokens", dtype)
    image = require("image", image, (B, C, H, W), *TYPE_CODES)
    if global_prompt is not None:
        global_prompt = require("global_prompt", global_prompt, (B, C, H, W), *TYPE_CODES)
    w1 = require("w1", w1, (R, K), torch.float32)
    b1 = require("b1", b1, (R,), torch.float32)
    w2 = require("w2", w2, (K, R), torch.float32)
    b2 = require("b2", b2, (K,), torch.float32)
    kept = _mask(kept, image)
    tokens = buffers.empty((B, N, K), dtype)
    hidden = buffers.empty((B, N, R), torch.float32)
    launch(
        "superpose_fwd",
        _FWD,
        *(*pointer(image), *pointer(global_prompt)),
        *(*map(address, (w1, b1, w2, b2, kept)), *pointer(tokens), address(hidden)),
        *(B, C, H, W, P, R, global_weight, patch_weight),
    )
    return tokens, hidden


def superpose_bwd(
    grad: Tensor,
    image: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    patch_size: int,
    global_weight: float,
    patch_weight: float,
    need_image: bool,
    need_global: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``superpose_fwd`` for ``grad`` of its tokens: d_image, d_global, dw1, db1, dw2, db2.

    grad [B, N, K] in float32 or bfloat16, hidden [B, N, R] in float32, the rest as in ``superpose_fwd``. d_image has
    the dtype of image, d_global that of grad, each of size 0 where not needed; the weights' gradients are float32, and
    the same bits for every number of threads. Errors: see ``native``.
    """
    B, C, H, W, P, R, N, K = _sizes(image, w1, patch_size)
    grad = require("grad", grad, (B, N, K), *TYPE_CODES)
    image = require("image", image, (B, C, H, W), *TYPE_CODES)
    hidden = require("hidden", hidden, (B, N, R), torch.float32)
    w1 = require("w1", w1, (R, K), torch.float32)
    w2 = require("w2", w2, (K, R), torch.float32)
    kept = _mask(kept, image)
    d_image = buffers.empty(image.shape if need_image else (0,), image.dtype)
    d_global = buffers.empty(image.shape if need_global else (0,), grad.dtype)
    shapes = ((R, K), (R,), (K, R), (K,))
    dw1, db1, dw2, db2 = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    call(
        "superpose_bwd",
        _BWD,
        *(*pointer(grad), *pointer(image), hidden.data_ptr(), w1.data_ptr(), w2.data_ptr(), address(kept)),
        *(*pointer(d_image), *pointer(d_global)),
        *(dw1.data_ptr(), db1.data_ptr(), dw2.data_ptr(), db2.data_ptr()),
        *(B, C, H, W, P, R, global_weight, patch_weight),
    )
    return d_image, d_global, dw1, db1, dw2, db2
