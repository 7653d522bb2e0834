"""dropout in C++, forward and backward, with the random numbers of PyTorch."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Sequence
from functools import cache

import torch
from torch import Generator, Tensor

from insvp_fast.runtime import buffers
from insvp_fast.runtime.native.library import TYPE_CODES, array, call, f32, i64, pointer, ptr, require

__all__ = ["STATE_BYTES", "dropout_bwd", "dropout_fwd", "dropout_mask"]

_FWD = [ptr, *array, *[ptr] * 3, i64, ctypes.c_uint64, f32]
_BWD = [ptr, *array, ptr, i64, f32]

STATE_BYTES = 5016  # of a generator's state that C++ reads and writes


def dropout_fwd(x: Tensor, p: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """``F.dropout(x, p)`` of a contiguous x, and where it kept an element (bool), from the numbers of ``generator``.

    x in float32 or bfloat16, p above 0 and below 1. Errors: see ``native``.

    Threads draw one after another. Where another thread lets PyTorch itself draw meanwhile, masks are drawn again; only
    what it draws between the last two steps, without a call between them, is drawn twice.
    """
    x = require("x", x, tuple(x.shape), *TYPE_CODES)
    y, kept = buffers.empty(x.shape, x.dtype), buffers.empty(x.shape, torch.bool)
    if x.numel():
        _draw((pointer(x)[0], *pointer(y)), kept, p, _scale(x.dtype, p), generator)
    return y, kept


def dropout_mask(shape: Sequence[int], p: float, generator: Generator) -> Tensor:
    """Where ``dropout_fwd`` keeps an element of a tensor of this shape (bool). Errors: see ``native``."""
    kept = buffers.empty(shape, torch.bool)
    if kept.numel():
        _draw((None, None, 0), kept, p, 0.0, generator)
    return kept


def _draw(operands: Sequence[object], kept: Tensor, p: float, scale: float, generator: Generator) -> None:
    below = math.ceil((1 - p) * 2**53)
    with _lock:
        while True:
            before = generator.get_state()
            if before.numel() < STATE_BYTES:
                raise ValueError(f"the generator has {before.numel()} bytes of state: expected at least {STATE_BYTES}")
            after = before.clone()
            rest = kept.data_ptr(), before.data_ptr(), after.data_ptr(), kept.numel(), below, scale
            call("dropout_fwd", _FWD, *operands, *rest)
            unchanged = before.numpy().tobytes()
            if generator.get_state().numpy().tobytes() == unchanged:  # bytes: neither call waits for other threads
                generator.set_state(after)
                return


_lock = threading.Lock()


def _renew_lock() -> None:
    """A thread that a forked process has not might hold it forever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def dropout_bwd(grad: Tensor, kept: Tensor, p: float) -> Tensor:
    """The gradient by x, of what ``dropout_fwd`` has kept.

    grad in float32 or bfloat16, of the shape of kept (bool); so is the result. Errors: see ``native``.
    """
    grad = require("grad", grad, tuple(kept.shape), *TYPE_CODES)
    kept = require("kept", kept, tuple(kept.shape), torch.bool)
    d_x = buffers.empty(grad.shape, grad.dtype)
    if grad.numel():
        operands = pointer(grad)[0], *pointer(d_x), kept.data_ptr()
        call("dropout_bwd", _BWD, *operands, grad.numel(), _scale(grad.dtype, p))
    return d_x


@cache
def _scale(dtype: torch.dtype, p: float) -> float:
    """What PyTorch multiplies a kept element of this dtype by: 1 / (1 - p), as it rounds it."""
    return torch.ones((), dtype=dtype, device="cpu").div_(1 - p).item()
