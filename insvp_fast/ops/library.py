"""The library of PyTorch operators that the files beside this one fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

__all__ = ["LIBRARY", "define", "implement", "widened"]

LIBRARY = Library("insvp_fast", "DEF")


def define(schema: str) -> None:
    """Declare an operator that traces, exports and compiles."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(
    name: str,
    everywhere: Callable[..., Any] | None = None,
    *,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Register what carries an operator out: on every device, and over that on CPU, and on CUDA and ROCm.

    Gradients are the business of the autograd functions: an exported program calls the operators without them.
    """
    for kernel, key in ((everywhere, "CompositeExplicitAutograd"), (cpu, "CPU"), (cuda, "CUDA")):
        if kernel is not None:
            LIBRARY.impl(name, torch.no_grad()(kernel), key)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic for tensors of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
