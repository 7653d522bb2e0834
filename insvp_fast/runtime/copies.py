"""Copies that may be part of a program of native calls."""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.runtime import native, torch_private

__all__ = ["put"]


def put(to: Tensor, x: Tensor | None) -> None:
    """``to.copy_(x)``, or ``to.zero_()`` without ``x``: by the native library where it can run as part of a program.

    ``x`` has the shape and the dtype of ``to``.
    """
    if torch.compiler.is_compiling() or not to.is_cpu or torch_private.dispatches((to, x)) or not native.available():
        native.interrupt()
        to.zero_() if x is None else to.copy_(x)
    else:
        native.copy(to, x)
