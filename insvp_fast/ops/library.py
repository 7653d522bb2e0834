"""The library of PyTorch operators that the files beside this one fill."""

from __future__ import annotations

import torch
from torch.library import Library

__all__ = ["LIBRARY", "define", "widened"]

LIBRARY = Library("insvp_fast", "DEF")


def define(schema: str) -> None:
    """Declare an operator that traces, exports and compiles."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic for tensors of ``dtype``: at least fp32."""
    return torch.promote_types(dtype, torch.float32)
