"""copy in C++: from one strided tensor to another, or zeros."""

from __future__ import annotations

from torch import Tensor

from insvp_fast.runtime.native.library import address, i64, launch, ptr

__all__ = ["copy"]

_MOST = 5  # dimensions, of which those that are one in both tensors count as one
_COPY = [ptr, ptr, i64, *[i64] * 3 * _MOST]


def copy(to: Tensor, x: Tensor | None) -> None:
    """``to[...] = x``, of the same shape and dtype, any dtype and any strides; zeros where there is no ``x``.

    Raises ValueError for another shape or dtype, too many dimensions, or another device than the CPU, and what else
    ``native`` says.
    """
    if x is not None and (x.shape != to.shape or x.dtype != to.dtype):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: expected {to.dtype} {tuple(to.shape)}")
    size = to.element_size()
    parts = [(size, 1, 1)]  # counts, and steps in both tensors, in bytes; from the innermost dimension on
    for n, a, b in zip(to.shape[::-1], to.stride()[::-1], (to if x is None else x).stride()[::-1], strict=True):
        count, step, step_of_x = parts[-1]
        if n == 1 or (a * size == count * step and b * size == count * step_of_x):
            parts[-1] = n * count, step, step_of_x
        else:
            parts.append((n, a * size, b * size))
    (run, _, _), *strides = parts
    if len(strides) > _MOST:
        raise ValueError(f"the strides {to.stride()} and {x if x is None else x.stride()} have too many dimensions")
    if to.numel():
        rows = zip(*[(1, 0, 0)] * (_MOST - len(strides)), *strides[::-1], strict=True)
        launch("copy", _COPY, address(to), address(x), run, *(number for row in rows for number in row))
