"""weighted_sum in C++: of two tensors, for each image."""

from __future__ import annotations

from torch import Tensor

from insvp_fast.runtime.native.library import TYPE_CODES, array, f32, i64, launch, pointer, require_kind

__all__ = ["weighted_sum"]

_SUM = [*array, i64, *[*array, i64, f32] * 2, i64, i64]


def weighted_sum(to: Tensor, a: Tensor, w_a: float, b: Tensor | None, w_b: float) -> None:
    """``to[...] = w_a * a + w_b * b``, with each product rounded to the dtype of its tensor, or ``w_a * a`` without b.

    All in float32 or bfloat16 and of one shape [B, ...], contiguous within an image; a and b may also be [1, ...] or
    expanded, for all images. Errors: see ``native``.
    """
    terms: list[object] = []
    for name, x, weight in (("to", to, None), ("a", a, w_a), ("b", b, w_b)):
        if x is None:
            terms += None, 0, 0, 0.0
            continue
        require_kind(name, x, *TYPE_CODES)
        if x.shape[1:] != to.shape[1:] or len(x) not in (1, len(to)):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {tuple(to.shape)}, or 1 image")
        if len(x) and not x[0].is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}: expected images that are contiguous")
        terms += *pointer(x), x.stride(0) if len(x) > 1 else 0, *([] if weight is None else [weight])
    if to.numel():
        launch("weighted_sum", _SUM, *terms, len(to), to[0].numel())
