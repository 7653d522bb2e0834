"""copy in C++: from one strided tensor to another, or zeros."""

from __future__ import annotations

from torch import Tensor

from insvp_fast.runtime.native.library import address, i64, launch, ptr

__all__ = ["copy"]

_MOST = 4  # dimensions, but those whose numbers follow one another in both tensors
_COPY = [ptr, ptr, i64, *[i64] * 3 * _MOST]


def copy(to: Tensor, x: Tensor | None) -> None:
    """``to[...] = x``, of the same shape and dtype, any dtype and any strides; zeros where there is no ``x``.

    Raises ValueError for another shape or dtype, too many dimensions, or another device than the CPU, and what else
    ``native`` says.
    """
    if x is not None and (x.shape != to.shape or x.dtype != to.dtype):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: expected {to.dtype} {tuple(to.shape)}")
    size, run = to.element_size(), to.element_size()
    steps = zip(to.shape, to.stride(), (to if x is None else x).stride(), strict=True)
    strides = [(n, a * size, b * size) for n, a, b in steps]
    while strides and (strides[-1][0] == 1 or strides[-1][1] == strides[-1][2] == run):
        run *= strides.pop()[0]
    if len(strides) > _MOST:
        raise ValueError(f"the strides {to.stride()} and {x if x is None else x.stride()} have too many dimensions")
    if to.numel():
        rows = zip(*[(1, 0, 0)] * (_MOST - len(strides)), *strides, strict=True)
        launch("copy", _COPY, address(to), address(x), run, *(number for row in rows for number in row))
